"""One answer of a base and a pilot behind servers: the draft, its checks, and the base's continuation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from ..engine.checks import check_shared
from ..speculation.rule import Drafted, SwitchReason
from ..strategies.wsd.draft import Draft
from ..text.bridge import Bridge, DraftOver, Offer
from ..text.streaming import FinishReason, Writer
from .call import RemoteCall
from .model import RemoteModel
from .server import Tokens

FIRST_CHECK = 16
"""Least tokens of a draft that are checked at first. Each check reads prompt and draft again, so the next ones take twice as
many as the one before."""


@dataclass
class ServerWork:
    """Work of one server for one answer, as far as its client saw it.

    Attributes:
        requests: that were answered.
        prompt_tokens: of all of them. A check reads its prompt whole, a continuation may find it in the server's cache.
        forwards: one for each check, and for each token of a stream.
    """

    requests: int = 0
    prompt_tokens: int = 0
    forwards: int = 0

    def begin(self, prompt_tokens: int) -> None:
        """Counts a request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens


@dataclass(frozen=True)
class RemoteAnswer:
    """An answer, its draft, and the work done.

    Attributes:
        text: without special tokens, stop strings and the header of a next turn.
        token_ids: of the base's vocabulary, the EOS included.
        prompt_length: tokens of the base's prompt.
        draft_length: tokens that the pilot wrote.
        switch_index: the paper's k, number of the drafted token, counted from 1, at which the base became confident; -1 if it
            never did.
        switch_reason: end of the pilot's part, as in `WSDOutput`.
        draft_log_probs: the base's natural-log probabilities of the drafted tokens.
        finish_reason: "stop" for an EOS or a stop string, "length" for a full budget.
        base, pilot: work of the servers.
    """

    text: str
    token_ids: list[int]
    prompt_length: int
    draft_length: int
    switch_index: int
    switch_reason: SwitchReason
    draft_log_probs: list[float]
    finish_reason: FinishReason
    base: ServerWork
    pilot: ServerWork


@dataclass
class Writing:
    """An answer that is being written.

    Attributes:
        token_ids: so far.
        finish_reason: None until the answer has ended.
    """

    base: RemoteModel
    pilot: RemoteModel
    call: RemoteCall
    bridge: Bridge
    draft: Draft
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    base_work: ServerWork = field(default_factory=ServerWork)
    pilot_work: ServerWork = field(default_factory=ServerWork)

    async def tokens(self) -> AsyncGenerator[tuple[list[int], Writer], None]:
        """Writes the answer; returns its tokens as they become certain."""
        async with aclosing(self._drafted()) as pieces:
            async for piece in pieces:
                yield piece, "pilot"
        if not self.finish_reason and (closing := self.draft.closing()):
            yield self._append([closing[0]]), "base"
        if not self.finish_reason:
            async with aclosing(self._continued()) as pieces:
                async for piece in pieces:
                    yield piece, "base"
        if len(self.token_ids) < self.call.budget:
            self.draft.stop(0, "stopped")

    def answer(self, text: str) -> RemoteAnswer:
        """The finished answer, whose text is given."""
        (length,), (reason,) = self.draft.lengths, self.draft.reasons
        return RemoteAnswer(
            text,
            self.token_ids,
            prompt_length=len(self.call.prompt),
            draft_length=length,
            switch_index=length if reason == "confident" else -1,
            switch_reason=reason,
            draft_log_probs=self.draft.log_probs[0],
            finish_reason=self.finish_reason or "stop",
            base=self.base_work,
            pilot=self.pilot_work,
        )

    async def _drafted(self) -> AsyncGenerator[list[int], None]:
        """The draft, from check to check."""
        config, limit = self.call.config, self.call.draft_limit
        ends = self.bridge.end_token_ids
        most = min(limit, self.call.budget) if self.bridge.token_by_token else limit
        stream = self.pilot.server.stream(self.call.pilot_prompt, most, self.call.pilot_sampling, ends)
        self.pilot_work.begin(len(self.call.pilot_prompt))
        size = config.chunk or max(FIRST_CHECK, config.window_size)
        async with aclosing(stream):
            while self.draft.drafting[0] and not self.finish_reason:
                offer = await self._offer(stream, size)
                if offer.tokens:
                    yield self._take(await self._scored(offer.tokens), offer.over)
                if offer.over and not self.finish_reason:
                    self.draft.stop(0, offer.over)
                size *= 2

    async def _offer(self, stream: AsyncGenerator[Tokens, None], size: int) -> Offer:
        """The next tokens of the draft, at least so many, unless there are no more or the answer is full."""
        room = self.call.budget - len(self.token_ids)
        offered, over = list[int](), None
        while len(offered) < min(size, room) and not over:
            tokens, over = self.bridge.offer(0, await self._proposed(stream, min(size, room) - len(offered)))
            offered += tokens
        return Offer(offered[:room], over)

    async def _proposed(self, stream: AsyncGenerator[Tokens, None], size: int) -> list[int]:
        """The pilot's next tokens, at least so many, unless it ends its draft before: a bridge takes many as fast as one."""
        proposed, ends = list[int](), self.bridge.end_token_ids
        while len(proposed) < size and ends.isdisjoint(proposed):
            tokens = await anext(stream)
            self.pilot_work.forwards += len(tokens.ids)
            proposed += tokens.ids
            if tokens.finish == "length":
                break
            if tokens.finish and ends.isdisjoint(proposed):  # a server that leaves out the token that ended it
                if not ends:
                    raise self.pilot.server.failure("ended a draft, and neither tokenizer nor configs name an EOS")
                proposed.append(min(ends))
        return proposed

    async def _scored(self, tokens: list[int]) -> list[Drafted]:
        check_shared(max(tokens), self.base.server.vocabulary)
        before = [*self.call.prompt, *self.token_ids]
        self.base_work.begin(len(before) + len(tokens))
        self.base_work.forwards += 1
        return await self.base.server.score(before, tokens, best="best_log_probs" in self.draft.needs)

    def _take(self, drafted: list[Drafted], over: DraftOver | None) -> list[int]:
        """Takes drafted tokens up to the switch or the answer's end; returns those taken."""
        begun = len(self.token_ids)
        for place, one in enumerate(drafted, start=1):
            self.draft.take({0: one})
            if place == len(drafted) and over == "draft_limit" and self.bridge.token_by_token:
                self.draft.stop(0, over)
            self._append([one.token])
            if self.finish_reason or not self.draft.drafting[0]:
                break
        return self.token_ids[begun:]

    async def _continued(self) -> AsyncGenerator[list[int], None]:
        """The base's tokens after the draft."""
        prompt, room = [*self.call.prompt, *self.token_ids], self.call.budget - len(self.token_ids)
        stream = self.base.server.stream(prompt, room, self.call.sampling, self.base.end_token_ids)
        self.base_work.begin(len(prompt))
        async with aclosing(stream):
            async for tokens in stream:
                self.base_work.forwards += len(tokens.ids)
                yield self._append(tokens.ids)
                if self.finish_reason:
                    return
        self.finish_reason = "stop"  # at a token that only the server takes for an end

    def _append(self, tokens: list[int]) -> list[int]:
        """Appends tokens up to the answer's end; returns those appended."""
        begun = len(self.token_ids)
        for token in tokens:
            self.token_ids.append(token)
            stops = self.call.stop_strings
            if token in self.base.end_token_ids or (stops and stops.ends(self.call.prompt, self.token_ids)):
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.call.budget:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        return self.token_ids[begun:]
