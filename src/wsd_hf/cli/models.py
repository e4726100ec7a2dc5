"""The models of a command, from its options."""

from __future__ import annotations

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..errors import WSDValueError
from ..pair import Pair


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


def load_models(
    base: str | None,
    pilot: str | None,
    reference: str | None = None,
    device: str = "cpu",
    dtype: DType = DType.auto,
    in_4bit: bool = False,
) -> Pair:
    """The models that options name, by paths or Hub ids; the shipped pair where base and pilot are None.

    Raises:
        WSDValueError: an option that cannot work, or a model that cannot be loaded.
    """
    quantized = _in_4bit(base, device, dtype) if in_4bit else {}
    place = known_device(device)
    if (base is None) != (pilot is None):
        raise WSDValueError(
            f"--{'base' if base is None else 'pilot'} is missing: give both models, or neither for the shipped pair"
        )
    for option, source in {"--pilot": pilot, "--base": base, "--reference": reference}.items():
        if source and source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists():
            raise WSDValueError(f"{option} {source}: no such folder")
    try:
        if base is None or pilot is None:
            pair = Pair.tiny(reference=reference)
        else:
            pair = Pair.from_pretrained(base, pilot, reference=reference, dtype=dtype.torch or "auto", **quantized)
    except Exception as error:  # the readers of weights and tokenizers raise what they like over a damaged file
        raise WSDValueError(str(error)) from error
    for model in (pair.base, pair.pilot, pair.reference):
        if model is not None and not quantized:
            model.to(device=place, dtype=dtype.torch)
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


def _in_4bit(base: str | None, device: str, dtype: DType) -> dict[str, Any]:
    """Keywords of `Pair.from_pretrained` that quantize the base."""
    if base is None:
        raise WSDValueError("--load-in-4bit: the shipped pair is small; give --base and --pilot")
    if not torch.cuda.is_available():
        raise WSDValueError("--load-in-4bit: runs on CUDA only, and there is no CUDA device; leave it out")
    if not device.startswith("cuda"):
        raise WSDValueError(f"--load-in-4bit: runs on CUDA only, not on --device {device}; give --device cuda")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise WSDValueError(f'--load-in-4bit: {" and ".join(missing)} not installed; pip install "wsd_hf[4bit]"')
    compute = dtype.torch or torch.bfloat16
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config, "device_map": {"": device}}
