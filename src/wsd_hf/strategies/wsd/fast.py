"""The fast path: from a prepared call to its output."""

from __future__ import annotations

from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.call import Call
from ...engine.ragged_stream import open_stream, real_tokens
from ...engine.stats import Stats, peak_memory, work
from ...text.bridge import OneVocabulary
from .draft_setup import DraftSetup
from .loop import Decoding
from .pace import CHUNKS, Pace, cost_ratio
from .proposer import Proposer


def decode(
    call: Call, setup: DraftSetup, chunk: int | None, speculate: bool, cuda_graphs: bool
) -> tuple[GenerateDecoderOnlyOutput, Stats]:
    """Decodes a call that `unsupported_reason` allows; the settings are those of `WSDConfig`."""
    settings, side = call.generation_config, setup.side
    room = call.budget + max(*CHUNKS, chunk or 0)
    # The pilot may need more tokens of another vocabulary for the same text: a long draft still fits, if not all proposals.
    pilot_room = room if isinstance(setup.bridge, OneVocabulary) else room + setup.longest
    prompts, pilot_prompts = real_tokens(*call.prompt), real_tokens(*side.prompt)
    with (
        open_stream(call.base, prompts, room, cuda_graphs) as base,
        open_stream(side.model, pilot_prompts, pilot_room, cuda_graphs) as pilot,
    ):
        proposer = Proposer(pilot, setup.bridge, side.warpers, pilot_room, call.input_ids.device)
        pace = Pace(cost_ratio(side.model, call.base), chunk, speculate)
        decoding = Decoding(call, base, proposer, setup.draft, pace)
        decoding.run()
        stats = Stats(
            work(base),
            work(pilot),
            proposed=decoding.proposed,
            kept=decoding.kept,
            cache_memory=base.workspace.cache.memory + pilot.workspace.cache.memory,
            peak_memory=peak_memory(call.base, side.model),
        )
    record = decoding.record
    return GenerateDecoderOnlyOutput(
        sequences=decoding.rows.sequences,
        scores=record.columns("scores") if record and settings.output_scores else None,
        logits=record.columns("logits") if record and settings.output_logits else None,
    ), stats
