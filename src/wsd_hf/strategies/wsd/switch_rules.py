"""Switch rules: criteria that let the base take over where it finds the last drafted tokens good enough; each has a name."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from transformers import StoppingCriteria

from ...engine.numbers import check_number, check_positive_integer, check_probability
from ...engine.strategy import check_choice
from ...errors import WSDValueError
from ...speculation.rule import Drafted
from .switch import window_mean

REPEATED = 4
"""Tokens of an n-gram whose later occurrences are repetitions."""


class SwitchRule(StoppingCriteria):
    """A criterion that fires where the mean of a measure over the last drafted tokens is at least a bound; stateless.

    A subclass is a measure of one drafted token, with a threshold and a window of its own as defaults.

    Args:
        threshold: as the subclass takes it.
        bound: least mean of the measure.
        window_size: w >= 1; windows cover drafted tokens only, so none is full before token w.
        ignore_repeats: if True, tokens do not count that complete a 4-gram which the base's prompt and the draft hold already.
            The window is then over the last w tokens that count, and the rule fires at such a token only.

    Attributes:
        needs: arguments of a call that the rule cannot do without, beside drafted tokens and their log-probabilities.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Arguments that the measure is made from."""

    reached: ClassVar[str]
    """Words for a measure that reached its threshold."""

    def __init__(self, threshold: float, bound: float, window_size: int, ignore_repeats: bool) -> None:
        check_choice("ignore_repeats", ignore_repeats, (True, False))
        self.threshold, self.ignore_repeats = threshold, ignore_repeats
        self.window_size = check_positive_integer("window_size", window_size)
        self.needs = (*self.reads, "prompts") if ignore_repeats else self.reads
        self._bound = bound

    def measure(self, drafted: Drafted) -> float:
        """The base's opinion of one drafted token, the higher the better; NaN where a row drafted nothing."""
        raise NotImplementedError

    def fires(self, measures: Sequence[float]) -> bool:
        """True if a row's newest token is the last of its draft; `measures` are those of its tokens that count."""
        return len(measures) >= self.window_size and window_mean(measures[-self.window_size :]) >= self._bound

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        best_log_probs: torch.Tensor | None = None,
        entropies: torch.Tensor | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Rows whose newest drafted token is the last of its draft.

        Args:
            input_ids: drafted tokens so far, newest last, [batch, drafted].
            scores: the base's log-probabilities of them, [batch, drafted]; NaN where a row drafted nothing.
            best_log_probs: log-probabilities of the base's likeliest tokens in their places, [batch, drafted].
            entropies: of the base's distributions there, in nats, [batch, drafted].
            prompts: token ids of the base's prompt in each row, without padding.

        Returns:
            BoolTensor[batch].

        Raises:
            WSDValueError: an argument is missing that the rule needs.
        """
        given = {"best_log_probs": best_log_probs, "entropies": entropies, "prompts": prompts}
        for name in self.needs:
            if given[name] is None:
                raise WSDValueError(
                    f"{name}=None: {type(self).__name__} needs them; a criterion that calls it must take and pass {name}="
                )
        nothing = torch.full_like(scores, torch.nan)
        best_log_probs = nothing if best_log_probs is None else best_log_probs
        entropies = nothing if entropies is None else entropies
        columns = (input_ids, scores, best_log_probs, entropies)
        drafts = zip(*(column.tolist() for column in columns), strict=True)
        texts = [()] * len(scores) if prompts is None else prompts
        fired = [self._ends(map(Drafted, *draft), prompt) for draft, prompt in zip(drafts, texts, strict=True)]
        return torch.tensor(fired, dtype=torch.bool, device=scores.device)

    def _ends(self, draft: Iterable[Drafted], prompt: Iterable[int]) -> bool:
        """True if a whole draft's newest token is its last."""
        switch, ends = RowSwitch(self, prompt), False
        for drafted in draft:
            ends = switch.ends(drafted)
        return ends


class SwitchCriteria(SwitchRule):
    """The rule `confidence`, which is the paper's: confidence is at least the threshold.

    Confidence is the geometric mean of the base's probabilities of the last drafted tokens (arXiv 2506.07434, auto-switch).
    Any other `StoppingCriteria` may take its place in `generate(..., switch_criteria=...)`; it is called after every drafted
    token.

    Args:
        threshold: γ in (0, 1]; equality crosses.
        window_size: as for `SwitchRule`.
        ignore_repeats: as for `SwitchRule`.

    >>> SwitchCriteria(threshold=0.5, window_size=1)(torch.tensor([[7], [8]]), torch.tensor([[-0.1], [-3.0]])).tolist()
    [True, False]
    """

    reached = "confidence reached"

    def __init__(self, threshold: float = 0.8, window_size: int = 6, *, ignore_repeats: bool = False) -> None:
        threshold = check_probability("threshold", threshold)
        super().__init__(threshold, math.log(threshold), window_size, ignore_repeats)

    def measure(self, drafted: Drafted) -> float:
        """The log-probability of a drafted token."""
        return drafted.log_prob


class RelativeConfidenceCriteria(SwitchRule):
    """The rule `relative_confidence`: the base finds the drafted tokens almost as likely as its own first choices.

    Relative confidence is the geometric mean of p(token) / max p over the last drafted tokens, so it does not depend on how
    sure of itself a base is in general.

    Args:
        threshold: in (0, 1]; equality crosses.
        window_size: as for `SwitchRule`.
        ignore_repeats: as for `SwitchRule`.

    >>> tokens, log_probs, best = torch.tensor([[7, 8]]), torch.tensor([[-2.0, -3.0]]), torch.tensor([[-2.0, -2.9]])
    >>> RelativeConfidenceCriteria(threshold=0.9, window_size=2)(tokens, log_probs, best_log_probs=best).tolist()
    [True]
    """

    reads = ("best_log_probs",)
    reached = "relative confidence reached"

    def __init__(self, threshold: float = 0.8, window_size: int = 8, *, ignore_repeats: bool = False) -> None:
        threshold = check_probability("threshold", threshold)
        super().__init__(threshold, math.log(threshold), window_size, ignore_repeats)

    def measure(self, drafted: Drafted) -> float:
        """The log-probability of a drafted token, less that of the base's first choice."""
        return drafted.log_prob - drafted.best_log_prob


class EntropyCriteria(SwitchRule):
    """The rule `entropy`: the base is sure of the next token, whichever that is.

    The mean of the base's entropies at the last drafted tokens is at most the threshold.

    Args:
        threshold: in nats, at least 0; equality crosses.
        window_size: as for `SwitchRule`.
        ignore_repeats: as for `SwitchRule`.

    >>> tokens, log_probs, entropies = torch.tensor([[7, 8]]), torch.tensor([[-2.0, -3.0]]), torch.tensor([[0.5, 0.7]])
    >>> EntropyCriteria(threshold=0.5, window_size=2)(tokens, log_probs, entropies=entropies).tolist()
    [False]
    """

    reads = ("entropies",)
    reached = "entropy fell to"

    def __init__(self, threshold: float = 0.5, window_size: int = 8, *, ignore_repeats: bool = False) -> None:
        threshold = check_number("threshold", threshold, least=0)
        super().__init__(threshold, -threshold, window_size, ignore_repeats)

    def measure(self, drafted: Drafted) -> float:
        """The base's entropy where a token was drafted, times -1."""
        return -drafted.entropy


class AgreementCriteria(SwitchRule):
    """The rule `agreement`: the base would have chosen most of the last drafted tokens itself.

    Agreement is the share of the window's tokens that were the base's first choice.

    Args:
        threshold: in (0, 1]; equality crosses.
        window_size: as for `SwitchRule`.
        ignore_repeats: as for `SwitchRule`.

    >>> tokens, log_probs, best = torch.tensor([[7, 8]]), torch.tensor([[-2.0, -3.0]]), torch.tensor([[-2.0, -2.9]])
    >>> AgreementCriteria(threshold=0.5, window_size=2)(tokens, log_probs, best_log_probs=best).tolist()
    [True]
    """

    reads = ("best_log_probs",)
    reached = "agreement reached"

    def __init__(self, threshold: float = 0.8, window_size: int = 8, *, ignore_repeats: bool = False) -> None:
        threshold = check_probability("threshold", threshold)
        super().__init__(threshold, threshold, window_size, ignore_repeats)

    def measure(self, drafted: Drafted) -> float:
        """1 for the base's first choice, 0 for another token."""
        return math.nan if math.isnan(drafted.log_prob) else float(drafted.log_prob == drafted.best_log_prob)


SwitchRuleName = Literal["confidence", "relative_confidence", "entropy", "agreement"]

SWITCH_RULES: Mapping[str, type[SwitchRule]] = MappingProxyType(
    {
        "confidence": SwitchCriteria,
        "relative_confidence": RelativeConfidenceCriteria,
        "entropy": EntropyCriteria,
        "agreement": AgreementCriteria,
    }
)
"""The rules by name, as in `generate(..., switch_criteria=name)`."""

DISTRIBUTIONS = ("best_log_probs", "entropies")
"""Arguments of a criterion that are made from the base's whole distributions, in the order of `Drafted`."""


class RowSwitch:
    """A switch rule at work on one row's draft, token by token.

    `prompt` are the token ids of what the base has read before the draft.
    """

    def __init__(self, rule: SwitchRule, prompt: Iterable[int]) -> None:
        self._rule, self._measures = rule, list[float]()
        self._text = GrowingText(prompt) if rule.ignore_repeats else None

    def ends(self, drafted: Drafted) -> bool:
        """Takes the next drafted token; True if it is the last."""
        if self._text is not None and self._text.repeats(drafted.token):
            return False
        self._measures.append(self._rule.measure(drafted))
        return self._rule.fires(self._measures)


class GrowingText:
    """Tokens that grow, and their n-grams."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._last: deque[int] = deque(maxlen=REPEATED)
        self._ngrams: set[tuple[int, ...]] = set()
        for token in tokens:
            self.repeats(token)

    def repeats(self, token: int) -> bool:
        """Appends a token; True if it completes an n-gram that occurred before."""
        self._last.append(token)
        ngram = tuple(self._last)
        known = ngram in self._ngrams
        self._ngrams.add(ngram)
        return known
