"""Config, tokenizer and weights of a model folder: checked, and read as far as is possible without reading the weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..errors import WSDHubError
from .errors import reading
from .model_folder import check_kernels, check_tokenizer_files, int64, json_object, shards

NO_MODEL = "has a config that no model can be made from"

READING = threading.Lock()
"""transformers replaces methods of its classes while it reads a model: two threads at a time leave them replaced."""


def read_config(name: str, folder: Path, trust_remote_code: bool, kind: str) -> PreTrainedConfig:
    """Config of a folder; a WSDHubError unless it can be that of a model of the kind."""
    if not (folder / "config.json").is_file():
        raise WSDHubError(f"{name} has no config.json: give a whole transformers model, or a GGUF file")
    for file in ("config.json", "generation_config.json"):
        if (folder / file).exists():
            json_object(folder / file, parse_int=int64)
    if not trust_remote_code:
        check_kernels(folder / "config.json")
    with reading(f"{name} {NO_MODEL}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_config(name, config, kind)
    return config


def check_config(name: str, config: PreTrainedConfig, kind: str) -> None:
    """Raises a WSDHubError unless a config can be that of a model of the kind."""
    with reading(f"{name} {NO_MODEL}"):
        text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise WSDHubError(f"{name} is an encoder-decoder: a {kind} must be a decoder-only model")
    if getattr(config, "transformers_weights", None):
        raise WSDHubError(f"{name} names its weights in its config (transformers_weights): they must be in model.safetensors")
    for size in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if isinstance(number := getattr(text, size, None), int) and number < 1:
            raise WSDHubError(f"{name} has {size}={number} in its config: must be at least 1")


def read_tokenizer(name: str, folder: Path, trust_remote_code: bool, kind: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder; a WSDHubError if it can't be loaded."""
    check_tokenizer_files(folder)
    with reading(f"{name} has no tokenizer that can be loaded: a {kind} needs its own"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return tokenizer


def check_template(name: str, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raises a WSDHubError if a pilot's tokenizer has no chat template."""
    if kind == "pilot" and not tokenizer.chat_template:
        raise WSDHubError(
            f"{name} has no chat template: a pilot needs the one it was tuned with; give a model tuned for chats, or load both "
            "parts with transformers and set the tokenizer's chat_template"
        )


def fetch_weights(name: str, folder: Path, fetch: Callable[[str], Path], use_safetensors: bool | None) -> list[Path]:
    """Files of the weights: one, or all that an index names. `use_safetensors=None`: `.bin` where there is no other format."""
    wanted = ["model.safetensors", "pytorch_model.bin"]
    if use_safetensors is not None:
        wanted = wanted[:1] if use_safetensors else wanted[1:]
    missing: EntryNotFoundError | None = None
    for whole in wanted:
        index = folder / f"{whole}.index.json"
        sharded = index.is_file() and not (folder / whole).is_file()  # where both exist, transformers reads the whole one
        try:
            return [fetch(file) for file in (shards(index, Path(whole).suffix) if sharded else [whole])]
        except EntryNotFoundError as error:
            missing = missing or error
    if isinstance(missing, LocalEntryNotFoundError):
        raise missing
    other = " (use_safetensors=False loads .bin files, which may run code as they are read)" if use_safetensors else ""
    raise WSDHubError(f"{name} has no {' or '.join(wanted)}, or not all its parts: give a model that has{other}") from missing


def auto_class(kind: str) -> Any:
    """The class of transformers that makes a model of a kind."""
    return AutoModelForSequenceClassification if kind == "reward model" else AutoModelForCausalLM


def check_sizes(
    name: str, config: PreTrainedConfig, weights: list[Path], tensors: float, trust_remote_code: bool, kind: str
) -> None:
    """Raises a WSDHubError unless a model can be made from the config, and is no larger than its weights can fill."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise WSDHubError(f"{name} has num_hidden_layers={layers} in its config, and {tensors:.0f} weights: give a whole model")
    if trust_remote_code:
        return  # a model with code of its own may need more than its config
    with reading(f"{name} {NO_MODEL}"), READING, torch.device("meta"):
        model = auto_class(kind).from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    numbers, size = sum(weight.numel() for weight in model.parameters()), sum(file.stat().st_size for file in weights)
    if numbers > 16 * size:
        raise WSDHubError(f"{name} has {size} bytes of weights, and a config of {numbers} parameters: give a whole model")


def count_tensors(file: Path) -> float:
    """Number of weights in a safetensors file; infinity for other files, which must be loaded to be counted."""
    if file.suffix != ".safetensors":
        return math.inf
    with reading(f"{file} is damaged (cut off or changed), get it again"), safe_open(file, "pt") as content:
        return len(content.keys())
