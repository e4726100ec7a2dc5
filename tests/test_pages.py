"""Pages as they are read: in a browser, narrow and wide, light and dark, by keyboard; and the colours of their stylesheet."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import wsd_hf
from browser import NARROW, OVERFLOWING, TEXTS, WIDE, chromium, opened, wait_until
from time_limit import HANG
from wsd_hf.cli import app
from wsd_hf.diagnosis.diagnosis import Diagnosis, diagnose
from wsd_hf.diagnosis.forwards import Prediction
from wsd_hf.diagnosis.page import page
from wsd_hf.pages.document import box, document, table
from wsd_hf.pages.style import STYLE
from wsd_hf.tiny import demo_questions

QUESTIONS = demo_questions()[:4]
METHODS = ["base", "pilot", "nudging", "wsd"]

WINDOWS = [pytest.param(width, scheme, id=f"{width}-{scheme}") for width in (NARROW, WIDE) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison on the shipped pair."""
    folder = tmp_path_factory.mktemp("compare")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), "utf-8")
    options = {"prompts": prompts, "strategies": ",".join(METHODS), "max-new-tokens": 48, "judge": "tiny_world"}
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["compare", "--out", str(folder / "out"), *given])
    assert result.exit_code == 0, result.stderr
    return folder / "out" / "responses.html"


@pytest.fixture(scope="module")
def pair() -> wsd_hf.Pair:
    return wsd_hf.Pair.tiny()


@pytest.fixture(scope="module")
def diagnosis(pair: wsd_hf.Pair) -> Diagnosis:
    return diagnose(pair, [question["messages"] for question in demo_questions()[:6]], max_draft_tokens=32)


@pytest.fixture(scope="module")
def diagnosed(diagnosis: Diagnosis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a diagnosis of the shipped pair."""
    file = tmp_path_factory.mktemp("diagnose") / "diagnosis.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    return file


PAGES = ["responses", "diagnosed"]


# Every page


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_and_every_text_can_be_read(browser, request, name, width, scheme):
    with opened(browser, request.getfixturevalue(name), width, scheme) as shown:
        assert shown.page.evaluate("document.documentElement.scrollWidth") == width
        assert shown.page.evaluate(OVERFLOWING) == []
        texts = shown.page.evaluate(TEXTS)
        assert len(texts) > 20
        faint = {text: round(ratio, 2) for text, *pair in texts if (ratio := contrast(*map(channels, pair))) < 4.5}
        assert faint == {}
        dark = luminance(channels(shown.page.evaluate("getComputedStyle(document.body).backgroundColor"))) < 0.1
        assert dark == (scheme == "dark")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing_and_complains_of_nothing(browser, request, name):
    file = request.getfixturevalue(name)
    with opened(browser, file) as shown:
        assert shown.requests == [file.as_uri()]
        assert shown.messages == []
        shown.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/picture.png'}))")
        shown.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
        )
        wait_until(shown.page, lambda: len(shown.messages) == 2)
        assert [message.count("Content Security Policy") for message in shown.messages] == [1, 1]
        assert shown.page.title() != "1"


@pytest.mark.parametrize("name", PAGES)
def test_all_that_scrolls_is_reached_and_moved_by_keys(browser, request, name):
    with opened(browser, request.getfixturevalue(name), NARROW) as shown:
        wide = "[...document.querySelectorAll('[role=region]')].filter(box => box.scrollWidth > box.clientWidth)"
        boxes = shown.page.evaluate(f"{wide}.length")
        assert boxes
        reached: set[int] = set()
        for _ in range(50):
            if len(reached) == boxes:
                break
            shown.page.keyboard.press("Tab")
            number = shown.page.evaluate(f"{wide}.indexOf(document.activeElement)")
            if number >= 0 and number not in reached:
                reached.add(number)
                assert shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert reached == set(range(boxes))
        moved = f"new Promise(done => {{ box.onscroll = () => done(true); setTimeout(done, {1000 * HANG}, false); }})"
        shown.page.evaluate(f"const box = {wide}[0]; box.focus(); window.moved = {moved}; null")
        shown.page.keyboard.press("ArrowRight")
        assert shown.page.evaluate("window.moved")


# The page of a comparison


def visible_prompts(shown: Any) -> list[str]:
    return shown.page.locator("article:visible header p").all_inner_texts()


def test_search_leaves_the_prompts_that_hold_the_text(browser, responses):
    asked = [question["messages"][-1]["content"] for question in QUESTIONS]
    with opened(browser, responses) as shown:
        assert visible_prompts(shown) == asked
        assert shown.page.inner_text("#found") == "4 of 4 prompts"
        shown.page.fill("#search", asked[2][4:].upper())
        assert visible_prompts(shown) == [asked[2]]
        assert shown.page.inner_text("#found") == "1 of 4 prompts"
        shown.page.fill("#search", "<no such text>")
        assert visible_prompts(shown) == []
        answers = shown.page.locator("[data-method='1'] p")
        shown.page.fill("#search", "")
        texts = answers.all_inner_texts()
        word = next(word for word in " ".join(texts).split() if sum(word in text for text in texts) == 1)
        shown.page.fill("#search", word)
        assert asked[next(number for number, text in enumerate(texts) if word in text)] in visible_prompts(shown)


def test_the_kind_of_a_prompt_is_shown_and_found(browser, responses):
    with opened(browser, responses) as shown:
        assert shown.page.locator(".label").all_inner_texts() == [question["kind"] for question in QUESTIONS]
        shown.page.fill("#search", "harmful")
        assert len(visible_prompts(shown)) == sum(question["kind"] == "harmful" for question in QUESTIONS)


def test_methods_are_chosen_by_keys_and_an_answer_that_is_hidden_is_not_found(browser, responses):
    with opened(browser, responses) as shown:
        assert shown.page.locator("article >> nth=0").locator("h4:visible").all_inner_texts() == METHODS
        shown.page.focus("#search")
        shown.page.keyboard.press("Tab")
        shown.page.keyboard.press("Space")
        assert shown.page.locator("article >> nth=0").locator("h4:visible").all_inner_texts() == METHODS[1:]
        shown.page.fill("#search", "tokens of")  # in the traces of nudging and WSD
        assert len(visible_prompts(shown)) == len(QUESTIONS)
        for number in (2, 3):
            shown.page.locator("#methods input").nth(number).uncheck()
        assert visible_prompts(shown) == []


def test_the_answers_of_a_prompt_are_side_by_side_in_their_writers_colours(browser, responses):
    with opened(browser, responses) as shown:
        boxes = [section.bounding_box() for section in shown.page.locator("article >> nth=0").locator("section").all()]
        assert len({box["y"] for box in boxes}) == 1
        assert all(left["x"] + left["width"] <= right["x"] + 1 for left, right in itertools.pairwise(boxes))
        tokens = shown.page.locator("[data-method='3'] span")
        coloured = tokens.evaluate_all("all => all.map(token => [token.title, getComputedStyle(token).backgroundColor])")
        writers: dict[str, set[str]] = {}
        for title, colour in coloured:
            writers.setdefault(title.split(";")[0], set()).add(colour)
        assert set(writers) == {"pilot", "base"}
        assert not writers["pilot"] & writers["base"]


# The page of a diagnosis

MARKS = """svg => {
  const wide = svg.getBoundingClientRect().width, colour = name => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const writers = Object.fromEntries(["pilot", "base"].map(name => [colour(name), name]));
  return [...svg.querySelectorAll("path, use")].filter(mark => !mark.closest("defs")).flatMap(mark => {
    const {fill, stroke} = getComputedStyle(mark), {width, height, bottom, x} = mark.getBoundingClientRect();
    const kind = fill === "none" ? "curve" : mark.matches("use") && width * 20 < wide ? "dot" : "area";
    const writer = writers[kind === "curve" ? stroke : fill];
    return writer ? [{kind, writer, width: width / wide, height, bottom, x}] : [];
  });
}"""
"""The marks of a plot that have the colour of a writer, with their size; widths are shares of the plot's."""


def marks(shown: Any, figure: int, kind: str, writer: str) -> list[dict[str, Any]]:
    found = shown.page.locator("figure svg").nth(figure).evaluate(MARKS)
    return [mark for mark in found if (mark["kind"], mark["writer"]) == (kind, writer) and mark["height"] > 0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_every_plot_is_drawn_in_its_writers_colours(browser, diagnosed, width, scheme):
    pilot = [int(digits, 16) for digits in re.findall("[0-9a-f]{2}", schemes()[scheme]["pilot"])]
    with opened(browser, diagnosed, width, scheme) as shown:
        assert shown.page.locator("figure svg").count() == 3
        assert shown.page.locator("figure table").count() == 1
        for figure in range(3):
            box = shown.page.locator("figure svg").nth(figure).bounding_box()
            assert width * 0.4 < box["width"] <= width
            assert box["height"] > 150
            near = [
                pixels
                for pixels, colour in shown.colours(f"figure:nth-of-type({figure + 1}) svg")
                if all(abs(value - wanted) < 40 for value, wanted in zip(colour, pilot, strict=True))
            ]
            assert sum(near) > 100


def test_the_curves_of_both_writers_go_across_the_plot(browser, diagnosed):
    with opened(browser, diagnosed) as shown:
        for writer in ("pilot", "base"):
            curves = marks(shown, 0, "curve", writer)
            assert len([curve for curve in curves if curve["width"] > 0.4]) == 2  # with repeats and without
            assert len(marks(shown, 0, "area", writer)) == 2  # their standard errors


def test_the_bars_are_as_high_as_there_are_drafts(browser, diagnosed, diagnosis):
    counts = Counter(
        min(int(max(confidences[5:], default=0) * 20), 19)
        for confidences in (wsd_hf.confidence(draft.log_probs, 6).tolist() for draft in diagnosis.drafts)
    )
    with opened(browser, diagnosed) as shown:
        bars = sorted(marks(shown, 1, "area", "pilot"), key=lambda bar: bar["x"])
    assert len({round(bar["bottom"]) for bar in bars}) == 1
    unit = sum(bar["height"] for bar in bars) / len(diagnosis.drafts)
    assert [round(bar["height"] / unit, 1) for bar in bars] == [counts[place] for place in sorted(counts)]


def test_some_drafts_have_a_curve_and_a_dot_where_the_base_takes_over(browser, diagnosed):
    with opened(browser, diagnosed) as shown:
        curves = [curve for curve in marks(shown, 2, "curve", "pilot") if curve["width"] > 0.1]
        assert 3 <= len(curves) <= 6
        assert len(marks(shown, 2, "dot", "base")) == len(curves) + 1  # and the legend's


def test_the_grid_holds_the_switches_of_each_setting(diagnosis):
    read = ElementTree.fromstring(diagnosis.to_html()).find(".//figure//table")
    windows = [int(heading.text.removeprefix("window ")) for heading in read.findall("thead//th")[1:]]
    lines = {float(line.findtext("th")): line.findall("td") for line in read.findall("tbody/tr")}
    assert len(windows) * len(lines) == 20
    for threshold, cells in lines.items():
        for window, cell in zip(windows, cells, strict=True):
            found = [wsd_hf.switch_index(draft.log_probs, threshold, window) for draft in diagnosis.drafts]
            switches = [index for index in found if index is not None]
            assert cell.findtext("b") == (f"{median(switches):g}" if switches else "-")
            assert f"never {100 * found.count(None) / len(found):.0f} %" in "".join(cell.itertext())


def test_a_place_is_where_generate_switches(pair, diagnosis):
    shown = [
        "".join(place.itertext())
        for place in ElementTree.fromstring(diagnosis.to_html()).iter("p")
        if "│" in "".join(place.itertext())
    ]
    assert shown
    for place in shown[:3]:
        prompt, kept = int(place.split()[1]) - 1, place.split("│")
        output = pair.generate(demo_questions()[prompt]["messages"], max_new_tokens=32, return_dict_in_generate=True)
        tokens = pair.explain(output).tokens
        drafted = [token.text for token in tokens if token.writer == "pilot"]
        assert kept[1] == "".join(drafted[-6:])
        assert "".join(drafted).endswith(kept[0].split("…")[-1].split(f"prompt {prompt + 1} ")[-1] + kept[1])


def test_the_page_of_a_diagnosis_is_the_same_every_time_and_its_ids_are_unique(diagnosis):
    text = diagnosis.to_html()
    assert diagnosis.to_html() == text
    ids = [element.get("id") for element in ElementTree.fromstring(text).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 50
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(ids)


def test_predicted_costs_have_a_table_of_their_own(diagnosis):
    predictions = [
        Prediction(method="base", base_forwards=1, pilot_share=0, time=1),
        Prediction(method="wsd:threshold=0.6", base_forwards=0.2154, pilot_forwards=1.0701, pilot_share=0.383, time=0.961),
        Prediction(method="product", base_forwards=0.5, pilot_forwards=1),
    ]
    read = ElementTree.fromstring(page(diagnosis, predictions))
    assert "Predicted costs" in [heading.text for heading in read.iter("h2")]
    lines = {
        line.findtext("th"): [cell.text for cell in line.findall("td")] for line in read.findall(".//table")[-1].iter("tr")
    }
    assert lines["wsd:threshold=0.6"] == ["0.961", "0.215", "1.07", "0", "38 %"]
    assert lines["product"] == ["-", "0.5", "1", "0", "-"]


def test_texts_of_a_draft_are_escaped(diagnosis):
    nasty = "</p><script>alert(1)</script>\x1b[2J"
    draft = replace(diagnosis.drafts[0], texts=[nasty for _ in diagnosis.drafts[0].texts])
    read = ElementTree.fromstring(replace(diagnosis, drafts=[draft]).to_html())
    assert not list(read.iter("script"))
    assert "".join(read.itertext()).count("</p><script>alert(1)</script>␛[2J") > 6


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # which garbage of any other test may cause
@pytest.mark.parametrize("length", [1, 3, 32])
def test_any_rule_and_drafts_of_any_length_have_a_page(diagnosis, length):
    fields = ("tokens", "texts", "log_probs", "best_log_probs", "entropies")
    drafts = [replace(draft, **{name: getattr(draft, name)[:length] for name in fields}) for draft in diagnosis.drafts]
    for rule in (wsd_hf.SwitchCriteria(1.0), wsd_hf.RelativeConfidenceCriteria(), wsd_hf.EntropyCriteria(ignore_repeats=True)):
        for own in ([], diagnosis.own):
            read = ElementTree.fromstring(replace(diagnosis, drafts=drafts, own=own, rule=rule).to_html())
            assert len(list(read.iter("figure"))) == 4
            assert ("threshold 1" in "".join(read.find(".//figure[2]").itertext())) == (rule.threshold == 1)


def test_a_pilot_that_writes_nothing_has_a_page_too(diagnosis):
    silent = [replace(draft, tokens=[], texts=[], log_probs=[], best_log_probs=[], entropies=[]) for draft in diagnosis.drafts]
    read = ElementTree.fromstring(replace(diagnosis, drafts=silent, own=[]).to_html())
    assert not list(read.iter("figure"))
    assert "ended every draft at once" in "".join(read.itertext())


def test_a_missing_library_is_named_with_the_remedy(diagnosis, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(wsd_hf.WSDValueError, match=re.escape('pip install "wsd_hf[diagnose]"')):
        diagnosis.to_html()


# The parts, without a browser


def test_parts_escape_what_they_are_given():
    nasty = '<b a="\'">&\x1b'
    page = ElementTree.fromstring(document(nasty, table(nasty, ["", nasty], [(nasty, [nasty])]) + box(nasty, "<p/>")))
    shown = '<b a="\'">&␛'
    assert page.findtext("head/title") == page.findtext("body/main/h1") == shown
    assert [cell.text for cell in page.iter("td")] == [shown]
    assert [cell.text for cell in page.iter("th")] == [None, shown, shown]
    assert [element.get("aria-label") for element in page.iter("div")] == [shown, shown]


def test_a_page_without_a_script_allows_none():
    assert "script-src" not in document("title", "")
    assert "script-src &#x27;sha256-" in document("title", "", "show();")


# The colours of the stylesheet

Colour = tuple[float, float, float]

PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
"""Linear RGB as eyes without one kind of cones have it: Machado, Oliveira and Fernandes, 2009, severity 1."""

SIGHTS = [
    pytest.param(None, id="all cones"),
    pytest.param(PROTANOPIA, id="protanopia"),
    pytest.param(DEUTERANOPIA, id="deuteranopia"),
]


def channels(colour: str) -> Colour:
    """Linear red, green and blue, from 0 to 1, of `#rrggbb` or `rgb(r, g, b)`."""
    numbers = re.findall(r"\w\w", colour[1:]) if colour.startswith("#") else re.findall(r"[\d.]+", colour)[:3]
    values = [(int(number, 16) if colour.startswith("#") else float(number)) / 255 for number in numbers]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values)
    return red, green, blue


def luminance(colour: Colour) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def contrast(*colours: Colour) -> float:
    """Contrast ratio of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Colour) -> Colour:
    """CIE L*a*b* under D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = [sum(row) for row in rows]
    x, y, z = (max(apply(row, colour) / limit, 0) for row, limit in zip(rows, white, strict=True))
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apply(row: Colour, colour: Colour) -> float:
    return sum(weight * value for weight, value in zip(row, colour, strict=True))


def distance(first: str, second: str, sight: Any) -> float:
    """CIE 1976 distance of two colours, for eyes of some kind; about 2 are just seen side by side."""
    seen = [
        channels(colour) if sight is None else tuple(apply(row, channels(colour)) for row in sight)
        for colour in (first, second)
    ]
    return sum((a - b) ** 2 for a, b in zip(*map(lab, seen), strict=True)) ** 0.5


def schemes() -> dict[str, dict[str, str]]:
    """The named colours of the stylesheet, light and dark."""
    light, dark = (dict(re.findall(r"--(\w+):(#\w{6});", rule)) for rule in re.findall(r":root \{.*?\}", STYLE))
    return {"light": light, "dark": dark}


def pairs(scheme: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Text and background of every rule of the stylesheet that has both, and of all texts on the page and its surfaces."""
    for rule in re.findall(r"\{([^{}]*)\}", STYLE):
        colours = dict(re.findall(r"(?<![\w-])(color|background): ([^;]+);", rule))
        if len(colours) == 2:
            yield tuple(
                re.sub(r"var\(--(\w+)\)", lambda name: scheme[name[1]], colours[key]) for key in ("color", "background")
            )
    for text, ground in itertools.product(("text", "muted", "accent", "pilot", "base"), ("page", "surface")):
        yield scheme[text], scheme[ground]


def grounds() -> dict[str, list[str]]:
    """Backgrounds of the writers in the stylesheet, from the darkest."""
    return {writer: re.findall(rf"\.{writer}-\d \{{ background: (#\w+)", STYLE) for writer in ("pilot", "base")}


@pytest.mark.parametrize("scheme", schemes())
def test_every_text_of_the_stylesheet_has_the_contrast_of_wcag(scheme):
    found = list(pairs(schemes()[scheme]))
    assert len(found) >= 20
    assert {pair for pair in found if contrast(*map(channels, pair)) < 4.5} == set()


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_writers_are_told_apart_by_all_eyes(sight):
    for colours in schemes().values():
        assert distance(colours["pilot"], colours["base"], sight) > 40
    pilot, (base,) = grounds()["pilot"], grounds()["base"]
    assert len(pilot) == 5
    assert min(distance(colour, base, sight) for colour in pilot) > 20
    assert min(distance(*couple, sight) for couple in itertools.pairwise(pilot)) > 4
    assert pilot == sorted(pilot, key=lambda colour: luminance(channels(colour)))


def test_a_trace_has_the_colours_of_the_stylesheet_and_an_ink_of_its_own():
    chances = [None, 0.1, 0.3, 0.5, 0.7, 0.9]
    tokens = [wsd_hf.TracedToken(1, "a", "pilot", chance) for chance in chances] + [wsd_hf.TracedToken(1, "a", "base")]
    shown = re.findall(r"background:(#\w+);color:(#\w+)", wsd_hf.Trace(tuple(tokens)).to_html())
    assert [ground for ground, _ in shown] == [grounds()["pilot"][0], *grounds()["pilot"], *grounds()["base"]]
    assert min(contrast(*map(channels, pair)) for pair in shown) > 4.5
