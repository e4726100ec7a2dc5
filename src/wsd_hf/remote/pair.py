"""`RemotePair`: a base and a pilot behind two servers, called together."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import anyio
from anyio.from_thread import BlockingPortalProvider, start_blocking_portal
from transformers import PreTrainedTokenizerBase

from ..engine.numbers import check_integer
from ..errors import WSDServerError
from ..pair import Chats, as_messages
from ..strategies.wsd.config import WSDConfig
from ..text.bridge import Bridge, OneVocabulary, TwoVocabularies
from ..text.chat import Messages
from ..text.next_turn import turn_headers
from ..text.streaming import GrowingAnswer, Writer
from ..text.token_texts import token_texts
from ..text.vocabulary import same_vocabulary
from .answer import RemoteAnswer, Writing
from .call import RemoteCall, check_stop, check_strategy, prepared_call, sampling_fields
from .model import RemoteModel, known_model
from .server import Server

Tokenizer: TypeAlias = PreTrainedTokenizerBase | str | os.PathLike[str]

P = TypeVar("P", bound="RemotePair")


@dataclass(frozen=True)
class RemotePair:
    """A base and its pilot behind two servers that decode together as `Pair` does, by `strategy="wsd"`.

    The pilot's server streams the draft, the base's gives the log-probabilities of its tokens, and after the switch streams
    the rest. Prompts, switch rules, the bridge between two vocabularies and all ends of an answer are the package's own.
    Many answers may be written at a time, by any number of threads and event loops.

    Attributes:
        base, pilot: the models.
    """

    base: RemoteModel
    pilot: RemoteModel
    _portals: BlockingPortalProvider = field(default_factory=BlockingPortalProvider, init=False, repr=False, compare=False)

    @classmethod
    def connect(
        cls: type[P],
        base: Server | str,
        pilot: Server | str,
        tokenizer: Tokenizer | None = None,
        pilot_tokenizer: Tokenizer | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> P:
        """Finds the models, reads their tokenizers, and checks that the servers can do all that is needed.

        Args:
            base: the base's server, or its URL.
            pilot: the pilot's.
            tokenizer: the base's, or its folder or Hub id, where its generation config names the EOS too. Default: the name
                that the server has for the model.
            pilot_tokenizer: the pilot's, which must have a chat template.
            trust_remote_code: whether code that comes with a tokenizer may run.

        Raises:
            WSDServerError: a server that can't be reached, or lacks something, which is named.
            WSDHubError: a tokenizer that can't be had.
            WSDValueError: an illegal argument.
        """
        servers = [one if isinstance(one, Server) else Server(one) for one in (base, pilot)]
        with start_blocking_portal() as portal:
            found = [portal.call(server.found) for server in servers]
            pair = cls(
                known_model(found[0], tokenizer, "base", trust_remote_code),
                known_model(found[1], pilot_tokenizer, "pilot", trust_remote_code),
            )
            portal.call(pair.base.check, True)
            portal.call(pair.pilot.check, False)
        if not pair.one_vocabulary:
            token_texts(pair.tokenizer)  # a second's work for the first answer, which would keep others waiting
        return pair

    def __reduce__(self) -> tuple[type[RemotePair], tuple[RemoteModel, RemoteModel]]:
        """A copy, also in another process, has event loops of its own."""
        return type(self), (self.base, self.pilot)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return self.base.tokenizer

    @property
    def pilot_tokenizer(self) -> PreTrainedTokenizerBase:
        """The pilot's."""
        return self.pilot.tokenizer

    @property
    def one_vocabulary(self) -> bool:
        """True if token ids mean the same to both models."""
        return same_vocabulary(self.base.server.vocabulary, self.pilot.server.vocabulary, self.tokenizer, self.pilot_tokenizer)

    async def stream(
        self,
        chat: str | Messages,
        strategy: str | WSDConfig = "wsd",
        *,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> AsyncGenerator[tuple[str, Writer] | RemoteAnswer, None]:
        """Answers a chat: pieces of text with their writers, "pilot" or "base", and at last the `RemoteAnswer`.

        A piece comes as soon as no later token can change it. Closing the iterator ends the requests.

        Args:
            chat: a question, or a list of messages.
            strategy: "wsd", or its settings. `chunk` is the number of drafted tokens that are checked at first; each further
                check takes twice as many as the one before.
            max_new_tokens: most tokens of the answer, as far as the base's context reaches.
            do_sample: whether the base samples, and the pilot unless `assistant_do_sample` is set.
            temperature, top_p, top_k: of the sampling, of both models; 0 leaves `top_k` out.
            seed: of the sampling. The servers get numbers made from it, one for each model, so that their draws differ.
            stop: texts that end the answer.

        Raises:
            WSDValueError: an illegal argument, or a prompt that doesn't fit a context; before any request.
            WSDServerError: a server refuses, fails at every attempt, or stops in the middle; `.text` has the text so far.
        """
        stops = check_stop(stop)
        config = check_strategy(strategy)
        sampling = sampling_fields(config.assistant_do_sample, do_sample, temperature, top_p, top_k, seed)
        writing = self._writing(prepared_call(self.base, self.pilot, chat, config, max_new_tokens, stops, *sampling))
        answer = GrowingAnswer(self.tokenizer, transcript=bool(turn_headers(self.tokenizer)), stop_strings=stops)
        try:
            async with aclosing(writing.tokens()) as written:
                async for tokens, writer in written:
                    answer.add(tokens, writer)
                    for piece in answer.more(answer.settled):
                        yield piece
        except WSDServerError as error:
            error.text = answer.answer
            raise
        for piece in answer.more(answer.answer):
            yield piece
        yield writing.answer(answer.answer.strip())

    def generate(
        self, chats: Chats, strategy: str | WSDConfig = "wsd", *, seed: int | None = None, **settings: Any
    ) -> list[RemoteAnswer]:
        """Answers chats, all at once.

        Args:
            chats: a question, a chat (a list of messages), or a list of either.
            strategy, **settings: as for `stream`.
            seed: of the first answer; the next ones have the numbers after it.

        Raises:
            WSDValueError, WSDServerError: as for `stream`; the first error ends all answers.
        """
        messages = as_messages(chats)
        seeds = [None if seed is None else check_integer("seed", seed) + row for row in range(len(messages))]

        async def answers() -> list[RemoteAnswer]:
            return await self._answers([(chat, one) for chat, one in zip(messages, seeds, strict=True)], strategy, settings)

        with self._portals as portal:
            future = portal.start_task_soon(answers)
            try:
                found: list[RemoteAnswer] = future.result()
                return found
            except BaseException:  # such as Ctrl-C
                future.cancel()
                raise

    async def _answers(self, asked: Sequence[tuple[Messages, int | None]], strategy: Any, settings: Any) -> list[RemoteAnswer]:
        answers: dict[int, RemoteAnswer] = {}
        failures: list[Exception] = []
        async with anyio.create_task_group() as group:

            async def answer(row: int, chat: Messages, seed: int | None) -> None:
                try:
                    async with aclosing(self.stream(chat, strategy, seed=seed, **settings)) as pieces:
                        async for piece in pieces:
                            if isinstance(piece, RemoteAnswer):
                                answers[row] = piece
                except Exception as failure:
                    failures.append(failure)
                    group.cancel_scope.cancel()

            for row, (chat, seed) in enumerate(asked):
                group.start_soon(answer, row, chat, seed)
        if failures:
            raise failures[0]
        return [answers[row] for row in range(len(asked))]

    def _writing(self, call: RemoteCall) -> Writing:
        """An answer that can begin."""
        base, pilot, limits = self.base, self.pilot, [call.draft_limit]
        if self.one_vocabulary:
            bridge: Bridge = OneVocabulary(base.end_token_ids | pilot.end_token_ids, limits)
        else:
            bridge = TwoVocabularies(base.tokenizer, pilot.tokenizer, pilot.end_token_ids, limits, base.end_token_ids)
        return Writing(base, pilot, call, bridge, call.draft(base))
