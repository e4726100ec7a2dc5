"""Two-way switching with two vocabularies, written out: both models run anew over everything before each token, no cache."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from oracle import eos_ids
from slow_decoding import Reader
from wsd_hf.text.settled_tokens import ContinuationTokenizer

Change = tuple[int, str, str]
"""Number of response tokens before it, the writer after it, and why."""

Decode = Callable[[list[int]], str]
"""From a tokenizer's tokens to their text, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings of `two_way`, and what ends a response.

    Attributes:
        eos: tokens of the base that end it.
        pilot_eos: tokens that end a draft.
        ended: whether a criterion is met by a response.
        processors: of the base's scores; they are shown the prompt too.
    """

    threshold: float
    handback_threshold: float
    window_size: int
    max_draft_tokens: int
    draft_end: str
    budget: int
    eos: frozenset[int]
    pilot_eos: frozenset[int]
    ended: Callable[[list[int]], bool] = lambda response: False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)


@dataclass
class Expected:
    """One response, without padding.

    Attributes:
        by_pilot: for each of its tokens, whether the pilot wrote it.
        other: the base's log-probability of each token that the pilot wrote; NaN for the others.
        close: least distance of a mean from its threshold, in logarithms.
    """

    tokens: list[int] = field(default_factory=list)
    by_pilot: list[bool] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    close: float = math.inf

    def reaches(self, log_probs: list[float], window: int, threshold: float) -> bool:
        """Whether the mean over the last window is at least a threshold."""
        mean, least = math.fsum(log_probs[-window:]) / window, math.log(threshold)
        self.close = min(self.close, abs(mean - least))
        return mean >= least


def two_way(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[Any, Any],
    prompts: tuple[list[int], list[int]],
    rule: Rule,
) -> Expected:
    """One row; models, tokenizers and prompts are those of the base and of the pilot, whose contexts have room for all."""
    base, pilot = map(Reader, models, prompts)
    writing = _Writing(base, pilot, tokenizers, rule)
    while not writing.over:
        base_begun = len(writing.out.tokens)
        draft, reason = writing.draft()
        writing.take_draft(draft, reason)
        if not writing.over:
            writing.follow_base(draft, base_begun)
    return writing.out


class _Writing:
    """A response that grows until something ends it.

    Attributes:
        known: the pilot's tokens of the response, as far as they are settled.
    """

    def __init__(self, base: Reader, pilot: Reader, tokenizers: tuple[Any, Any], rule: Rule) -> None:
        self.base, self.pilot, self.rule = base, pilot, rule
        self.tokenizer, self.assistant_tokenizer = tokenizers
        self.own, self.theirs = map(ContinuationTokenizer, tokenizers)
        self.out, self.known, self.over = Expected(), list[int](), False

    def append(self, token: int, by_pilot: bool, other: float = math.nan) -> None:
        out, rule = self.out, self.rule
        out.tokens.append(token)
        out.by_pilot.append(by_pilot)
        out.other.append(other)
        self.over = len(out.tokens) >= rule.budget or token in rule.eos or rule.ended(out.tokens)

    def change(self, writer: str, reason: str) -> None:
        self.out.changes.append((len(self.out.tokens), writer, reason))

    def draft(self) -> tuple[list[int], str]:
        """The pilot's tokens of the response up to the end of a further draft, and why it ends there."""
        tokens = list(self.known)
        while len(tokens) < len(self.known) + self.rule.max_draft_tokens:
            token = int(self.pilot(tokens).argmax())
            if token in self.rule.pilot_eos:
                return tokens, "draft_ended"
            tokens.append(token)
        return tokens, "draft_limit"

    def pilots_text(self) -> Decode:
        """How a draft is read that begins now: after other text, its first token may begin with a space."""
        if self.known:
            return self.theirs.decode
        return functools.partial(self.assistant_tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def take_draft(self, draft: list[int], reason: str) -> None:
        """Writes a draft in tokens of the base, up to the switch."""
        rule = self.rule
        crossed = self.own.encode(_whole(self.assistant_tokenizer, draft[len(self.known) :], self.pilots_text()))
        if ends := [place for place, token in enumerate(crossed) if token in rule.eos]:
            crossed, reason = crossed[: ends[0]], "draft_ended"
        log_probs: list[float] = []
        for token in crossed:
            log_probs.append(float(self.base(self.out.tokens).log_softmax(-1)[token]))
            self.append(token, by_pilot=True, other=log_probs[-1])
            if len(log_probs) >= rule.window_size and self.out.reaches(log_probs, rule.window_size, rule.threshold):
                self.change("base", "confident")
                return
            if self.over:
                return
        self.change("base", reason)
        if rule.draft_end == "stop":
            self.append(min(rule.eos), by_pilot=False)
            self.over = True

    def follow_base(self, draft: list[int], begun: int) -> None:
        """Writes the base's tokens until it leaves the pilot's path; a draft began at the base's token `begun`."""
        rule, decode, first = self.rule, self.pilots_text(), len(self.known)
        taken = _settled(self.tokenizer, self.out.tokens[begun:], self.own.decode)
        texts = {end: decode(draft[first:end]) for end in range(first, len(draft) + 1)}
        before = max((text for text in texts.values() if taken.startswith(text)), key=len)
        kept = next(end for end, text in texts.items() if text == before)
        self.known = draft[:kept] + self.theirs.settled(taken[len(before) :])
        path: list[float] = []
        while not self.over:
            shown = torch.tensor([[*self.base.prompt, *self.out.tokens]])
            scores = rule.processors(shown, self.base(self.out.tokens)[None].float())
            self.append(int(scores[0].argmax()), by_pilot=False)
            tokens = self.out.tokens[begun:]
            settled = self.theirs.settled(_settled(self.tokenizer, tokens, self.own.decode)[len(before) :])
            if settled[: len(self.known) - kept] == self.known[kept:]:
                for token in settled[len(self.known) - kept :]:
                    logits = self.pilot(self.known)
                    ended = int(logits.argmax()) in rule.pilot_eos
                    path = [] if ended else [*path, float(logits.log_softmax(-1)[token])]
                    self.known = [*self.known, token]
            if self.over or len(path) < rule.window_size or self.own.decode(tokens).endswith("\ufffd"):
                continue
            if not self.out.reaches(path, rule.window_size, rule.handback_threshold):
                rest = _whole(self.tokenizer, tokens, self.own.decode)[len(before) :]
                self.known = draft[:kept] + self.theirs.encode(rest)
                self.change("pilot", "left_path")
                return


def _settled(tokenizer: Any, ids: list[int], decode: Decode) -> str:
    """Text of some tokens that no later token can change."""
    return decode(_before_bytes(tokenizer, ids)).rstrip("\ufffd")


def _whole(tokenizer: Any, ids: list[int], decode: Decode) -> str:
    """Text of some tokens, if no other follows: all but an incomplete last character."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [index for index in ids if index not in special]
    least = max(len(_before_bytes(tokenizer, ids)), len(ids) - 3)
    return max((decode(ids[:end]).rstrip("\ufffd") for end in range(least, len(ids) + 1)), key=len)


def _before_bytes(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens before a run of byte tokens at the end; special tokens are left out."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [index for index in ids if index not in special]
    while ids and re.fullmatch("<0x..>", tokenizer.convert_ids_to_tokens(ids[-1]) or ""):
        ids = ids[:-1]
    return ids


def pilot_eos(pilot: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens of a pilot that end its drafts."""
    own = tokenizer.eos_token_id
    return frozenset(eos_ids(pilot) | ({own} if own is not None else set()))
