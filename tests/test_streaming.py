"""What a streamer gets, also when something fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer, TextStreamer
from transformers.generation import BaseStreamer

import wsd_hf
from oracle import ones, random_prompt
from scripted import PILOT_EOS, ScriptedModel, believe, scripted_model, write
from time_limit import HANG
from tokenizers_for_tests import letter_tokenizer

PROMPT = random_prompt(1, 6)


class Recorder(BaseStreamer):
    """Keeps what it is given; raises at its n-th `put` if asked to."""

    def __init__(self, fails_at: int | None = None, fails_at_end: bool = False) -> None:
        self.puts: list[list[int]] = []
        self.ends = 0
        self._fails_at = fails_at
        self._fails_at_end = fails_at_end

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())
        if len(self.puts) == self._fails_at:
            raise BrokenPipeError("reader has gone")

    def end(self) -> None:
        self.ends += 1
        if self._fails_at_end:
            raise BrokenPipeError("reader has gone")

    @property
    def tokens(self) -> list[int]:
        return [token for put in self.puts for token in put]


def decode(base: PreTrainedModel, pilot: PreTrainedModel | None, prompt: torch.Tensor = PROMPT, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 10, "wsd_threshold": 0.15, "wsd_window_size": 2, **kwargs}
    return base.generate(prompt, attention_mask=ones(prompt), assistant_model=pilot, strategy="wsd", **kwargs)


def scripted_pair() -> tuple[ScriptedModel, ScriptedModel]:
    prompt, draft = [5, 6, 7], [8, 9, 10, 11]
    base = wsd_hf.enable_wsd(believe(scripted_model(seed=1), prompt, draft, [1e-4, 1e-4, 0.9]))
    return base, write(scripted_model(seed=2, eos=PILOT_EOS), prompt, [*draft, PILOT_EOS])


@pytest.mark.parametrize("threshold", [1e-9, 0.15, 1.0])
@pytest.mark.parametrize("draft_end", ["continue", "stop"])
def test_streamed_tokens_are_the_returned_sequence(base: Any, pilot: Any, threshold: float, draft_end: str) -> None:
    streamer = Recorder()
    out = decode(base, pilot, wsd_threshold=threshold, wsd_draft_end=draft_end, wsd_max_draft_tokens=5, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ends == 1


def test_tokens_arrive_one_by_one_and_none_that_the_switch_left_out() -> None:
    base, pilot = scripted_pair()
    streamer = Recorder()
    out = decode(base, pilot, torch.tensor([[5, 6, 7]]), wsd_threshold=0.8, wsd_window_size=1, streamer=streamer)
    assert streamer.puts[:4] == [[5, 6, 7], [8], [9], [10]]
    assert all(len(put) == 1 for put in streamer.puts[1:])
    assert streamer.tokens == out[0].tolist()


def test_a_token_is_streamed_before_the_next_forward(base: Any, pilot: Any) -> None:
    streamer = Recorder()
    seen: list[int] = []
    hook = base.register_forward_pre_hook(lambda *args: seen.append(len(streamer.puts)))
    decode(base, pilot, streamer=streamer, wsd_engine="step")
    hook.remove()
    assert seen == list(range(1, 11))


def test_printed_text_is_the_decoded_response(base: Any, pilot: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = letter_tokenizer(64)
    out = decode(base, pilot, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0, 6:])


def test_iterated_text_is_the_decoded_response(base: Any, pilot: Any) -> None:
    tokenizer = letter_tokenizer(64)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=HANG)
    thread = threading.Thread(target=decode, args=(base, pilot), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join(HANG)
    assert text == tokenizer.decode(decode(base, pilot)[0, 6:])


@pytest.mark.parametrize("at", [1, 2, 4, 8])
def test_a_streamer_that_raises_ends_generation_with_its_exception(base: Any, pilot: Any, at: int) -> None:
    streamer = Recorder(fails_at=at)
    with pytest.raises(BrokenPipeError, match="reader has gone"):
        decode(base, pilot, streamer=streamer)
    assert len(streamer.puts) == at
    assert streamer.ends == 1


def test_a_streamer_that_cannot_even_end_does_not_hide_the_error(base: Any, pilot: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="threshold"):
        decode(base, pilot, wsd_threshold=2.0, streamer=Recorder(fails_at_end=True))


FAILURES = {
    "an illegal setting": {"wsd_threshold": 2.0},
    "an unknown strategy": {"strategy": "best"},
    "no pilot": {"assistant_model": None},
    "a keyword of nobody": {"temprature": 1.0},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_reader_does_not_hang_when_a_call_is_refused(base: Any, pilot: Any, failure: str) -> None:
    streamer = TextIteratorStreamer(letter_tokenizer(64), timeout=HANG)
    kwargs = {"assistant_model": pilot, "strategy": "wsd", **FAILURES[failure]}
    with pytest.raises(ValueError, match=r"\w"):
        base.generate(PROMPT, attention_mask=ones(PROMPT), streamer=streamer, **kwargs)
    assert list(streamer) in ([], [""])


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
def test_a_reader_gets_what_was_written_when_a_model_fails(base: Any, pilot: Any, role: str, error: BaseException) -> None:
    tokenizer = letter_tokenizer(64)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=HANG)
    forwards = 0

    def fail(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise error

    hook = {"base": base, "pilot": pilot}[role].register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            decode(base, pilot, wsd_threshold=1.0, streamer=streamer, wsd_engine="step")
    finally:
        hook.remove()
    assert "".join(streamer) == tokenizer.decode(decode(base, pilot, wsd_threshold=1.0)[0, 6:8])


def test_a_batch_is_refused_by_a_text_streamer_and_its_reader_is_released(base: Any, pilot: Any) -> None:
    streamer = TextIteratorStreamer(letter_tokenizer(64), timeout=HANG)
    with pytest.raises(ValueError, match="batch size 1"):
        decode(base, pilot, torch.cat([PROMPT, PROMPT]), streamer=streamer)
    assert list(streamer) in ([], [""])


def test_stop_strings_end_the_stream_at_the_same_token(base: Any, pilot: Any) -> None:
    tokenizer = letter_tokenizer(64)
    whole = decode(base, pilot)[0, 6:].tolist()
    streamer = Recorder()
    out = decode(base, pilot, streamer=streamer, tokenizer=tokenizer, stop_strings=[tokenizer.decode(whole[3:5])])
    assert streamer.tokens == out[0].tolist()
    assert out[0, 6:].tolist() == whole[:5]
