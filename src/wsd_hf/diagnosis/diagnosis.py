"""The diagnosis of a pair of models on some prompts."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..comparison.prompts import Record
from ..engine.numbers import check_positive_integer
from ..errors import WSDValueError
from ..pair import Pair
from ..strategies.wsd.switch_rules import SWITCH_RULES, SwitchCriteria, SwitchRule
from ..text.chat import Messages
from .forwards import Prediction
from .measures import THRESHOLDS, WINDOWS, Band, Firing, Place, by_position, firing, highest_confidence, of_texts, places
from .page import page
from .predictions import continued, predictable, predictions
from .reading import Reading, check_prompts, read, reading_tasks
from .verdict import verdict


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Measures of a pair: all of them follow from one draft of the pilot, and one reading of it by the base, per prompt.

    Attributes:
        drafts: of the pilot, at least one.
        own: the base's own answers to the same prompts; may be empty.
        max_draft_tokens: most tokens of a text, in the base's vocabulary.
        rule: the switch rule that `verdict`, `places` and `highest` are about.
        predictions: costs of methods; empty unless they were asked for.

    Raises:
        WSDValueError: there is no draft.
    """

    drafts: Sequence[Reading]
    own: Sequence[Reading] = ()
    max_draft_tokens: int
    rule: SwitchRule = field(default_factory=SwitchCriteria)
    predictions: Sequence[Prediction] = ()

    def __post_init__(self) -> None:
        if not self.drafts:
            raise WSDValueError("drafts: there are none; a diagnosis is made from at least one")

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
        return verdict(self.drafts, self.own, self.rule, self.predictions)

    def texts(self) -> dict[str, dict[str, float | None]]:
        """Numbers of the texts of each writer, "pilot" and "base"; None where there is no token to count.

        `texts` is their number and `length` their mean tokens; `ended` is the share that ended before the limit. The others
        are over all tokens: the share `repeated` that completes a 4-gram of the prompt or the text; the base's mean
        `probability`, also `_without_repeats`; the share that is the base's `first_choice`; the share `unsure` in whose places
        no token has 0.4 of the base's probability, which is where `"blend"` and nudging intervene; and the base's `perplexity`,
        also of the first 8 tokens (`_start`) and of those after them (`_rest`).
        """
        return {writer: of_texts(readings) for writer, readings in (("pilot", self.drafts), ("base", self.own)) if readings}

    def to_dict(self) -> dict[str, Any]:
        """All measures as plain data, ready for JSON; None for a number that is not finite."""
        data: dict[str, Any] = {
            "prompts": len(self.drafts),
            "max_draft_tokens": self.max_draft_tokens,
            "rule": asdict(firing(self.drafts, self.rule)),
            "verdict": self.verdict(),
            "texts": self.texts(),
            "positions": {name: [band._asdict() for band in bands] for name, bands in self.positions().items()},
            "grid": [asdict(cell) for cell in self.grid()],
            "rules": [asdict(one) for one in self.rules()],
            "highest": self.highest(),
            "places": [asdict(place) for place in self.places()],
            "predictions": [asdict(one) for one in self.predictions],
        }
        return _finite(data)  # type: ignore[no-any-return]

    def to_html(self) -> str:
        """The diagnosis as one HTML page, which needs no other file.

        Raises:
            WSDValueError: matplotlib is missing.
        """
        return page(self, self.predictions)


def _finite(data: Any) -> Any:
    """JSON data with None in place of numbers that JSON cannot hold."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def diagnose(
    pair: Pair,
    prompts: Sequence[str | Messages | Record],
    *,
    max_draft_tokens: int = 96,
    batch_size: int = 1,
    own_answers: bool = True,
    rule: SwitchRule | None = None,
    predict_costs: bool = False,
) -> Diagnosis:
    """Measures whether Weak-to-Strong Decoding suits a pair, before any answers are compared.

    The pilot drafts one greedy text for each prompt, and the base reads it once, 64 tokens in a forward. The switch of any
    threshold, window and named rule follows without another forward; it is that of `generate` with greedy decoding.

    Args:
        pair: the models.
        prompts: questions, chats, or records with a chat as `messages`.
        max_draft_tokens: most tokens of a draft and of an own answer, >= 1, in the base's vocabulary.
        batch_size: prompts that are answered at a time, >= 1; the base's logits of all their tokens are held.
        own_answers: whether the base answers too, which takes most of the time; else all that compares its own text is missing.
        rule: the switch rule that the verdict is about; default: the paper's.
        predict_costs: whether the base also continues every draft at several places, from which the forwards and the time of
            each method are predicted; needs the own answers.

    Raises:
        WSDValueError: no prompts, one that cannot be rendered or leaves no room for an answer, or a number out of its range;
            before any forward.
        WSDLogitsError: NaN in a model's logits.

    >>> diagnosis = diagnose(Pair.tiny(), ["What does the Keloft eat?"], own_answers=False)
    >>> diagnosis.rules()[0].median
    12.0
    """
    most = check_positive_integer("max_draft_tokens", max_draft_tokens)
    rows = check_positive_integer("batch_size", batch_size)
    chats = _chats(prompts)
    check_prompts(pair, chats)
    if predict_costs and not own_answers:
        raise WSDValueError("predict_costs=True needs own_answers=True: the base's own time is the measure")
    tasks = reading_tasks(len(chats), (), rows, own_answers)
    found = of_readings((reading for task in tasks for reading in read(pair, chats, task, most)), most, rule)
    if not predict_costs:
        return found
    methods = predictable(pair, found.rule)
    texts = [continued(pair, chat, draft, methods, most) for chat, draft in zip(chats, found.drafts, strict=True)]
    return replace(found, predictions=predictions(pair, found.drafts, found.own, methods, texts, most))


def of_readings(readings: Iterable[Reading], max_draft_tokens: int, rule: SwitchRule | None = None) -> Diagnosis:
    """The diagnosis of readings of both writers, in any order."""
    found = sorted(readings, key=lambda reading: reading.prompt)
    drafts, own = ([reading for reading in found if reading.writer == writer] for writer in ("pilot", "base"))
    return Diagnosis(drafts=drafts, own=own, max_draft_tokens=max_draft_tokens, rule=rule or SwitchCriteria())


def _chats(prompts: Sequence[str | Messages | Record]) -> list[Messages]:
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence) or not prompts:
        raise WSDValueError(f"prompts={prompts!r}: must be a list of questions, chats or records, at least one")
    return [_chat(f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts)]


def _chat(name: str, prompt: str | Messages | Record) -> Messages:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    chat = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    if not isinstance(chat, Sequence) or isinstance(chat, str):
        raise WSDValueError(
            f"{name}={reprlib.repr(prompt)}: must be a question, a list of messages, or a record with such a list"
        )
    return chat
