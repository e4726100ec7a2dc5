"""GGUF files: their header checked, and the config and the tokenizer that transformers makes of it."""

from __future__ import annotations

import importlib.util
import json
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .. import _compat
from ..errors import WSDHubError
from .contents import check_config
from .errors import reading

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, by their numbers in the file, as `struct` names them."""

TEXT, ARRAY = 8, 9
"""The other types of values."""

ROPE_FACTORS = "rope_freqs.weight"
"""Name of the weight with the divisors of rotary frequencies, by which llama.cpp keeps the settings of Llama 3.1 and later."""

LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The settings that are the same in all of these models."""


class Header(NamedTuple):
    """The part of a GGUF file before its weights."""

    metadata: dict[str, Any]
    weights: set[str]
    """Names of the weights."""
    rope_factors: tuple[float, ...] = ()
    """Divisors of the rotary frequencies; none if the frequencies are as `rope.freq_base` makes them."""


def read_header(name: str, file: Path) -> Header:
    """The header of a GGUF file, all of whose counts, lengths and offsets lie within the file.

    Raises:
        WSDHubError: the file is damaged, or a part of a model; or a package is missing.
    """
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise WSDHubError(f'{name} is in GGUF format, and {" and ".join(missing)} not installed; pip install "wsd_hf[gguf]"')
    with reading(f"{file} is no whole GGUF file, get it again"), _bytes(file) as data:
        header = _header(data)
    if int(header.metadata.get("split.count", 0)) > 1:
        raise WSDHubError(f"{name} is one of several GGUF files of a model: join them (llama-gguf-split --merge)")
    if header.metadata.get("general.type", "model") != "model":
        raise WSDHubError(f"{name} is a GGUF file of type {header.metadata['general.type']!r:.50}: give one of a whole model")
    return header


def read_gguf_config(name: str, file: Path, header: Header, kind: str) -> PreTrainedConfig:
    """The config in a GGUF file, with the ids of the tokens that end a text and a turn."""
    with reading(f"{name} cannot be read by transformers"), alone(file) as place:
        config: PreTrainedConfig = AutoConfig.from_pretrained(**place)
        ends = [_token_id(header, key) for key in ("eos", "eot")]
        ids = list(dict.fromkeys(number for number in ends if number is not None))
        config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        config.bos_token_id, config.pad_token_id = _token_id(header, "bos"), _token_id(header, "padding")
        _set_rope(config, header)
    check_config(name, config, kind)
    return config


def read_gguf_tokenizer(name: str, file: Path, header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, without the tokens that transformers adds to its vocabulary."""
    if not _compat.makes_gguf_tokenizers():
        raise WSDHubError(
            f"{name} has a tokenizer that this version of transformers mistakes: upgrade it (5.23 will do), or give a folder "
            "that also holds the files of the original tokenizer"
        )
    with reading(f"{name} has no tokenizer that can be loaded"), alone(file) as place:
        made = PreTrainedTokenizerFast.from_pretrained(**place)  # AutoTokenizer reads the config again, which takes seconds
        parts = json.loads(made.backend_tokenizer.to_str())
        size = len(header.metadata["tokenizer.ggml.tokens"])
        parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < size]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
            chat_template=header.metadata.get("tokenizer.chat_template"),
            **made.special_tokens_map,
        )


def _set_rope(config: PreTrainedConfig, header: Header) -> None:
    """Completes the rotary settings, of which transformers reads the base alone; a ValueError if the file has others."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    factors = torch.tensor(header.rope_factors)
    if len(factors) and config.model_type == "llama":
        config.rope_parameters = rope | LLAMA_3 | {"factor": float(factors.max())}
        size = 2 * len(factors)
        frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2) / size) / factors
        if torch.allclose(LlamaRotaryEmbedding(config).inv_freq, frequencies, rtol=1e-3, atol=0):
            return
    scaling = header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.type", "none")
    known = scaling == "none" or scaling in json.dumps(rope)
    if len(factors) or "rope_factors_long.weight" in header.weights or not known:
        raise ValueError("it scales rotary positions in a way that is not read; give the model that the file was made from")


@contextmanager
def alone(file: Path) -> Iterator[dict[str, str]]:
    """Keywords of `from_pretrained` for a file and an empty folder; transformers reads what is beside a file, too."""
    with tempfile.TemporaryDirectory() as empty:
        yield {"pretrained_model_name_or_path": empty, "gguf_file": str(file.resolve())}


@contextmanager
def _bytes(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _header(data: mmap.mmap) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    reader = _Reader(data)
    magic, version, tensors, entries = reader.numbers("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text()
        if key in metadata:
            raise ValueError(f"it has {key!r:.100} twice")
        metadata[key] = reader.value(*reader.numbers("I"))
    places: dict[str, tuple[int, int]] = {}
    for _ in range(tensors):
        name = reader.text()
        (dimensions,) = reader.numbers("I")
        shape = reader.numbers(f"{min(dimensions, 9)}Q")
        kind, offset = reader.numbers("IQ")
        if name in places or not 1 <= dimensions <= 4:
            raise ValueError(f"it has the weight {name!r:.100} twice, or with {dimensions} dimensions")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        places[name] = offset, prod(shape) // block * size
    alignment = metadata.get("general.alignment", 32)
    begin = -(-reader.place // alignment) * alignment
    if any(begin + offset + size > len(data) for offset, size in places.values()):
        raise ValueError("it is cut off")
    offset, size = places.get(ROPE_FACTORS, (0, 0))
    return Header(metadata, set(places), struct.unpack_from(f"<{size // 4}f", data, begin + offset))


class _Reader:
    """Reads values one after another; raises `struct.error` or ValueError where the file ends first."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if length > len(self.data) - self.place:
            raise ValueError("it is cut off")
        self.place += length
        return self.data[self.place - length : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.numbers(NUMBERS[kind])[0]
        kind, count = self.numbers("IQ")
        return [self.text() for _ in range(count)] if kind == TEXT else list(self.numbers(f"{count}{NUMBERS[kind]}"))


def _token_id(header: Header, name: str) -> int | None:
    """The id of a special token; None without one."""
    number: int | None = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and not 0 <= number < len(header.metadata["tokenizer.ggml.tokens"]):
        raise ValueError(f"{name}_token_id={number} is outside of its vocabulary")
    return number
