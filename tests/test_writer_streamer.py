"""WriterStreamer: all of an answer's text, in whole characters, each with its writer, and nothing of a next turn's header."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wsd_hf import AnswerStreamer, WriterStreamer, WSDValueError
from wsd_hf.text.streaming import Likelihood, put_tokens
from wsd_hf.tiny import FOLDER

PROMPT = torch.tensor([[1, 2]])
VOCABULARY = ["</s>", "Yes", " no", ".\n\n", "\n\n", "[", "User", "]\n", "plain", "]"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each text of the vocabulary; no chat template, so the base writes a transcript."""
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(VOCABULARY)}, unk_token="</s>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def feed(streamer: Any, tokens: list[int], writers: str) -> None:
    """Feeds an answer as a strategy does: the prompt alone, and then each token with its writer (p or b)."""
    streamer.put(PROMPT)
    for token, writer in zip(tokens, writers, strict=True):
        put_tokens(streamer, torch.tensor([token]), torch.tensor([writer == "p"]))


class Pieces(list[tuple[str, Any]]):
    """The pieces that were written."""

    def __call__(self, text: str, writer: Any) -> None:
        self.append((text, writer))


def likelihood(place: int) -> Likelihood:
    return Likelihood(-float(place), rank=place + 10)


def ids(*texts: str) -> list[int]:
    return [VOCABULARY.index(text) for text in texts]


def test_each_piece_comes_at_once_with_its_writer(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    feed(streamer, ids("Yes", " no", "plain"), "pbp")
    assert pieces == [("Yes", "pilot"), (" no", "base"), ("plain", "pilot")]
    streamer.end()
    assert len(pieces) == 3


def test_a_header_is_never_written_and_its_likeness_late(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    feed(streamer, ids("Yes", ".\n\n", "[", "plain"), "ppbb")
    assert pieces == [("Yes", "pilot"), (".", "pilot"), ("\n\n", "pilot"), ("[", "base"), ("plain", "base")]
    streamer.end()
    pieces.clear()
    feed(streamer, ids("Yes", ".\n\n", "[", "User", "]\n"), "ppbbb")
    streamer.end()
    assert pieces == [("Yes", "pilot"), (".", "pilot")]


def test_an_unfinished_header_was_text(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    feed(streamer, ids("Yes", "\n\n", "[", "User", "</s>"), "ppppb")
    assert pieces == [("Yes", "pilot")]
    streamer.end()
    assert "".join(text for text, _ in pieces) == "Yes\n\n[User"


def test_a_base_with_a_template_may_write_a_header(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages }}"
    pieces = Pieces()
    feed(WriterStreamer(tokenizer, pieces), ids("Yes", "\n\n", "[", "User", "]\n"), "pbbbb")
    assert "".join(text for text, _ in pieces) == "Yes\n\n[User]\n"


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    tokens = tokenizer.encode("a\N{SNOWMAN}b", add_special_tokens=False)
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    feed(streamer, tokens, "p" * (len(tokens) - 2) + "bb")
    streamer.end()
    assert pieces == [("a", "pilot"), ("\N{SNOWMAN}", "base"), ("b", "base")]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_any_tokens_become_the_decoded_text_by_their_writers(seed: int, template: str | None) -> None:
    """Bytes that are no characters too: the text is that of one `decode`, and no piece is taken back."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    tokenizer.chat_template = template
    chance = random.Random(seed)
    tokens = [chance.randrange(len(tokenizer)) for _ in range(30)]
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    feed(streamer, tokens, "p" * 15 + "b" * 15)
    streamer.end()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(piece for piece, _ in pieces) == (text if template else text.rstrip())
    drafted = "".join(piece for piece, writer in pieces if writer == "pilot")
    assert text.startswith(drafted)
    assert (
        tokenizer.decode(tokens[:15], skip_special_tokens=True).rstrip("\ufffd").rstrip() == drafted.rstrip("\ufffd").rstrip()
    )


def test_a_strategy_without_single_writers_gives_neutral_text(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    for value in (PROMPT, torch.tensor([1]), torch.tensor([2])):
        streamer.put(value)
    assert pieces == [("Yes", None), (" no", None)]


def test_the_likelihood_of_a_token_comes_once_with_the_piece_that_it_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    streamer.put(PROMPT)
    for place, token in enumerate(ids("Yes", ".\n\n", "[", "User", "plain", "\n\n"), start=1):
        put_tokens(streamer, torch.tensor([token]), torch.tensor([True]), [likelihood(place)])
    assert pieces[:3] == [("Yes", "pilot", (likelihood(1),)), (".", "pilot", (likelihood(2),)), ("\n\n", "pilot", ())]
    assert pieces[3:] == [
        ("[", "pilot", (likelihood(3),)),
        ("User", "pilot", (likelihood(4),)),
        ("plain", "pilot", (likelihood(5),)),
    ]
    put_tokens(streamer, torch.tensor(ids("[")), torch.tensor([False]), [None])
    put_tokens(streamer, torch.tensor(ids("User")), torch.tensor([False]), [None])
    put_tokens(streamer, torch.tensor(ids("]\n")), torch.tensor([False]), [None])
    streamer.end()
    assert pieces[6:] == [("", "pilot", (likelihood(6),))]


def test_a_character_has_the_likelihoods_of_all_its_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    tokenizer.chat_template = "{{ messages }}"
    tokens = tokenizer.encode("a\N{SNOWMAN}b", add_special_tokens=False)
    pieces = Pieces()
    streamer = AnswerStreamer(WriterStreamer(tokenizer, lambda *piece: pieces.append(piece), likelihoods=True), tokenizer)
    streamer.put(PROMPT)
    for place, token in enumerate(tokens, start=1):
        put_tokens(streamer, torch.tensor([token]), torch.tensor([True]), [likelihood(place)])
    streamer.end()
    first, *middle, last = [likelihood(place) for place in range(1, len(tokens) + 1)]
    assert len(middle) > 1
    assert pieces == [("a", "pilot", (first,)), ("\N{SNOWMAN}", "pilot", tuple(middle)), ("b", "pilot", (last,))]


def test_a_piece_has_the_likelihoods_of_its_writers_tokens_only() -> None:
    """Also where the base completes a character that the pilot has begun, and at an end that shows no text."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    tokens = [*tokenizer.encode("a\N{SNOWMAN}b", add_special_tokens=False), tokenizer.eos_token_id]
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    streamer.put(PROMPT)
    writers = [True] * (len(tokens) - 3) + [False] * 3
    for place, (token, by_pilot) in enumerate(zip(tokens, writers, strict=True), start=1):
        put_tokens(streamer, torch.tensor([token]), torch.tensor([by_pilot]), [likelihood(place)])
    streamer.end()
    first, *middle, completing, b, end = [likelihood(place) for place in range(1, len(tokens) + 1)]
    assert middle
    assert pieces == [
        ("a", "pilot", (first,)),
        ("", "pilot", tuple(middle)),
        ("\N{SNOWMAN}", "base", (completing,)),
        ("b", "base", (b,)),
        ("", "base", (end,)),
    ]


def test_a_batch_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WSDValueError, match="a WriterStreamer takes one response, not 2"):
        WriterStreamer(tokenizer, Pieces()).put(PROMPT.repeat(2, 1))


def test_it_can_be_used_again_and_ended_without_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = WriterStreamer(tokenizer, pieces)
    streamer.end()
    for _ in range(2):
        feed(streamer, [1, 8], "pb")
        streamer.end()
    assert pieces == [("Yes", "pilot"), ("plain", "base")] * 2


def test_a_piece_whose_writing_failed_is_not_written_again(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces: list[str] = []

    def write(text: str, writer: Any) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    streamer = WriterStreamer(tokenizer, write)
    with pytest.raises(KeyboardInterrupt):
        feed(streamer, ids("Yes", " no"), "pb")
    streamer.end()
    assert pieces == ["Yes", " no"]


def test_an_answer_streamer_passes_writers_on_and_only_where_they_are_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces()
    streamer = AnswerStreamer(WriterStreamer(tokenizer, pieces), tokenizer)
    feed(streamer, ids("Yes", ".\n\n", "[", "User", "]\n"), "pbbbb")
    streamer.end()
    assert pieces == [("Yes", "pilot"), (".", "base")]
    assert not AnswerStreamer(AnswerStreamer(None, tokenizer), tokenizer).takes_writers  # type: ignore[arg-type]
