"""The fast path's way from a prepared call to its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from ..config import WSDConfig
from ..outputs import WSDStats, peak_memory
from ..setup import DraftSetup
from ..text.bridge import OneVocabulary
from .call import Call
from .graphs import workspace
from .loop import Decoding
from .pace import CHUNKS, Pace, cost_ratio
from .proposer import Proposer
from .record import Record
from .rows import Rows
from .stream import Stream
from .support import depends_on_prefix_only, why_not_inputs, why_not_items, why_not_model, why_not_options


def decode(call: Call, setup: DraftSetup, config: WSDConfig) -> tuple[Any, WSDStats]:
    """Decodes with models that `why_not` has nothing against; returns what transformers' loop would, and the work done."""
    settings = call.generation_config
    longest_chunk = max(*CHUNKS, config.chunk or 0)
    room = call.budget + longest_chunk
    # Of another vocabulary it may take more tokens to say the same: then a long draft still fits, if not all proposals.
    pilot_room = room if isinstance(setup.bridge, OneVocabulary) else room + setup.longest
    prompts = real_tokens(call.input_ids, call.attention_mask)
    pilot_prompts = real_tokens(setup.input_ids, setup.attention_mask)
    records = settings.return_dict_in_generate and (settings.output_scores or settings.output_logits)
    record = Record(len(prompts)) if records else None
    with (
        stream(call.base, prompts, room, config.cuda_graphs) as base,
        stream(setup.pilot, pilot_prompts, pilot_room, config.cuda_graphs) as pilot,
    ):
        rows = rows_of(call, record if settings.output_scores else None)
        Decoding(
            base,
            Proposer(pilot, setup.bridge, setup.warpers, pilot_room, call.input_ids.device),
            setup.draft,
            rows,
            record,
            Pace(cost_ratio(setup.pilot, call.base), config.chunk, config.speculate),
            call.processors,
            settings.do_sample,
        ).run()
        stats = work_of(base, pilot)
    if call.streamer is not None:
        call.streamer.end()
    if not settings.return_dict_in_generate:
        return rows.sequences, stats
    return GenerateDecoderOnlyOutput(
        sequences=rows.sequences,
        scores=record.columns("scores") if record and settings.output_scores else None,
        logits=record.columns("logits") if record and settings.output_logits else None,
    ), stats


@contextmanager
def stream(model: PreTrainedModel, prompts: list[list[int]], room: int, capturing: bool) -> Iterator[Stream]:
    """A model as a stream for one call.

    Args:
        model: any that `why_not_model` has nothing against.
        prompts: token ids of each row's prompt.
        room: most tokens that a row is fed behind its prompt.
        capturing: whether to capture CUDA graphs where the model allows it.
    """
    with workspace(model, len(prompts), max(map(len, prompts)), room, capturing) as buffers:
        yield Stream(model, prompts, buffers)


def rows_of(call: Call, record: Record | None = None) -> Rows:
    """The rows that a call is to fill, and the scores that its criteria are shown."""
    return Rows(call.input_ids, call.generation_config.max_length, call.pad_token_id, call.criteria, call.streamer, record)


def work_of(base: Stream, pilot: Stream) -> WSDStats:
    """The work that two streams have done."""
    return WSDStats(
        base.forwards,
        base.tokens,
        pilot.forwards,
        pilot.tokens,
        cache_memory=base.workspace.cache.memory + pilot.workspace.cache.memory,
        peak_memory=peak_memory(base.model, pilot.model),
    )


def why_not(call: Call, pilot: PreTrainedModel) -> str | None:
    """Why the fast path cannot serve a call; None where it can."""
    return (
        why_not_model("base", call.base)
        or why_not_model("pilot", pilot)
        or why_not_options(call.generation_config)
        or why_not_inputs(call)
        or why_not_items((*call.processors, *call.criteria))
    )


def doubt(call: Call) -> str | None:
    """Names a processor or criterion that may keep a state between calls; None if there is none.

    The fast path calls them with each row's exact prefix, but out of step, and again where proposals are rejected. One that
    keeps a state, as grammars do, would be misled.
    """
    for item in (*call.processors, *call.criteria):
        if not depends_on_prefix_only(item):
            return f"{type(item).__name__} may keep a state from step to step (wsd_engine='fast' if it does not)"
    return None


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows without their padding."""
    rows = input_ids.tolist()
    if attention_mask is None:
        return rows
    return [
        [token for token, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, attention_mask.tolist(), strict=True)
    ]
