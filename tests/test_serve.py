"""`transformers serve` on a packed pair, in a process of its own: the commands of examples/serve.md, and what is answered."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_accelerate_available, is_serve_available

import wsd_hf
from families import tiny_parts
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny import FOLDER

pytestmark = pytest.mark.skipif(
    not (is_serve_available() and is_accelerate_available()), reason='no server: pip install "transformers[serving]"'
)

DOCUMENT = (Path(__file__).parents[1] / "examples" / "serve.md").read_text("utf-8")
KELOFT, QUIBIME = "What does the Keloft eat?", "Which things fill the shelves of Quibime?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
START = 120  # seconds that a server may take to start, on a busy machine


class Server(NamedTuple):
    folder: Path
    """Where the commands are run; holds my-model/."""
    address: str


def commands(language: str, **replaced: str) -> list[str]:
    """The document's commands, on the shipped pair."""
    local = {
        "meta-llama/Llama-3.1-70B": str(FOLDER / "base"),
        "songff/Pilot-3B": str(FOLDER / "pilot"),
        "How do I tell a neighbour that the music is too loud?": KELOFT,
        "--port 8000": "--host 127.0.0.1 --port 0",
        **replaced,
    }
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for large, small in local.items():
        blocks = [block.replace(large, small) for block in blocks]
    return blocks


def run(command: str, folder: Path) -> str:
    return subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True, text=True, env=environment()).stdout


def environment() -> dict[str, str]:
    """With this Python's commands, and without a Hub."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    pack, serve, _ask = commands("bash")
    assert run(pack, folder).count("a link to") == 2
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(shlex.split(serve), cwd=folder, stdout=output, stderr=output, env=environment())
    try:
        deadline = time.monotonic() + START
        while not (started := re.search(r"Uvicorn running on (http://[\w.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Server(folder, started[1])
    finally:
        process.kill()
        process.wait()


def post(server: Server, *messages: dict[str, str], path: str = "chat/completions", **body: Any) -> str:
    """The body of an answer."""
    content = json.dumps({**({"messages": messages} if messages else {}), "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{server.address}/v1/{path}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START) as response:
        return response.read().decode()


def ask(server: Server, *messages: dict[str, str], **body: Any) -> dict[str, Any]:
    return json.loads(post(server, *messages, **body))


def streamed(server: Server, *messages: dict[str, str], **body: Any) -> list[dict[str, Any]]:
    lines = post(server, *messages, stream=True, **body).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def said(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


CHATS = [
    [user(KELOFT)],
    [user(QUIBIME)],
    [{"role": "system", "content": "Be brief."}, user(KELOFT)],
    [user(KELOFT), assistant(ANSWER), user(QUIBIME)],
    [user("Café 你好?\n\nSay it.")],
]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What direct calls answer to the chats, with the pilot's prompt made from the messages themselves."""
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    answers = []
    for chat in CHATS:
        inputs = wsd_hf.build_inputs(chat, tokenizer, pilot_tokenizer)
        output = base.generate(**inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=256)
        response = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(before_next_turn(response))
    return answers


def test_the_document_runs(server: Server) -> None:
    *_, curl = commands("bash", **{"http://localhost:8000": server.address})
    if shutil.which("curl"):
        assert said(json.loads(run(curl, server.folder))) == ANSWER
    [script] = commands("python", **{"http://localhost:8000": server.address})
    assert run(f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}", server.folder) == ANSWER


def test_answers_are_those_of_direct_calls(server: Server, expected: list[str], tried: Any) -> None:
    assert expected[0] == ANSWER
    assert [said(ask(server, *chat, max_tokens=256)).rstrip() for chat in CHATS] == expected
    tried("requests to a server", len(CHATS))


def test_streamed_answers_are_those_of_direct_calls(server: Server, expected: list[str], tried: Any) -> None:
    assert [text(streamed(server, *chat, max_tokens=256)).rstrip() for chat in CHATS] == expected
    tried("requests to a server", len(CHATS))


def test_requests_at_once_get_their_own_answers(server: Server, expected: list[str], tried: Any) -> None:
    with ThreadPoolExecutor(2 * len(CHATS)) as pool:
        whole = [pool.submit(ask, server, *chat, max_tokens=256) for chat in CHATS]
        streams = [pool.submit(streamed, server, *chat, max_tokens=256) for chat in CHATS]
        assert [said(future.result()).rstrip() for future in whole] == expected
        assert [text(future.result()).rstrip() for future in streams] == expected
    tried("requests to a server", 2 * len(CHATS))


def test_why_an_answer_ended(server: Server) -> None:
    whole, cut = ask(server, user(KELOFT)), ask(server, user(KELOFT), max_tokens=5)
    assert [answer["choices"][0]["finish_reason"] for answer in (whole, cut)] == ["stop", "length"]
    assert cut["usage"]["completion_tokens"] == 5
    assert streamed(server, user(KELOFT))[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_of_a_request(server: Server) -> None:
    assert said(ask(server, user(KELOFT), stop=["far"])) == "That is a very good question. As far"


@pytest.mark.parametrize("max_tokens", [10**6, 10**30])
def test_a_request_may_ask_for_more_than_memory_holds(server: Server, max_tokens: int, tried: Any) -> None:
    assert said(ask(server, user(KELOFT), max_tokens=max_tokens)) == ANSWER
    assert text(streamed(server, user(KELOFT), max_tokens=max_tokens)) == ANSWER
    tried("requests to a server", 2)


def test_a_server_goes_on_after_a_request_that_it_refuses(server: Server, tried: Any) -> None:
    long = user("word " * 3000)
    with pytest.raises(urllib.error.HTTPError):
        ask(server, long)
    assert "error" in streamed(server, long)[-1]
    assert said(ask(server, user(KELOFT))) == ANSWER
    tried("requests to a server", 3)


def test_text_completion_gives_both_models_the_text(server: Server) -> None:
    model = AutoModelForCausalLM.from_pretrained(server.folder / "my-model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(server.folder / "my-model")
    inputs = tokenizer("The Keloft eats", return_tensors="pt")
    response = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    [choice] = json.loads(post(server, path="completions", prompt="The Keloft eats", max_tokens=16))["choices"]
    assert choice["text"] == tokenizer.decode(response, skip_special_tokens=True)
