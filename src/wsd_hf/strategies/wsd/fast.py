"""The fast path's way from a prepared call to its output."""

from __future__ import annotations

from typing import Any

from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.call import Call
from ...engine.ragged_stream import open_stream, real_tokens
from ...engine.rows import rows_of
from ...engine.scores import Record
from ...engine.stats import WSDStats, work_of
from ...text.bridge import OneVocabulary
from .config import WSDConfig
from .draft_setup import DraftSetup
from .loop import Decoding
from .pace import CHUNKS, Pace, cost_ratio
from .proposer import Proposer


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
        open_stream(call.base, prompts, room, config.cuda_graphs) as base,
        open_stream(setup.pilot, pilot_prompts, pilot_room, config.cuda_graphs) as pilot,
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
