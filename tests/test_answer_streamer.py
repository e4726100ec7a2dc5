"""AnswerStreamer: every token of the answer once and in order, as early as can be, and nothing of the next turn's header."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from test_streaming import Recorder
from wsd_hf import AnswerStreamer
from wsd_hf.tiny import FOLDER

PROMPT = torch.tensor([[1, 2]])
VOCABULARY = ["</s>", "Yes", " no", ".\n\n", "\n\n", "[", "User", "]\n", "plain", "]"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(VOCABULARY)}, unk_token="</s>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def stream(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> tuple[list[list[str]], Recorder]:
    """What has been handed on after each piece, and then at the end."""
    recorder = Recorder()
    streamer = AnswerStreamer(recorder, tokenizer)
    streamer.put(PROMPT)
    handed = []
    for piece in pieces:
        streamer.put(torch.tensor([VOCABULARY.index(piece)]))
        handed.append(list(recorder.puts[1:]))
    streamer.end()
    handed.append(list(recorder.puts[1:]))
    assert recorder.puts[0] == PROMPT[0].tolist()
    return [["".join(VOCABULARY[token] for token in put) for put in puts] for puts in handed], recorder


def test_text_is_handed_on_at_once_and_a_header_never(tokenizer: PreTrainedTokenizerFast) -> None:
    handed, recorder = stream(tokenizer, "Yes", " no", "\n\n", "[", "User", "]")
    assert handed == [["Yes"], *[["Yes", " no"]] * 6]
    assert recorder.ends == 1


def test_tokens_that_come_together_are_handed_on_together(tokenizer: PreTrainedTokenizerFast) -> None:
    recorder = Recorder()
    streamer = AnswerStreamer(recorder, tokenizer)
    streamer.put(PROMPT)
    streamer.put(torch.tensor([[1, 2]]))  # as transformers' assisted decoding puts what it has kept
    streamer.end()
    assert recorder.puts[1:] == [[1, 2]]


def test_what_only_looked_like_a_header_comes_late(tokenizer: PreTrainedTokenizerFast) -> None:
    handed, _ = stream(tokenizer, "Yes", "\n\n", "[", "plain", "]")
    assert handed == [["Yes"], ["Yes"], ["Yes"], ["Yes", "\n\n", "[", "plain"], *[["Yes", "\n\n", "[", "plain", "]"]] * 2]


def test_what_is_unfinished_at_the_end_was_text(tokenizer: PreTrainedTokenizerFast) -> None:
    handed, _ = stream(tokenizer, "Yes", "[", "User", "</s>")
    assert handed == [*[["Yes"]] * 4, ["Yes", "[", "User", "</s>"]]


def test_a_token_that_ends_the_answer_and_begins_the_header_is_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    handed, _ = stream(tokenizer, "Yes", ".\n\n", "[", "User", "]\n")
    assert handed == [["Yes"], *[["Yes", ".\n\n"]] * 5]


def test_a_character_of_several_tokens_is_handed_on_when_it_is_complete() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    *first, last = tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False)
    assert first
    recorder = Recorder()
    streamer = AnswerStreamer(recorder, tokenizer)
    streamer.put(PROMPT)
    for token in first:
        streamer.put(torch.tensor([token]))
    assert recorder.puts == [[1, 2]]
    streamer.put(torch.tensor([last]))
    assert recorder.tokens == [1, 2, *first, last]


def test_a_batch_goes_through(tokenizer: PreTrainedTokenizerFast) -> None:
    recorder = Recorder()
    streamer = AnswerStreamer(recorder, tokenizer)
    streamer.put(PROMPT.repeat(2, 1))
    streamer.put(torch.tensor([5, 1]))
    streamer.end()
    assert recorder.puts == [[1, 2, 1, 2], [5, 1]]


def test_it_can_be_used_again(tokenizer: PreTrainedTokenizerFast) -> None:
    recorder = Recorder()
    streamer = AnswerStreamer(recorder, tokenizer)
    for _ in range(2):
        for value in (PROMPT, torch.tensor([1]), torch.tensor([5])):
            streamer.put(value)
        streamer.end()
    assert recorder.puts == [[1, 2], [1], [5]] * 2
