"""The parts of the page without a browser: answers as they grow, the switch at other settings, pictures, files."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import socket
import threading
from contextlib import aclosing
from dataclasses import astuple
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import wsd_hf
from serving_for_tests import Scripted, get
from wsd_hf import Pair, WSDConfig, WSDValueError
from wsd_hf.cli import app
from wsd_hf.serving.local import LocalAnswerer
from wsd_hf.serving.requests import End, Piece
from wsd_hf.text.streaming import Likelihood
from wsd_hf.tiny import FOLDER
from wsd_hf.ui.answers import Answer, Conversation, Turn
from wsd_hf.ui.curve import curve
from wsd_hf.ui.download import as_html, as_json
from wsd_hf.ui.replay import recording, verdict
from wsd_hf.ui.settings import HEADINGS, Settings, available
from wsd_hf.ui.view import conversation, note, panel, status

DOCS = Path(__file__).parents[1] / "docs" / "ui.md"
KELOFT = "What does the Keloft eat?"
NASTY = "</p><script>alert(1)</script>\x1b[2J\u202e"
CONFIDENT = End("stop", prompt_tokens=3, pilot_tokens=3, base_tokens=1, switch_index=3, switch_reason="confident")
DONE = End("stop", prompt_tokens=3, pilot_tokens=3, base_tokens=1, switch_index=-1, switch_reason="draft_ended")
WRITTEN = [
    Piece("Yes", "pilot", (Likelihood(math.log(0.1), 17),)),
    Piece(", it", "pilot", (Likelihood(math.log(0.5), 2),)),
    Piece(" is", "pilot", (Likelihood(math.log(0.98), 1),)),
    Piece(" so.", "base", (Likelihood(math.log(0.75), 1), Likelihood(math.log(0.5), 3))),
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


def grown(answerer: Any, settings: Settings, *questions: str) -> Conversation:
    """A conversation after some questions."""
    talk = Conversation(settings.threshold, settings.window_size)

    async def ask() -> None:
        for question in questions:
            async with aclosing(talk.ask(question, settings, answerer)) as turns:
                async for _ in turns:
                    pass

    asyncio.run(ask())
    return talk


def turn(*items: Any, settings: Settings = Settings(window_size=1), question: str = "Is it so?") -> Turn:  # noqa: B008
    """A turn whose only answer is given."""
    return grown(Scripted(*items), settings, question).turns[0]


def texts(html: str) -> str:
    return "".join(ElementTree.fromstring(f"<x>{html}</x>").itertext())


# Answers


@pytest.mark.parametrize("pilot", ["pilot", "pilot_other_vocab"])
def test_each_method_answers_as_it_does_by_itself(pilot: str) -> None:
    pair = Pair.tiny(pilot)
    talk = grown(LocalAnswerer(pair), Settings(methods=("base", "pilot", "nudging"), max_tokens=48), KELOFT)
    answers = {answer.method: answer for answer in talk.turns[0].answers}
    assert list(answers) == ["base", "pilot", "wsd", "nudging"]
    for method in ("wsd", "nudging"):
        assert answers[method].text == pair.answers(pair.generate(KELOFT, method, max_new_tokens=48))[0]
    inputs = pair.inputs(KELOFT)
    for method, model, tokenizer, ids in (
        ("base", pair.base, pair.tokenizer, inputs["input_ids"]),
        ("pilot", pair.pilot, pair.pilot_tokenizer, inputs["assistant_input_ids"]),
    ):
        response = model.generate(ids, max_new_tokens=48, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
        assert answers[method].text == tokenizer.decode(response, skip_special_tokens=True).split("\n\n[User]")[0].strip()
    output = pair.generate(KELOFT, max_new_tokens=48)
    assert answers["wsd"].draft == output.draft_log_probs[0].tolist()
    plain = pair.base.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=48)
    prompt = inputs["input_ids"].shape[1]
    for method, sequence in (("wsd", output.sequences), ("base", plain)):
        found = [likelihood for piece in answers[method].pieces for likelihood in piece.likelihoods]
        end = prompt + len(found)
        with torch.no_grad():
            logits = pair.base(sequence[:, :end]).logits[0, prompt - 1 : -1]
        of_tokens = logits.gather(1, sequence[0, prompt:end, None])
        assert [one.rank for one in found] == (1 + (logits > of_tokens).sum(dim=1)).tolist()
        log_probs = logits.log_softmax(dim=-1).gather(1, sequence[0, prompt:end, None])
        assert [one.log_prob for one in found] == pytest.approx(log_probs.flatten().tolist(), abs=1e-4)
        tokens = answers[method].end.pilot_tokens + answers[method].end.base_tokens  # type: ignore[union-attr]
        assert len(found) == tokens > 20
        assert ({one.rank for one in found} == {1}) == (method == "base")
    assert answers["wsd"].end is not None
    assert answers["wsd"].end.switch_index == int(output.switch_index[0])


def test_every_method_has_its_own_history() -> None:
    answerer = Scripted(*WRITTEN, CONFIDENT)
    talk = grown(answerer, Settings(methods=("base",), system="Be brief."), "One?", "Two?")
    by_both, by_base = (request.messages for request in answerer.requests[2:])
    assert [message["role"] for message in by_both] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in by_base] == ["Be brief.", "One?", "Yes, it is so.", "Two?"]
    talk.turns[0].answers = [answer for answer in talk.turns[0].answers if answer.method == "wsd"]
    assert talk.messages("base")[1]["content"] == "Yes, it is so.", "a method that was not asked has the answer of the other"


def test_a_question_that_failed_is_forgotten() -> None:
    failing, answerer = Scripted(WSDValueError("too long")), Scripted(*WRITTEN, CONFIDENT)
    talk = Conversation(0.8, 6)

    async def ask() -> None:
        for question, by in (("Long?", failing), ("One?", answerer), ("Two?", answerer)):
            async with aclosing(talk.ask(question, Settings(), by)) as turns:
                async for _ in turns:
                    pass

    asyncio.run(ask())
    assert [message["content"] for message in answerer.requests[-1].messages] == ["One?", "Yes, it is so.", "Two?"]
    assert talk.retract() == "Two?"
    assert [turn.question for turn in talk.turns] == ["Long?", "One?"]


def test_a_stopped_answer_stays_and_its_row_is_freed() -> None:
    waits = threading.Event()
    answerer = Scripted(*WRITTEN[:2], waits, *WRITTEN[2:], CONFIDENT)
    talk = Conversation(0.8, 6)

    async def stop() -> None:
        async with aclosing(talk.ask("Is it so?", Settings(), answerer)) as turns:
            async for grown in turns:
                assert talk.busy != grown.answers[0].stopped
                if len(grown.answers[0].pieces) == 2:
                    talk.stop()

    asyncio.run(stop())
    (answer,) = talk.turns[0].answers
    assert (answer.text, answer.stopped, answer.over, answerer.closed) == ("Yes, it", True, True, 1)
    assert not talk.busy
    assert note(answer, Settings()) == "stopped"


def test_a_reader_that_leaves_frees_the_row() -> None:
    answerer = Scripted(*WRITTEN[:1], threading.Event())

    async def leave() -> None:
        turns = Conversation(0.8, 6).ask("Is it so?", Settings(methods=("base",)), answerer)
        await anext(turns)
        await anext(turns)
        await turns.aclose()

    asyncio.run(leave())
    assert answerer.closed == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WSDValueError("the prompt is too long"), "the prompt is too long"),
        (RuntimeError("/models/secret.bin"), "The models failed (RuntimeError); the log of the server has more."),
    ],
)
def test_a_failure_is_a_message_beside_the_other_answers(error: Exception, message: str, caplog: Any) -> None:
    found = turn(*WRITTEN[:2], error)
    (answer,) = found.answers
    assert answer.error == message
    page = conversation([found])
    assert message in texts(page)
    assert "Traceback" not in page
    assert "secret" not in page
    assert ("secret" in caplog.text) == isinstance(error, RuntimeError)
    assert message in status(found)
    assert "Yes, it" in texts(page)


def test_visitors_see_nothing_of_each_other(pair: Pair) -> None:
    questions = {KELOFT: "acorns", "Which things fill the shelves of Quibime?": "keys"}
    answerer = LocalAnswerer(pair)
    talks = [Conversation(0.8, 6) for _ in range(4)]

    async def ask(talk: Conversation, question: str) -> None:
        async with aclosing(talk.ask(question, Settings(), answerer)) as turns:
            async for _ in turns:
                pass

    async def together() -> None:
        await asyncio.gather(*(ask(talk, list(questions)[number % 2]) for number, talk in enumerate(talks)))

    asyncio.run(together())
    for number, talk in enumerate(talks):
        own, other = (list(questions.values())[(number + add) % 2] for add in (0, 1))
        assert own in talk.turns[0].answers[0].text
        assert other not in talk.turns[0].answers[0].text


# Handlers of the page


def handlers(answerer: Any, most_tokens: int = 256) -> Any:
    pytest.importorskip("gradio")
    from wsd_hf.ui.app import Handlers, Parts

    return Handlers(answerer, Parts(*range(9), []), most_tokens, "A pair")  # type: ignore[arg-type]


def test_of_two_questions_in_the_same_moment_one_is_answered() -> None:
    answerer, talk = Scripted(*WRITTEN, CONFIDENT), Conversation(0.8, 6)
    page = handlers(answerer)

    async def ask_twice() -> None:
        asked = [page.ask(talk, question, *astuple(Settings())) for question in ("One?", "Two?")]
        for changes in asked:
            await anext(changes)
        for changes in asked:
            async for _ in changes:
                pass

    asyncio.run(ask_twice())
    assert [found.question for found in talk.turns] == ["One?"]
    assert [request.messages[-1]["content"] for request in answerer.requests] == ["One?"]


def test_a_visitor_asks_for_no_more_tokens_than_the_page_allows() -> None:
    answerer, talk = Scripted(*WRITTEN, CONFIDENT), Conversation(0.8, 6)
    page = handlers(answerer, most_tokens=64)

    async def ask(most: int) -> None:
        async for _ in page.ask(talk, KELOFT, *astuple(Settings(max_tokens=most))):
            pass

    with pytest.raises(Exception, match="max_tokens=65: must be from 1 to 64"):  # gradio's, which becomes a message
        asyncio.run(ask(65))
    assert not talk.turns
    asyncio.run(ask(64))
    assert [request.max_tokens for request in answerer.requests] == [64]


def test_what_reads_a_growing_draft_runs_where_it_grows() -> None:
    page = handlers(Scripted())
    for handler in (page.ask, page.look, page.stop, page.clear, page.json_file, page.html_file):
        in_the_loop = inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler)
        assert in_the_loop, "gradio runs plain functions in threads"


# The switch at other settings, against generate


def test_the_switch_of_a_recorded_draft_is_that_of_generate(pair: Pair) -> None:
    talk = grown(LocalAnswerer(pair), Settings(methods=("pilot",), max_tokens=48), KELOFT)
    found = recording(talk.turns[0])
    assert found.whole
    for threshold, window in ((0.3, 1), (0.5, 6), (0.8, 6), (0.95, 8), (1.0, 32)):
        output = pair.generate(KELOFT, max_new_tokens=48, wsd_threshold=threshold, wsd_window_size=window)
        index = int(output.switch_index[0])
        assert found.switch(threshold, window) == (index if index > 0 else None)
        after = f"takes over after {index} token" if index > 0 else "never takes over"
        assert after in verdict(found, threshold, window)


def test_a_draft_that_was_cut_by_its_switch_does_not_show_a_later_one() -> None:
    found = recording(turn(*WRITTEN, CONFIDENT))
    assert verdict(found, 0.9, 1) == "At 0.9 over 1 token the base takes over after 3 tokens."
    assert verdict(found, 0.4, 1) == "At 0.4 over 1 token the base takes over after 2 tokens."
    assert verdict(found, 0.01, 1) == "At 0.01 over 1 token the base takes over after 1 token."
    assert "not take over within this draft of 3 tokens; Retry" in verdict(found, 0.99, 1)
    assert "never takes over: the draft of 3 tokens is kept whole" in verdict(recording(turn(*WRITTEN, DONE)), 0.99, 1)
    growing = Turn("", Settings(), [Answer("wsd", WRITTEN[:2])])
    assert "has not taken over yet, after 2 drafted tokens" in verdict(recording(growing), 0.99, 1)


def test_sampled_drafts_are_not_taken_for_each_other() -> None:
    longer = Answer("pilot", [*WRITTEN[:3], *WRITTEN[:3]], DONE)
    for temperature, length in ((0.0, 6), (0.7, 3)):
        settings = Settings(methods=("pilot",), temperature=temperature)
        found = recording(Turn("", settings, [longer, Answer("wsd", WRITTEN, CONFIDENT)]))
        assert len(found.log_probs) == length


def test_drafts_of_different_conversations_are_not_taken_for_each_other(pair: Pair) -> None:
    first, second = grown(LocalAnswerer(pair), Settings(methods=("pilot",), max_tokens=48), KELOFT, KELOFT).turns
    assert recording(first).answer is first.answer("pilot")
    (answer,) = (answer.text for answer in first.answers if answer.method == "wsd")
    chat = [{"role": "user", "content": KELOFT}, {"role": "assistant", "content": answer}, {"role": "user", "content": KELOFT}]
    output = pair.generate(chat, max_new_tokens=48)
    assert recording(second).log_probs == output.draft_log_probs[0].tolist()


# Settings and the address


def test_the_address_gives_the_settings_back() -> None:
    settings = Settings(0.65, 3, ("base", "two_way"), 256, 0.5, 7, "Sé breve, 好", True)
    assert Settings().with_query(settings.texts()) == (settings, [])
    assert settings.with_query({}) == (settings, [])
    assert settings.with_query(Settings(max_tokens=99).texts()) == (Settings(max_tokens=99), [])


def test_an_address_asks_for_no_more_tokens_than_the_page_allows() -> None:
    settings, (fault,) = Settings(max_tokens=99).with_query({"max_tokens": "100", "window_size": "4"})
    assert settings == Settings(max_tokens=99, window_size=4)
    assert fault == "max_tokens=100: must be from 1 to 99; the page's own is used"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", "2"),
        ("threshold", "nan"),
        ("threshold", "a"),
        ("window_size", "1.5"),
        ("max_tokens", "0"),
        ("methods", "best"),
        ("methods", "wsd"),
        ("slow", "yes"),
        ("seed", "-1"),
    ],
)
def test_a_bad_address_is_reported_and_the_rest_of_it_used(name: str, value: str) -> None:
    settings, faults = Settings().with_query({name: value, "temperature": "0.25", "unknown": "1"})
    assert settings == Settings(temperature=0.25)
    assert len(faults) == 1
    assert f"{name}=" in faults[0]


def test_an_address_names_only_what_the_pair_can_do(pair: Pair) -> None:
    settings, (fault,) = Settings().with_query({"methods": "base,emulated_fine_tuning"}, available(pair))
    assert settings == Settings()
    assert "methods=emulated_fine_tuning: unknown; known are base, pilot, two_way, nudging, product, ensemble, blend" in fault
    _, (fault,) = Settings().with_query({"seed": "4294967296"})
    assert "seed=4294967296: must be from 0 to 4294967295" in fault


def test_a_pair_is_asked_for_what_it_can_do(pair: Pair) -> None:
    assert available(pair) == ["base", "pilot", "two_way", "nudging", "product", "ensemble", "blend"]
    with_reference = Pair.tiny(reference=FOLDER / "pilot")
    assert set(available(with_reference)) - set(available(pair)) == {"emulated_fine_tuning"}
    for method in [*available(with_reference), "wsd"]:
        assert method in HEADINGS
        Settings(0.5, 3).strategy(method)
    assert Settings(0.5, 3).strategy("wsd") == WSDConfig(threshold=0.5, window_size=3)


# What is shown


def test_tokens_have_the_colours_of_their_writers_and_of_the_bases_opinion() -> None:
    page = ElementTree.fromstring(f"<x>{conversation([turn(*WRITTEN, CONFIDENT)])}</x>")
    tokens = [(token.text, token.get("class")) for token in page.iter("span") if token.get("data-trace")]
    looks = ["token pilot-0", "token pilot-2", "token pilot-4", "token base-0"]
    assert tokens == list(zip(["Yes", ", it", " is", " so."], looks, strict=True))
    traces = [token.get("data-trace") for token in page.iter("span") if token.get("data-trace")]
    assert traces[1:] == [
        "pilot\nprobability 0.50\nrank 2\nconfidence 0.50",
        "pilot\nprobability 0.98\nrank 1\nconfidence 0.98",
        "base\nprobability 0.38\nrank 1, 3",
    ]
    lines = [[cell.text or "".join(cell.itertext()) for cell in line] for line in page.findall(".//tbody/tr")]
    assert lines[1] == ["2", ", it", "pilot", "0.500", "2", "0.500"]
    assert lines[3] == ["4", " so.", "base", "0.375", "1, 3", ""]
    (words,) = (line.text for line in page.iter("p") if line.get("class") == "note")
    assert words == "3 of 4 tokens by the pilot; there confidence reached 0.8 over 1 token"


def test_a_token_of_several_models_has_a_neutral_look() -> None:
    page = conversation([turn(Piece("Yes", None), End("length", 3, 0, 1, -1, None))])
    assert 'class="token both-0" data-trace="both models"' in page
    assert "1 token, cut at the limit" in texts(page)


def test_a_character_of_several_drafted_tokens_has_the_ranks_of_all() -> None:
    page = conversation([turn(Piece("é", "pilot", (Likelihood(math.log(0.8), 2), Likelihood(math.log(0.3), 31))), DONE)])
    assert "probability 0.24&#10;rank 2, 31&#10;confidence 0.30" in page
    assert "<td>2, 31</td>" in page


def test_an_end_that_shows_no_text_is_no_part_of_the_page() -> None:
    end = Piece("", "base", (Likelihood(math.log(0.2), 3),))
    assert conversation([turn(*WRITTEN, end, CONFIDENT)]) == conversation([turn(*WRITTEN, CONFIDENT)])
    cut = Piece("", "pilot", (Likelihood(math.log(0.9), 1),))
    found = turn(*WRITTEN[:2], cut, Piece("\N{SNOWMAN}", "base"), CONFIDENT)
    page = ElementTree.fromstring(f"<x>{conversation([found])}</x>")
    lines = [["".join(cell.itertext()) for cell in line] for line in page.findall(".//tbody/tr")]
    assert lines[2:] == [["3", "", "pilot", "0.900", "1", "0.900"], ["4", "\N{SNOWMAN}", "base", "", "", ""]]


def test_a_window_covers_tokens_of_one_draft_only() -> None:
    page = conversation([turn(*WRITTEN, *WRITTEN, CONFIDENT, settings=Settings(window_size=2))])
    found = re.findall(r"confidence ([\d.]+)", page)
    assert found == [f"{(0.1 * 0.5) ** 0.5:.2f}", f"{(0.5 * 0.98) ** 0.5:.2f}"] * 2


def test_confidence_covers_the_window_of_the_settings() -> None:
    page = conversation([turn(*WRITTEN, CONFIDENT, settings=Settings(window_size=2))])
    found = re.findall(r"confidence ([\d.]+)", page)
    assert found[:2] == [f"{(0.1 * 0.5) ** 0.5:.2f}", f"{(0.5 * 0.98) ** 0.5:.2f}"]


def test_hostile_texts_are_only_shown() -> None:
    found = turn(Piece(NASTY, "pilot", (Likelihood(-0.1, 1),)), Piece(NASTY, "base"), WSDValueError(NASTY), question=NASTY)
    for html in (conversation([found]), panel(found, 0.8, 1), as_html([found], 0.8, 1, NASTY).partition("\n")[2]):
        tree = ElementTree.fromstring(f"<x>{html}</x>")
        assert not list(tree.iter("script"))
        assert "</p><script>alert(1)</script>␛[2J\\u202e" in "".join(tree.itertext())
    assert "\x1b" not in as_html([found], 0.8, 1, NASTY)


def test_the_curve_is_to_scale() -> None:
    log_probs = [math.log(chance) for chance in (0.25, 0.5, 1.0)]
    tree = ElementTree.fromstring(curve(log_probs, [math.nan, 0.4, 0.7], 0.6, 2, 3, "words & words"))
    bars = [(float(bar.get("y", "")), float(bar.get("height", ""))) for bar in tree.iter("rect")]
    heights = [height for _, height in bars]
    assert heights[0] / heights[2] == pytest.approx(0.25, abs=0.01)
    assert heights[1] / heights[2] == pytest.approx(0.5, abs=0.01)
    bottom, whole = sum(bars[2]), heights[2]
    line = next(line for line in tree.iter("line") if line.get("class") == "threshold")
    assert (bottom - float(line.get("y1", ""))) / whole == pytest.approx(0.6, abs=0.01)
    dot = next(tree.iter("circle"))
    assert (bottom - float(dot.get("cy", ""))) / whole == pytest.approx(0.7, abs=0.01)
    points = next(tree.iter("polyline")).get("points", "").split()
    assert len(points) == 2
    assert points[-1] == f"{dot.get('cx')},{dot.get('cy')}"
    assert [bar.get("class") for bar in tree.iter("rect")] == ["drafted", "marked", "marked"]
    assert tree.get("aria-label") == "words & words"


@pytest.mark.parametrize("length", [0, 1, 16, 17, 99, 100, 101, 512, 4096])
def test_a_draft_of_any_length_has_a_curve_within_its_frame(length: int) -> None:
    tree = ElementTree.fromstring(curve([-0.5] * length, [0.6] * length, 0.8, 6, None, "words"))
    _, _, width, _ = map(float, tree.get("viewBox", "").split())
    assert all(float(bar.get("x", "")) + float(bar.get("width", "")) <= width for bar in tree.iter("rect"))
    numbers = [int(text.text.split()[0]) for text in list(tree.iter("text"))[3:-1] if text.text]
    assert numbers == sorted(numbers)
    assert len(numbers) <= 7
    assert numbers[-1] >= max(length, 16)


def test_the_draft_has_a_bar_where_the_base_takes_over() -> None:
    found = turn(*WRITTEN, CONFIDENT)
    for threshold, kept, rest in ((0.9, "Yes, it is|", ""), (0.4, "Yes, it|", " is"), (0.999, "Yes, it is", "")):
        tree = ElementTree.fromstring(f"<x>{panel(found, threshold, 1)}</x>")
        draft = tree.find(".//p[@class='draft text']")
        assert draft is not None
        shown = ["|" if part.get("role") == "img" else "".join(part.itertext()) for part in draft]
        assert "".join(shown) == kept + rest
    assert "Ask something" in panel(None, 0.8, 6)
    assert "There is no draft yet." in panel(Turn("", Settings(), [Answer("wsd")]), 0.8, 6)


def test_of_a_long_draft_the_places_around_the_switch_are_shown() -> None:
    pieces = [Piece(f" {number}", "pilot", (Likelihood(math.log(0.9 if number == 30 else 0.1), 1),)) for number in range(1, 61)]
    found = turn(*pieces, DONE)
    draft = ElementTree.fromstring(f"<x>{panel(found, 0.8, 1)}</x>").find(".//p[@class='draft text']")
    assert draft is not None
    numbers = [word for word in "".join(draft.itertext()).split() if word != "…"]
    assert numbers == [str(number) for number in range(15, 39)]
    assert "confidence reached 0.90 at most" in texts(panel(found, 0.95, 1))


# Files


def test_a_saved_file_has_what_the_switch_is_found_with() -> None:
    found = turn(*WRITTEN, CONFIDENT, question="Is it só?")
    saved = json.loads(as_json([found], "A base with the pilot <A>"))
    assert (saved["wsd_hf"], saved["models"]) == (wsd_hf.__version__, "A base with the pilot <A>")
    (data,) = saved["turns"]
    (answer,) = data["answers"]
    assert (data["question"], answer["text"], answer["end"]["switch_index"]) == ("Is it só?", "Yes, it is so.", 3)
    draft = [one["log_prob"] for piece in answer["pieces"] for one in piece["likelihoods"] if piece["writer"] == "pilot"]
    assert wsd_hf.switch_index(draft, data["settings"]["threshold"], data["settings"]["window_size"]) == 3
    assert [one["rank"] for piece in answer["pieces"] for one in piece["likelihoods"]] == [17, 2, 1, 1, 3]


def test_every_field_of_a_saved_file_is_documented() -> None:
    _, _, rest = DOCS.read_text("utf-8").partition("## The saved JSON")
    documented = set(re.findall(r"`(\w+)`", rest.partition("\n## ")[0]))

    def fields(data: Any) -> set[str]:
        if isinstance(data, list):
            return set().union(*map(fields, data))
        return set(data).union(*map(fields, data.values())) if isinstance(data, dict) else set()

    assert fields(json.loads(as_json([turn(*WRITTEN, CONFIDENT)], "A pair"))) <= documented


def test_a_saved_page_names_the_models_and_loads_nothing() -> None:
    page = as_html([turn(*WRITTEN, CONFIDENT)], 0.8, 1, "Base & pilot")
    assert "<p>Base &amp; pilot</p>" in page
    ElementTree.fromstring(page.partition("\n")[2])
    assert "script-src" not in page
    assert not re.search(r"(src|href)=|url\(|https?:", page)


# The command


def test_what_cannot_be_served_is_refused_before_models_are_loaded() -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, problem in (
            (["--port", port], f"--host 127.0.0.1 --port {port}: Address already in use"),
            (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: "),
            (["--max-new-tokens", "5000"], "4096"),
        ):
            result = CliRunner().invoke(app, ["ui", "--base", "no/such", "--pilot", "no/such", *words])
            assert result.exit_code == 2
            assert problem in result.output


def test_without_gradio_the_command_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ui"])
    assert result.exit_code == 2
    assert 'pip install "wsd_hf[ui]"' in result.output


def test_the_command_serves_this_machine_only_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **given: calls.append(given))
    assert CliRunner().invoke(app, ["ui"]).exit_code == 0
    assert CliRunner().invoke(app, ["ui", "--host", "0.0.0.0", "--port", "8000", "--share"]).exit_code == 0
    first, second = ([call[name] for name in ("server_name", "server_port", "share")] for call in calls)
    assert first == ["127.0.0.1", None, False]
    assert second == ["0.0.0.0", 8000, True]
    assert CliRunner().invoke(app, ["ui", "--base", "there/is/none"]).exit_code == 2


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"share": True}])
def test_a_page_for_other_machines_may_have_any_name(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio")
    from wsd_hf.ui.launch import launch

    with gradio.Blocks(analytics_enabled=False) as page:
        launched = gradio.Blocks.launch
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched(page, **{**options, "share": False}))
    launch(page, wait=False, **options)
    try:
        assert get(f"{page.local_url}config", headers={"Host": "a.example"}).status_code == 200
    finally:
        page.close()
