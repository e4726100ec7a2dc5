"""Stop strings end a response at the very token at which transformers' criterion does, without a table over the vocabulary."""

from __future__ import annotations

import functools
import gc
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedTokenizer, PreTrainedTokenizerFast, StopStringCriteria

from every_strategy import WAYS, Case, every_case
from oracle import ones
from test_bridge import FRAGMENTS, MAKERS
from tokenizers_for_tests import letter_tokenizer
from wsd_hf import BASE_STOP_STRINGS, WSDValueError, build_inputs
from wsd_hf.engine.supported import depends_on_prefix_only
from wsd_hf.text.stop_strings import StopStrings


class Spelled(PreTrainedTokenizer):
    """Written in Python, with ids that no token has, each its unknown token's; and its padding says nothing."""

    def __init__(self, **kwargs: Any) -> None:
        self._ids = {letter: 3 * index for index, letter in enumerate("<?>abcdefst op\n")}
        super().__init__(unk_token="?", pad_token="<", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["?"])

    def _convert_id_to_token(self, index: int) -> str:
        return {index: token for token, index in self._ids.items()}.get(index, "?")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("<", "")


NAMES = [*MAKERS, "letters", "written in Python"]


@functools.cache
def tokenizer(name: str) -> Any:
    others = {"letters": lambda: letter_tokenizer(40), "written in Python": Spelled}
    return (MAKERS | others)[name]()


def theirs(tokenizer: Any, strings: Sequence[str], rows: torch.Tensor) -> list[bool]:
    """Where transformers' criterion ends rows; it refuses strings of which no token of the vocabulary has a part."""
    try:
        return StopStringCriteria(tokenizer, list(strings))(rows, None).tolist()
    except ValueError as error:
        if "unable to identify tokens" not in str(error):
            raise
        return ["" in strings] * len(rows)


def prefixes(ids: Sequence[int], padding: int) -> torch.Tensor:
    """All prefixes of a row as a batch that is padded on the left."""
    return torch.tensor([[padding] * (len(ids) - end) + list(ids[:end]) for end in range(1, len(ids) + 1)])


def random_strings(rng: random.Random, text: str) -> list[str]:
    """Parts of a text, cut anywhere, and others."""
    strings = []
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        part = text[start : start + rng.choice([1, 1, 2, 3, 5, 9, 20])]
        odd = rng.choice(FRAGMENTS) * rng.choice([1, 1, 2, 4])
        strings.append(rng.choice([part, part, part + odd, odd, odd + part, *(["", part * 2] if rng.random() < 0.2 else [])]))
    return strings


@pytest.mark.parametrize("name", NAMES)
def test_random_texts_end_where_transformers_ends_them(name: str, tried: Any) -> None:
    rng, own = random.Random(name), tokenizer(name)
    size = max(own.get_vocab().values())
    ended = 0
    for _ in range(8):
        text = "".join(rng.choices(FRAGMENTS, k=12))
        ids = own.encode(text)
        for _ in range(rng.choice([0, 3, 9])):
            ids.insert(rng.randint(0, len(ids)), rng.choice([rng.randint(0, size), ids[-1] if ids else 0, size + 1, 10**6]))
        rows = prefixes(ids or [0], own.pad_token_id or 0)
        strings = random_strings(rng, own.decode(ids))
        want = theirs(own, strings, rows)
        assert StopStrings(own, strings)(rows, None).tolist() == want, strings
        tried("texts searched for stop strings", len(rows))
        ended += sum(want)
    assert ended


@settings(max_examples=200)
@given(
    name=st.sampled_from(NAMES),
    text=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=10).map("".join),
    extra=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10**4)), max_size=6),
    stop=st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4), st.tuples(st.integers(0, 30), st.integers(0, 9))),
    times=st.integers(1, 3),
)
def test_any_text_ends_where_transformers_ends_it(
    name: str, text: str, extra: list[tuple[int, int]], stop: str | tuple[int, int], times: int
) -> None:
    own = tokenizer(name)
    ids = own.encode(text)
    for place, token in extra:
        ids.insert(place, token)
    if isinstance(stop, tuple):
        stop = own.decode(ids)[stop[0] : sum(stop)]
    rows = prefixes(ids or [0], 0)
    assert StopStrings(own, [stop * times])(rows, None).tolist() == theirs(own, [stop * times], rows)


LETTERS = [
    ("ab", "xab", True),
    ("ab", "abx", False),  # not at the last token
    ("aaa", "aa", False),
    ("aaa", "aaaa", True),
    ("aba", "ababa", True),
    ("ab", "a<b", False),  # padding and special tokens are text
    ("<b", "a<b", True),
    ("", "a", True),  # as in transformers, where tokens of several letters exist
]


@pytest.mark.parametrize(("stop", "text", "ends"), LETTERS)
def test_a_string_ends_a_row_when_its_last_token_completes_it(stop: str, text: str, ends: bool) -> None:
    own = letter_tokenizer(40)
    assert StopStrings(own, stop)(torch.tensor([own.encode(text)]), None).tolist() == [ends]


@pytest.mark.parametrize(
    ("text", "strings", "ends"),
    [("s<t", ["st"], False), ("s<t", ["st", "abc"], True), ("st<", ["st", "abc"], False), ("<<<st", ["st"], True)],
)
def test_strings_are_looked_for_in_as_many_tokens_as_the_longest_has_letters(text: str, strings: list[str], ends: bool) -> None:
    own = tokenizer("written in Python")
    rows = torch.tensor([own.encode(text)])
    assert StopStrings(own, strings)(rows, None).tolist() == theirs(own, strings, rows) == [ends]


def test_rows_of_a_batch_are_ended_one_by_one_and_on_their_device() -> None:
    own = letter_tokenizer(40)
    rows = torch.tensor([own.encode("<abc"), own.encode("abcd"), own.encode("<<<c")])
    out = StopStrings(own, ["bc", "x"])(rows, None)
    assert (out.dtype, out.device, out.tolist()) == (torch.bool, rows.device, [True, False, False])


def test_a_vocabulary_without_the_letters_of_the_prefix_has_texts_too() -> None:
    own = letter_tokenizer(8, start="stopxyz")
    with pytest.raises(ValueError, match="substring not found"):
        StopStringCriteria(own, ["st"])
    assert StopStrings(own, ["st"])(prefixes(own.encode("xstop"), 0), None).tolist() == [False, False, True, False, False]


class Counted(PreTrainedTokenizerFast):
    """Counts what would take a pass over its vocabulary."""

    looked_at = 0

    def get_vocab(self) -> Any:
        raise AssertionError("the whole vocabulary was read")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        Counted.looked_at += 1
        return super().convert_tokens_to_string(tokens)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "unigram"])
def test_only_tokens_that_were_written_are_looked_at_and_each_once(name: str) -> None:
    own = Counted(tokenizer_object=tokenizer(name).backend_tokenizer, pad_token=tokenizer(name).eos_token)
    pilot = tokenizer("A_pilot_llama3")
    Counted.looked_at = 0
    inputs = build_inputs([{"role": "user", "content": "The quick brown fox?"}], own, pilot)
    assert Counted.looked_at == 0
    (criterion,) = inputs["stopping_criteria"]
    assert criterion.stop_strings == tuple(BASE_STOP_STRINGS)
    for _ in range(3):
        for end in range(1, inputs["input_ids"].shape[1] + 1):
            criterion(inputs["input_ids"][:, :end], None)
    assert Counted.looked_at <= len(set(inputs["input_ids"].flatten().tolist()))


@pytest.mark.parametrize("way", WAYS)
def test_no_strategy_reads_a_vocabulary_that_both_models_share(way: str) -> None:
    case = Case("one", way)
    own = Counted(tokenizer_object=case.world.tokenizer.backend_tokenizer, eos_token=case.world.tokenizer.eos_token)
    case.generate(case.prompt(1), tokenizer=own, assistant_tokenizer=None, stop_strings=["bcd"])


def test_texts_are_looked_up_again_when_the_vocabulary_has_grown() -> None:
    own = letter_tokenizer(40)
    before = StopStrings(own, "stop")
    rows = torch.tensor([[3, len(own)]])
    assert before(rows, None).tolist() == [False]
    own.add_tokens(["stop"])
    assert before(rows, None).tolist() == [True]
    assert StopStrings(own, "stop")(rows, None).tolist() == [True]


def test_a_tokenizer_is_not_kept_alive_by_its_texts() -> None:
    own = letter_tokenizer(40)
    StopStrings(own, "ab")(torch.tensor([[1, 2]]), None)
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None


def test_threads_that_share_a_tokenizer_find_the_same() -> None:
    own, wrong = letter_tokenizer(60), []
    rows = prefixes([*range(1, 60)] * 2, 0)
    want = StopStringCriteria(own, ["yz", "ba"])(rows, None).tolist()

    def look() -> None:
        if StopStrings(own, ["yz", "ba"])(rows, None).tolist() != want:
            wrong.append(1)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("strings", [5, [5], ["a", None], b"ab", ["\ud800"]])
def test_stop_strings_that_are_no_text_are_refused(strings: Any) -> None:
    with pytest.raises(WSDValueError, match=r"^stop_strings=.*: must be text"):
        StopStrings(letter_tokenizer(40), strings)


@every_case
@pytest.mark.parametrize("place", ["keyword", "config"])
def test_empty_stop_strings_are_what_they_are_in_plain_generate(case: Case, place: str) -> None:
    ids, tokenizer = case.prompt(1), case.world.tokenizer
    for strings in ("", [""]):
        config = GenerationConfig(stop_strings=strings)
        given = {"stop_strings": strings} if place == "keyword" else {"generation_config": config}
        assert case.repeatable(ids, **given).shape == (1, ids.shape[1] + 1)
        if case.vocabularies == "two":  # the criterion of transformers fails with a vocabulary of letters
            plain = case.world.base.generate(ids, attention_mask=ones(ids), tokenizer=tokenizer, max_new_tokens=5, **given)
            assert plain.shape == (1, ids.shape[1] + 1)
    given = {"stop_strings": []} if place == "keyword" else {"generation_config": GenerationConfig(stop_strings=[])}
    with pytest.raises(WSDValueError, match=r"^stop_strings=\[\] holds no text"):
        case.generate(ids, **given)


def test_it_keeps_nothing_between_steps() -> None:
    assert depends_on_prefix_only(StopStrings(letter_tokenizer(40), "ab"))
