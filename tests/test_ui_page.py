"""The page of `wsd-hf ui` in a browser: an answer that grows, the sliders, stop, several visitors, keys, files."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import socket
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

import wsd_hf
from browser import NARROW, OVERFLOWING, TEXTS, WIDE, Opened, chromium, opened, wait_for_count, wait_until
from test_pages import channels, contrast, luminance
from wsd_hf.pages.style import BASE_COLOUR, PILOT_COLOURS
from wsd_hf.serving.local import LocalAnswerer
from wsd_hf.serving.requests import ChatRequest, End, Piece
from wsd_hf.ui.settings import Settings, available

pytest.importorskip("gradio", reason='no gradio: pip install "wsd_hf[ui]"')

import httpx

import serving_for_tests
from wsd_hf.ui.answers import Conversation
from wsd_hf.ui.app import REQUESTS, build
from wsd_hf.ui.launch import launch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio", "ignore::FutureWarning:gradio")

KELOFT, QUIBIME = "What does the Keloft eat?", "Which things fill the shelves of Quibime?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
DRAFTED = 12


class Stage:
    """The shipped pair, whose answers to some questions wait in the middle.

    Attributes:
        address: of the page.
        blocks: gradio's object of the page.
        pair: that answers.
        holds: for each question that waits, the number of pieces before it does.
        go_on: ends all waiting.
        asked: the requests so far.
        open: number of answers that are read.
    """

    def __init__(self) -> None:
        self.pair = wsd_hf.Pair.tiny()
        self.address, self.blocks = "", None
        self._local = LocalAnswerer(self.pair)
        self.reset()

    def reset(self) -> None:
        self.holds: dict[str, int] = {}
        self.go_on = threading.Event()
        self.asked: list[ChatRequest] = []
        self.open = 0

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Piece | End, None]:
        self.asked.append(request)
        self.open += 1
        question = str(request.messages[-1]["content"])
        number = 0
        try:
            async with aclosing(self._local.answer(request)) as items:
                async for item in items:
                    while number == self.holds.get(question) and not self.go_on.is_set():
                        await asyncio.sleep(0.01)
                    number += 1
                    yield item
        finally:
            self.open -= 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[str]]:
    """Hosts whose addresses this process looks up while the page is made and served."""
    hosts: set[str] = set()
    look_up = socket.getaddrinfo

    def noted(host: Any, *arguments: Any, **options: Any) -> Any:
        hosts.add(host.decode() if isinstance(host, bytes) else str(host))
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        yield hosts


@pytest.fixture(scope="module")
def served(browser: Any, looked_up: set[str]) -> Iterator[Stage]:
    stage = Stage()
    page = build(stage, available(stage.pair), Settings(max_tokens=64), "The shipped pair", [KELOFT, QUIBIME])
    launch(page, wait=False)
    stage.blocks, stage.address = page, page.local_url
    yield stage
    page.close(verbose=False)


@pytest.fixture
def stage(served: Stage) -> Iterator[Stage]:
    served.reset()
    yield served
    served.go_on.set()
    serving_for_tests.wait_until(lambda: served.open == 0)  # the next test counts from there


@contextmanager
def visit(browser: Any, stage: Stage, query: str = "", width: int = WIDE, scheme: str = "light") -> Iterator[Opened]:
    with opened(browser, stage.address + query, width, scheme) as shown:
        wait_for_text(shown.page, "#status", "Ready.")
        yield shown


def ask(page: Any, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")


def wait_for_tokens(page: Any, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('#turns .token').length >= {count}")


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


def answer(page: Any) -> str:
    return page.locator("#turns .turn").last.locator(".answer > .text").inner_text()


def copied(page: Any) -> str:
    return page.evaluate("navigator.clipboard.readText()")


def backgrounds(page: Any) -> list[str]:
    found = page.evaluate(
        "[...document.querySelectorAll('#turns .token')].map(token => getComputedStyle(token).backgroundColor)"
    )
    return ["#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", colour)[:3]) for colour in found]


def test_an_answer_grows_in_the_colours_of_its_writers_and_the_sliders_move_its_switch(browser: Any, stage: Stage) -> None:
    stage.holds[KELOFT] = 5
    with visit(browser, stage) as shown:
        page = shown.page
        page.get_by_role("button", name=KELOFT).click()
        wait_for_tokens(page, 5)
        assert answer(page) == "That is a very good"
        assert set(backgrounds(page)) <= set(PILOT_COLOURS)
        assert len(set(backgrounds(page))) > 1
        wait_for_text(page, ".answer .note", "the pilot is writing")
        wait_for_count(page, ".caret", 1)
        wait_for_count(page, "#panel .curve rect", 5)
        wait_for_text(page, ".verdict", "has not taken over yet, after 5 drafted tokens")
        stage.go_on.set()
        wait_for_text(page, ".answer .note", "12 of 32 tokens by the pilot; there confidence reached 0.8 over 6 tokens")
        assert answer(page) == ANSWER
        looks = backgrounds(page)
        switch = looks.index(BASE_COLOUR)
        assert set(looks[:switch]) <= set(PILOT_COLOURS)
        assert set(looks[switch:]) == {BASE_COLOUR}
        wait_for_count(page, "#panel .curve rect", DRAFTED)
        wait_for_text(page, ".verdict", f"At 0.8 over 6 tokens the base takes over after {DRAFTED} tokens.")
        wait_for_count(page, ".caret", 0)

        page.locator("#turns .token").nth(5).hover()
        trace = page.evaluate("getComputedStyle(document.querySelectorAll('#turns .token')[5], '::after').content")
        output = stage.pair.generate(KELOFT, max_new_tokens=64, output_logits=True)
        draft, logits = output.draft_log_probs[0].tolist(), output.logits[5][0]
        rank = 1 + int((logits > logits[output.sequences[0, 5 - len(output.logits)]]).sum())
        assert f"probability {math.exp(draft[5]):.2f}\nrank {rank}\n" in trace.replace("\\a ", "\n")

        slider = page.get_by_role("slider", name="Threshold")
        slider.focus()
        for _ in range(30):
            page.keyboard.press("ArrowLeft")
        expected = wsd_hf.switch_index(draft, 0.5, 6)
        assert expected is not None
        assert expected < DRAFTED
        wait_for_text(page, ".verdict", f"At 0.5 over 6 tokens the base takes over after {expected} tokens.")
        page.get_by_role("slider", name="Window").focus()
        page.keyboard.press("End")
        wait_for_text(page, ".verdict", "At 0.5 over 32 tokens the base does not take over within this draft of 12 tokens")
        for typed, taken in (("0", "1 token"), ("5", "5 tokens"), ("99", "32 tokens")):
            page.get_by_label("number input for Window").fill(typed)
            wait_for_text(page, ".verdict", f"At 0.5 over {taken} ")
        page.keyboard.press("Tab")
        assert len(stage.asked) == 1
        page.wait_for_function("location.search.includes('threshold=0.5') && location.search.includes('window_size=32')")

        assert {address for address in shown.requests if not address.startswith(stage.address)} == set()
        assert shown.messages == []


def test_by_keys_alone_an_answer_is_asked_for_stopped_and_asked_for_again(browser: Any, stage: Stage) -> None:
    stage.holds[KELOFT] = 4
    with visit(browser, stage) as shown:
        page = shown.page
        page.wait_for_function("document.activeElement.matches('#composer textarea')")
        page.keyboard.type(KELOFT)
        page.keyboard.press("Enter")
        wait_for_tokens(page, 4)
        assert stage.open == 1
        press(page, "Stop")
        wait_for_text(page, ".answer .note", "stopped")
        assert answer(page) == "That is a very"
        wait_until(page, lambda: not stage.open)
        stage.go_on.set()
        press(page, "Retry")
        wait_for_text(page, ".answer .note", "12 of 32 tokens by the pilot")
        assert answer(page) == ANSWER
        wait_for_count(page, ".turn", 1)
        assert [request.messages for request in stage.asked] == [stage.asked[0].messages] * 2
        press(page, "Trace", backwards=True)
        page.locator("details[open] tbody tr").nth(DRAFTED).wait_for()
        ask(page, " ")
        press(page, "New chat")
        page.get_by_role("button", name=KELOFT).wait_for()
        wait_for_count(page, ".turn", 0)
        assert len(stage.asked) == 2


def press(page: Any, name: str, backwards: bool = False) -> None:
    """Goes to a control by Tab once it is shown, and presses Enter there; the focus can be seen on the way."""
    page.locator("button:visible, summary:visible").filter(has_text=name).first.wait_for()
    for _ in range(40):
        page.keyboard.press("Shift+Tab" if backwards else "Tab")
        if (page.evaluate("document.activeElement.innerText") or "").strip() == name:
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            page.keyboard.press("Enter")
            return
    raise AssertionError(f"Tab never comes to {name}")


def test_two_tabs_see_nothing_of_each_other_and_a_closed_one_frees_its_row(browser: Any, stage: Stage) -> None:
    stage.holds |= {KELOFT: 3, QUIBIME: 4}
    with visit(browser, stage) as one:
        with visit(browser, stage, "?methods=base") as other:
            ask(one.page, KELOFT)
            ask(other.page, QUIBIME)
            wait_for_tokens(one.page, 3)
            wait_for_tokens(other.page, 8)
            assert stage.open == 3
            assert answer(one.page) == "That is a"
            assert "Quibime" not in one.page.locator("#turns, #panel").first.inner_text()
            assert "Keloft" not in other.page.locator("#turns, #panel").first.inner_text()
        wait_until(one.page, lambda: stage.open == 1)
        stage.go_on.set()
        wait_for_text(one.page, ".answer .note", "tokens by the pilot")
        assert answer(one.page) == ANSWER
    with visit(browser, stage) as again:
        assert again.page.locator(".turn").count() == 0


def test_a_conversation_is_gone_with_its_tab(browser: Any, stage: Stage) -> None:
    with visit(browser, stage) as shown:
        ask(shown.page, QUIBIME)
        shown.page.get_by_role("button", name="Retry").wait_for()
        found = [thing for thing in gc.get_objects() if isinstance(thing, Conversation) and thing.turns]
        conversation = weakref.ref(next(thing for thing in found if thing.turns[-1].question == QUIBIME))
        del found
    with visit(browser, stage) as other:
        wait_until(other.page, lambda: gc.collect() is not None and conversation() is None)


def test_what_a_lost_conversation_cannot_do_any_more_is_a_message(browser: Any, stage: Stage) -> None:
    with visit(browser, stage) as shown:
        ask(shown.page, KELOFT)
        shown.page.get_by_role("button", name="Retry").wait_for()
        stage.blocks.state_holder.session_data.clear()
        for name in ("Retry", "Save as JSON", "Save as HTML"):
            shown.page.get_by_role("button", name=name).click()
            wait_for_text(shown.page, ".toast-body", "This conversation is gone: its connection was cut. Ask again.")
            shown.page.locator(".toast-close").click()
            shown.page.locator(".toast-body").wait_for(state="detached")
        assert answer(shown.page) == ANSWER
        ask(shown.page, QUIBIME)
        wait_for_text(shown.page, ".answer .text", "Quibime")
        shown.page.get_by_role("button", name="Retry").wait_for()
        assert shown.page.locator(".turn").count() == 1


@pytest.mark.sweep
def test_the_page_opens_while_more_questions_are_open_than_are_answered_at_a_time(browser: Any, stage: Stage) -> None:
    stage.holds[KELOFT] = 0
    with httpx.Client(base_url=stage.address) as strangers, visit(browser, stage, "?window_size=4") as shown:
        events = strangers.get("config").json()["dependencies"]
        asking = next(event["id"] for event in events if event["api_name"] == "ask")
        data = [None, KELOFT, 0.8, 6, [], 8, 0, "", "", False]
        for number in range(REQUESTS + 1):
            call = {"fn_index": asking, "data": data, "session_hash": f"stranger{number}"}
            assert strangers.post("gradio_api/queue/join", json=call).is_success
        wait_until(shown.page, lambda: stage.open == REQUESTS)
        with visit(browser, stage, "?window_size=5") as other:
            assert other.page.get_by_role("slider", name="Window").input_value() == "5"
        assert stage.open == REQUESTS
        stage.go_on.set()
        wait_until(shown.page, lambda: len(stage.asked) == REQUESTS + 1 and not stage.open)


def test_a_page_of_another_site_that_renames_this_machine_gets_nothing(stage: Stage) -> None:
    """Browsers send its name as Host, and take its requests for those of one site."""
    call = {"fn_index": 0, "data": [None, KELOFT, 0.8, 6, [], 8, 0, "", "", False], "session_hash": "stranger"}
    with httpx.Client(base_url=stage.address) as stranger:
        for host in ("rebound.example:7860", "127.0.0.1.rebound.example", ""):
            headers = {"Host": host, "Origin": f"http://{host}"}
            for path in ("", "config", "gradio_api/info", "theme.css"):
                assert stranger.get(path, headers=headers).status_code == 400
            assert stranger.post("gradio_api/queue/join", json=call, headers=headers).status_code == 400
        for host in ("localhost:7860", "LocalHost", "[::1]:7860", "127.0.0.1"):
            assert stranger.get("config", headers={"Host": host}).status_code == 200
    assert stage.asked == []


def test_the_page_takes_no_files_and_no_calls_past_the_queue(stage: Stage) -> None:
    with httpx.Client(base_url=stage.address) as stranger:
        assert stranger.post("gradio_api/upload", files={"files": b"anything"}).status_code == 413
        call = {"fn_index": 0, "data": [None, KELOFT, 0.8, 6, [], 8, 0, "", "", False], "session_hash": "stranger"}
        assert stranger.post("gradio_api/run/predict", json=call).status_code == 404
        assert stranger.get("gradio_api/file=/etc/passwd").status_code == 403
        assert stage.asked == []


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (NARROW, "dark"),
        pytest.param(NARROW, "light", marks=pytest.mark.sweep),
        pytest.param(WIDE, "light", marks=pytest.mark.sweep),
        pytest.param(WIDE, "dark", marks=pytest.mark.sweep),
    ],
)
def test_all_of_the_page_fits_its_window_and_can_be_read(browser: Any, stage: Stage, width: int, scheme: str) -> None:
    with visit(browser, stage, "?methods=base,pilot,blend&threshold=9", width, scheme) as shown:
        page = shown.page
        wait_for_text(page, "body", "threshold=9.0: must be from 0.01 to 1")
        page.get_by_role("button", name="Settings").click()
        ask(page, QUIBIME)
        page.get_by_role("button", name="Retry").wait_for()
        page.get_by_text("Trace").first.click()
        wait_for_count(page, ".answer", 4)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOWING) == []
        texts = page.evaluate(TEXTS)
        assert len(texts) > 40
        faint = {text: round(ratio, 2) for text, *pair in texts if (ratio := contrast(*map(channels, pair))) < 4.5}
        assert faint == {}
        body = channels(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (luminance(body) < 0.1) == (scheme == "dark")


def test_a_visitor_may_ask_for_fewer_tokens_than_the_page_begins_with(stage: Stage) -> None:
    components = httpx.get(f"{stage.address}config").json()["components"]
    (slider,) = (part["props"] for part in components if part["props"].get("label") == "Most tokens in an answer")
    assert (slider["minimum"], slider["maximum"], slider["value"]) == (1, 64, 64)


def test_an_answer_is_copied_saved_and_linked_to(browser: Any, stage: Stage) -> None:
    with visit(browser, stage, "?window_size=4") as shown:
        page = shown.page
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for question in (QUIBIME, KELOFT):
            ask(page, question)
            wait_for_text(page, ".question", question)
            page.get_by_role("button", name="Retry").wait_for()
        page.get_by_role("button", name="Copy", exact=True).click()
        wait_until(page, lambda: copied(page) == answer(page))
        files = {}
        for kind in ("JSON", "HTML"):
            with page.expect_download() as download:
                page.get_by_role("button", name=f"Save as {kind}").click()
            files[download.value.suggested_filename] = download.value.path().read_text("utf-8")
        _, saved = json.loads(files["wsd.json"])["turns"]
        assert (saved["question"], saved["answers"][0]["text"], saved["settings"]["window_size"]) == (KELOFT, answer(page), 4)
        assert answer(page) in re.sub("<.*?>", "", files["wsd.html"])
        page.get_by_role("button", name="Copy link").click()
        wait_until(page, lambda: copied(page).startswith("http"))
        link = copied(page)
    with opened(browser, link) as shown:
        shown.page.wait_for_function(f"document.querySelector('#composer textarea')?.value === {json.dumps(KELOFT)}")
        wait_until(shown.page, lambda: shown.page.get_by_role("slider", name="Window").input_value() == "4")
        assert len(stage.asked) == 2
        assert shown.messages == []


def test_over_plain_http_an_answer_is_copied_too(browser: Any, stage: Stage) -> None:
    with visit(browser, stage) as shown:
        page = shown.page
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as from another machine
        ask(page, KELOFT)
        page.get_by_role("button", name="Copy", exact=True).click()

        def pasted() -> str:
            page.get_by_label("Question").fill("")
            page.get_by_label("Question").press("Control+V")
            return page.get_by_label("Question").input_value()

        wait_until(page, lambda: pasted() == ANSWER)
        assert shown.messages == []


def test_a_failure_is_a_message_on_the_page(browser: Any, stage: Stage, looked_up: set[str]) -> None:
    with visit(browser, stage, "?methods=emulated_fine_tuning") as shown:
        wait_for_text(shown.page, "body", "methods=emulated_fine_tuning: unknown; known are base, pilot, two_way")
        ask(shown.page, "What? " * 600)
        wait_for_text(shown.page, ".fault", "the prompt of the base has")
        shown.page.get_by_role("button", name="Settings").click()
        shown.page.get_by_label("Seed").fill("one")
        shown.page.get_by_role("button", name="Retry").click()
        wait_for_text(shown.page, "body", "seed=one: must be a whole number, or empty")
        assert shown.page.locator(".fault").count() == 1
        assert "Traceback" not in shown.page.content()
        assert looked_up <= {"127.0.0.1", "localhost"}, "the server reports nothing to anyone"
