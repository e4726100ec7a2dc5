"""Every use of private names of transformers, accelerate, PEFT and torch, in one file to change for upgrades.

Tested on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    cache_utils,
)
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import StopStringCriteria
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.chat_template_utils import Chat as Chat

HTTPError: Any = HfHubHTTPError.__bases__[0]
"""Error of a broken connection in the Hub's client, which is built on httpx or, since 2.0, on httpx2."""


def sample(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """Runs transformers' own loop for greedy decoding and sampling."""
    return type(model)._sample(model, input_ids, **kwargs)


def update_model_kwargs(model: PreTrainedModel, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the next forward: cache, mask and positions advanced by one step."""
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    return updated


def takes_input(model: Any, name: str, value: Any) -> bool:
    """True if transformers passes a keyword of `generate` on to the model's forward, or PEFT takes it out before."""
    if name in getattr(model, "special_peft_forward_args", ()):
        return True
    try:
        unwrapped(model)._validate_model_kwargs({name: value})
    except ValueError:
        return False
    return True


def default_setting(name: str) -> Any:
    """Value that transformers fills in for a generation setting that neither caller nor model has set."""
    return GenerationConfig._get_default_generation_params().get(name)


CACHES = ("past_key_values", "cache_params")
"""Keywords of a model's cache; the second is Mamba's."""


ENCODED = "mm_encoder_outputs"
"""Keyword of a prompt's encoded images and videos, by kind of input; `generate` makes it, empty for text, since 5.18."""


REWINDABLE_LAYERS = {
    cache_utils.DynamicLayer,
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer),  # since 5.18; layers that keep nothing
}
"""Classes of cache layers with nothing but recurrent states, and keys and values of all tokens."""


def cache_keyword(model: PreTrainedModel) -> str:
    """Keyword of the cache in a model's forward."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHES if name in parameters)


def can_select_rows(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> bool:
    """True if a model keeps all its state in a cache that can be reordered."""
    holds_cache = any(isinstance(model_kwargs.get(name), Cache) for name in CACHES)
    return holds_cache and not keeps_state_in_layers(model)


def keeps_state_in_layers(model: PreTrainedModel) -> bool:
    """True if every forward of a model changes a state outside of its cache."""
    return str(model.config.model_type) == "recurrent_gemma"


def select_rows(model_kwargs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of the next forward for some rows, which may repeat; reorders the cache in place."""
    selected: dict[str, Any] = {
        name: value[rows.to(value.device)] if isinstance(value, torch.Tensor) and name != "cache_position" else value
        for name, value in model_kwargs.items()
    }
    for name in CACHES:
        if selected.get(name) is not None:
            selected[name].reorder_cache(rows)
    return selected


def whole_mask(input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
    """The mask of ones that transformers dropped; wider than `input_ids` if `past_key_values` holds a part of the prompt."""
    return input_ids.new_ones(len(input_ids), getattr(generation_config, "_mask_length", input_ids.shape[1]))


def with_custom_entries(generation_config: GenerationConfig, entries: Mapping[str, Any]) -> GenerationConfig:
    """A copy of `generation_config` with more keys."""
    customised = copy.deepcopy(generation_config)
    customised._from_model_config = False  # else the keys would be lost when it is loaded
    for name, value in entries.items():
        setattr(customised, name, value)
    return customised


def with_pad_token(generation_config: GenerationConfig, pad_token_id: int) -> GenerationConfig:
    """A copy of a configuration that `generate` has completed, with another pad token; its loop reads it as a tensor."""
    changed = copy.copy(generation_config)
    changed.pad_token_id = pad_token_id
    changed._pad_token_tensor = torch.full_like(generation_config._pad_token_tensor, pad_token_id)
    return changed


def attention_implementation(model: PreTrainedModel) -> str:
    """Name of the attention function that the model's decoder uses ("sdpa", "eager", ...)."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def routes_attention(model: PreTrainedModel) -> bool:
    """True if every layer takes its attention from transformers' table, by the name in the config.

    Not Doge's, which make masks of their own from the one that they are given.
    """
    routed = getattr(type(model), "_supports_attention_backend", False)
    return bool(routed) and not any(hasattr(type(module), "prepare_dynamic_mask") for module in model.modules())


def with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Shallow copies of a model's modules that share weights, buffers and hooks, with configs whose attention is `name`.

    Modules are copied without their constructors, and configs once each, so that they go on sharing what they shared.
    """
    configs: dict[int, Any] = {}
    copies: dict[torch.nn.Module, Any] = {}

    def copied(module: torch.nn.Module) -> Any:
        if module not in copies:
            new = copies[module] = object.__new__(type(module))
            new.__dict__.update(module.__dict__)
            for key, value in module.__dict__.items():
                if isinstance(value, PreTrainedConfig):
                    new.__dict__[key] = copy.deepcopy(value, configs)
                    new.__dict__[key]._attn_implementation = name
            new.__dict__["_modules"] = {key: child and copied(child) for key, child in module._modules.items()}
        return copies[module]

    twin: PreTrainedModel = copied(model)
    return twin


def custom_generate_source(model: PreTrainedModel) -> str | None:
    """The folder or repository that the running call of `model.generate` was given as `custom_generate`; None without one.

    transformers does not pass it to the code that it runs from there, so it is read from the frame of `generate`.
    """
    for frame, _line in traceback.walk_stack(inspect.currentframe()):
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            source = frame.f_locals.get("custom_generate")
            if isinstance(source, str):
                return source
    return None


def stop_string_mode(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """transformers' mode of matching stop strings in a vocabulary: by characters if None, else by bytes."""
    mode: str | None = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    return mode


def stop_string_bytes(token: str, mode: str | None, letters: Mapping[str, int]) -> bytes | None:
    """Bytes by which transformers matches a token as it is spelt in the vocabulary; None if it must be decoded for them."""
    spelt: bytes | None = StopStringCriteria._token_to_bytes(token, mode, letters)
    return spelt


def commit(model: PreTrainedModel) -> str | None:
    """Commit of the Hub that a model was loaded from."""
    sha: str | None = getattr(model.config, "_commit_hash", None)
    return sha


def makes_gguf_tokenizers() -> bool:
    """True if transformers makes a GGUF file's own tokenizer; 5.17 splits all texts by one pattern, and takes BOS for EOS."""
    return hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer")


def forget_quantizer(model: PreTrainedModel) -> None:
    """Makes a model whose quantised weights became floats while it was loaded an ordinary one, which can be saved."""
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)


def decompress(model: PreTrainedModel) -> None:
    """Turns the weights of a compressed-tensors model into floats now; else a hook does it in its first forward."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def input_device(model: PreTrainedModel) -> torch.device:
    """Device for a model's inputs; that of its forwards if accelerate keeps the weights elsewhere between them."""
    hooked = model.modules() if model.device.type == "meta" else [model]
    hooks = [vars(module).get("_hf_hook") for module in hooked]
    devices = [getattr(part, "execution_device", None) for hook in hooks for part in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), model.device))


def lacks_weights(model: PreTrainedModel) -> bool:
    """True if weights are on the meta device, and accelerate does not load them for a forward."""
    on_meta = any(weight.is_meta for weight in model.parameters())
    return on_meta and not any("_hf_hook" in vars(module) for module in model.modules())


def sharded(model: PreTrainedModel) -> bool:
    """True if ranks hold parts of a model's weights, and gather them in every forward: FSDP, or DeepSpeed's ZeRO-3."""
    return is_deepspeed_zero3_enabled() or any(map(is_fsdp_managed_module, model.modules()))


def collective_device() -> torch.device:
    """Device for a tensor that all ranks reduce."""
    return torch.device(torch.distributed.distributed_c10d._get_object_coll_device())


def tensor_parallel_group(model: PreTrainedModel) -> Any:
    """Process group whose ranks run each forward of a tensor-parallel model together; None for other models."""
    if (getattr(model, "tp_size", None) or 1) == 1:  # a reward may be any module, which is refused later
        return None
    mesh: Any = model._device_mesh
    return (mesh if mesh.ndim == 1 else mesh["tp"]).get_group()


def checkpoints_gradients(model: PreTrainedModel) -> bool:
    """True if gradient checkpointing is in effect (in training mode only); layers then ignore their cache."""
    return any(module.training and vars(module).get("gradient_checkpointing", False) for module in model.modules())


def adapter_layers(model: PreTrainedModel) -> set[torch.nn.Module]:
    """Layers that PEFT has put into a model."""
    return {module for module in model.modules() if type(module).__module__.startswith("peft.")}


def compiled(module: torch.nn.Module) -> bool:
    """True if `torch.compile` runs the forward of a module."""
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the operations of this thread for one that can't be part of a CUDA graph: `found`, its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None and not _capturable(func, args, out):
            self.found = str(func)
        return out


def _capturable(func: Any, args: Any, out: Any) -> bool:
    """True if an operation neither waits for the device nor draws random numbers, nor is unknown."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name == "_grouped_mm":  # which reads its offsets on the host unless in bfloat16
        return False
    if name in ("_to_copy", "copy_"):
        return len({tensor.device for tensor in (*args, out) if isinstance(tensor, torch.Tensor)}) == 1
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # Masks become indices, whose number is read, and lists become indices on the host.
        indices = [index for index in args[1] if index is not None]
        return not any(index.dtype in (torch.bool, torch.uint8) or index.device != args[0].device for index in indices)
    seeded = torch.Tag.nondeterministic_seeded in func.tags and not name.startswith("_scaled_dot_product")
    return not (seeded or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


@contextmanager
def workspaces_of_their_own() -> Iterator[None]:
    """Lets the graphs that are captured meanwhile hold cuBLAS's workspaces in memory pools of their own.

    A workspace that was made before belongs to the process, which may free it: torch does when it compiles. Graphs would go on
    writing there. One that is made in a capture lies in the graph's pool, which lives as long as the graph.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def abandon_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Ends a capture that failed, also where CUDA has invalidated it: torch then goes on allocating to its memory pool."""
    with suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # released with the graph if its capture has ended
    except RuntimeError:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(device.index, pool)


def uncompiled(model: Any) -> Any:
    """The model inside `torch.compile(model)`; any other object itself."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def unwrapped(model: Any) -> Any:
    """The model inside wrappers of torch.compile and PEFT, adapters included; None if a wrapper holds tuned prompts.

    A PEFT wrapper that is generating is found from the model inside, whose inputs it prepares.
    """
    inner = uncompiled(model)
    wrapper = getattr(vars(inner).get("prepare_inputs_for_generation"), "__self__", inner)
    if (config := getattr(wrapper, "active_peft_config", None)) is not None:
        if config.is_prompt_learning:
            return None
        inner = wrapper.get_base_model()
    return inner if inner is model else unwrapped(inner)


class DecodingLoop(NamedTuple):
    """Local state of a decoding loop that transformers does not pass to logits processors."""

    processors: LogitsProcessorList
    """The loop's processors; a new object for every call of `generate`, so it identifies the call."""
    model: PreTrainedModel
    logits: torch.Tensor
    """Logits before any processor, float32 [batch, vocabulary]."""
    attention_mask: torch.Tensor | None
    """Mask of the tokens so far, [batch, length]; None if nothing is padded."""
    finished: torch.Tensor
    """Rows that have ended, BoolTensor[batch]."""
    generation_config: GenerationConfig


def decoding_loop() -> DecodingLoop | None:
    """The greedy or sampling loop that is calling the current logits processor; None outside of one.

    A processor gets the scores that those before it have changed. Only the frame of the loop holds the raw logits, and
    identifies the call.
    """
    processors = None
    for frame, _line in traceback.walk_stack(inspect.currentframe()):
        if frame.f_code is LogitsProcessorList.__call__.__code__:
            processors = frame.f_locals["self"]
        elif frame.f_code is GenerationMixin._sample.__code__:
            local = frame.f_locals
            mask = local["model_kwargs"].get("attention_mask")
            return DecodingLoop(
                processors,
                model=local["self"],
                logits=local["next_token_logits"],
                attention_mask=None if mask is None else mask[:, :-1],
                finished=local["unfinished_sequences"] == 0,
                generation_config=local["generation_config"],
            )
    return None


def dpo_trainer_of_token_ids(**kwargs: Any) -> Any:
    """A `DPOTrainer` of TRL over rows that are token ids already, which it would tokenize otherwise."""
    from trl import DPOTrainer

    class _DPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    return _DPOTrainer(**kwargs)
