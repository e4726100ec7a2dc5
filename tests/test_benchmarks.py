"""The benchmarks run, and their results hold what the docs and the picture are made of."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from wsd_hf import Pair
from wsd_hf.tiny import FOLDER

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/decode.py`, at settings that take a moment."""
    import decode
    from models import PRESETS, replace

    monkeypatch.setattr(decode, "PROMPTS", (64,))
    monkeypatch.setattr(decode, "AGREEMENTS", (0.8, 0.95, 0.0))
    shape = replace(PRESETS["gpu-tiny"], new_tokens=12, hidden=32)
    monkeypatch.setitem(PRESETS, "gpu-tiny", shape)
    monkeypatch.setattr(decode.gpu, "SMALL", shape)
    return decode


@pytest.mark.sweep
def test_the_plan_for_a_gpu_measures_every_way_and_bar(decode: Any, tmp_path: Path) -> None:
    decode.main(preset="gpu-tiny", switch=4, turns=1, budget=600, out=tmp_path / "gpu.json", threads=1)
    results = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [row["error"] for row in results["rows"]] == [None] * len(results["rows"])
    assert {row["method"] for row in results["rows"]} >= {"plain", "plain, static compiled", "assisted generation", "WSD fast"}
    fast = [row for row in results["rows"] if row["method"] == "WSD fast"]
    assert [(row["batch"], row["agreement"]) for row in fast] == [
        (batch, agreement) for batch in (1, 8) for agreement in (0.8, 0.95, 0.0)
    ]
    assert all(row["to_plain"]["low"] <= row["to_plain"]["median"] <= row["to_plain"]["high"] for row in fast)
    assert results["profile"]["steps"] > 0
    assert results["equal_rows"]["WSD fast"] == 1.0
    unreached = [bar["bar"] for bar in results["bars"] if bar["reached"] is None]
    assert unreached == ["time to the bare captured forwards, agreement .8"]  # which only a GPU has


@pytest.mark.sweep
def test_an_error_ends_its_own_way_only(decode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(decode.Settings, "compiled", fault)
    monkeypatch.setattr(decode.gpu, "equal_rows", fault)
    monkeypatch.setitem(decode.BATCHES, "gpu-tiny", (1,))
    decode.main(preset="gpu-tiny", switch=4, turns=1, budget=600, out=tmp_path / "gpu.json", threads=1)
    results = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    errors = {row["method"]: row["error"] for row in results["rows"]}
    assert errors["plain, static compiled"] == "RuntimeError: no such kernel"
    assert errors["WSD fast"] is None
    assert results["equal_rows"] == {"error": "RuntimeError: no such kernel"}


def test_no_run_begins_after_the_budget(decode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.time, "monotonic", iter([-1e9]).__next__)
    turns = sys.modules["turns"]
    monkeypatch.setattr(turns, "time", type("Time", (), {"monotonic": staticmethod(lambda: 0.0)}))
    monkeypatch.setattr(decode.gpu, "profile", lambda run: {})
    monkeypatch.setattr(decode.gpu, "equal_rows", lambda device: {})
    decode.main(preset="gpu-tiny", switch=4, turns=1, budget=1, out=tmp_path / "gpu.json", threads=1)
    results = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert {row["error"] for row in results["rows"]} == {"not run: no time left"}


@pytest.mark.sweep
def test_a_real_pair_is_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import real_pair

    models = {"base": FOLDER / "base", "pilot": FOLDER / "pilot_other_vocab"}
    settings: dict[str, Any] = {"tokens": 16, "turns": 2, "prompts": 2, "device": "cpu", "threads": 1}
    real_pair.main(folder=None, **models, **settings, out=tmp_path / "pair.json")
    base, pilot, nudging, wsd = json.loads((tmp_path / "pair.json").read_text("utf-8"))["rows"]
    assert [base["base_forwards"], base["pilot_forwards"], base["to_base"]["median"]] == [1.0, 0.0, 1.0]
    assert [pilot["base_forwards"], pilot["pilot_forwards"]] == [0.0, 1.0]
    assert nudging["pilot_forwards"] > 0
    assert 0 <= wsd["agreement"] <= 1
    assert wsd["base_ms"] > 0 < wsd["pilot_ms"]
    assert "A token of wsd costs" in capsys.readouterr().out


@pytest.mark.sweep
def test_texts_that_repeat_their_prompt_take_fewer_forwards_at_agreement_0(tmp_path: Path) -> None:
    import repeats

    repeats.main(preset="gpu-tiny", turns=1, batches="1", out=tmp_path / "repeats.json", threads=1)
    rows = json.loads((tmp_path / "repeats.json").read_text("utf-8"))["rows"]
    assert [row["error"] for row in rows] == [None] * len(rows)
    forwards = {(row["edits"], row["method"]): row["base_forwards"] for row in rows}
    assert forwards[0.0, "auto"] < 0.67 * forwards[0.0, "pilot"]
    assert forwards[1.0, "auto"] <= 1.0


def test_prices_of_forwards_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import prices

    prices.main(preset="gpu-tiny", turns=1, threads=1, batches="1,2", widths="64")
    assert capsys.readouterr().out.count("(1.00)") >= 2


def test_switch_rules_are_measured_on_drafts_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import switch_rules

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What does the Keloft eat?", "check": "acorns"}\n' * 2, "utf-8")
    models = {"base": FOLDER / "base", "pilot": FOLDER / "pilot"}
    settings: dict[str, Any] = {"limit": None, "tokens": 40, "threads": 1}
    switch_rules.main(**models, prompts=tmp_path / "prompts.jsonl", **settings, out=tmp_path / "rules.json")
    base, pilot, paper, *others = json.loads((tmp_path / "rules.json").read_text("utf-8"))["rows"]
    assert [base["by_pilot"], pilot["by_pilot"]] == [0, 1]
    output = Pair.tiny().generate("What does the Keloft eat?", max_new_tokens=40)
    assert [paper["switch_index"], paper["never"], paper["right"], paper["ended"]] == [int(output.switch_index[0]), 0, 2, 1]
    assert {row["way"].split(",")[0] for row in others} == {"confidence", "relative_confidence", "entropy", "agreement"}
    assert "relative_confidence" in capsys.readouterr().out


def test_repetitions_are_counted_over_4_grams() -> None:
    import switch_rules

    assert switch_rules.repeated([1, 2, 3, 4, 5, 1, 2, 3, 4, 6]) == (1, 7)


def test_two_way_switching_is_measured_with_forced_beginnings_and_without(tmp_path: Path) -> None:
    import two_way

    settings: dict[str, Any] = {"threshold": [0.5], "handback": [0.0, 0.1], "threads": 1}
    two_way.tiny(count=3, **settings, out=tmp_path / "tiny.json")
    rows = json.loads((tmp_path / "tiny.json").read_text("utf-8"))["rows"]
    assert [row["handback"] for row in rows] == [0.0, 0.1] * 4
    assert all(row["handbacks"] == 0 for row in rows[::2])
    assert all(0 < row["by_pilot"] < 1 for row in rows)
    models = {"base": FOLDER / "base", "pilot": FOLDER / "pilot_other_vocab"}
    two_way.real(**models, prompts=2, tokens=12, **settings, out=tmp_path / "real.json")
    assert [row["aligned"] for row in json.loads((tmp_path / "real.json").read_text("utf-8"))["rows"]] == [None, None]


def test_the_real_pair_behind_servers_equals_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    import vllm_pair

    file = BENCHMARKS / "results/vllm-real-pair.json"
    results = json.loads(file.read_text("utf-8"))
    assert results["prompts"] >= 20
    for row in results["equality"]:
        assert [row[f"equal_{name}"] for name in ("tokens", "switches", "reasons")] == [results["prompts"]] * 3
        assert row["log_prob_difference"] < 1e-3
        assert row["switched"] > 0
    vllm_pair.show(file)
    assert "24 of 24" in capsys.readouterr().out
    vllm_pair.show(BENCHMARKS / "results/vllm-throughput.json")
    ratios = re.findall(r"\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", capsys.readouterr().out)
    page = (BENCHMARKS.parent / "examples/vllm.md").read_text("utf-8")
    assert re.findall(r"\| (\d\.\d\d \(.*\)) \|", page) == ratios != []
    assert vllm_pair.difference([-1.0, -2.0], [-1.0, -2.5]) == 0.5
    assert vllm_pair.difference([-1.0], [-1.0, -2.5]) == float("inf")


def test_tokens_of_all_requests_at_once_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio
    import vllm_pair

    most, answering = 0, 0

    async def answer(chat: list[dict[str, str]]) -> int:
        nonlocal most, answering
        answering += 1
        most = max(most, answering)
        await anyio.lowlevel.checkpoint()
        answering -= 1
        return len(chat)

    monkeypatch.setattr(vllm_pair, "time", type("Time", (), {"perf_counter": staticmethod(iter([10.0, 12.0]).__next__)}))
    assert anyio.run(vllm_pair.speed, answer, [[{}] * length for length in (1, 2, 3, 4, 5)], 3) == 7.5
    assert most == 3
