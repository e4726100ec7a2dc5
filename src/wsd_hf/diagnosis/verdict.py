"""A diagnosis in words: whether the rule fires, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..strategies.wsd.switch_rules import SwitchCriteria, SwitchRule
from .measures import by_position, firing, first_choice_share, highest_confidence, rule_name
from .reading import Reading

RARELY = 0.5
"""Share of drafts in which a rule must fire, or it fires rarely."""

ON_REPETITION = 0.25
"""Share of switches on repeated text from which repetition counts as a cause."""

INTERVENTIONS = 0.2
"""Share of tokens that are not the base's first choice, above which the base and the pilot write different texts."""

WALL = 0.2
"""The base's mean probability of first tokens below which the beginning of an answer is what it would not write."""


def verdict(drafts: Sequence[Reading], own: Sequence[Reading], rule: SwitchRule) -> list[str]:
    """Sentences about a rule on some drafts, and on the base's own answers if there are any. They name no best setting."""
    if not any(draft.tokens for draft in drafts):
        return ["The pilot ended every draft at once, so there is nothing to read. Does it get the right chat template?"]
    return [*_beginning(drafts), *_firing(drafts, rule), *_own(own, rule), *_interventions(drafts)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _shown(rule: SwitchRule) -> str:
    ignoring = ", repeats ignored" if rule.ignore_repeats else ""
    return f"{rule_name(rule)} of {rule.threshold:g} over {rule.window_size} tokens{ignoring}"


def _beginning(drafts: Sequence[Reading]) -> list[str]:
    """About the first token of drafts, and those after it."""
    first, *rest = by_position(drafts)
    if not rest:
        return []
    begins = f"The base gives the first token of a draft {first.probability:.2f}"
    if first.probability >= WALL:
        return [f"{begins}: its own answers begin much like the pilot's."]
    grows = rest[-1].probability > 2 * first.probability
    ending = "it would not begin like this, but it goes along" if grows else "it does not grow sure of this pilot's texts"
    return [f"{begins}, and the last ones {rest[-1].probability:.2f}: {ending}."]


def _firing(drafts: Sequence[Reading], rule: SwitchRule) -> list[str]:
    """About how often a rule fires, and on what."""
    found = firing(drafts, rule)
    if found.median is None:
        sentences = [f"The rule never fires ({_shown(rule)}): the pilot writes whole answers."]
    else:
        word = "rarely fires" if found.never > RARELY else "fires"
        sentences = [
            f"The rule {word} ({_shown(rule)}): in {_percent(1 - found.never)} of the drafts, at token {found.median:g} "
            f"in the median; the pilot writes {_percent(found.kept)} of its drafts."
        ]
    if found.never > RARELY and isinstance(rule, SwitchCriteria):
        reached = median(highest_confidence(draft, rule.window_size) for draft in drafts)
        sentences.append(f"Half of the drafts reach a confidence of {reached:.2f} or less.")
    if found.on_repeats is not None:
        share = f"{_percent(found.on_repeats)} of its switches are on a window that the draft held before, word for word"
        cause = "repetition makes it fire" if found.on_repeats >= ON_REPETITION else "repetition is not its cause"
        sentences.append(f"{share}: {cause}.")
    return sentences


def _own(own: Sequence[Reading], rule: SwitchRule) -> list[str]:
    """About a rule on what the base writes itself."""
    if not any(answer.tokens for answer in own):
        return []
    fires = 1 - firing(own, rule).never
    if fires >= RARELY:
        return [f"The rule would fire in {_percent(fires)} of the base's own answers too: this base reaches the threshold."]
    return [
        f"In the base's own answers the rule would fire in {_percent(fires)} only: the threshold is above what this base gives "
        "its own text."
    ]


def _interventions(drafts: Sequence[Reading]) -> list[str]:
    """About tokens that the base would not have chosen."""
    share = 1 - (first_choice_share(drafts) or 0.0)
    more = "more" if share > INTERVENTIONS else "no more"
    return [
        f"{_percent(share)} of the drafted tokens are not the base's first choice, {more} than {_percent(INTERVENTIONS)}: "
        + ("the two models write different texts." if share > INTERVENTIONS else "the two models write much the same text.")
    ]
