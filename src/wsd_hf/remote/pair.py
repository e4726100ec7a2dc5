"""`RemotePair`: a base and a pilot behind two servers, called together."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import anyio
from anyio.from_thread import BlockingPortalProvider, start_blocking_portal
from transformers import PreTrainedTokenizerBase

from ..engine.numbers import check_integer, check_number, check_positive_integer, check_probability
from ..engine.strategy import check_choice
from ..errors import WSDServerError, WSDValueError
from ..pair import Chats, as_messages
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.draft import Draft
from ..text.bridge import OneVocabulary, TwoVocabularies
from ..text.chat import Messages, base_prompts, pilot_prompts
from ..text.next_turn import turn_headers
from ..text.stop_strings import StopStrings
from ..text.streaming import GrowingAnswer, Writer
from ..text.token_texts import token_texts
from ..text.vocabulary import same_vocabulary
from .answer import RemoteAnswer, RemoteCall, Writing
from .model import RemoteModel, known_model
from .server import GREEDY, Server

Tokenizer: TypeAlias = PreTrainedTokenizerBase | str | os.PathLike[str]

LOCAL = ("engine", "speculate", "cuda_graphs")
"""Settings of `WSDConfig` that concern models in this process."""

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
        sampling = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        stops = _stops(stop)
        writing = self._writing(chat, strategy, max_new_tokens, stops, **sampling)
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

    def _writing(
        self, chat: str | Messages, strategy: str | WSDConfig, max_new_tokens: int, stop: list[str], **sampling: Any
    ) -> Writing:
        """An answer that can begin; raises a WSDValueError for anything that can't work."""
        config, base, pilot = _checked(strategy), self.base, self.pilot
        messages = as_messages([chat] if isinstance(chat, str) else chat)
        if len(messages) != 1:
            raise WSDValueError(f"chat={chat!r}: must be a question, or one list of messages")
        prompt: list[int] = base_prompts(messages, base.tokenizer)["input_ids"][0].tolist()
        pilot_prompt: list[int] = pilot_prompts(messages, pilot.tokenizer)["input_ids"][0].tolist()
        room = _room("base", base, prompt) - 1  # a check of a whole answer has a token after it
        pilot_room = _room("pilot", pilot, pilot_prompt)
        stops = [*turn_headers(base.tokenizer), *stop]
        own, pilots = _fields(config.assistant_do_sample, **sampling)
        call = RemoteCall(
            config,
            prompt,
            pilot_prompt,
            budget=min(check_positive_integer("max_new_tokens", max_new_tokens), room),
            draft_limit=min(config.max_draft_tokens, pilot_room),
            stop_strings=StopStrings(base.tokenizer, stops) if stops else None,
            sampling=own,
            pilot_sampling=pilots,
        )
        draft = Draft(*config.draft_arguments([prompt], base.server.vocabulary, set(base.end_token_ids)))
        if "entropies" in draft.needs:
            raise WSDValueError(
                f"switch_criteria={config.switch_criteria!r}: needs the base's whole distributions, which servers don't give; "
                "choose 'confidence', 'relative_confidence' or 'agreement'"
            )
        return Writing(base, pilot, call, self._bridge(call), draft)

    def _bridge(self, call: RemoteCall) -> OneVocabulary | TwoVocabularies:
        base, pilot, limits = self.base, self.pilot, [call.draft_limit]
        if self.one_vocabulary:
            return OneVocabulary(base.end_token_ids | pilot.end_token_ids, limits)
        return TwoVocabularies(base.tokenizer, pilot.tokenizer, pilot.end_token_ids, limits, base.end_token_ids)


def _checked(strategy: str | WSDConfig) -> WSDConfig:
    """Settings that servers can honour; raises for others."""
    config = WSDConfig() if strategy == "wsd" else strategy
    if type(config) is not WSDConfig:
        raise WSDValueError(f"strategy={strategy!r}: over servers there are 'wsd' and WSDConfig objects; call a local Pair")
    for name in LOCAL:
        if (value := getattr(config, name)) != getattr(WSDConfig, name):
            raise WSDValueError(f"{name}={value!r} concerns models in this process, and has no effect on servers: leave it out")
    return config


def _room(name: str, model: RemoteModel, prompt: Sequence[int]) -> int:
    """Number of tokens that a model's context holds after a prompt."""
    context, least = model.server.context, 2 if name == "base" else 1
    if len(prompt) + least > context:
        raise WSDValueError(
            f"the prompt of the {name} has {len(prompt)} tokens and the context of its server holds {context}: "
            "shorten the prompt"
        )
    return context - len(prompt)


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(one, str) and one for one in stops):
        raise WSDValueError(f"stop={stop!r}: must be a text, or a list of texts, none of them empty")
    return list(stops)


def _fields(
    assistant_do_sample: bool | None, do_sample: bool, temperature: float, top_p: float, top_k: int, seed: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of sampling in the base's requests, and in the pilot's."""
    check_choice("do_sample", do_sample, (True, False))
    if not check_number("temperature", temperature, least=0):
        raise WSDValueError("temperature=0: must be above 0; for greedy answers leave do_sample out")
    if check_integer("top_k", top_k) < 0:
        raise WSDValueError(f"top_k={top_k!r}: must be at least 0")
    values = {"temperature": float(temperature), "top_p": check_probability("top_p", top_p), "top_k": int(top_k)}
    pilot_samples = do_sample if assistant_do_sample is None else assistant_do_sample
    if not do_sample and not pilot_samples and (values != {"temperature": 1, "top_p": 1, "top_k": 0} or seed is not None):
        raise WSDValueError(
            "temperature, top_p, top_k and seed have no effect without do_sample=True: leave them out, or add it"
        )

    def fields(samples: bool, writer: Writer) -> dict[str, Any]:
        # Each model draws from numbers of its own: with the same ones, the base's first choice would depend on the draft's.
        draws = {} if seed is None else {"seed": random.Random(f"{check_integer('seed', seed)} {writer}").getrandbits(62)}
        return {**GREEDY, **values, **draws} if samples else dict(GREEDY)

    return fields(do_sample, "base"), fields(pilot_samples, "pilot")
