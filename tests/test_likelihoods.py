"""What a streamer gets with each token: its probability and rank in the base's raw distribution, against plain forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextStreamer
from transformers.generation import BaseStreamer

import wsd_hf
from every_strategy import Case, every_case
from oracle import left_padded
from wsd_hf.engine.likelihoods import likelihoods_of, ranks
from wsd_hf.text.streaming import Likelihood, Likelihoods

KELOFT = "What does the Keloft eat?"
ENDS = [3, 7, 11, 19, 23, 31]
"""Token ids that end a response in these tests, so that its rows have unequal lengths."""

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 50},
    "one by one": {"do_sample": False, "repetition_penalty": 1.3},
    "sampled one by one": {"do_sample": True, "repetition_penalty": 1.3},
}


class Recorder(BaseStreamer):
    """Keeps the writers and likelihoods of all tokens, by position."""

    takes_likelihoods = True

    def __init__(self) -> None:
        self.by_pilot: list[torch.Tensor | None] = []
        self.likelihoods: list[Sequence[Likelihood | None]] = []
        self._prompt_is_next = True

    def put(self, value: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        if not self._prompt_is_next:
            self.by_pilot.append(by_pilot)
            self.likelihoods.append([None] * len(value) if likelihoods is None else likelihoods)
        self._prompt_is_next = False

    def end(self) -> None:
        pass


def check(base: PreTrainedModel, sequences: torch.Tensor, mask: torch.Tensor, found: Recorder, known: torch.Tensor) -> None:
    """Checks the likelihoods of response tokens against a plain forward; `known`: those that must have one."""
    width = mask.shape[1]
    mask = torch.cat([mask, torch.ones_like(sequences[:, width:])], dim=1)
    with torch.no_grad():
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = base(sequences, attention_mask=mask, position_ids=places).logits[:, width - 1 : -1].float()
    assert known.any()
    assert len(found.likelihoods) == known.shape[1]
    assert [[one is not None for one in column] for column in found.likelihoods] == known.T.tolist()
    for row, place in known.nonzero().tolist():
        token, likelihood = int(sequences[row, width + place]), found.likelihoods[place][row]
        assert likelihood is not None
        assert likelihood.log_prob == pytest.approx(float(logits[row, place].log_softmax(dim=-1)[token]), abs=1e-4)
        above = logits[row, place] - logits[row, place, token]
        assert 1 + int((above > 1e-4).sum()) <= likelihood.rank <= int((above > -1e-4).sum())


@every_case
@pytest.mark.parametrize("choice", CHOICES)
def test_every_written_token_has_its_likelihood_under_the_base(case: Case, choice: str) -> None:
    ids, mask = left_padded([case.prompt(seed, 3 + 2 * seed) for seed in range(3)], 0)
    torch.manual_seed(1)
    found = Recorder()
    output = case.generate(
        ids,
        attention_mask=mask,
        streamer=found,
        pad_token_id=0,
        eos_token_id=ENDS,
        max_new_tokens=16,
        **(CHOICES["sampled"] if case.samples else CHOICES[choice]),
    )
    response = output.sequences[:, ids.shape[1] :]
    ended = torch.isin(response, torch.tensor(ENDS)).cumsum(dim=1)
    real = torch.nn.functional.pad(ended, (1, 0))[:, :-1] == 0
    if case.strategy == "weak_to_strong_search":
        assert not any(likelihood for column in found.likelihoods for likelihood in column)
        return
    known = real & ~output.written_by_pilot if case.strategy in ("nudging", "reward_guided") else real
    check(case.world.base, output.sequences, mask, found, known)


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("pilot_name", ["pilot", "pilot_other_vocab"])
@pytest.mark.parametrize("strategy", ["wsd", "two_way"])
def test_so_has_every_token_of_the_shipped_pair(engine: str, pilot_name: str, strategy: str) -> None:
    pair = wsd_hf.Pair.tiny(pilot_name)
    inputs = pair.inputs([KELOFT, "Where does the Rundoro live, and what does it look like?"])
    threshold = {"two_way_handback_threshold": 0} if strategy == "two_way" and engine == "step" else {}
    found = Recorder()
    settings = {f"{strategy}_threshold": 0.7, f"{strategy}_window_size": 4, f"{strategy}_engine": engine, **threshold}
    output = pair.generate(inputs, strategy, max_new_tokens=16, streamer=found, **settings)
    check(pair.base, output.sequences, inputs["attention_mask"], found, torch.ones_like(output.written_by_pilot))
    assert len({likelihood.rank for column in found.likelihoods for likelihood in column if likelihood}) > 1
    writers = torch.stack([writer for writer in found.by_pilot if writer is not None], dim=1)
    assert torch.equal(writers, output.written_by_pilot)
    assert 0 < int(writers.sum()) < writers.numel()


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("threshold", [1, 0.1])
def test_the_rank_counts_the_tokens_that_the_base_prefers(engine: str, threshold: float) -> None:
    """Exactly, in the very logits that the call returns."""
    pair, found = wsd_hf.Pair.tiny(), Recorder()
    torch.manual_seed(0)
    settings = {"wsd_threshold": threshold, "wsd_window_size": 4, "wsd_engine": engine, "do_sample": True, "temperature": 2.0}
    output = pair.generate(KELOFT, max_new_tokens=24, streamer=found, output_logits=True, **settings)
    tokens = output.sequences[0, -len(output.logits) :].tolist()
    preferred = [1 + int((logits[0] > logits[0, token]).sum()) for token, logits in zip(tokens, output.logits, strict=True)]
    assert [column[0] and column[0].rank for column in found.likelihoods] == preferred
    assert (int(output.draft_length[0]) == len(tokens)) == (threshold == 1)
    assert len(set(preferred)) > 2


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_token_that_no_model_chose_has_none(engine: str) -> None:
    """The EOS after a draft that ended unconfirmed, and padding."""
    pair, found = wsd_hf.Pair.tiny(), Recorder()
    inputs = pair.inputs([KELOFT, "Where does the Rundoro live, and what does it look like?"])
    settings = {"wsd_threshold": 1, "wsd_window_size": 64, "wsd_draft_end": "stop", "wsd_engine": engine}
    output = pair.generate(inputs, max_new_tokens=64, streamer=found, **settings)
    assert output.switch_reason == ["draft_ended"] * 2
    assert len(set(output.draft_length.tolist())) == 2
    check(pair.base, output.sequences, inputs["attention_mask"], found, output.written_by_pilot)


def test_equal_logits_have_equal_ranks() -> None:
    logits = torch.tensor([[2.0, 3.0, 3.0, -torch.inf, 1.0]])
    assert [ranks(logits, torch.tensor([token])).item() for token in range(5)] == [3, 1, 1, 5, 4]
    assert likelihoods_of(logits.log(), torch.tensor([0]))[0].rank == 3


@pytest.mark.parametrize(("strategy", "engine"), [("wsd", "fast"), ("wsd", "step"), ("product", "step"), ("nudging", None)])
def test_ranks_are_computed_only_for_a_streamer_that_takes_them(
    strategy: str, engine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        return ranks(logits, tokens)

    for module in ("engine.likelihoods", "speculation.loop", "strategies.nudging.loop"):
        monkeypatch.setattr(f"wsd_hf.{module}.ranks", counted)
    pair, pieces = wsd_hf.Pair.tiny(), list[Any]()
    settings = {f"{strategy}_engine": engine} if engine else {}
    without = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece))
    outputs = []
    for streamer in (None, TextStreamer(pair.tokenizer), without, Recorder()):
        assert not calls
        outputs.append(pair.generate(KELOFT, strategy, max_new_tokens=8, streamer=streamer, **settings).sequences)
    assert calls
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("pilot_name", ["pilot", "pilot_other_vocab"])
def test_pieces_carry_the_likelihoods_of_all_tokens_and_those_of_the_pilot_the_draft(engine: str, pilot_name: str) -> None:
    """So that the switch can be found again in what was streamed, at any threshold and window."""
    pair = wsd_hf.Pair.tiny(pilot_name)
    pieces: list[tuple[str, Any, tuple[Likelihood, ...]]] = []
    streamer = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    output = pair.generate(KELOFT, max_new_tokens=64, streamer=streamer, wsd_engine=engine)
    draft = [likelihood.log_prob for _, writer, likelihoods in pieces for likelihood in likelihoods if writer == "pilot"]
    assert draft == output.draft_log_probs[0].tolist()
    assert wsd_hf.switch_index(draft) == int(output.switch_index[0]) > 0
    assert "".join(text for text, _, _ in pieces).strip() == pair.answers(output)[0]
    found = [likelihood.log_prob for _, _, likelihoods in pieces for likelihood in likelihoods]
    prompt = output.prompt_length
    with torch.no_grad():
        logits = pair.base(output.sequences).logits[0, prompt - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(1, output.sequences[0, prompt:, None]).squeeze(1)
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    *_, (text, writer, _) = pieces
    assert (text, writer) == ("", "base"), "the header of the next turn, at which the base is stopped"


def test_a_streamer_of_a_transcript_gets_none_where_none_is_known() -> None:
    pair = wsd_hf.Pair.tiny()
    pieces: list[tuple[str, Any, tuple[Likelihood, ...]]] = []
    streamer = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece: pieces.append(piece), likelihoods=True)
    pair.generate(KELOFT, "nudging", max_new_tokens=24, streamer=streamer)
    assert {bool(likelihoods) for _, writer, likelihoods in pieces if writer == "pilot"} == {False}
    assert {bool(likelihoods) for _, writer, likelihoods in pieces if writer == "base"} == {True}
    pieces.clear()
    inputs = pair.inputs(KELOFT)
    pair.base.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, streamer=streamer)
    assert {(writer, likelihoods) for _, writer, likelihoods in pieces} == {(None, ())}
