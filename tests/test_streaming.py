"""What a streamer gets, also when something fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
from wsd_hf.speculation.rule import ranks
from wsd_hf.text.streaming import Likelihood, Likelihoods

PROMPT = random_prompt(1, 6)
KELOFT = "What does the Keloft eat?"


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


class Drafts(BaseStreamer):
    """Keeps the likelihoods of all tokens, by position and row."""

    takes_likelihoods = True

    def __init__(self) -> None:
        self.columns: list[Sequence[Likelihood | None]] = []

    def put(self, value: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        if by_pilot is not None:
            assert likelihoods is not None
            assert [likelihood is not None for likelihood in likelihoods] == by_pilot.tolist()
            self.columns.append(likelihoods)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("pilot_name", ["pilot", "pilot_other_vocab"])
@pytest.mark.parametrize("strategy", ["wsd", "two_way"])
def test_drafted_tokens_are_streamed_with_their_likelihoods(engine: str, pilot_name: str, strategy: str) -> None:
    pair = wsd_hf.Pair.tiny(pilot_name)
    inputs = pair.inputs([KELOFT, "Where does the Rundoro live, and what does it look like?"])
    threshold = {"two_way_handback_threshold": 0} if strategy == "two_way" and engine == "step" else {}
    streamer = Drafts()
    settings = {f"{strategy}_threshold": 0.7, f"{strategy}_window_size": 4, f"{strategy}_engine": engine, **threshold}
    output = pair.generate(inputs, strategy, max_new_tokens=24, streamer=streamer, **settings)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(output.sequences[:, width:])], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = pair.base(output.sequences, attention_mask=mask, position_ids=places).logits[:, width - 1 : -1]
    drafted = output.written_by_pilot.nonzero().tolist()
    assert 0 < len(drafted) < output.written_by_pilot.numel()
    assert sum(likelihood is not None for column in streamer.columns for likelihood in column) == len(drafted)
    found = set()
    for row, place in drafted:
        token, likelihood = int(output.sequences[row, width + place]), streamer.columns[place][row]
        assert likelihood is not None
        assert likelihood.log_prob == pytest.approx(float(logits[row, place].log_softmax(dim=-1)[token]), abs=1e-4)
        above = logits[row, place] - logits[row, place, token]
        assert 1 + int((above > 1e-4).sum()) <= likelihood.rank <= int((above > -1e-4).sum())
        found.add(likelihood.rank)
    assert len(found) > 1


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_the_rank_counts_the_tokens_that_the_base_prefers(engine: str) -> None:
    """Exactly, in the very logits that the call returns."""
    pair, streamer = wsd_hf.Pair.tiny(), Drafts()
    output = pair.generate(KELOFT, max_new_tokens=24, streamer=streamer, output_logits=True, wsd_threshold=1, wsd_engine=engine)
    tokens = output.sequences[0, -len(output.logits) :].tolist()
    preferred = [int((logits[0] > logits[0, token]).sum()) for token, logits in zip(tokens, output.logits, strict=True)]
    assert len(set(preferred)) > 2
    drafted = int(output.draft_length[0])
    assert drafted > 6
    assert [column[0] and column[0].rank for column in streamer.columns[:drafted]] == [1 + n for n in preferred[:drafted]]


def test_equal_logits_have_equal_ranks() -> None:
    logits = torch.tensor([[2.0, 3.0, 3.0, -torch.inf, 1.0]])
    assert [ranks(logits, torch.tensor([token])).item() for token in range(5)] == [3, 1, 1, 5, 4]


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_ranks_are_computed_only_for_a_streamer_that_takes_them(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        return ranks(logits, tokens)

    monkeypatch.setattr("wsd_hf.speculation.loop.ranks", counted)
    monkeypatch.setattr("wsd_hf.strategies.wsd.stepwise.ranks", counted)
    pair, pieces = wsd_hf.Pair.tiny(), list[Any]()
    without = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece))
    outputs = []
    for streamer in (None, TextStreamer(pair.tokenizer), without, Drafts()):
        assert not calls
        outputs.append(pair.generate(KELOFT, max_new_tokens=8, streamer=streamer, wsd_engine=engine).sequences)
    assert calls
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("pilot_name", ["pilot", "pilot_other_vocab"])
def test_pieces_carry_the_whole_draft(engine: str, pilot_name: str) -> None:
    """So that the switch can be found again in what was streamed, at any threshold and window."""
    pair = wsd_hf.Pair.tiny(pilot_name)
    pieces: list[tuple[str, Any, tuple[Likelihood, ...]]] = []
    streamer = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    output = pair.generate(KELOFT, max_new_tokens=32, streamer=streamer, wsd_engine=engine)
    draft = [likelihood.log_prob for _, _, likelihoods in pieces for likelihood in likelihoods]
    assert draft == output.draft_log_probs[0].tolist()
    assert wsd_hf.switch_index(draft) == int(output.switch_index[0]) > 0
    assert "".join(text for text, _, _ in pieces).strip() == pair.answers(output)[0]
    assert all(not likelihoods for _, writer, likelihoods in pieces if writer == "base")


@pytest.mark.parametrize("strategy", ["nudging", "product"])
def test_a_strategy_without_drafts_streams_no_likelihoods(strategy: str) -> None:
    pair = wsd_hf.Pair.tiny()
    pieces: list[tuple[str, Any, tuple[Likelihood, ...]]] = []
    streamer = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    pair.generate(KELOFT, strategy, max_new_tokens=8, streamer=streamer)
    assert {likelihoods for _, _, likelihoods in pieces} == {()}
