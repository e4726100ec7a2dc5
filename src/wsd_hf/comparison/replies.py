"""Answers of some models to a batch of prompts, their costs, and the writers of their tokens."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import input_device
from ..engine.checks import check_room, eos_token_ids
from ..engine.strategy import StrategyConfig
from ..pair import Pair
from ..strategies.wsd.output import WSDOutput
from ..text.chat import Messages
from ..text.next_turn import answer_length, answer_text, next_turn_criteria, turn_headers
from .statistics import repeated_ngrams

MODELS = ("base", "pilot", "reference")
WORK = tuple(f"{model}_{unit}" for model in MODELS for unit in ("forwards", "tokens"))
"""Costs of an answer: forwards of each model, and token positions fed to it; as in `Stats`."""

GREEDY = {"do_sample": False}


@dataclass(frozen=True)
class Bench:
    """The models that answer, and the settings that all methods share.

    Attributes:
        pair: the models, with a reference for the methods that need it.
        examples: the in-context prompt of the base; see `urial_messages`.
        max_new_tokens: most tokens of an answer.
        sampling: keywords of `generate`.
        seed: of the sampling; None begins every call with torch's seed 0.
        reward: keywords of `generate` for the strategies that take a reward.
    """

    pair: Pair
    examples: Messages
    max_new_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=GREEDY.copy)
    seed: int | None = None
    reward: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criteria(self) -> dict[str, Any]:
        """Stopping criteria that end the base's answers, if it writes a transcript."""
        return {} if self.pair.tokenizer.chat_template else {"stopping_criteria": next_turn_criteria(self.pair.tokenizer)}

    def torch_seed(self, chats: Sequence[Messages], sample: int) -> int:
        """Seed of a call, which depends on the run's seed, the prompts of the call and the number of their answers alone."""
        if self.seed is None:
            return 0
        text = json.dumps([self.seed, *map(list, chats), sample], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response, and its cost: of a batch, an equal part, so that the sums over its rows are the batch's.

    Attributes:
        response: its text, without the header of a next turn.
        tokens: number of tokens written, the end (EOS, or that header) included.
        ended: whether it ended by itself, before it was cut.
        repeats: share of its 4-grams of tokens that it held before.
        seconds: of this process's CPUs; where a GPU does the work, seconds that passed.
        work: numbers for some of `WORK`; those missing are 0.
        written_by_pilot: number of the response's tokens that the pilot wrote; None where every token is the work of several
            models.
        drafted: number of characters of the response before the switch, which the pilot wrote; None where there is no switch.
        switch_index, switch_reason: as in `WSDOutput`; None where there is no switch.
        html: the writers, as an HTML element; None where one model alone answered, or tokens have no single writer.
    """

    response: str
    tokens: int
    ended: bool
    repeats: float
    seconds: float
    work: dict[str, int]
    written_by_pilot: int | None = None
    drafted: int | None = None
    switch_index: int | None = None
    switch_reason: str | None = None
    html: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer(Reply):
    """A reply, stored.

    Attributes:
        prompt: its number, counted from 0.
        strategy: name of the variant.
        sample: number of the answer among those to the same prompt, counted from 0.
        scores: by the names of the judges; None of a judge without a score for it.
    """

    prompt: int
    strategy: str
    sample: int
    scores: dict[str, float | None]


def by_base(bench: Bench, inputs: Mapping[str, Any], _settings: None = None) -> list[Reply]:
    """The base alone."""
    replies = _plain("base", bench.pair.base, bench.pair.tokenizer, bench, inputs)
    return [replace(reply, written_by_pilot=0) for reply in replies]


def by_pilot(bench: Bench, inputs: Mapping[str, Any], _settings: None = None) -> list[Reply]:
    """The pilot alone."""
    own = {name.removeprefix("assistant_"): value for name, value in inputs.items()}
    replies = _plain("pilot", bench.pair.pilot, bench.pair.pilot_tokenizer, bench, own)
    return [replace(reply, written_by_pilot=reply.tokens) for reply in replies]


def _plain(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bench: Bench, inputs: Mapping[str, Any]
) -> list[Reply]:
    """One model alone: a forward for each token, the first over the prompts, the others over the tokens before."""

    def generate(prompt: BatchEncoding, **limits: int) -> Any:
        return model.generate(**prompt, **limits, **bench.sampling)

    ids, seconds = _timed(generate, model, tokenizer, bench, inputs)
    rows, prompt = inputs["input_ids"].shape
    forwards = ids.shape[1] - prompt
    work = {f"{name}_forwards": forwards, f"{name}_tokens": rows * (prompt + forwards - 1)}
    return _replies(ids[:, prompt:], eos_token_ids(model.generation_config), tokenizer, seconds, work)


def by_strategy(bench: Bench, inputs: Mapping[str, Any], settings: StrategyConfig) -> list[Reply]:
    """A strategy; one that always samples does so at the temperature of search's official runs, unless another is given."""
    pair = bench.pair
    sampling = {"temperature": 0.7, **bench.sampling, "do_sample": True} if settings.always_samples else bench.sampling
    own = bench.reward if "reward" in settings.keywords() else {}

    def generate(prompt: BatchEncoding, **limits: int) -> Any:
        return pair.generate(prompt, settings, **limits, **sampling, **own)

    output, seconds = _timed(generate, pair.base, pair.tokenizer, bench, inputs)
    models = {name: work for name in MODELS if (work := getattr(output.stats, name))}
    work = {f"{name}_{unit}": count for name, spent in models.items() for unit, count in asdict(spent).items()}
    ends = eos_token_ids(pair.base.generation_config)
    if settings.ends_with_pilot:
        ends |= eos_token_ids(pair.pilot.generation_config) | eos_token_ids(pair.pilot_tokenizer)
    replies = _replies(output.sequences[:, output.prompt_length :], ends, pair.tokenizer, seconds, work)
    if output.written_by_pilot is not None:
        by_pilot = output.written_by_pilot.sum(dim=1).tolist()
        replies = [
            replace(reply, written_by_pilot=count, html=pair.explain(output, row).to_html())
            for row, (reply, count) in enumerate(zip(replies, by_pilot, strict=True))
        ]
    if isinstance(output, WSDOutput):
        responses = output.sequences[:, output.prompt_length :]
        switches = zip(responses, output.draft_length, output.switch_index.tolist(), output.switch_reason, strict=True)
        replies = [
            replace(reply, drafted=len(answer_text(ids[:length], pair.tokenizer)), switch_index=index, switch_reason=reason)
            for reply, (ids, length, index, reason) in zip(replies, switches, strict=True)
        ]
    return replies


def _timed(
    generate: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: Bench,
    inputs: Mapping[str, Any],
) -> tuple[Any, float]:
    """Output of a call, whose prompts leave room for the same number of tokens, and the seconds that it took."""
    device = input_device(model)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    prompt = BatchEncoding(inputs).to(device)
    room = int(check_room("model", model, inputs["attention_mask"]).min())  # transformers itself goes on, and may fail there
    limits = {"max_new_tokens": min(bench.max_new_tokens, room)}
    if len(inputs["input_ids"]) > 1:
        limits["pad_token_id"] = tokenizer.pad_token_id
    begin = clock()
    output = generate(prompt, **limits)
    return output, clock() - begin


def _replies(
    rows: torch.Tensor, ends: set[int], tokenizer: PreTrainedTokenizerBase, seconds: float, work: Mapping[str, int]
) -> list[Reply]:
    """The replies of a batch, from its responses, LongTensor[batch, longest], padded on the right."""
    parts = {name: _parts(count, len(rows)) for name, count in work.items()}
    replies = []
    for row, ids in enumerate(rows.tolist()):
        written, ended = _response(ids, ends, tokenizer)
        replies.append(
            Reply(
                response=answer_text(rows[row, : len(written)], tokenizer),
                tokens=len(written),
                ended=ended,
                repeats=repeated_ngrams(written),
                seconds=seconds / len(rows),
                work={name: counts[row] for name, counts in parts.items()},
            )
        )
    return replies


def _parts(count: int, rows: int) -> list[int]:
    """A count in parts that are as equal as whole numbers can be."""
    return [count // rows + (row < count % rows) for row in range(rows)]


def _response(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Token ids of a padded response up to its end, and whether it ended by itself."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    if turn_headers(tokenizer) and answer_length(ids[:end], tokenizer) is not None:
        while ids[end - 1] == tokenizer.pad_token_id:  # the EOS that was found is padding, if it was found at all
            end -= 1
        return ids[:end], True
    return ids[: end + 1], end < len(ids)
