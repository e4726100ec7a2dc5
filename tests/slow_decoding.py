"""Slow decoding: the rule of every strategy, written out on forwards over everything and without a cache.

The oracle of all engines. A rule gives the scores that a row's next token is chosen from. `slow_response` writes a row with it,
one token after the other; `slow_distribution` gives the probability of every response. Processors and criteria are prepared by
transformers' plain `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from oracle import ones
from wsd_hf.engine.sampling import SAMPLING_WARPERS

Shape = Callable[[torch.Tensor], torch.Tensor]
"""From scores to scores, [V]."""

Formula = Callable[..., torch.Tensor]
"""Scores [V] from the raw logits of base, pilot and reference, each [V]."""

Switch = Callable[[list[int], torch.Tensor], bool]
"""Whether the newest token of a draft is its last, from its token ids and the base's log-probabilities [draft, V]."""


class Reader:
    """Raw logits of a model after a prompt and a response, float64 [V]; every forward reads all of them.

    `ahead` is a response that will probably be asked for: one forward gives the logits at all of its places.
    """

    def __init__(self, model: PreTrainedModel, prompt: list[int], ahead: list[int] | None = None) -> None:
        self.model, self.prompt, self.ahead = model, prompt, ahead or []
        self._at = self._read(self.ahead)

    def __call__(self, response: list[int]) -> torch.Tensor:
        known = response == self.ahead[: len(response)]
        return self._at[len(response)] if known else self._read(response)[-1]

    @torch.no_grad()
    def _read(self, response: list[int]) -> torch.Tensor:
        ids = torch.tensor([self.prompt + response])
        logits: torch.Tensor = self.model(ids, attention_mask=ones(ids), use_cache=False).logits
        return logits[0, len(self.prompt) - 1 :].double()


class Rule:
    """One row's rule, which is asked for each token of one response, in order.

    Attributes:
        by_pilot: whether each token asked for so far is the pilot's; None where every token is the work of several models.
    """

    by_pilot: list[bool] | None = None

    def scores(self, response: list[int], process: Shape, pilots: Shape) -> torch.Tensor:
        """Scores that the token after `response` is chosen from, [V].

        Args:
            response: token ids so far.
            process: the caller's processors and warpers.
            pilots: from the pilot's raw logits to the scores that it chooses from.
        """
        raise NotImplementedError


def slow_response(base: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, rule: Rule, **settings: Any) -> list[int]:
    """The greedy response of one row; `settings` are keywords of plain `generate`.

    Args:
        base: whose processors and criteria are prepared.
        ids: the prompt with its padding, [1, prompt], since processors see it.
        mask: [1, prompt].
        rule: of the strategy.
    """
    start = ids.shape[1]

    def loop(
        model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **_others: Any
    ) -> torch.Tensor:
        ended = False
        while not ended:
            prefix = input_ids
            scores = rule.scores(prefix[0, start:].tolist(), _shape(logits_processor, prefix), lambda logits: logits)
            input_ids = torch.cat([prefix, scores.argmax()[None, None]], dim=1)
            ended = bool(stopping_criteria(input_ids, None))
        return input_ids

    out = base.generate(ids, attention_mask=mask, custom_generate=loop, do_sample=False, **settings)
    response: list[int] = out[0, start:].tolist()
    return response


def slow_distribution(
    base: PreTrainedModel, prompt: list[int], rule: Callable[[], Rule], length: int, pilot_samples: bool, **settings: Any
) -> torch.Tensor:
    """The probability of each sampled response of `length` tokens without an end, float64 [V, ..., V]."""
    vocabulary = base.config.vocab_size
    processors = prepared_processors(base, torch.tensor([prompt]), max_new_tokens=length, **settings)
    warpers = LogitsProcessorList(one for one in processors if type(one) in SAMPLING_WARPERS)

    def after(response: list[int]) -> torch.Tensor:
        if len(response) == length:
            return torch.ones((), dtype=torch.float64)
        asked = rule()
        for end in range(len(response) + 1):
            prefix = torch.tensor([prompt + response[:end]])
            warp = _shape(warpers, prefix)
            choice = warp if pilot_samples else (lambda logits: forced(int(logits.argmax()), logits))
            scores = asked.scores(response[:end], _shape(processors, prefix), choice)
        probabilities = scores.double().softmax(-1)
        return torch.stack([probabilities[token] * after([*response, token]) for token in range(vocabulary)])

    return after([])


def prepared_processors(base: PreTrainedModel, ids: torch.Tensor, **settings: Any) -> LogitsProcessorList:
    """The processors and warpers of a call of plain `generate` that samples."""

    def loop(model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_others: Any) -> Any:
        return logits_processor

    processors: LogitsProcessorList = base.generate(
        ids, attention_mask=ones(ids), custom_generate=loop, do_sample=True, **settings
    )
    return processors


def _shape(processors: LogitsProcessorList, prefix: torch.Tensor) -> Shape:
    """Processors after a prefix, [1, length], on float32 scores as in transformers."""
    return lambda scores: processors(prefix, scores[None].float().clone())[0]


def forced(token: int, like: torch.Tensor) -> torch.Tensor:
    """Scores that leave one token."""
    return torch.full_like(like, -torch.inf).index_fill(0, torch.tensor([token]), 0.0)


# Targets: one formula over the logits


class OfFormula(Rule):
    """Every token is chosen from a formula over the logits of some models."""

    def __init__(self, formula: Formula, *readers: Reader) -> None:
        self.formula, self.readers = formula, readers

    def scores(self, response: list[int], process: Shape, pilots: Shape) -> torch.Tensor:
        return process(self.formula(*(reader(response) for reader in self.readers)))


def emulated_fine_tuning(beta: float) -> Formula:
    return lambda base, tuned, reference: base + beta * (tuned - reference)


def product(alpha: float) -> Formula:
    return lambda base, pilot: base.log_softmax(-1) + alpha * pilot.log_softmax(-1)


def ensemble(weight: float) -> Formula:
    return lambda base, pilot: (weight * base.softmax(-1) + (1 - weight) * pilot.softmax(-1)).log()


def blend(threshold: float) -> Formula:
    def formula(base: torch.Tensor, pilot: torch.Tensor) -> torch.Tensor:
        p, q = base.softmax(-1), pilot.softmax(-1)
        if p.max() >= threshold:
            return p.log()
        share = (q.max() / (p.max() + q.max()) + 0.1 * p[q.argmax()]).clamp(0, 1)
        return ((1 - share) * p + share * q).log()

    return formula


# Weak-to-Strong Decoding


class Drafting(Rule):
    """The rule of WSD: the pilot's tokens up to the switch, then the base's.

    Args:
        ends: tokens of a greedy pilot that end its draft.
        limit: most tokens of the draft.
        closing: ends the response after a draft that ended unconfirmed; None: the base writes on.
    """

    def __init__(
        self, base: Reader, pilot: Reader, ends: set[int], switch: Switch, limit: int, closing: int | None = None
    ) -> None:
        self.base, self.pilot = base, pilot
        self.ends, self.switch, self.limit, self.closing = ends, switch, limit, closing
        self.drafting, self.begin = True, 0
        self.by_pilot: list[bool] = []

    def scores(self, response: list[int], process: Shape, pilots: Shape) -> torch.Tensor:
        base, unconfirmed = self.base(response), False
        draft = response[self.begin :]
        if self.drafting and draft:
            before = [self.base(response[:end]).log_softmax(-1) for end in range(self.begin, len(response))]
            self.drafting = not self.switch(draft, torch.stack(before))
        if self.drafting:
            pilot = pilots(self.pilot(response))
            unconfirmed = len(draft) == self.limit or int(pilot.argmax()) in self.ends
            self.drafting = not unconfirmed
        self.by_pilot.append(self.drafting)
        if self.drafting:
            return pilot
        return forced(self.closing, base) if unconfirmed and self.closing is not None else process(base)


class TwoWay(Drafting):
    """The rule of two-way switching: WSD, and a further draft where the base's last tokens are improbable to the pilot.

    Args:
        drafting: of `Drafting`.
        handback: least geometric mean of the pilot's probabilities.
        window: tokens that it is over, counted from the last change, or place where the pilot would have ended the response.
        switch_after: the switch of a draft that begins after a response.
    """

    def __init__(self, *drafting: Any, handback: float, window: int, switch_after: Callable[[list[int]], Switch]) -> None:
        super().__init__(*drafting)
        self.least, self.window, self.switch_after = math.log(handback), window, switch_after
        self.path: list[float] = []

    def scores(self, response: list[int], process: Shape, pilots: Shape) -> torch.Tensor:
        if response and not self.drafting:
            pilot = self.pilot(response[:-1])
            ended = int(pilot.argmax()) in self.ends
            self.path = [] if ended else [*self.path, float(pilot.log_softmax(-1)[response[-1]])][-self.window :]
            if len(self.path) == self.window and math.fsum(self.path) / self.window < self.least:
                self.drafting, self.begin, self.path, self.switch = True, len(response), [], self.switch_after(response)
        return super().scores(response, process, pilots)


MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "confidence": lambda chosen, all_of_them: chosen,
    "relative_confidence": lambda chosen, all_of_them: chosen - all_of_them.amax(-1),
    "entropy": lambda chosen, all_of_them: (all_of_them.exp() * all_of_them).sum(-1),
    "agreement": lambda chosen, all_of_them: (chosen == all_of_them.amax(-1)).double(),
}
"""Opinions of drafted tokens, [draft], by rule: from log-probabilities of these tokens and of all tokens."""

BOUNDS: dict[str, Callable[[float], float]] = {
    "confidence": math.log,
    "relative_confidence": math.log,
    "entropy": lambda threshold: -threshold,
    "agreement": float,
}
"""Least mean of the measure within a window, from a threshold."""


def switch_rule(name: str, threshold: float, window: int, prompt: list[int] | None) -> Switch:
    """A switch rule by name; with a prompt, tokens that complete a 4-gram of the text so far don't count."""

    def ends(draft: list[int], log_probs: torch.Tensor) -> bool:
        counts = [prompt is None or not _repeats([*prompt, *draft[: place + 1]]) for place in range(len(draft))]
        measures = MEASURES[name](log_probs[range(len(draft)), draft], log_probs)[torch.tensor(counts)]
        return counts[-1] and len(measures) >= window and float(measures[-window:].mean()) >= BOUNDS[name](threshold)

    return ends


def _repeats(text: list[int]) -> bool:
    return any(text[start : start + 4] == text[-4:] for start in range(len(text) - 4))


# Nudging


class Nudging(Rule):
    """The rule of nudging for a greedy pilot: its next word wherever the base is unsure.

    Args:
        ends: tokens of the pilot that end a response.
        eos: tokens of the base that end it.
        tokenizer: in which the first token of a word begins with its space.
    """

    LONGEST = 16

    def __init__(
        self,
        base: Reader,
        pilot: Reader,
        ends: set[int],
        eos: set[int],
        threshold: float,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.base, self.pilot, self.ends, self.eos = base, pilot, ends, eos
        self.threshold, self.tokenizer = threshold, tokenizer
        self.by_pilot: list[bool] = []
        self.rest: list[int] = []

    def scores(self, response: list[int], process: Shape, pilots: Shape) -> torch.Tensor:
        base = self.base(response)
        if not self.rest:
            own, unsure = process(base), bool(base.softmax(-1).max() < self.threshold)
            after_a_word = self.by_pilot[-1:] == [True]
            over = (unsure or after_a_word) and self._next(response) in self.ends
            may_end = bool(self.eos) and float(own[min(self.eos)]) > -torch.inf
            self.rest = [min(self.eos)] if over and may_end else self._word(response) if unsure else []
            self.by_pilot.append(bool(self.rest))
            if not self.rest:
                return own
        else:
            self.by_pilot.append(True)
        return forced(self.rest.pop(0), base)

    def _next(self, response: list[int]) -> int:
        return int(self.pilot(response).argmax())

    def _word(self, response: list[int]) -> list[int]:
        word: list[int] = []
        while len(word) < self.LONGEST and (token := self._next(response + word)) not in self.ends:
            text = "".join(map(self._text, word)).lstrip(" ")
            if " " in text or (text and self._text(token).startswith(" ")):
                break
            word.append(token)
        return word

    def _text(self, token: int) -> str:
        """Special tokens have none."""
        text: str = "" if token in self.tokenizer.all_special_ids else self.tokenizer.convert_ids_to_tokens(token)
        return text
