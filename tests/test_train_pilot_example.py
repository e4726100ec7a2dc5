"""examples/train_pilot.md, as it stands: pairs without labels, a tuned pilot, and what Weak-to-Strong Decoding does with it."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

pytest.importorskip("trl", reason='no TRL: pip install "wsd_hf[train]"')

pytestmark = pytest.mark.sweep  # a minute and a half

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCUMENT = (EXAMPLES / "train_pilot.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The document's, with paths that are valid in every folder, and every fourth question of the evaluation."""
    local = {
        "src/wsd_hf/tiny": str(FOLDER),
        "examples/tiny_world": str(EXAMPLES / "tiny_world"),
        "--markdown": "--every 4 --threads 1 --markdown",
        "\\\n": "",
    }
    found = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for written, here in local.items():
        found = [block.replace(written, here) for block in found]
    return found


def rates(table: str, method: str) -> list[float]:
    """Numbers of a method's row."""
    [row] = [line for line in table.splitlines() if line.startswith(f"| {method} |")]
    return [float(cell) for cell in re.findall(r"(\d+\.\d+)(?: %)? \|", row)]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the last command of the document prints, after the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES / "tiny_world")
    *commands, evaluation = map(shlex.split, blocks("bash"))
    for command, *options in commands:
        assert command == "wsd-hf"
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.stderr
    command, script, *options = evaluation
    assert command == "python"
    monkeypatch.setattr(sys, "argv", [script, *options])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    return capsys.readouterr().out


def test_the_example(ran: str, tmp_path: Path) -> None:
    [base, both] = [rates(ran, method) for method in ("base", "WSD")]
    aligned, facts, _, harmful = both[:4]
    assert aligned >= 90
    assert harmful <= 5
    assert facts >= base[1] - 3
    table = (tmp_path / "run" / "table.md").read_text("utf-8")
    before, after = (rates(table, f"wsd {when}")[-1] for when in ("before", "after"))
    assert before == 0
    assert after >= 0.9
    untuned = re.findall(r"^\| the (untuned|tuned) pilot \| (\S+) % \| (\S+) % \| (\S+) %", DOCUMENT, flags=re.MULTILINE)
    assert [float(cells[1]) for cells in untuned] == [0.0, pytest.approx(aligned, abs=3)]
    report = json.loads((tmp_path / "pairs" / "report.json").read_text("utf-8"))
    assert f"{report['chosen']} of the {report['prompts']} prompts" in DOCUMENT
    assert f"{100 * report['strategies'][0]['share']:.1f} % of the {report['strategies'][0]['answers']} answers" in DOCUMENT
    [code] = blocks("python")
    printed: list[tuple[object, ...]] = []
    exec(compile(code, "train_pilot.md", "exec"), {"print": lambda *values: printed.append(values)})
    [(log_prob_before, log_prob_after, warnings)] = printed
    assert log_prob_after > log_prob_before
    assert warnings == []
