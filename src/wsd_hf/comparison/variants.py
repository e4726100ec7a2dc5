"""Variants: methods with settings of their own, as `wsd-hf compare --strategies` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from .methods import ALIASES, METHODS, Method

WORDS = {"true": True, "false": False, "none": None}
"""Values that are spelt as words."""

EXAMPLE = "wsd:threshold=0.6"


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        name: its text in `--strategies`, with settings in the strategy's own order, such as `wsd:threshold=0.6,window_size=6`.
        method: of answering.
        strategy: its settings; None if the method has none.
    """

    name: str
    method: Method
    strategy: StrategyConfig | None = None


def read_variants(text: str, defaults: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """Variants from their names with commas between them; the base is the first, and each is there once.

    An item is a method (`wsd`), a method and its first setting (`wsd:threshold=.6`), or a further setting of the last method
    (`window_size=6`). A value is a number, `true`, `false`, `none`, or a text without commas.

    Args:
        text: as in `--strategies`.
        defaults: settings of methods that a variant without them has, by the method's name.

    Raises:
        WSDValueError: an unknown method or setting, an illegal value, or a setting without a method.

    >>> [variant.name for variant in read_variants("pilot,wsd:window_size=6,threshold=.6,wsd", {})]
    ['base', 'pilot', 'wsd:threshold=0.6,window_size=6', 'wsd']
    """
    variants = [_variant("base", {}, {})]
    variants += [_variant(name, settings, defaults.get(name, {})) for name, settings in _items(text)]
    return list({variant.name: variant for variant in variants}.values())


def _items(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names of methods, each with the settings that were given for it."""
    found: list[tuple[str, dict[str, str]]] = []
    takes_settings = False
    for item in map(str.strip, text.split(",")):
        setting = item
        if "=" not in item or ":" in item.split("=")[0]:
            name, colon, setting = item.partition(":")
            found.append((_method(name.strip()), {}))
            takes_settings = bool(colon)
            if not colon:
                continue
        if not takes_settings:
            before = found[-1][0] if found else "METHOD"
            raise WSDValueError(f"--strategies: {setting!r} is a setting of no method; write it as {before}:{setting}")
        _add(setting, *found[-1])
    return found


def _method(name: str) -> str:
    """The name of a method, which may be given by its short name."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise WSDValueError(f"--strategies: {name!r} is unknown; known are {known}; a setting needs a value, as in {EXAMPLE}")
    return name


def _add(setting: str, name: str, settings: dict[str, str]) -> None:
    """Adds a setting to those of a method."""
    key, equals, value = map(str.strip, setting.partition("="))
    if not equals:
        raise WSDValueError(f"--strategies: {name}:{setting}: after the colon must be NAME=VALUE, as in {EXAMPLE}")
    if key in settings:
        raise WSDValueError(f"--strategies: {key} is given twice for one {name}")
    settings[key] = value


def _variant(name: str, spelt: Mapping[str, str], defaults: Mapping[str, Any]) -> Variant:
    kind = METHODS[name].strategy
    settings = [] if kind is None else [known for known in kind.keywords().values() if known.metadata.get("travels", True)]
    known = [setting.name for setting in settings]
    for setting in (setting for setting in spelt if setting not in known):
        if not known:
            raise WSDValueError(f"--strategies: {name} has no settings; leave {setting}={spelt[setting]} out")
        near = difflib.get_close_matches(setting, known, n=1)
        raise WSDValueError(
            f"--strategies: {name} has no setting {setting!r}; it has {', '.join(known)}"
            + (f"; {near[0]} is near" if near else "")
        )
    if kind is None:
        return Variant(name, METHODS[name])
    given = {setting: _value(value) for setting, value in spelt.items()}
    try:
        strategy = kind(**kind.override(dict(defaults), given))
    except WSDValueError as error:
        raise WSDValueError(f"--strategies: {name}: {error}") from None
    own = ",".join(f"{setting}={_spelt(getattr(strategy, setting))}" for setting in known if setting in given)
    return Variant(f"{name}:{own}" if own else name, METHODS[name], strategy)


def _value(text: str) -> Any:
    """A value from its text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _spelt(value: Any) -> str:
    """The text of a value."""
    return next((word for word, known in WORDS.items() if value is known), str(value))
