"""The Space: its files name what there is, and its app serves the page."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoCard

import wsd_hf
from time_limit import HANG, time_limit

gradio = pytest.importorskip("gradio", reason='no gradio: pip install "wsd_hf[ui]"')
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"


def test_the_front_matter_and_requirements_name_what_there_is() -> None:
    card = RepoCard.load(SPACE / "README.md", repo_type="space").data
    assert (card.sdk, card.app_file, card.license) == ("gradio", "app.py", "apache-2.0")
    assert f"gradio=={card.sdk_version}" in (ROOT / "constraints-tools.txt").read_text("utf-8").splitlines()
    assert {card.colorFrom, card.colorTo} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert len(card.short_description) <= 60  # the Hub's limit
    package, extra, wheel = re.fullmatch(
        r"(\w+)\[(\w+)\] @ https://huggingface.co/spaces/NAME/wsd/resolve/main/(\S+)\n",
        (SPACE / "requirements.txt").read_text("utf-8"),
    ).groups()
    assert wheel == f"{package}-{wsd_hf.__version__}-py3-none-any.whl"
    assert extra in metadata("wsd_hf").get_all("Provides-Extra")


def test_the_space_starts_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **given: calls.append(given))
    monkeypatch.setenv("BASE", "")
    monkeypatch.setenv("PILOT", "")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert ended.value.code == 0
    assert calls[0]["server_name"] == "0.0.0.0"


@pytest.mark.sweep
def test_the_app_serves_the_page(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("BASE", "PILOT")}
    with subprocess.Popen(
        [sys.executable, "-u", SPACE / "app.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            lines: list[str] = []
            with time_limit():
                for line in process.stdout:
                    lines.append(line)
                    if found := re.search(r"http://0\.0\.0\.0:(\d+)", line):
                        break
                else:
                    pytest.fail("".join(lines))
            answer = httpx.get(f"http://127.0.0.1:{found[1]}/", timeout=HANG)
        finally:
            process.kill()
    assert answer.status_code == 200
    assert "Weak-to-Strong Decoding" in answer.text
