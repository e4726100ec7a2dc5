"""Predicted forwards against those that are counted, and the texts that they are predicted from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria
from typer.testing import CliRunner

from every_strategy import swept_unless
from wsd_hf import Pair, RelativeConfidenceCriteria, SwitchCriteria, WSDConfig
from wsd_hf.cli import app
from wsd_hf.comparison.replies import Bench
from wsd_hf.comparison.variants import read_variants
from wsd_hf.diagnosis.diagnosis import Diagnosis, diagnose
from wsd_hf.diagnosis.forwards import Prediction, costs, predict
from wsd_hf.diagnosis.paths import Path as TextPath
from wsd_hf.diagnosis.paths import cuts, find_paths
from wsd_hf.diagnosis.reading import Reading
from wsd_hf.diagnosis.suggestion import compare_command, suggest
from wsd_hf.diagnosis.switches import switch_index
from wsd_hf.errors import WSDValueError
from wsd_hf.strategies import STRATEGIES
from wsd_hf.tiny import demo_questions, polite_examples

UNTUNED = Path(__file__).parents[1] / "examples/tiny_world/pilot_untuned"
CHATS = [question["messages"] for question in demo_questions()][:8]
LIMIT = 64

BOTH = (
    "nudging,nudging:threshold=.8,wsd,wsd:threshold=.6,wsd:window_size=1,wsd:switch_criteria=relative_confidence,"
    "wsd:max_draft_tokens=8,draft_end=stop,wsd:speculate=ngram,wsd:chunk=4,two_way"
)
METHODS = {"pilot": f"{BOTH},eft,product,ensemble,blend", "pilot_other_vocab": BOTH}


@dataclasses.dataclass
class Case:
    """A pair, its diagnosis, and the texts that follow the drafts."""

    pair: Pair
    methods: dict[str, Any]
    diagnosis: Diagnosis
    paths: list[list[TextPath]]

    def predict(self, **methods: Any) -> list[Prediction]:
        cost = costs(self.pair, self.diagnosis.drafts, self.diagnosis.own)
        return predict(methods or self.methods, self.diagnosis.drafts, self.paths, cost, LIMIT)


@pytest.fixture(scope="module", params=[swept_unless(pilot == "pilot", pilot) for pilot in METHODS])
def case(request: pytest.FixtureRequest) -> Case:
    pair = Pair.tiny(request.param, reference=UNTUNED if request.param == "pilot" else None)
    methods = {variant.name: variant.strategy for variant in read_variants(METHODS[request.param], {})}
    diagnosis = diagnose(pair, CHATS, max_draft_tokens=LIMIT)
    return Case(pair, methods, diagnosis, [*find_paths(pair, CHATS, diagnosis.drafts, LIMIT, methods)])


def test_forwards_are_those_of_a_comparison_within_15_percent(case: Case) -> None:
    bench = Bench(case.pair, polite_examples(), LIMIT)
    predicted = {prediction.method: prediction for prediction in case.predict()}
    for variant in read_variants(",".join(case.methods), {}):
        replies = [reply for chat in CHATS for reply in variant.method.answer(bench, [chat], variant.strategy)]
        tokens = sum(reply.tokens for reply in replies)
        found = predicted[variant.name]
        for model in ("base", "pilot", "reference"):
            measured = sum(reply.work.get(f"{model}_forwards", 0) for reply in replies) / tokens
            assert getattr(found, f"{model}_forwards") == pytest.approx(measured, rel=0.15), (variant.name, model)
        if found.pilot_share is not None:
            share = sum(reply.written_by_pilot for reply in replies) / tokens
            assert found.pilot_share == pytest.approx(share, abs=0.05), variant.name


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.6}, {"window_size": 1}, {"switch_criteria": "relative_confidence"}])
def test_the_text_after_a_switch_is_the_path_of_the_next_token_that_the_base_would_not_have_written(
    case: Case, settings: dict[str, Any]
) -> None:
    rule = WSDConfig(**settings)
    for chat, draft, paths in zip(CHATS, case.diagnosis.drafts, case.paths, strict=True):
        output = case.pair.generate(chat, rule, max_new_tokens=LIMIT, do_sample=False)
        response = output.sequences[0, output.prompt_length :].tolist()
        length = int(output.draft_length)
        assert next(path.tokens for path in paths if path.drafted >= length) == response
        assert paths[0].drafted == 0
        assert paths[-1].drafted == len(draft.tokens)


def test_paths_hold_each_model_s_choices_by_its_own_forward(case: Case) -> None:
    path, draft = case.paths[1][1], case.diagnosis.drafts[1]
    ids = torch.tensor([draft.base_prompt + path.tokens])
    logits = case.pair.base(ids).logits[0, len(draft.base_prompt) - 1 : -1]
    assert path.followed == (logits.argmax(dim=-1) == ids[0, len(draft.base_prompt) :]).tolist()
    assert path.certainties == pytest.approx(logits.softmax(dim=-1).amax(dim=-1).tolist())
    assert all(path.followed[path.drafted :])
    assert path.tokens[: path.drafted] == draft.tokens[: path.drafted]
    assert path.pilot_reach == sorted(path.pilot_reach)
    assert path.pilot_reach[-1] <= len(path.tokens)


def test_a_single_model_costs_one_forward_for_each_token(case: Case) -> None:
    base, pilot, urial = case.predict(base=None, pilot=None, urial=None)
    assert (base.base_forwards, base.pilot_forwards, base.pilot_share, base.time) == (1, 0, 0, 1)
    assert (pilot.base_forwards, pilot.pilot_forwards, pilot.pilot_share) == (0, 1, 1)
    assert (urial.base_forwards, urial.time) == (1, None)


def test_what_cannot_be_predicted_is_refused_by_name(case: Case) -> None:
    for name in ("weak_to_strong_search", "reward_guided"):
        with pytest.raises(WSDValueError, match=f"strategy='{name}' cannot be predicted"):
            case.predict(**{name: STRATEGIES[name]()})
    with pytest.raises(WSDValueError, match="must be a switch rule, or the name of one"):
        case.predict(wsd=WSDConfig(switch_criteria=OwnCriterion()))
    assert case.predict(wsd=WSDConfig(switch_criteria=RelativeConfidenceCriteria()))[0].base_forwards < 1


def test_targets_need_one_vocabulary() -> None:
    pair = Pair.tiny("pilot_other_vocab")
    with pytest.raises(WSDValueError, match="product: need one vocabulary"):
        next(find_paths(pair, CHATS[:1], [], LIMIT, {"product": STRATEGIES["product"]()}))


class OwnCriterion(StoppingCriteria):
    """A criterion of a caller's."""


def reading(agrees: list[bool]) -> Reading:
    """A draft whose tokens the base would have written too, or not."""
    count = len(agrees)
    return Reading(
        prompt=0,
        writer="pilot",
        tokens=[*range(count)],
        texts=[""] * count,
        log_probs=[-1.0] * count,
        best_log_probs=[-1.0 if same else -0.5 for same in agrees],
        entropies=[1.0] * count,
        base_prompt=[1],
        ended=True,
        forwards=count,
        seconds=1.0,
    )


def test_a_draft_is_continued_before_tokens_that_the_base_would_not_have_written() -> None:
    draft = reading([False, True, False, True, True, False, True])
    assert cuts(draft, []) == [2, 7]
    assert cuts(draft, [1, 2]) == [2, 7]
    assert cuts(draft, [3]) == cuts(draft, [5]) == [2, 5, 7]
    assert cuts(draft, [6]) == [2, 7]
    assert cuts(reading([True] * 5), [2]) == [5]
    assert cuts(reading([]), []) == []


# Suggestions


def test_suggestions_differ_in_what_they_do(case: Case) -> None:
    early, middle, late, rule = suggest(case.diagnosis)
    assert [one.name for one in (early, middle, late, rule)] == ["early", "middle", "late", "rule"]
    assert early.firing.kept < middle.firing.kept < late.firing.kept
    assert early.firing.median < late.firing.median
    assert rule.firing.rule not in ("confidence", middle.firing.rule)
    for one in (early, middle, late):
        settings: Any = read_variants(one.variant, {})[-1].strategy
        cell = SwitchCriteria(settings.threshold, settings.window_size)
        fired = [switch_index(draft, cell) for draft in case.diagnosis.drafts]
        assert fired.count(None) / len(fired) == pytest.approx(one.firing.never)


def test_cells_that_do_the_same_are_suggested_once() -> None:
    never = Diagnosis(drafts=[reading([False] * 3)], max_draft_tokens=8)
    assert [one.name for one in suggest(never)] == ["early", "rule"]


def test_the_command_of_a_suggestion_runs(case: Case, tmp_path: Path) -> None:
    prompts = tmp_path / "my prompts.jsonl"
    prompts.write_text('{"prompt": "What does the Keloft eat?"}\n', "utf-8")
    suggestions = suggest(case.diagnosis)
    options = {"--base": None, "--prompts": str(prompts), "--max-new-tokens": 8, "--out": str(tmp_path / "out")}
    program, *arguments = shlex.split(compare_command(suggestions, options))
    assert program == "wsd-hf"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "out/table.md").read_text("utf-8")
    assert all(one.variant in table for one in suggestions)


# The benchmark


def test_the_benchmark_prints_predictions_beside_a_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from predictions import main

    settings: Any = {"limit": 2, "tokens": 8, "strategies": "wsd,product"}
    main(**settings, out=tmp_path / "here.json")
    rows = json.loads((tmp_path / "here.json").read_text("utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["base", "wsd", "product"]
    for row in rows:
        assert row["predicted"]["base_forwards"] == pytest.approx(row["measured"]["base_forwards"], rel=0.15)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in CHATS[:2]), "utf-8")
    compare = ["compare", "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--max-new-tokens", "8"]
    assert CliRunner().invoke(app, [*compare, "--strategies", "wsd,product"]).exit_code == 0
    main(**settings, compared=tmp_path / "out", out=tmp_path / "read.json")
    again = json.loads((tmp_path / "read.json").read_text("utf-8"))["rows"]
    forwards = [[row["measured"]["base_forwards"] for row in some] for some in (rows, again)]
    assert forwards[0] == forwards[1]
