"""The bridge between two vocabularies: what crosses is the draft's text, early, exactly, and for good."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

import tokenizers_for_tests as make
import wsd_hf.tiny
from wsd_hf.text.bridge import Offer, OneVocabulary, TwoVocabularies
from wsd_hf.text.settled_tokens import ContinuationTokenizer

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "cross_tokenizer_open.json").read_text("utf-8"))


def examples(
    few: int, many: int, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """A property, tried with few examples in every run of the tests, and with many in the sweep."""

    def decorate(check: Callable[..., None]) -> Callable[[int], None]:
        def test(number: int) -> None:
            settings(max_examples=number)(given(**strategies)(check))()

        return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.sweep)])(test)

    return decorate


def with_added_tokens() -> Any:
    tokenizer = make.byte_level_tokenizer()
    added = [AddedToken("<think>", lstrip=True), AddedToken("wordy", single_word=True), AddedToken("<mask>", rstrip=True)]
    tokenizer.add_tokens(added)
    return tokenizer


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": make.byte_level_tokenizer,
    "gpt2 with a space in front": lambda: make.byte_level_tokenizer(add_prefix_space=True),
    "gpt2 with added tokens": with_added_tokens,
    "llama3": lambda: make.byte_level_tokenizer(make.LLAMA_3_SPLIT, ignore_merges=True),
    "qwen": lambda: make.byte_level_tokenizer(make.QWEN_SPLIT, normalizers.NFC()),
    "gpt4o": lambda: make.byte_level_tokenizer(make.GPT_4O_SPLIT),
    "bytes without words": lambda: make.byte_level_tokenizer("", size=900),
    "lower case": lambda: make.byte_level_tokenizer(None, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "llama2": make.llama_2_tokenizer,
    "mistral": make.mistral_tokenizer,
    "gemma": make.gemma_tokenizer,
    "unigram": make.unigram_tokenizer,
    "wordpiece": make.wordpiece_tokenizer,
    **{
        f"random merges {seed} {name}": functools.partial(make.random_merges_tokenizer, seed, split, bool(seed % 2))
        for seed in range(4)
        for name, split in (("gpt2", None), ("gpt4o", make.GPT_4O_SPLIT), ("without words", ""))
    },
    **{
        folder.name: functools.partial(AutoTokenizer.from_pretrained, folder)
        for folder in [*sorted((DATA / "tokenizers").iterdir()), *sorted(wsd_hf.tiny.FOLDER.iterdir())]
        if (folder / "tokenizer.json").exists()
    },
}
LOSSY = {"lower case", "unigram", "wordpiece", "qwen"}

FRAGMENTS = [
    *re.findall(r"\s?\w{1,3}|\s+|\W", make.ENGLISH + make.WORLD),
    *("The", " the", " quick", "dog", " doesn", "'", "'t", "'l", "l", "'re", "ve", "S", "'LL", "ABC", "Wor", " wordy", "(x)"),
    *(" 123", "4567", "89", "...", "=====", "----", "__", "\n", "\n\n", " ", "  ", "     ", "\t", "\r\n", "\u00a0", "\u3000"),
    *("\u0301", "\u0308", "\u0323", "\u0344", "ᄀ", "ᅡ", "ᆨ", "각", "\u200d", "🙂", "ไทย", "ำ", "ा", "𒀀", "\x00", "\x07"),
    *(
        "<|eot|>",
        "<|eo",
        "t|>",
        "</s>",
        "</",
        "s>",
        "<think>",
        "<thi",
        "<mask>",
        "[UNK]",
        "<0x0A>",
        "▁",
        "▁▁",
        "\ufeff",
        "\ufffd",
    ),
    *("ſ", "ﬁ", "ﬀ", "İ", "ß", "½", "①", "㎏"),
]

texts = st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), st.text(max_size=12))
chunks = st.lists(st.integers(0, 7), min_size=1, max_size=10).filter(any)


@functools.cache
def tokenizer(name: str) -> Any:
    return MAKERS[name]()


@functools.cache
def encode(name: str) -> Callable[[str], list[int]]:
    """How a tokenizer encodes a piece of text, with no space put in front: the oracle of what must cross.

    Where a tokenizer puts one behind special tokens too, that one stays.
    """
    ordinary = functools.partial(tokenizer(name).encode, add_special_tokens=False)
    spaceless = functools.partial(make.without_added_space(tokenizer(name)).encode, add_special_tokens=False)
    special = [] if name == "mistral" else tokenizer(name).all_special_tokens

    def oracle(text: str) -> list[int]:
        end = min((text.find(token) + len(token) for token in special if token in text), default=None)
        return spaceless(text) if end is None else spaceless(text[:end]) + ordinary(text[end:])

    return oracle


def decode(name: str, ids: list[int]) -> str:
    return tokenizer(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def complete_text(name: str, ids: list[int]) -> str:
    """The text of a draft without an incomplete last character."""
    tokens = tokenizer(name).convert_ids_to_tokens(ids, skip_special_tokens=True)
    run = 0
    while run < len(tokens) and re.fullmatch("<0x..>", tokens[-1 - run]):
        run += 1
    if not run:
        return decode(name, ids).rstrip("\ufffd")
    before = tokenizer(name).convert_tokens_to_ids(tokens[:-run])
    for cut in range(min(3, run) + 1):
        text = decode(name, [*before, *tokenizer(name).convert_tokens_to_ids(tokens[len(before) : len(tokens) - cut])])
        if not text.endswith("\ufffd"):
            return text
    return decode(name, before).rstrip("\ufffd")


def in_chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The ids in pieces of these sizes, over and over."""
    pieces, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(ids):
            return pieces
        pieces.append(ids[start : start + size])
        start += size
    return pieces


def offers(pilot: str, base: str, ids: list[int], sizes: list[int], end: int = -1) -> list[Offer]:
    """What crosses of a draft that is proposed in chunks and then ended."""
    bridge = TwoVocabularies(tokenizer(base), tokenizer(pilot), {end}, [len(ids) + 1])
    return [bridge.offer(0, chunk) for chunk in [*in_chunks(ids, sizes), [end]]]


def crossed(parts: list[Offer]) -> list[int]:
    return [token for part in parts for token in part.tokens]


# Golden data


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_golden_draft_crosses_as_its_text_encoded_on_its_own(case: dict[str, Any]) -> None:
    names = [Path(case["pair"][name]).name for name in ("base_tokenizer", "pilot_tokenizer")]
    base, pilot = map(tokenizer, names)
    drafted, want = case["pilot"]["output_ids"], case["separate"]["draft_ids"]
    if "utf8_cut" in case["tags"]:
        assert "\ufffd" in base.decode(want)
        want = base.encode(base.decode(want).rstrip("\ufffd"), add_special_tokens=False)
    for seed in range(5):
        sizes = random.Random(seed).choices(range(1, 9), k=20)
        bridge = TwoVocabularies(base, pilot, {pilot.eos_token_id}, [len(drafted)])
        parts = [bridge.offer(0, chunk) for chunk in in_chunks(drafted, sizes)]
        assert parts[-1].over == ("draft_ended" if case["pilot"]["ended"] == "eos" else "draft_limit")
        assert crossed(parts) == want


# Settled tokens


@examples(400, 3000, name=st.sampled_from(sorted(MAKERS)), text=texts, more=texts)
def test_no_continuation_changes_a_settled_token(name: str, text: str, more: str) -> None:
    settled = ContinuationTokenizer(tokenizer(name)).settled(text)
    assert encode(name)(text + more)[: len(settled)] == settled


SPLIT_ANEW = [
    "We'll see",
    "doesn't jump",
    "they've x",
    "It's 2",
    "x  \n  \n y",
    "x   y",
    "12345",
    " 가\u11a8 다",
    "de\u0301\u0323f",
    "a\n <think> b",
    "a wordy1",
    "</s>quick lazy dogs",
]


@pytest.mark.parametrize("text", SPLIT_ANEW)
def test_where_text_is_split_or_composed_anew_nothing_settles_too_early(text: str) -> None:
    for name, end in itertools.product(MAKERS, range(len(text))):
        settled = ContinuationTokenizer(tokenizer(name)).settled(text[:end])
        assert encode(name)(text)[: len(settled)] == settled


@examples(200, 1000, name=st.sampled_from(sorted(MAKERS)), text=texts)
def test_a_piece_is_encoded_without_a_space_in_front(name: str, text: str) -> None:
    assert ContinuationTokenizer(tokenizer(name)).encode(text) == encode(name)(text)


@examples(200, 1500, pilot=st.sampled_from(sorted(MAKERS)), base=st.sampled_from(sorted(MAKERS)), text=texts, sizes=chunks)
def test_a_draft_crosses_as_its_text_encoded_on_its_own(pilot: str, base: str, text: str, sizes: list[int]) -> None:
    ids = encode(pilot)(text)
    parts = offers(pilot, base, ids, sizes)
    text = complete_text(pilot, ids)
    assert crossed(parts) == encode(base)(text)
    assert {part.over for part in parts[:-1]} <= {None}
    assert parts[-1].over == "draft_ended"


@examples(
    150,
    600,
    pilot=st.sampled_from(sorted(MAKERS)),
    base=st.sampled_from(sorted(MAKERS)),
    numbers=st.lists(st.integers(0, 10**6), max_size=25),
    sizes=chunks,
)
def test_a_draft_of_any_tokens_crosses(pilot: str, base: str, numbers: list[int], sizes: list[int]) -> None:
    ids = [number % len(tokenizer(pilot)) for number in numbers]
    assert crossed(offers(pilot, base, ids, sizes)) == encode(base)(complete_text(pilot, ids))


@pytest.mark.parametrize("base", sorted(set(MAKERS) - LOSSY))
@pytest.mark.parametrize("pilot", ["gpt2", "llama2", "pilot_other_vocab"])
def test_what_has_crossed_says_how_the_draft_begins_and_lacks_a_word_at_most(pilot: str, base: str) -> None:
    text = "Hello world, it's there: the quick brown fox and the lazy dogs don't jump over the other words then. " * 6
    parts = offers(pilot, base, encode(pilot)(text), [6])
    reader = ContinuationTokenizer(tokenizer(base))
    given: list[int] = []
    drafted = [decode(pilot, encode(pilot)(text)[: 6 * n]) for n in range(1, len(parts))]
    for part, said in zip(parts, drafted, strict=False):
        given += part.tokens
        assert said.startswith(reader.decode(given))
        assert len(said) - len(reader.decode(given)) <= 12
    assert reader.decode(crossed(parts)) == text


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=[pytest.mark.sweep] if number % 4 else []) for number, base in enumerate(MAKERS)]
)
def test_the_tokens_of_a_long_draft_are_the_same_as_those_of_a_short_one(base: str) -> None:
    ids = encode("gpt2")((make.ENGLISH + make.WORLD) * 4)
    assert crossed(offers("gpt2", base, ids, [5])) == encode(base)(complete_text("gpt2", ids))


# The rest of the bridge

PILOT, BASE = "pilot_other_vocab", "base"


def bridge_of(limit: int = 100, pilot: str = PILOT, base: str = BASE, **kwargs: Any) -> TwoVocabularies:
    return TwoVocabularies(tokenizer(base), tokenizer(pilot), {tokenizer(pilot).eos_token_id}, [limit], **kwargs)


def pilot_ids(text: str) -> list[int]:
    return encode(PILOT)(text)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_draft_ends_at_its_limit_counted_in_the_pilots_tokens_over_all_calls(limit: int) -> None:
    ids = pilot_ids("Paris is the capital of France, they say.")
    two, one = bridge_of(limit), OneVocabulary({3}, [limit])
    chunks = [*in_chunks(ids, [2, 0, 1]), []]
    parts = [two.offer(0, chunk) for chunk in chunks]
    assert crossed(parts) == encode(BASE)(decode(PILOT, ids[:limit]))
    assert two.pilot_tokens(0) == ids[:limit]
    alike = [one.offer(0, chunk) for chunk in chunks]
    assert crossed(alike) == one.pilot_tokens(0) == ids[:limit]
    assert [part.over for part in parts] == [part.over for part in alike]
    assert parts[-1].over == "draft_limit"


def test_a_draft_ends_before_the_first_end_token() -> None:
    ids = pilot_ids("No, I will not.")
    end = tokenizer(PILOT).eos_token_id
    two, one = bridge_of(), OneVocabulary({end}, [100])
    assert two.offer(0, [*ids, end, *ids]) == Offer(encode(BASE)("No, I will not."), "draft_ended")
    assert one.offer(0, [*ids, end, *ids]) == Offer(ids, "draft_ended")
    for bridge in (two, one):
        assert bridge.offer(0, ids) == Offer([], "draft_ended")
        assert bridge.pilot_tokens(0) == ids


def test_the_last_token_that_the_limit_allows_ends_a_draft_even_before_an_end_token() -> None:
    ids = pilot_ids("No.")
    proposed = [*ids, tokenizer(PILOT).eos_token_id]
    assert (
        bridge_of(len(ids)).offer(0, proposed).over == OneVocabulary({3}, [len(ids)]).offer(0, proposed).over == "draft_limit"
    )


def test_an_empty_draft_crosses_as_nothing() -> None:
    for bridge in (bridge_of(), OneVocabulary({3}, [9])):
        assert bridge.offer(0, []) == Offer([], None)
        assert bridge.offer(0, [3]) == Offer([], "draft_ended")
        assert bridge.pilot_tokens(0) == bridge.pilot_tokens(0, []) == []


def test_special_tokens_of_the_pilot_say_nothing() -> None:
    ids = pilot_ids("Paris<|user|> is<s><s> the capital.<|system|>")
    assert set(ids) >= {1, 4, 5}
    assert crossed([bridge_of(len(ids)).offer(0, ids)]) == encode(BASE)("Paris is the capital.")


def test_rows_know_nothing_of_each_other() -> None:
    bridge = TwoVocabularies(tokenizer(BASE), tokenizer(PILOT), {3}, [9, 9])
    begun = bridge.offer(0, pilot_ids("Paris"))
    assert bridge.offer(1, [*pilot_ids("Rome"), 3]) == Offer(encode(BASE)("Rome"), "draft_ended")
    assert crossed([begun, bridge.offer(0, [3])]) == encode(BASE)("Paris")


@pytest.mark.parametrize("sizes", [[1], [3], [100]])
def test_a_draft_that_spells_an_end_token_of_the_base_ends_before_it(sizes: list[int]) -> None:
    ids = encode("gpt2")("Paris.</s> And Rome.")
    bridge = bridge_of(100, "gpt2", BASE, base_end_token_ids={tokenizer(BASE).eos_token_id})
    parts = [bridge.offer(0, chunk) for chunk in [*in_chunks(ids, sizes), [tokenizer("gpt2").eos_token_id]]]
    assert crossed(parts) == encode(BASE)("Paris.")
    assert parts[-1].over == "draft_ended"


@examples(
    120,
    500,
    pilot=st.sampled_from(sorted(set(MAKERS) - LOSSY)),
    base=st.sampled_from(sorted(set(MAKERS) - LOSSY)),
    drafted=texts,
    kept=st.integers(0, 20),
    written=st.lists(texts, max_size=3),
    guessed=texts,
)
def test_the_pilots_tokens_say_what_the_response_says_and_keep_what_stands(
    pilot: str, base: str, drafted: str, kept: int, written: list[str], guessed: str
) -> None:
    known = encode(pilot)(drafted)
    bridge = TwoVocabularies(tokenizer(base), tokenizer(pilot), {-1}, [len(known) + 1])
    response = bridge.offer(0, [*known, -1]).tokens[:kept]
    for text in ["", *written]:
        response = response + encode(base)(text)
        said = ContinuationTokenizer(tokenizer(base)).decode(response).rstrip("\ufffd")
        stands = next(end for end in range(len(known), -1, -1) if said.startswith(decode(pilot, known[:end])))
        rest = said[len(decode(pilot, known[:stands])) :]
        known = bridge.pilot_tokens(0, response)
        assert known == known[:stands] + encode(pilot)(rest)
        guess = encode(pilot)(guessed)
        complete = complete_text(pilot, known + guess)[len(decode(pilot, known)) :]
        mid_character = ContinuationTokenizer(tokenizer(base)).decode(response) != said
        assert bridge.guess(0, guess) == ([] if mid_character else encode(base)(complete))
        known = known if mid_character else known + guess


def test_a_guess_that_comes_true_keeps_the_pilots_own_tokens() -> None:
    bridge = bridge_of()
    response = bridge.offer(0, [*pilot_ids("Paris is"), 3]).tokens
    given = bridge.pilot_tokens(0, response)
    proposed = pilot_ids(" the ca") + pilot_ids("pital") + [3] + pilot_ids("never")
    guess = bridge.guess(0, proposed)
    assert decode(BASE, guess) == " the capital"
    assert bridge.pilot_tokens(0, response + guess) == given + proposed[: proposed.index(3)]
    other = response + encode(BASE)(" the cat")
    assert bridge.pilot_tokens(0, other) == given + pilot_ids(" the ca") + pilot_ids("t")


def test_nothing_is_guessed_inside_a_character() -> None:
    bridge = bridge_of()
    response = encode(BASE)("Paris こ")
    assert bridge.pilot_tokens(0, response[:-1]) == pilot_ids("Paris ")
    assert bridge.guess(0, pilot_ids("!")) == []
    assert bridge.pilot_tokens(0, response) == pilot_ids("Paris ") + pilot_ids("こ")
    assert bridge.guess(0, pilot_ids("!")) == encode(BASE)("!")
    assert bridge.guess(0, pilot_ids("んに")[:-1]) == encode(BASE)("ん")


def test_one_vocabulary_takes_tokens_for_what_they_are() -> None:
    bridge = OneVocabulary({2}, [9, 9])
    assert bridge.offer(1, [5, 6]) == Offer([5, 6], None)
    assert bridge.pilot_tokens(1) == [5, 6]
    assert bridge.pilot_tokens(1, [5, 7]) == [5, 7]
    assert bridge.guess(1, [8, 2]) == [8, 2]


def test_a_token_added_later_is_seen() -> None:
    base = make.byte_level_tokenizer()
    assert ContinuationTokenizer(base).settled("a <no")
    base.add_tokens(["a <now>"])
    assert ContinuationTokenizer(base).settled("a <no") == []
