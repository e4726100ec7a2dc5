"""The diagnosis of a pair of models on some prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..comparison.prompts import Record
from ..engine.numbers import check_positive_integer
from ..errors import WSDValueError
from ..pair import Pair
from ..strategies.wsd.switch_rules import SWITCH_RULES, SwitchCriteria, SwitchRule
from ..text.chat import Messages
from .measures import Band, Firing, Place, by_position, firing, first_choice_share, highest_confidence, perplexity, places
from .reading import Reading, check_prompts, read, reading_tasks
from .verdict import verdict

THRESHOLDS, WINDOWS = (0.5, 0.6, 0.7, 0.8, 0.9), (1, 3, 6, 12)
"""Of the grid."""

START = 8
"""Tokens that count as the beginning of a text, for perplexity."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a base makes of a pilot's drafts: everything is measured from one draft and one reading of it per prompt.

    Attributes:
        drafts: of the pilot, at least one.
        own: the base's own answers to the same prompts; empty if they were not asked for.
        max_draft_tokens: most tokens of a text.
        rule: the switch rule that `verdict` and `places` are about.
    """

    drafts: Sequence[Reading]
    own: Sequence[Reading] = ()
    max_draft_tokens: int
    rule: SwitchRule = field(default_factory=SwitchCriteria)

    def positions(self) -> dict[str, list[Band]]:
        """The base's mean probability by position, of drafts and own answers, with and without repeated 4-grams."""
        texts = {"draft": self.drafts, "own": self.own} if self.own else {"draft": self.drafts}
        return {
            f"{name}{without}": by_position(readings, not without)
            for name, readings in texts.items()
            for without in ("", ", repeats left out")
        }

    def grid(self) -> list[Firing]:
        """The paper's rule at every threshold and window of the grid."""
        return [firing(self.drafts, SwitchCriteria(threshold, window)) for threshold in THRESHOLDS for window in WINDOWS]

    def rules(self) -> list[Firing]:
        """Every named rule at its defaults, with repeats and without."""
        kinds: Any = SWITCH_RULES.values()
        return [firing(self.drafts, kind(ignore_repeats=ignored)) for kind in kinds for ignored in (False, True)]

    def highest(self, window_size: int | None = None) -> list[float]:
        """The highest confidence of each draft, over the rule's window unless another is given."""
        return [highest_confidence(draft, window_size or self.rule.window_size) for draft in self.drafts]

    def places(self) -> list[Place]:
        """The places where the rule fires."""
        return list(places(self.drafts, self.rule))

    def verdict(self) -> list[str]:
        """The diagnosis in words; it names no best setting."""
        return verdict(self.drafts, self.own, self.rule)

    def texts(self) -> dict[str, dict[str, float | None]]:
        """Numbers of the drafts and of the base's own answers.

        These are the mean length, the share that ended before the limit, the base's perplexity of them (of the first 8 tokens
        and of those after them, too), and the share of tokens that are its first choice.
        """
        kinds = {"pilot": self.drafts, "base": self.own} if self.own else {"pilot": self.drafts}
        return {
            writer: {
                "texts": len(readings),
                "length": sum(len(reading.tokens) for reading in readings) / len(readings),
                "ended": sum(reading.ended for reading in readings) / len(readings),
                "perplexity": perplexity(readings),
                "perplexity_start": perplexity(readings, last=START),
                "perplexity_rest": perplexity(readings, first=START + 1),
                "first_choice": first_choice_share(readings),
            }
            for writer, readings in kinds.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, ready for JSON."""
        return {
            "max_draft_tokens": self.max_draft_tokens,
            "rule": asdict(firing(self.drafts, self.rule)),
            "verdict": self.verdict(),
            "texts": self.texts(),
            "positions": {name: [band._asdict() for band in bands] for name, bands in self.positions().items()},
            "grid": [asdict(cell) for cell in self.grid()],
            "rules": [asdict(one) for one in self.rules()],
            "highest": self.highest(),
            "places": [asdict(place) for place in self.places()],
        }


def diagnose(
    pair: Pair,
    prompts: Iterable[str | Messages | Record],
    *,
    max_draft_tokens: int = 96,
    batch_size: int = 1,
    own_answers: bool = True,
    rule: SwitchRule | None = None,
) -> Diagnosis:
    """Reads the pilot's drafts with the base: where would it take over, and why?

    Costs one greedy draft of the pilot and one reading of it by the base per prompt, and for comparison the base's own greedy
    answer. Every threshold, window and named rule is then read off without another forward, exactly as `generate` would find
    it.

    Args:
        pair: the models.
        prompts: questions, chats, or records with `messages`.
        max_draft_tokens: most tokens of a draft and of an own answer.
        batch_size: prompts that are read together.
        own_answers: whether the base answers too.
        rule: the switch rule that the verdict is about; default: the paper's.

    Raises:
        WSDValueError: no prompts, one that cannot be rendered or leaves no room for an answer, or a number out of range.

    >>> diagnosis = diagnose(Pair.tiny(), ["What does the Keloft eat?"], max_draft_tokens=32)
    >>> diagnosis.grid()[0].never
    0.0
    """
    most = check_positive_integer("max_draft_tokens", max_draft_tokens)
    chats = [messages(prompt) for prompt in prompts]
    if not chats:
        raise WSDValueError("prompts: there are none; give at least one question or chat")
    check_prompts(pair, chats)
    size = check_positive_integer("batch_size", batch_size)
    found = [reading for task in reading_tasks(len(chats), (), size, own_answers) for reading in read(pair, chats, task, most)]
    return of_readings(found, most, rule)


def of_readings(readings: Iterable[Reading], max_draft_tokens: int, rule: SwitchRule | None = None) -> Diagnosis:
    """The diagnosis of some readings, in the order of their prompts."""
    found = sorted(readings, key=lambda reading: reading.prompt)
    drafts, own = ([reading for reading in found if reading.writer == writer] for writer in ("pilot", "base"))
    return Diagnosis(drafts=drafts, own=own, max_draft_tokens=max_draft_tokens, rule=rule or SwitchCriteria())


def messages(prompt: str | Messages | Record) -> Messages:
    """The chat of a question, a chat, or a record."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt["messages"] if isinstance(prompt, Mapping) else prompt
