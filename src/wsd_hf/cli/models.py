"""The two models of a command: loading them, and asking them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import input_device
from ..errors import WSDValueError
from ..generation import enable_wsd
from ..hub.loading import fetch_model, load_pilot, read_model
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.output import WSDOutput
from ..text.chat import Messages, build_inputs
from ..text.next_turn import answer_text
from ..tiny import load_tiny_pair

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]


class DType(str, Enum):
    """Weights as stored, or converted."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def load_pair(base: str | None, pilot: str | None, device: str, dtype: DType) -> Pair:
    """Base, pilot and their tokenizers, from paths or Hub ids; the shipped pair where both are None."""
    target = _target(device, dtype)
    if base is None and pilot is None:
        model, assistant, tokenizer, assistant_tokenizer = load_tiny_pair()
    elif base is None or pilot is None:
        raise WSDValueError(
            f"--{'base' if base is None else 'pilot'} is missing: give both models, or neither for the shipped pair"
        )
    else:
        with _blamed("--pilot", pilot):  # the smaller one first: faults show sooner
            assistant, assistant_tokenizer = load_pilot(pilot, dtype=dtype.value)
        with _blamed("--base", base):
            fetched = fetch_model(base, "base", use_safetensors=None)
            model, tokenizer = enable_wsd(read_model(fetched, dtype.value)), fetched.tokenizer
    return model.to(**target), assistant.to(**target), tokenizer, assistant_tokenizer


def load_reference(reference: str, device: str, dtype: DType) -> PreTrainedModel:
    """The pilot as it was before its alignment, from a path or Hub id."""
    with _blamed("--reference", reference):
        return read_model(fetch_model(reference, "reference", use_safetensors=None), dtype.value).to(**_target(device, dtype))


def answer(pair: Pair, chat: Messages, config: WSDConfig, max_new_tokens: int, **kwargs: Any) -> WSDOutput:
    """What base and pilot together say to a chat; `kwargs` are more keywords of `generate`."""
    base, pilot, tokenizer, assistant_tokenizer = pair
    output: WSDOutput = base.generate(
        **build_inputs(chat, tokenizer, assistant_tokenizer).to(input_device(base)),
        assistant_model=pilot,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        strategy=config,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output


def response_text(sequences: torch.Tensor, prompt_length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer in the first row of what `generate` returned."""
    return answer_text(sequences[0, prompt_length:], tokenizer)


def known_device(name: str) -> torch.device:
    """The device of that name; a WSDValueError where there is none."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise WSDValueError(f"--device {name}: {error}") from None
    if device.type == "meta":
        raise WSDValueError("--device meta: holds no data, so nothing can run there; give one such as cpu or cuda")
    return device


def _target(device: str, dtype: DType) -> dict[str, Any]:
    return {"device": known_device(device), "dtype": None if dtype is DType.auto else getattr(torch, dtype.value)}


@contextmanager
def _blamed(option: str, source: str) -> Iterator[None]:
    """Errors that are raised while a model is loaded, as errors of the option that named it."""
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists():
        raise WSDValueError(f"{option} {source}: no such folder")
    try:
        yield
    except Exception as error:  # the readers of weights and tokenizers raise what they like over a damaged file
        reason = str(error).removeprefix(f"{source}: ").removeprefix(f"{source} ")
        raise WSDValueError(f"{option} {source}: {reason}") from error
