"""The gate of the docstrings' English."""

from __future__ import annotations

from pathlib import Path

import pytest

from english import main


def test_headless_sentences_are_printed_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""Rows of a batch."""\n\nROWS = 1\n"""Number of rows.\n\nWhat each begins with."""\n', "utf-8")
    assert main([tmp_path]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{file}:6: What each begins with."
    assert printed[1].startswith("1 of 3 sentences open headless: 333 per 1,000")


def test_few_headless_sentences_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "module.py").write_text(f'"""{"Rows of a batch. " * 99}What each begins with."""\n', "utf-8")
    assert main([tmp_path]) == 0
    assert "1 of 100 sentences open headless: 10 per 1,000" in capsys.readouterr().out


def test_other_habits_are_counted_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "module.py").write_text('"""The token behind it says where the word stands."""\n', "utf-8")
    assert main([tmp_path]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["behind, in front of: 1", "says, tells, knows, asks, wants, stands: 2"]
