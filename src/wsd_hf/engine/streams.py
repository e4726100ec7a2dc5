"""Streams of both kinds, opened for the prompts of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from .cuda_graphs import workspace
from .ragged_stream import RaggedStream
from .recurrent_stream import RecurrentStream
from .recurrent_support import is_recurrent, recurrent_self_test
from .stream import Stream


@contextmanager
def open_stream(model: PreTrainedModel, prompts: list[list[int]], room: int, capturing: bool) -> Iterator[Stream]:
    """A stream of a model without an `unsupported_model` reason; see `workspace` for `room` and `capturing`."""
    if is_recurrent(model):
        yield RecurrentStream(model, prompts, recurrent_self_test(model).reads_blocks)
        return
    with workspace(model, len(prompts), max(map(len, prompts)), room, capturing) as buffers:
        yield RaggedStream(model, prompts, buffers)
