"""Texts as the base reads them: the pilot's drafts, and the base's own answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BatchEncoding, PreTrainedModel, StoppingCriteria

from .._compat import input_device
from ..engine.checks import check_room, eos_token_ids, logits_error, not_finite
from ..engine.ragged_stream import real_tokens
from ..errors import WSDLogitsError, WSDValueError
from ..pair import Pair
from ..ranks import ALONE, Rank
from ..speculation.config import MOST_PROPOSALS
from ..speculation.rule import Drafted
from ..speculation.verdict import entropies
from ..strategies.wsd.config import WSDConfig
from ..text.bridge import before_end
from ..text.chat import Messages, base_prompts
from ..text.next_turn import answer_length, next_turn_criteria, turn_headers
from ..trace import added_texts

Writer = Literal["pilot", "base"]

Task = tuple[Writer, Sequence[int]]
"""A writer, and the numbers of the prompts that it answers in one batch."""


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
        seconds: that these took, with the work of the host between them; of a batch, its time divided by its rows.
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

    @property
    def drafted(self) -> list[Drafted]:
        """The tokens as switch rules see them."""
        columns = (self.tokens, self.log_probs, self.best_log_probs, self.entropies)
        return [Drafted(*values) for values in zip(*columns, strict=True)]


def reading_tasks(
    prompts: int,
    done: Container[tuple[int, Writer]],
    batch_size: int = 1,
    own_answers: bool = True,
    rank: Rank = ALONE,
) -> list[Task]:
    """Batches with a missing reading: all drafts, then the base's own answers.

    A batch is the same in every run, however much of it has been read. All readings of a prompt are made in one process.

    Args:
        prompts: their number.
        done: prompts and writers of the readings that exist.
        batch_size: most prompts of a batch.
        own_answers: whether the base answers too.
        rank: this process, among those that share the batches.
    """
    writers: tuple[Writer, ...] = ("pilot", "base") if own_answers else ("pilot",)
    batches = rank.share([range(prompts)[begin : begin + batch_size] for begin in range(0, prompts, batch_size)])
    tasks = [(writer, batch) for writer in writers for batch in batches]
    return [(writer, batch) for writer, batch in tasks if not all((number, writer) in done for number in batch)]


def check_prompts(pair: Pair, chats: Sequence[Messages]) -> None:
    """Raises a WSDValueError, with the number of the prompt, unless both models can read every prompt; runs no forward."""
    for number, chat in enumerate(chats):
        with _blamed_on([number]):
            inputs = pair.inputs([chat])
            check_room("base", pair.base, inputs["attention_mask"])
            check_room("pilot", pair.pilot, inputs["assistant_attention_mask"])


def read(pair: Pair, chats: Sequence[Messages], task: Task, most: int) -> list[Reading]:
    """The readings of one batch.

    Args:
        pair: the models.
        chats: all prompts.
        task: the writer, and the prompts that it answers.
        most: tokens of a text, in the base's vocabulary.

    Raises:
        WSDValueError: prompts that the pair cannot answer, by their numbers.
        WSDLogitsError: NaN in a model's logits, with the same numbers.
    """
    writer, numbers = task
    texts = _drafts if writer == "pilot" else _own_answers
    with _blamed_on(numbers):
        return texts(pair, [chats[number] for number in numbers], numbers, most)


def _drafts(pair: Pair, chats: Sequence[Messages], numbers: Sequence[int], most: int) -> list[Reading]:
    """The pilot's greedy drafts: a run of the strategy that never switches, in which the base reads each token once."""
    inputs, recorder = pair.inputs(chats), _Recorder(len(chats))
    limit = min(most, int(check_room("base", pair.base, inputs["attention_mask"]).min()))
    settings = WSDConfig(
        switch_criteria=recorder,
        max_draft_tokens=max(most, WSDConfig.max_draft_tokens),  # the pilot's tokens; the base's are limited by the response
        draft_end="stop",
        chunk=math.ceil(limit / math.ceil(limit / MOST_PROPOSALS)),
        speculate=False,
    )
    clock = _clock(pair.base)
    with _forward_times(pair.base, clock) as of_base:
        begin = clock()
        output = pair.generate(inputs, settings, max_new_tokens=limit, do_sample=False)
        seconds = clock() - begin - sum(of_base)
    prompts = real_tokens(inputs["input_ids"], inputs["attention_mask"])
    return [
        _reading(
            pair,
            recorder.drafts[row],
            prompt=number,
            writer="pilot",
            base_prompt=prompts[row],
            ended=output.switch_reason[row] in ("draft_ended", "stopped"),
            forwards=output.stats.pilot.forwards,
            seconds=seconds / len(chats),
        )
        for row, number in enumerate(numbers)
    ]


def _own_answers(pair: Pair, chats: Sequence[Messages], numbers: Sequence[int], most: int) -> list[Reading]:
    """The base's own greedy answers, without the EOS or the header of a next turn that ends them."""
    inputs = BatchEncoding(base_prompts(chats, pair.tokenizer)).to(input_device(pair.base))
    transcript = bool(turn_headers(pair.tokenizer))
    criteria = {"stopping_criteria": next_turn_criteria(pair.tokenizer)} if transcript else {}
    limit = min(most, int(check_room("base", pair.base, inputs["attention_mask"]).min()))
    asked = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": limit}
    clock = _clock(pair.base)
    begin = clock()
    output = pair.base.generate(**inputs, **asked, **criteria)
    seconds = clock() - begin
    prompts = real_tokens(inputs["input_ids"], inputs["attention_mask"])
    ends = eos_token_ids(pair.base.generation_config)
    readings = []
    for row, number in enumerate(numbers):
        written = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        text = before_end(written, ends)
        length = answer_length(text, pair.tokenizer) if transcript else None
        answer = [_drafted(output.logits, place, row, token) for place, token in enumerate(text[:length])]
        readings.append(
            _reading(
                pair,
                answer,
                prompt=number,
                writer="base",
                base_prompt=prompts[row],
                ended=len(text) < len(written) or length is not None,
                forwards=len(output.logits),
                seconds=seconds / len(chats),
            )
        )
    return readings


def _reading(pair: Pair, text: Sequence[Drafted], **fields: Any) -> Reading:
    tokens = [token.token for token in text]
    return Reading(
        tokens=tokens,
        texts=[*added_texts(tokens, pair.tokenizer)],
        log_probs=[token.log_prob for token in text],
        best_log_probs=[token.best_log_prob for token in text],
        entropies=[token.entropy for token in text],
        **fields,
    )


class _Recorder(StoppingCriteria):
    """A switch criterion that never fires, and keeps the draft of each row."""

    def __init__(self, rows: int) -> None:
        self.drafts: list[list[Drafted]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Any, scores: Any, best_log_probs: Any, entropies: Any, prompts: Any) -> torch.Tensor:
        newest = zip(*(values[:, -1].tolist() for values in (input_ids, scores, best_log_probs, entropies)), strict=True)
        for draft, values in zip(self.drafts, newest, strict=True):
            drafted = Drafted(*values)
            # Rows may be at other lengths: shorter ones hold NaN here, and longer ones are shown once more.
            if len(draft) == input_ids.shape[1] - 1 and not math.isnan(drafted.log_prob):
                draft.append(drafted)
        return torch.zeros(len(scores), dtype=torch.bool, device="cpu")


def _drafted(logits: Sequence[torch.Tensor], place: int, row: int, token: int) -> Drafted:
    """The base's opinion of a token of its own, from raw logits, [rows, V] in each place."""
    raw = logits[place][row]
    if not_finite(raw):
        raise logits_error("base", place, row)
    log_probs = raw.float().log_softmax(dim=-1)
    return Drafted(token, float(log_probs[token]), float(log_probs.amax()), float(entropies(log_probs)))


def _clock(model: PreTrainedModel) -> Callable[[], float]:
    """Seconds of this process's CPUs; where a GPU does the work, seconds until it is done."""
    device = input_device(model)
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@contextmanager
def _forward_times(model: PreTrainedModel, clock: Callable[[], float]) -> Iterator[list[float]]:
    """The time of each of a model's forwards, noted as it ends."""
    times, begun = list[float](), list[float]()
    hooks = [
        model.register_forward_pre_hook(lambda *_: begun.append(clock())),
        model.register_forward_hook(lambda *_: times.append(clock() - begun.pop())),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _blamed_on(numbers: Sequence[int]) -> Iterator[None]:
    """Errors name the prompts of a batch, counted from 1."""
    try:
        yield
    except (WSDValueError, WSDLogitsError) as error:
        first, last = numbers[0] + 1, numbers[-1] + 1
        prompts = f"prompt {first}" if first == last else f"prompts {first} to {last}"
        raise type(error)(f"{prompts}: {error}") from error
