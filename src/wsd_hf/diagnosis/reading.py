"""Texts as the base reads them: the pilot's drafts, and the base's own answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BatchEncoding, StoppingCriteria

from .._compat import input_device
from ..engine.checks import check_room, eos_token_ids
from ..engine.ragged_stream import real_tokens
from ..pair import Pair
from ..speculation.config import MOST_PROPOSALS
from ..strategies.wsd.config import WSDConfig
from ..text.bridge import before_end
from ..text.chat import Messages, base_prompts
from ..text.next_turn import answer_length, next_turn_criteria, turn_headers
from ..trace import added_texts

Writer = Literal["pilot", "base"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One greedy text, and the base's opinion of each of its tokens.

    Attributes:
        prompt: number of the prompt, counted from 0.
        writer: the pilot of a draft, or the base of its own answer.
        tokens: of the text, in the base's vocabulary.
        texts: part of the text that each token adds.
        log_probs: of each token, from a float32 softmax of the base's raw logits.
        best_log_probs: of the base's first choice in each place.
        entropies: of the base's distribution in each place, in nats.
        base_prompt: token ids that the base read before the text.
        ended: whether the writer ended the text by itself, before the limit.
        forwards: of the writer while it wrote.
        seconds: of the call that wrote the text, for a draft with the base's reading of it; of a batch, its time divided by its
            rows.
    """

    prompt: int
    writer: Writer
    tokens: list[int]
    texts: list[str]
    log_probs: list[float]
    best_log_probs: list[float]
    entropies: list[float]
    base_prompt: list[int]
    ended: bool
    forwards: int
    seconds: float


def read_drafts(pair: Pair, chats: Sequence[Messages], numbers: Sequence[int], most: int) -> Iterator[Reading]:
    """The pilot's greedy drafts of one batch, each read once by the base: a run of the strategy that never switches.

    Args:
        pair: the models.
        chats: the prompts.
        numbers: of the prompts.
        most: tokens of a draft.
    """
    inputs, recorder = pair.inputs(list(chats)), Recorder()
    settings = WSDConfig(
        switch_criteria=recorder, max_draft_tokens=most, draft_end="stop", chunk=min(most, MOST_PROPOSALS), speculate=False
    )
    limit = min(most, int(check_room("base", pair.base, inputs["attention_mask"]).min()))
    begin = _clock(pair)
    output = pair.generate(inputs, settings, max_new_tokens=limit, do_sample=False)
    seconds = (_clock(pair) - begin) / len(chats)
    prompts = real_tokens(inputs["input_ids"], inputs["attention_mask"])
    for row, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        tokens, *measures = recorder.drafts.get(row, ([], [], [], []))
        yield Reading(
            prompt=number,
            writer="pilot",
            tokens=tokens,
            texts=list(added_texts(tokens, pair.tokenizer)),
            **dict(zip(MEASURES, measures, strict=True)),
            base_prompt=prompt,
            ended=output.switch_reason[row] in ("draft_ended", "stopped"),
            forwards=output.stats.pilot.forwards,
            seconds=seconds,
        )


def read_own_answers(pair: Pair, chats: Sequence[Messages], numbers: Sequence[int], most: int) -> Iterator[Reading]:
    """The base's own greedy answers of one batch, up to an EOS or the header of a next turn; see `read_drafts`."""
    inputs = BatchEncoding(base_prompts(list(chats), pair.tokenizer)).to(input_device(pair.base))
    criteria = {"stopping_criteria": next_turn_criteria(pair.tokenizer)} if turn_headers(pair.tokenizer) else {}
    limit = min(most, int(check_room("base", pair.base, inputs["attention_mask"]).min()))
    asked = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": limit}
    begin = _clock(pair)
    output = pair.base.generate(**inputs, **asked, **criteria)
    seconds = (_clock(pair) - begin) / len(chats)
    prompts = real_tokens(inputs["input_ids"], inputs["attention_mask"])
    ends = eos_token_ids(pair.base.generation_config)
    for row, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        written = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        text = before_end(written, ends)
        length = answer_length(text, pair.tokenizer) if criteria else None
        tokens = text[:length]
        measures = [_measured(output.logits[place][row], token) for place, token in enumerate(tokens)]
        yield Reading(
            prompt=number,
            writer="base",
            tokens=tokens,
            texts=list(added_texts(tokens, pair.tokenizer)),
            **{name: [measure[place] for measure in measures] for place, name in enumerate(MEASURES)},
            base_prompt=prompt,
            ended=len(text) < len(written) or length is not None,
            forwards=len(output.logits),
            seconds=seconds,
        )


MEASURES = ("log_probs", "best_log_probs", "entropies")
"""Fields of a `Reading` with a number for each token."""


class Recorder(StoppingCriteria):
    """A switch criterion that never fires, and keeps what it is shown.

    Attributes:
        drafts: for each row its tokens, and a list for each of `MEASURES`.
        prompts: token ids of the base's prompts.
    """

    def __init__(self) -> None:
        self.drafts: dict[int, list[Any]] = {}

    def __call__(self, input_ids: Any, scores: Any, best_log_probs: Any, entropies: Any, prompts: Any) -> torch.Tensor:
        self.prompts = prompts
        for row in (~scores[:, -1].isnan()).nonzero().flatten().tolist():  # the others have ended before
            self.drafts[row] = [values[row].tolist() for values in (input_ids, scores, best_log_probs, entropies)]
        return torch.zeros(len(scores), dtype=torch.bool)


def _measured(logits: torch.Tensor, token: int) -> tuple[float, float, float]:
    """Numbers for `MEASURES` from the base's raw logits, [V], in a token's place."""
    log_probs = logits.float().log_softmax(dim=-1)
    return float(log_probs[token]), float(log_probs.max()), float(torch.special.entr(log_probs.exp()).sum())


def _clock(pair: Pair) -> float:
    """Seconds of this process's CPUs; where a GPU does the work, seconds that passed."""
    return time.process_time() if input_device(pair.base).type == "cpu" else time.perf_counter()
