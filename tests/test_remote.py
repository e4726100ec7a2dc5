"""Weak-to-Strong Decoding over two servers is that of the step-by-step engine, for any settings; and its requests end."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wsd_hf
from completions_server import CompletionsServer, Fault, serving
from time_limit import no_thread_left, time_limit
from wsd_hf import Pair, SwitchRule, TwoWayConfig, WSDConfig, WSDHubError, WSDServerError, WSDValueError, enable_wsd
from wsd_hf.tiny import FOLDER, demo_questions

anyio = pytest.importorskip("anyio")
pytest.importorskip("httpx")

from wsd_hf.remote import RemoteAnswer, RemotePair, Server  # noqa: E402

QUESTIONS = [question["messages"][0]["content"] for question in demo_questions()]
KELOFT = "What does the Keloft eat?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
FOLDERS = {
    "one vocabulary": ("base", "pilot"),
    "two vocabularies": ("base", "pilot_other_vocab"),
    "a base with a chat template": ("pilot", "pilot_other_vocab"),
}


class Case(NamedTuple):
    """Two models in this process, and the same behind servers."""

    pair: Pair
    base: CompletionsServer
    pilot: CompletionsServer
    remote: RemotePair

    def idle(self) -> None:
        """Returns when the servers have nothing to do, and no connections; fails if it doesn't come to that."""
        self.base.wait_until_idle()
        self.pilot.wait_until_idle()

    def reset(self) -> None:
        """Leaves the servers idle, without faults, and without bodies of requests."""
        for server in (self.base, self.pilot):
            server.reset()


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    with ExitStack() as stack:

        def case(name: str) -> Case:
            base_folder, pilot_folder = (FOLDER / folder for folder in FOLDERS[name])
            pair = Pair.from_pretrained(base_folder, pilot_folder, dtype=torch.float32)
            base = stack.enter_context(serving(pair.base, pair.tokenizer, "base"))
            pilot = stack.enter_context(serving(pair.pilot, pair.pilot_tokenizer, "pilot"))
            return Case(pair, base, pilot, RemotePair.connect(base.url, pilot.url, base_folder, pilot_folder))

        yield {name: case(name) for name in FOLDERS}


@pytest.fixture
def case(cases: dict[str, Case]) -> Iterator[Case]:
    one = cases["one vocabulary"]
    one.reset()
    yield one
    one.reset()


def checks(case: Case) -> list[dict[str, Any]]:
    """Bodies of the requests that checked drafts."""
    return [body for body in case.base.bodies if "prompt_logprobs" in body]


def collected(remote: RemotePair, chat: Any, **settings: Any) -> tuple[list[tuple[str, str]], RemoteAnswer]:
    """The pieces of a stream, and its last record."""

    async def read() -> list[Any]:
        return [piece async for piece in remote.stream(chat, **settings)]

    *pieces, answer = anyio.run(read)
    return pieces, answer


# The same as in one process


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.sampled_from([1e-9, 0.05, 0.3, 0.8, 0.97, 0.999, 1.0]),
        "window_size": st.integers(1, 9),
        "max_draft_tokens": st.sampled_from([1, 2, 8, 30, 40]),
        "draft_end": st.sampled_from(["continue", "stop"]),
        "ignore_repeats": st.booleans(),
        "switch_criteria": st.sampled_from(["confidence", "relative_confidence", "agreement"]),
        "chunk": st.sampled_from([1, 2, 5, 64]),
    },
)
CHATS = st.one_of(
    st.sampled_from(QUESTIONS).map(lambda question: [{"role": "user", "content": question}]),
    st.sampled_from(["", "That", "As far as I know, the", "The"]).map(
        lambda start: [{"role": "user", "content": KELOFT}, {"role": "assistant", "content": start}]
    ),
    st.text(max_size=12).map(lambda text: [{"role": "user", "content": f"{text} {KELOFT}"}]),
)
STOPS = st.lists(st.sampled_from([".", " the", "lovely", "question. As", "s", "\n", "eats acorns"]), max_size=2)


def check_equal(case: Case, chat: Any, config: dict[str, Any], length: int, stops: list[str]) -> None:
    expected = case.pair.generate(
        case.pair.inputs(chat), WSDConfig(**config, engine="step"), max_new_tokens=length, stop_strings=stops or None
    )
    (answer,) = case.remote.generate(chat, WSDConfig(**config), max_new_tokens=length, stop=stops)
    assert answer.token_ids == expected.sequences[0, expected.prompt_length :].tolist()
    assert answer.prompt_length == expected.prompt_length
    assert (answer.draft_length, answer.switch_index) == (expected.draft_length[0], expected.switch_index[0])
    assert answer.switch_reason == expected.switch_reason[0]
    assert answer.draft_log_probs == pytest.approx(expected.draft_log_probs[0].tolist(), abs=1e-3)
    whole = case.pair.answers(expected)[0]
    assert answer.text == min((whole.split(stop)[0].strip() for stop in stops), key=len, default=whole)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore:window_size")
@settings(max_examples=10)
@given(CHATS, SETTINGS, st.integers(1, 48), STOPS)
def test_an_answer_is_that_of_one_process(
    cases: dict[str, Case], name: str, chat: Any, config: dict[str, Any], length: int, stops: list[str]
) -> None:
    check_equal(cases[name], chat, config, length, stops)


@pytest.mark.sweep
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore:window_size")
@settings(max_examples=150)
@given(CHATS, SETTINGS, st.integers(1, 48), STOPS)
def test_an_answer_is_that_of_one_process_for_many(
    cases: dict[str, Case], name: str, chat: Any, config: dict[str, Any], length: int, stops: list[str]
) -> None:
    with time_limit(1200):
        check_equal(cases[name], chat, config, length, stops)


def chances(model: torch.nn.Module, prompt: list[int], temperature: float, top_k: int) -> dict[int, float]:
    """The distribution that the next token is drawn from."""
    with torch.no_grad():
        best = model(torch.tensor([prompt])).logits[0, -1].float().topk(top_k)
    shares = (best.values / temperature).softmax(-1).tolist()
    return dict(zip(best.indices.tolist(), shares, strict=True))


def test_sampled_answers_have_the_distribution_of_the_models(case: Case) -> None:
    """The first token is the pilot's and the second the base's, whose draw must not depend on the pilot's."""
    warped, number = {"temperature": 15.0, "top_k": 3}, 120
    config = WSDConfig(threshold=1e-30, window_size=1, chunk=1)
    answers = case.remote.generate([KELOFT] * number, config, max_new_tokens=2, do_sample=True, seed=5, **warped)
    inputs = case.pair.inputs(KELOFT)
    prompt, pilot_prompt = inputs["input_ids"][0].tolist(), inputs["assistant_input_ids"][0].tolist()
    expected = {
        (first, second): number * share * other
        for first, share in chances(case.pair.pilot, pilot_prompt, **warped).items()
        for second, other in chances(case.pair.base, [*prompt, first], **warped).items()
    }
    found = Counter(tuple(answer.token_ids) for answer in answers)
    assert found.keys() <= expected.keys()
    rare = [pair for pair, count in expected.items() if count < 5]
    bins = [[pair] for pair in expected if pair not in rare] + ([rare] if rare else [])
    counts = [(sum(found[pair] for pair in one), sum(expected[pair] for pair in one)) for one in bins]
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in counts)
    assert len(bins) > 4
    assert chi_square < 30  # of at most 9 bins: p < 0.001


def test_a_seed_repeats_an_answer(case: Case) -> None:
    warped = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
    answers = case.remote.generate([KELOFT] * 3, seed=7, **warped)
    assert case.remote.generate([KELOFT] * 2, seed=8, **warped) == answers[1:]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3


@pytest.mark.parametrize("name", FOLDERS)
def test_the_pilot_alone_may_sample(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    case.reset()
    case.remote.generate(KELOFT, WSDConfig(assistant_do_sample=True), temperature=1.5, top_p=0.9, seed=3, max_new_tokens=24)
    (drafted,), continued = case.pilot.bodies, case.base.bodies[-1]
    assert (drafted["temperature"], drafted["top_p"], drafted["top_k"]) == (1.5, 0.9, 0)
    assert (continued["temperature"], continued["top_p"]) == (0, 1)
    assert "seed" not in continued


# Streams


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("stop", [[], ["acorns", "As far"], "lovely"])
def test_pieces_make_the_answer_and_name_their_writers(cases: dict[str, Case], name: str, stop: Any) -> None:
    pair, remote = cases[name].pair, cases[name].remote
    pieces, answer = collected(remote, KELOFT, stop=stop)
    assert [answer] == remote.generate(KELOFT, stop=stop)
    assert "".join(text for text, _ in pieces).strip() == answer.text
    drafted = pair.tokenizer.decode(answer.token_ids[: answer.draft_length])
    by_pilot = "".join(text for text, writer in pieces if writer == "pilot")
    assert drafted.startswith(by_pilot)
    assert by_pilot == drafted or stop
    assert [writer for _, writer in pieces] == sorted((writer for _, writer in pieces), reverse=True)


def test_a_line_separator_within_an_event_ends_no_line(case: Case) -> None:
    event = {"choices": [{"text": "\u2028 \x85 \x0b", "token_ids": [5], "finish_reason": None}]}
    content = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
    case.base.faults.append(Fault(where=lambda body: "stream" in body, then="content", content=content, after=3))
    (answer,) = case.remote.generate(KELOFT)
    assert answer.token_ids[answer.draft_length + 3] == 5


def test_chunks_grow_and_the_pilot_is_stopped_at_the_switch(case: Case) -> None:
    chat = [{"role": "user", "content": KELOFT}]
    config = WSDConfig(threshold=1.0, window_size=2, chunk=2)
    (answer,) = case.remote.generate(chat, config, max_new_tokens=14)
    sizes = [len(body["prompt"]) - answer.prompt_length for body in checks(case)]
    assert sizes == [2, 6, 14]
    assert case.pilot.bodies[0]["max_tokens"] == 14
    assert answer.base.requests == len(sizes) + len([body for body in case.base.bodies if "stream" in body])
    assert all(body["max_tokens"] == 1 for body in checks(case))
    assert not any("skip_reading_prefix_cache" in body for body in case.base.bodies + case.pilot.bodies)
    case.idle()
    aborted = case.pilot.counts.aborted
    case.pilot.faults.append(Fault(then="silence", after=20))
    (answer,) = case.remote.generate(KELOFT)
    assert answer.text == ANSWER
    case.idle()
    assert case.pilot.counts.aborted == aborted + 1


@pytest.mark.parametrize(("window_size", "first"), [(6, 16), (20, 20)])
def test_the_first_check_reads_a_window_at_least(case: Case, window_size: int, first: int) -> None:
    (answer,) = case.remote.generate(KELOFT, WSDConfig(threshold=1.0, window_size=window_size), max_new_tokens=24)
    assert len(checks(case)[0]["prompt"]) - answer.prompt_length == first


def test_a_stream_that_is_closed_or_cancelled_leaves_nothing(case: Case) -> None:
    case.base.faults.append(Fault(where=lambda body: "stream" in body, then="silence", after=2))

    async def close() -> None:
        async with aclosing(case.remote.stream(KELOFT)) as pieces:
            async for _text, writer in pieces:
                if writer == "base":
                    return

    async def cancel() -> None:
        with anyio.CancelScope() as scope:
            async for _text, writer in case.remote.stream(KELOFT):
                if writer == "base":
                    scope.cancel()

    aborted = case.base.counts.aborted
    with no_thread_left():
        for leave in (close, cancel):
            anyio.run(leave)
            case.idle()
    assert case.base.counts.aborted == aborted + 2


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("number", [3, 100])
def test_several_tokens_may_come_in_one_event(cases: dict[str, Case], name: str, number: int) -> None:
    case = cases[name]
    one_by_one = case.remote.generate(KELOFT)
    for server in (case.base, case.pilot):
        server.faults.append(Fault(where=lambda body: "stream" in body, per_event=number))
    (answer,) = case.remote.generate(KELOFT)
    case.reset()
    assert replace(answer, base=None, pilot=None) == replace(one_by_one[0], base=None, pilot=None)


# Many at once


def test_fifty_answers_at_once_are_those_one_by_one(case: Case) -> None:
    different = QUESTIONS[:5]
    answers = case.remote.generate(different * 10, max_new_tokens=14)
    alone = [case.remote.generate(question, max_new_tokens=14)[0] for question in different]
    assert answers == alone * 10


def test_generate_works_where_an_event_loop_is_running(case: Case) -> None:
    async def notebook() -> list[RemoteAnswer]:
        return case.remote.generate([KELOFT, KELOFT])

    assert [answer.text for answer in anyio.run(notebook)] == [ANSWER] * 2


def test_threads_may_share_a_pair(case: Case) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(case.remote.generate(KELOFT)[0].text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [ANSWER] * 4


def test_no_more_requests_are_open_than_a_server_is_to_have(case: Case) -> None:
    models = (case.remote.base, case.remote.pilot)
    remote = RemotePair(*(replace(model, server=replace(model.server, open_requests=1)) for model in models))
    case.pilot.faults.append(Fault(then="silence", after=0))
    answers: list[RemoteAnswer] = []
    thread = threading.Thread(target=lambda: answers.extend(remote.generate([KELOFT] * 5)))
    thread.start()
    case.pilot.wait_for(lambda server: server.counts.silent == 1)
    assert len(case.pilot.bodies) == 1
    case.pilot.faults.clear()
    case.pilot.release()
    thread.join()
    assert [answer.text for answer in answers] == [ANSWER] * 5


def test_one_server_may_have_both_parts(case: Case) -> None:
    server = Server(case.pilot.url, open_requests=1)
    remote = RemotePair.connect(server, server, FOLDER / "pilot", FOLDER / "pilot")
    pair = Pair(enable_wsd(copy.deepcopy(case.pair.pilot)), case.pair.pilot, *[case.pair.pilot_tokenizer] * 2)
    (answer,) = remote.generate(KELOFT)
    assert answer.text == pair.answers(pair.generate(KELOFT, max_new_tokens=512))[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda remote: pickle.loads(pickle.dumps(remote))])
def test_a_copy_answers_as_the_pair_does(case: Case, copied: Callable[[RemotePair], RemotePair]) -> None:
    """Also one that is pickled for another process."""
    assert copied(case.remote).generate(KELOFT) == case.remote.generate(KELOFT)


# Drafts of few tokens


@pytest.mark.parametrize("name", FOLDERS)
def test_a_pilot_may_end_its_draft_with_its_first_token(cases: dict[str, Case], name: str) -> None:
    pair, pilot = cases[name].pair, cases[name].remote.pilot
    inputs = pair.inputs(KELOFT)
    with torch.no_grad():
        first = int(pair.pilot(inputs["assistant_input_ids"]).logits[0, -1].argmax())
    remote = replace(cases[name].remote, pilot=replace(pilot, end_token_ids=frozenset([first])))
    (answer,) = remote.generate(KELOFT, max_new_tokens=12)
    alone = pair.base.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)
    assert answer.token_ids == alone[0, answer.prompt_length :].tolist()
    assert (answer.draft_length, answer.switch_index, answer.switch_reason) == (0, -1, "draft_ended")
    assert answer.base.requests == 1


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("room", [1, 5])
def test_a_draft_ends_with_the_pilots_context(cases: dict[str, Case], name: str, room: int) -> None:
    pair, pilot = cases[name].pair, cases[name].remote.pilot
    inputs = pair.inputs(KELOFT)
    context = inputs["assistant_input_ids"].shape[1] + room
    remote = replace(cases[name].remote, pilot=replace(pilot, server=replace(pilot.server, context=context)))
    (answer,) = remote.generate(KELOFT, WSDConfig(threshold=1.0), max_new_tokens=12)
    config = WSDConfig(threshold=1.0, window_size=1, max_draft_tokens=room, engine="step")
    whole = pair.generate(inputs, config, max_new_tokens=12)
    assert answer.token_ids == whole.sequences[0, whole.prompt_length :].tolist()
    assert (answer.draft_length, answer.switch_reason) == (whole.draft_length[0], "draft_limit")


# Refusals, before any request


def test_a_prompt_beyond_a_context_is_refused_and_a_long_answer_is_cut(cases: dict[str, Case]) -> None:
    pair = cases["one vocabulary"].pair
    with serving(pair.base, pair.tokenizer, max_model_len=64) as base, serving(pair.pilot, pair.pilot_tokenizer) as pilot:
        remote = RemotePair.connect(base.url, pilot.url, FOLDER / "base", FOLDER / "pilot")
        (answer,) = remote.generate(KELOFT, WSDConfig(threshold=1.0), stop="never")
        whole = pair.generate(KELOFT, WSDConfig(threshold=1.0), max_new_tokens=63 - answer.prompt_length)
        assert answer.token_ids == whole.sequences[0, whole.prompt_length :].tolist()
        requests = len(base.requests) + len(pilot.requests)
        with pytest.raises(
            WSDValueError, match=r"the prompt of the base has \d+ tokens and the context of its server holds 64"
        ):
            remote.generate("Why? " * 40)
        assert len(base.requests) + len(pilot.requests) == requests


class Entropic(SwitchRule):
    """A rule of the caller's that needs whole distributions."""

    reads = ("entropies",)

    def __init__(self) -> None:
        super().__init__(0.5, 0.5, 2, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "nudging"}, "strategy='nudging': over servers there are 'wsd'"),
        ({"strategy": TwoWayConfig()}, "strategy=TwoWayConfig"),
        ({"strategy": None}, "strategy=None"),
        ({"strategy": WSDConfig(switch_criteria="entropy")}, "switch_criteria='entropy': needs the base's whole distributions"),
        ({"strategy": WSDConfig(switch_criteria=Entropic())}, "needs the base's whole distributions"),
        ({"strategy": WSDConfig(engine="fast")}, "engine='fast' concerns models in this process"),
        ({"strategy": WSDConfig(speculate=False)}, "speculate=False"),
        ({"strategy": WSDConfig(cuda_graphs=False)}, "cuda_graphs=False"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be an integer of at least 1"),
        ({"temperature": 0.5}, "have no effect without do_sample=True"),
        ({"seed": 3}, "have no effect without do_sample=True"),
        ({"do_sample": True, "seed": "a"}, "seed='a': must be an integer"),
        ({"do_sample": True, "temperature": 0}, "temperature=0: must be above 0"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1: must be a finite number of at least 0"),
        ({"do_sample": True, "top_p": 0}, "top_p=0: must be a number above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1: must be at least 0"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"stop": 5}, "stop=5: must be a text, or a list of texts"),
        ({"stop": [""]}, r"stop=\[''\]: must be a text"),
        ({"stop": "\ud800"}, "stop: holds half of a surrogate pair"),
        ({"chats": [[{"role": "robot", "content": "?"}]]}, r"messages\[0\]"),
        ({"chats": 5}, "chats=5: must be a question"),
    ],
)
def test_what_cannot_work_is_refused_before_any_request(case: Case, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(WSDValueError, match=message):
        case.remote.generate(**{"chats": KELOFT, **arguments})
    assert not case.base.bodies + case.pilot.bodies


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, r"url: must be http\(s\)://HOST"),
        ({"url": "http://me:secret@host"}, "url: must be"),
        ({"key": "a b"}, "key: holds a space"),
        ({"timeout": 0}, "timeout=0"),
        ({"open_requests": 0}, "open_requests=0: must be an integer of at least 1"),
    ],
)
def test_a_server_checks_its_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(WSDValueError, match=message) as caught:
        Server(**{"url": "http://host", **arguments})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable.lower(), raising=False)  # which would be taken before it
    monkeypatch.setenv(variable, "nonsense://proxy:1")
    with pytest.raises(WSDValueError, match=r"(?s)proxies .* of the environment .*nonsense.*unset"):
        case.remote.generate(KELOFT)


# Tokenizers


def test_code_of_the_page_runs_as_it_stands(cases: dict[str, Case], capsys: pytest.CaptureFixture[str]) -> None:
    """The servers have the models' folders for names, so the tokenizers are found by them."""
    pair, names = cases["one vocabulary"].pair, dict[str, Any]()
    page = (Path(__file__).parents[1] / "docs" / "remote.md").read_text("utf-8")
    with (
        serving(pair.base, pair.tokenizer, str(FOLDER / "base")) as base,
        serving(pair.pilot, pair.pilot_tokenizer, str(FOLDER / "pilot")) as pilot,
    ):
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
            block = block.replace("http://localhost:8001/v1", base.url).replace("http://localhost:8002/v1", pilot.url)
            exec(block.replace("How do I tell a neighbour that the music is too loud?", KELOFT), names)
            assert ANSWER in capsys.readouterr().out


def test_a_name_that_is_no_tokenizer_s_is_explained(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WSDHubError, match=r"; base is the server's name for the model: give tokenizer="):
        RemotePair.connect(case.base.url, case.pilot.url)


def test_a_folder_with_a_tokenizer_alone(case: Case, tmp_path: Path) -> None:
    """The EOS is the tokenizer's, and the width of the logits that of its vocabulary."""
    for file in (FOLDER / "base").glob("token*"):
        shutil.copy(file, tmp_path)
    remote = RemotePair.connect(case.base.url, case.pilot.url, tmp_path, FOLDER / "pilot")
    assert remote.generate([KELOFT]) == case.remote.generate([KELOFT])


def test_an_eos_of_the_generation_config_ends_an_answer(case: Case, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "base", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    lovely = case.pair.tokenizer.encode(" lovely", add_special_tokens=False)[0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, lovely]}), "utf-8")
    remote = RemotePair.connect(case.base.url, case.pilot.url, tmp_path, FOLDER / "pilot")
    (answer,) = remote.generate([KELOFT])
    assert answer.token_ids[-1] == lovely
    assert answer.finish_reason == "stop"


def test_a_pilot_needs_a_chat_template(case: Case) -> None:
    with pytest.raises(WSDValueError, match="no chat template"):
        RemotePair.connect(case.base.url, case.pilot.url, FOLDER / "base", case.pair.tokenizer).generate(KELOFT)


def test_the_tokenizer_of_another_model_is_refused(case: Case) -> None:
    with pytest.raises(WSDServerError, match=r"give the model's own|no tokens of its vocabulary"):
        RemotePair.connect(case.base.url, case.pilot.url, FOLDER / "pilot_other_vocab", FOLDER / "pilot")


def test_an_adapter_has_the_context_of_its_model(case: Case) -> None:
    cards = [{"id": "base", "max_model_len": 77}, {"id": "tuned", "parent": "base", "max_model_len": None}]
    case.base.faults.append(Fault("/v1/models", status=200, content=json.dumps({"data": cards}).encode()))
    assert anyio.run(Server(case.base.url, "tuned").found).context == 77


# Without the extra


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsd_hf, "remote", wsd_hf.remote)  # which the import replaces
    for name in [name for name in sys.modules if name.startswith("wsd_hf.remote")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    remote = importlib.import_module("wsd_hf.remote")
    assert importlib.import_module("wsd_hf.remote.address").WAITS
    with pytest.raises(WSDValueError, match=r'decoding over servers needs httpx and anyio .*; pip install "wsd_hf\[remote\]"'):
        _ = remote.RemotePair
    with pytest.raises(AttributeError, match="nothing"):
        _ = remote.nothing
