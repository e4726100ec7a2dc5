"""The shape of every strategy: a frozen settings object that decodes a prepared call, and the output that it returns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .. import _compat
from ..errors import WSDValueError
from .call import Call
from .stats import Stats

Config = TypeVar("Config", bound="StrategyConfig")


@dataclass
class StrategyOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput`, plus the work done and the writer of each token.

    Attributes:
        stats: forwards and tokens of each model.
        prompt_length: columns of `sequences` that are prompt.
        written_by_pilot: response tokens that the pilot wrote, BoolTensor[batch, response], False after a response's end;
            None where every token is the work of several models.
        strategy: the settings of the call.
    """

    # ModelOutput insists on a default of None; a call always sets all but `written_by_pilot`.
    stats: Stats = None  # type: ignore[assignment]
    prompt_length: int = None  # type: ignore[assignment]
    written_by_pilot: torch.Tensor | None = None
    strategy: StrategyConfig = None  # type: ignore[assignment]


def keyword(name: str, *, travels: bool = True) -> dict[str, Any]:
    """Metadata of a field of a `StrategyConfig` whose keyword has no prefix; it travels if a generation config can hold it."""
    return {"keyword": name, "travels": travels}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises unless a setting is one of some values."""
    if value not in choices:
        raise WSDValueError(f"{name}={value!r}: must be {' or '.join(map(repr, choices))}")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Settings of a strategy, and its way of decoding.

    A subclass is a frozen dataclass; it checks its fields in `__post_init__`, and implements `decode`. Each field is a keyword
    of `generate` and a key of generation configs: its name after `prefix`, or as `keyword` gives it.

    Attributes:
        name: of the strategy, as in `generate(strategy=name)`.
        prefix: of its keywords.
        partners: small models that it needs: "assistant" (the pilot), "reference" (the pilot before its tuning).
        always_samples: whether it draws tokens without `do_sample=True`, and refuses `do_sample=False`.
        ends_with_pilot: whether the pilot's EOS ends a response too, unless the call has an `eos_token_id` of its own.
    """

    name: ClassVar[str]
    prefix: ClassVar[str] = ""
    partners: ClassVar[tuple[str, ...]] = ("assistant",)
    always_samples: ClassVar[bool] = False
    ends_with_pilot: ClassVar[bool] = False

    def decode(self, call: Call) -> StrategyOutput:
        """The output of a prepared call; its `prompt_length` and `strategy` are set by the caller.

        Raises:
            WSDValueError: a call that the strategy cannot serve; before any forward.
        """
        raise NotImplementedError

    @property
    def needed(self) -> tuple[str, ...]:
        """Those of `partners` that a call must have."""
        return self.partners

    @classmethod
    def keywords(cls) -> dict[str, Field[Any]]:
        """The field of each keyword of `generate` that is a setting; those of the class itself before the inherited ones."""
        ordered = sorted(fields(cls), key=lambda setting: setting.name not in vars(cls).get("__annotations__", ()))
        return {setting.metadata.get("keyword", cls.prefix + setting.name): setting for setting in ordered}

    def to_dict(self) -> dict[str, Any]:
        """The settings under their keys in a `GenerationConfig`; without objects, which no file can hold."""
        values = {
            name: getattr(self, known.name) for name, known in self.keywords().items() if known.metadata.get("travels", True)
        }
        return {name: value for name, value in values.items() if value is None or isinstance(value, str | int | float)}

    def check_travels(self) -> None:
        """Raises if a setting is an object, which no file can hold."""
        travelling = self.to_dict()
        for name, known in self.keywords().items():
            if name not in travelling and getattr(self, known.name) is not None:
                raise WSDValueError(f"{name}: an object can't be saved in a generation config; pass it to generate()")

    def to_generation_config(self, generation_config: GenerationConfig) -> GenerationConfig:
        """A copy of `generation_config` that carries these settings, also through `save_pretrained`.

        Raises:
            WSDValueError: a setting is an object, which no file can hold.
        """
        self.check_travels()
        return _compat.with_custom_entries(generation_config, self.to_dict())

    @classmethod
    def resolve(
        cls: type[Config],
        keywords: Mapping[str, Any],
        given: StrategyConfig | None,
        *generation_configs: GenerationConfig | None,
    ) -> Config:
        """The settings of one call: keyword > `given` > generation configs in their order > default.

        Args:
            keywords: of the call; None counts as not given, unless the field's metadata say `takes_none`.
            given: settings as one object, or None.
            generation_configs: the call's and then the model's; not looked at beside `given`.

        Raises:
            WSDValueError: an illegal value, an unknown key with the strategy's prefix, a setting that is missing.
        """
        known = cls.keywords()
        if given is not None and not isinstance(given, cls):
            raise WSDValueError(f"{given!r}: must be a {cls.__name__}")
        sources = [keywords, *(vars(config) for config in generation_configs if config and given is None)]
        values = {} if given is None else {setting.name: getattr(given, setting.name) for setting in known.values()}
        for source in reversed(sources):
            cls._check_prefixed(source, "keyword" if source is keywords else "key of a generation config")
            found = {
                known[name].name: source[name]
                for name in known.keys() & source.keys()
                if source[name] is not None or known[name].metadata.get("takes_none")
            }
            values = cls.override(values, found)
        for name, setting in known.items():
            if setting.default is MISSING and setting.name not in values:
                raise WSDValueError(f"strategy={cls.name!r} needs {name}: pass {name}=")
        return cls(**values)

    @classmethod
    def override(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Values of fields after those of a source that beats them; a strategy may drop some that depend on others."""
        return values | given

    @classmethod
    def _check_prefixed(cls, source: Mapping[str, Any], kind: str) -> None:
        known = cls.keywords()
        for key in sorted(key for key in source if cls.prefix and key.startswith(cls.prefix) and key not in known):
            near = difflib.get_close_matches(key, known, n=1)
            raise WSDValueError(
                f"{key}: unknown {kind}; known are {', '.join(known)}" + (f"; {near[0]} is near" if near else "")
            )
