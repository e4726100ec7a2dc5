"""A diagnosis in words: whether the rule fires, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..strategies.blend import BlendConfig
from ..strategies.wsd.switch_rules import SwitchCriteria, SwitchRule
from .forwards import Prediction
from .measures import by_position, firing, highest_confidence, of_texts, rule_name
from .reading import Reading

RARELY = 0.5
"""Share of drafts in which a rule must fire, or it fires rarely."""

ON_REPETITION = 0.25
"""Share of switches on repeated text from which repetition counts as a cause."""

INTERVENTIONS = 0.2
"""Share of unsure places above which methods that intervene there do so often (BlendIn, arXiv 2606.11201)."""

ABOUT = 0.2
"""Difference of a predicted time from the base's within which both count as the same: predictions are off by up to a fifth."""

WALL = 0.2
"""The base's mean probability of first tokens below which the beginning of an answer is what it would not write."""


def verdict(
    drafts: Sequence[Reading], own: Sequence[Reading], rule: SwitchRule, predictions: Sequence[Prediction] = ()
) -> list[str]:
    """Sentences about a rule on drafts, on own answers, and by predicted costs, as far as they are given.

    They name no best setting.
    """
    if not any(draft.tokens for draft in drafts):
        return ["The pilot ended every draft at once, so there is nothing to read. Does it get the right chat template?"]
    return [*_beginning(drafts), *_firing(drafts, rule), *_own(own, rule), *_interventions(own or drafts), *_pays(predictions)]


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
        return [f"{begins}: it may begin like this itself."]
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
            f"in the median; {_percent(found.kept)} of the drafted tokens are kept."
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
    """About a rule on the base's own text, without repeats: in a loop any greedy base is sure of itself."""
    if not any(answer.tokens for answer in own):
        return []
    kind: Any = type(rule)
    fires = 1 - firing(own, kind(rule.threshold, rule.window_size, ignore_repeats=True)).never
    fired = f"In the base's own answers, repeats left out, the rule would fire in {_percent(fires)}"
    if fires >= RARELY:
        return [f"{fired}: this base reaches the threshold."]
    return [f"{fired} only: the threshold is above what this base gives its own text."]


def _interventions(texts: Sequence[Reading]) -> list[str]:
    """About the places at which methods intervene that do so where the base is unsure."""
    share = of_texts(texts)["unsure"]
    if share is None:
        return []
    more, outcome = (
        ("more", "hand much of the answer to it") if share > INTERVENTIONS else ("no more", "hand little of the answer to it")
    )
    return [
        f"At {_percent(share)} of the tokens the base's largest probability is below {BlendConfig.threshold:g}, {more} than "
        f"{_percent(INTERVENTIONS)}: methods that let the pilot write there, such as nudging and blend, {outcome}."
    ]


def _pays(predictions: Sequence[Prediction]) -> list[str]:
    """About the predicted costs of Weak-to-Strong Decoding with the rule."""
    return [
        f"Predicted costs of a token with this rule: {one.base_forwards:.2f} forwards of the base, {one.pilot_forwards:.2f} of "
        f"the pilot, and {one.time:.2f} of the base's time alone: {_paying(one.time)}."
        for one in predictions
        if one.method == "wsd" and one.time is not None
    ]


def _paying(time: float) -> str:
    if time < 1 - ABOUT:
        return "it pays in time"
    return "it takes about as long" if time <= 1 + ABOUT else "it does not pay in time"
