"""The models of a command, from its options."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..errors import WSDValueError
from ..hub.names import PATHS, parse_name
from ..pair import Pair
from ..ranks import Rank, local_rank


class DType(str, Enum):
    """Weights as stored, or converted."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype | None:
        """The type of torch; None for weights as stored."""
        return None if self is DType.auto else getattr(torch, self.value)


class DeviceMap(str, Enum):
    """accelerate's ways to spread weights over devices."""

    auto = "auto"
    balanced = "balanced"
    balanced_low_0 = "balanced_low_0"
    sequential = "sequential"


class Attention(str, Enum):
    """Attention functions of transformers."""

    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flex_attention = "flex_attention"


class Quantization(str, Enum):
    """bitsandbytes' formats of weights."""

    bits4 = "4bit"
    bits8 = "8bit"


@dataclass(frozen=True)
class Loading:
    """Options by which a command loads its models: a parameter `loading` of commands that are `takes_loading`."""

    device: Annotated[
        str, typer.Option(help="Device of the models: cpu, cuda, cuda:1, ... Under a launcher, cuda is the process's own GPU.")
    ] = "cpu"
    device_map: Annotated[
        DeviceMap | None, typer.Option(help="Spread the models over all devices, instead of --device; needs accelerate.")
    ] = None
    dtype: Annotated[DType, typer.Option(help="Data type of the models.")] = DType.auto
    attn: Annotated[Attention | None, typer.Option(help="Attention function of the models. Default: transformers' choice.")] = (
        None
    )
    quantization: Annotated[
        Quantization | None, typer.Option(help="Load the base in 4 or 8 bits; needs the extra quantization.")
    ] = None

    @property
    def own_device(self) -> str:
        """The device, with a GPU's number: "cuda" is this process's own among those of a launcher."""
        number = local_rank()
        return self.device if self.device != "cuda" or number is None else f"cuda:{number}"

    def options(self) -> dict[str, str | None]:
        """The values by the names of their options, as plain JSON data."""
        values = {f"--{field.name.replace('_', '-')}": getattr(self, field.name) for field in fields(self)}
        return {option: value.value if isinstance(value, Enum) else value for option, value in values.items()}

    def keywords(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`, but for the quantization, which is the base's alone.

        Raises:
            WSDValueError: no such device, two places for the weights, or a package that is not installed.
        """
        keywords: dict[str, Any] = {"dtype": self.dtype.torch or "auto"}
        if self.attn:
            keywords["attn_implementation"] = self.attn.value
        if self.quantization:
            option = f"--quantization {self.quantization.value}"
            _check_installed(option, ["bitsandbytes", "accelerate"], '"wsd_hf[quantization]"')
            keywords["device_map"] = {"": self.own_device}
        if self.device_map:
            option = f"--device-map {self.device_map.value}"
            if self.device != "cpu":
                raise WSDValueError(f"--device {self.device} has no effect with {option}: leave one out")
            _check_installed(option, ["accelerate"], "accelerate")
            keywords["device_map"] = self.device_map.value
        known_device(self.own_device)
        return keywords

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Moves a model to the device, unless `keywords` have placed it already."""
        device = torch.device(self.own_device)
        there = self.device_map or self.quantization or model.device == device
        return model if there else model.to(device)


def takes_loading(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the fields of `Loading` as options, in the place of its parameter `loading`."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        loading = Loading(**{field.name: given.pop(field.name) for field in fields(Loading)})
        command(**given, loading=loading)

    hints = get_type_hints(command, include_extras=True)
    options = [
        parameter.replace(annotation=hint)
        for parameter, hint in zip(
            inspect.signature(Loading).parameters.values(), get_type_hints(Loading, include_extras=True).values(), strict=True
        )
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += options if parameter.name == "loading" else [parameter.replace(annotation=hints[parameter.name])]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return run


def load_models(base: str | None, pilot: str | None, reference: str | None = None, *, loading: Loading) -> Pair:
    """The models that options name (docs/loading.md); the shipped pair where base and pilot are None.

    Raises:
        WSDValueError: an option that cannot work, or a model that cannot be loaded.
    """
    if (base is None) != (pilot is None):
        raise WSDValueError(
            f"--{'base' if base is None else 'pilot'} is missing: give both models, or neither for the shipped pair"
        )
    keywords = loading.keywords()
    if not Rank.from_environment().first:
        disable_progress_bar()
    if loading.quantization:
        if base is None:
            raise WSDValueError("--quantization: the shipped pair is small; give --base and --pilot")
        keywords["quantization_config"] = _bitsandbytes(loading.quantization, loading.dtype)
    try:
        for option, name in {"--pilot": pilot, "--base": base, "--reference": reference}.items():
            for source in filter(None, parse_name(name) if name else ()):
                if source.place.startswith(PATHS) and not Path(source.place).exists():
                    raise WSDValueError(f"{option} {source}: no such folder")
        if base is None or pilot is None:
            pair = Pair.tiny(reference=reference, **keywords | {"dtype": loading.dtype.torch or torch.float32})
        else:
            pair = Pair.from_pretrained(base, pilot, reference=reference, **keywords)
    except Exception as error:  # the readers of weights and tokenizers raise what they like over a damaged file
        raise WSDValueError(str(error)) from error
    for model in (pair.base, pair.pilot, pair.reference):
        if model is not None:
            loading.place(model)
    return pair


def known_device(name: str) -> torch.device:
    """The device of that name; a WSDValueError where there is none."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise WSDValueError(f"--device {name}: {error}") from None
    if device.type == "meta":
        raise WSDValueError("--device meta: holds no data, so nothing can run there; give one such as cpu or cuda")
    return device


def _bitsandbytes(quantization: Quantization, dtype: DType) -> BitsAndBytesConfig:
    if quantization is Quantization.bits8:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every product of weights not in float16
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype.torch or torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _check_installed(option: str, packages: list[str], remedy: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise WSDValueError(f"{option}: {' and '.join(missing)} not installed; pip install {remedy}")
