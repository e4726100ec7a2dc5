"""`wsd-hf serve` as a process, and the options that it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("starlette", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("openai", reason="no client: pip install openai")

import httpx

import wsd_hf
from completions_server import Fault, serving
from serving_for_tests import asked, get, user
from time_limit import HANG
from wsd_hf import Pair
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

START = 120  # seconds that a process may take to start, on a busy machine
DOCUMENT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text("utf-8")


@contextmanager
def process(log: Path, *options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server in a process of its own, which is killed at last; what it prints goes to a file."""
    command = [sys.executable, "-m", "wsd_hf", "serve", "--port", "0", *options]
    with log.open("wb") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + START
        while not (started := re.search(r"served at (http://[\w.:]+)/v1", log.read_text())):
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield started[1], run
    finally:
        run.kill()
        run.wait()


def refused(*options: str) -> str:
    """The line that the command prints for options that cannot work."""
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


def test_a_process_answers_as_documented_until_it_is_stopped(tmp_path: Path, capsys: Any) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    [(code, printed)] = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    with process(tmp_path / "log", "--api-key-file", str(key)) as (url, run):
        assert get(f"{url}/v1/models").status_code == 401
        exec(code.replace("http://127.0.0.1:8000", url).replace('"none"', '"secret"'), {})
        assert capsys.readouterr().out == printed
        headers = {"Authorization": "Bearer secret"}
        body = {"messages": user("Keloft?"), "wsd_window_size": 10**20}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=HANG).status_code == 200
        run.send_signal(signal.SIGTERM)
        assert run.wait(HANG) == 143
    log = (tmp_path / "log").read_text()
    assert log.count("a request was answered") == 3
    assert str(10**20) not in log
    assert "Keloft" not in log
    assert "secret" not in log


def test_help_and_refusals_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uvicorn", "starlette", "starlette.applications", "prometheus_client", "httpx", "anyio"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(wsd_hf, "serving", wsd_hf.serving)  # which the import replaces
    for name in [name for name in sys.modules if name.startswith("wsd_hf.serving")]:
        monkeypatch.delitem(sys.modules, name)
    assert "--base-url" in CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert 'pip install "wsd_hf[serve]"' in refused()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--base-url", "http://x/v1"], "--pilot-url is missing"),
        (["--pilot-url", "http://x/v1"], "--base-url is missing"),
        (["--base-url", "x", "--pilot-url", "http://x/v1"], "--base-url: must be http"),
        (["--base-url", "http://x/v1", "--pilot-url", "http://x/v1", "--dtype", "float16"], "--dtype float16 has no effect"),
        (["--base-model", "x"], "--base-model x has no effect without --base-url"),
        (["--base", "x"], "--pilot is missing"),
        (["--temperature", "-1"], "--temperature -1.0: must be"),
        (["--temperature", "3"], "--temperature=3.0: must be at most 2"),
        (["--temperature", "1e-9"], "--temperature=1e-09: must be 0, which is greedy, or at least 0.000001"),
        (["--top-p", "2"], "--top-p=2.0"),
        (["--threshold", "2"], "threshold=2.0"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: "),
        (["--host", "a..b"], "--host a..b --port 0: "),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_line(options: list[str], problem: str) -> None:
    message = refused("--port", "0", *options)
    assert problem in message
    assert "\n" not in message


def test_an_empty_key_and_a_key_that_no_header_holds_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "key").write_text("\n")
    assert "is empty" in refused("--api-key-file", str(tmp_path / "key"))
    (tmp_path / "key").write_bytes(b"\xff\n")
    assert "key: holds a space, a line break or a letter outside ASCII" in refused("--api-key-file", str(tmp_path / "key"))
    monkeypatch.setenv("WSD_HF_API_KEY", "two words")
    message = refused()
    assert "WSD_HF_API_KEY" in message
    assert "two words" not in message


def test_a_port_that_is_taken_is_refused_before_models_are_loaded(monkeypatch: Any) -> None:
    monkeypatch.setattr("wsd_hf.cli.serving.load_models", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"--port {port}: Address already in use" in refused("--port", port)


def test_settings_that_servers_cannot_honour_are_refused_at_the_start() -> None:
    pair = Pair.tiny()
    with (
        serving(pair.base, pair.tokenizer, "base") as base,
        serving(pair.pilot, pair.pilot_tokenizer, "pilot") as pilot,
    ):
        urls = ["--port", "0", "--base-url", base.url, "--pilot-url", pilot.url]
        folders = ["--base", str(FOLDER / "base"), "--pilot", str(FOLDER / "pilot")]
        assert "switch_criteria='entropy'" in refused(*urls, *folders, "--switch-criteria", "entropy")
        assert "has no such model" in refused(*urls, *folders, "--base-model", "other")


def test_an_answer_that_outlasts_the_grace_ends_with_an_error(tmp_path: Path) -> None:
    pair = Pair.tiny()
    with (
        serving(pair.base, pair.tokenizer, "base") as base,
        serving(pair.pilot, pair.pilot_tokenizer, "pilot") as pilot,
    ):
        urls = ["--base-url", base.url, "--pilot-url", pilot.url, "--grace", "0"]
        folders = ["--base", str(FOLDER / "base"), "--pilot", str(FOLDER / "pilot")]
        with process(tmp_path / "log", *urls, *folders) as (url, run):
            base.faults.append(Fault(where=lambda body: bool(body.get("stream")), then="silence", after=2))
            connection = asked(url, messages=user("What does the Keloft eat?"), stream=True)
            base.wait_for(lambda server: server.counts.silent == 1)
            run.send_signal(signal.SIGTERM)
            answer = connection.getresponse().read().decode()
            assert run.wait(HANG) == 143
        first, *_, last = [json.loads(event.removeprefix("data: ")) for event in answer.strip().split("\n\n")]
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert last["error"]["code"] == "stopping"
        base.wait_until_idle()
    assert "Keloft" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("options", "key", "status"), [([], "", 400), (["--host", "0.0.0.0"], "", 200), ([], "secret", 200)])
def test_other_names_of_a_server_without_a_key_are_refused_on_loopback(
    options: list[str], key: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    apps: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: apps.append(server.config.app))
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options], env={"WSD_HF_API_KEY": key})
    assert result.exit_code == 0, result.output
    for host, expected in (("127.0.0.1:8000", 200), ("localhost", 200), ("rebound.example:8000", status)):
        assert TestClient(apps[0], base_url=f"http://{host}").get("/health").status_code == expected
