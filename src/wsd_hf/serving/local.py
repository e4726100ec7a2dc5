"""A base and a pilot in this process, as an answerer."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..engine.cancelled import Cancelled
from ..engine.checks import eos_token_ids
from ..engine.hf_loop import RawLogits, TokenStreamer
from ..pair import Pair
from ..speculation.rule import SwitchReason
from ..strategies.wsd.draft import Draft
from ..text.next_turn import turn_headers
from ..text.stop_strings import before_stop
from ..text.streaming import FinishReason, Likelihood, Likelihoods, Writer, WrittenAnswer, WrittenPiece
from .batching import Batcher, Waiting
from .requests import ChatRequest, End, Piece, Stripping

GATHERING = 0.02
"""Seconds for which a batch waits for more requests."""

BATCH_SIZE = 16
"""Most answers that are written at a time."""

WRITERS: tuple[Writer, Writer] = ("base", "pilot")
"""Writer of a token by whether it is the pilot's."""


class LocalAnswerer:
    """A pair that answers requests with equal settings in batches, one batch at a time.

    The pieces of an answer together are that of `Pair.answers`. A request with a seed has a batch of its own.

    Args:
        pair: the models; they and their tokenizers stay as they are.
        batch_size: most answers that are written at a time.
    """

    def __init__(self, pair: Pair, batch_size: int = BATCH_SIZE) -> None:
        tokenizers = {"tokenizer": pair.tokenizer, "pilot_tokenizer": pair.pilot_tokenizer}
        self._pair = replace(pair, **{name: _padding(tokenizer) for name, tokenizer in tokenizers.items()})
        self._size = batch_size
        self._batcher = Batcher(self._answer, GATHERING)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Piece | End, None]:
        """As `Answerer.answer`; on asyncio."""
        row = _Row(request)
        # A task of its own: one request's task runs the batch of many, and goes on when that request's client has left.
        task = asyncio.create_task(self._batcher.outcome(row, self._size))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(row.done)
        try:
            item: Piece | End | None = None
            while not isinstance(item, End):
                item = await row.next_item()
                yield item
        finally:
            row.cancelled.set()
            if not row.taken:
                task.cancel()

    def _answer(self, batch: list[_Row]) -> list[bool]:
        """Writes the answers of a batch; they are sent while they are written."""
        pair, inputs = self._pair, self._pair.inputs([row.messages for row in batch])
        streamer = _BatchStreamer(batch, pair, inputs["attention_mask"].sum(dim=1).tolist())
        criteria = [*inputs.get("stopping_criteria", ()), Cancelled([row.cancelled for row in batch])]
        if batch[0].seed is None:
            torch.seed()  # else the draws would follow from the seed of an earlier request
        else:
            torch.manual_seed(batch[0].seed)
        settings = batch[0].settings | {
            "stopping_criteria": StoppingCriteriaList(criteria),
            "streamer": streamer,
            "pad_token_id": pair.tokenizer.pad_token_id,
        }
        if settings["strategy"] is None:
            prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            if streamer.takes_likelihoods:
                settings["streamer"] = tokens = TokenStreamer(streamer)
                settings["logits_processor"] = LogitsProcessorList([RawLogits(tokens)])
            pair.base.generate(**prompts, **settings, tokenizer=pair.tokenizer)
        else:
            pair.generate(inputs, **settings)
        streamer.finish()
        return [True] * len(batch)


class _Row(Waiting):
    """A request, and the way of its answer from the thread that writes it into the event loop."""

    def __init__(self, request: ChatRequest) -> None:
        samples = request.temperature > 0
        settings: dict[str, Any] = {
            "strategy": request.strategy,
            "max_new_tokens": request.max_tokens,
            "do_sample": samples,
            "stop_strings": list(request.stop) or None,
        }
        if samples:
            settings |= {"temperature": request.temperature}
            settings |= {name: value for name in ("top_p", "top_k") if (value := getattr(request, name)) is not None}
        super().__init__(request.messages, settings, request.seed if samples else None)
        self.request = request
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Piece | End | BaseException] = asyncio.Queue()

    def send(self, item: Piece | End) -> None:
        """Sends the next part of the answer; called in the thread."""
        self.begun = True
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next_item(self) -> Piece | End:
        """The next part of the answer; raises the exception that ends it."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def done(self, task: asyncio.Task[Any]) -> None:
        """Notes the failure of the request, if any."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._items.put_nowait(error)


class _BatchStreamer(BaseStreamer):
    """Splits the tokens of a batch into answers, and sends each piece and each end as soon as it is settled."""

    takes_writers = True

    def __init__(self, rows: list[_Row], pair: Pair, prompt_tokens: list[int]) -> None:
        self.takes_likelihoods = any(row.request.likelihoods for row in rows)
        self._rows, self._prompt_tokens = rows, prompt_tokens
        self._headers = turn_headers(pair.tokenizer)
        self._texts = [WrittenAnswer(pair.tokenizer, bool(self._headers), row.request.stop) for row in rows]
        self._stripping = [Stripping() for _ in rows]
        self._eos, self._pad = eos_token_ids(pair.base.generation_config), pair.tokenizer.pad_token_id
        self._tokens: list[Counter[Writer | None]] = [Counter() for _ in rows]
        self._open = list(range(len(rows)))
        self._draft: Draft | None = None
        self._prompt_is_next = True

    def take_draft(self, draft: Draft) -> None:
        """Takes the draft of the call, which shows the switches; of two-way switching there may be several."""
        self._draft = draft if type(draft) is Draft else None

    def put(self, value: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        """Takes the prompts, [batch, prompt], and then tokens, [batch], each with its writer and likelihood."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        tokens = value.tolist()
        writers = [None] * len(tokens) if by_pilot is None else [WRITERS[drafted] for drafted in by_pilot.tolist()]
        for row in list(self._open):
            self._put(row, tokens[row], writers[row], likelihoods[row] if likelihoods else None)

    def end(self) -> None:
        """Nothing: a call that has failed is ended too."""

    def finish(self) -> None:
        """Ends the answers that are still open after the call."""
        for row in list(self._open):
            self._end(row)

    def _put(self, row: int, token: int, writer: Writer | None, likelihood: Likelihood | None) -> None:
        if token == self._pad and token not in self._eos:
            self._end(row)
            return
        text = self._texts[row]
        text.write(token, writer, likelihood)
        self._tokens[row][writer] += 1
        self._send(row, text.pieces())
        if token in self._eos or before_stop(text.text, [*self._headers, *self._rows[row].request.stop]) != text.text:
            self._end(row)
        elif self._full(row):
            self._end(row, "length")

    def _full(self, row: int) -> bool:
        return self._tokens[row].total() >= self._rows[row].request.max_tokens

    def _send(self, row: int, written: Iterable[WrittenPiece]) -> None:
        for new in written:
            for piece in self._stripping[row].add(*new):
                self._rows[row].send(piece)

    def _end(self, row: int, reason: FinishReason = "stop") -> None:
        self._open.remove(row)
        self._send(row, self._texts[row].last_pieces())
        for piece in self._stripping[row].rest():
            self._rows[row].send(piece)
        draft, tokens = self._draft, self._tokens[row]
        switch: SwitchReason | None = None
        if draft is not None:
            switch = ("budget" if self._full(row) else "stopped") if draft.drafting[row] else draft.reasons[row]
        end = End(
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens[row],
            pilot_tokens=tokens["pilot"],
            base_tokens=tokens.total() - tokens["pilot"],
            switch_index=tokens["pilot"] if switch == "confident" else -1,
            switch_reason=switch,
        )
        self._rows[row].send(end)
        self._rows[row].cancelled.set()  # its text may hold a stop string that its tokens do not


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad: a copy with the EOS as padding if it has none of its own."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
