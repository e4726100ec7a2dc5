"""`generate(..., strategy=...)` on transformers models: a mixin, a switch for loaded models, and an auto class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import BaseStreamer

from . import _compat
from .engine.checks import check_data, check_models
from .engine.joint_calls import check_same_call, joint_forwards, models_among, refused_together, with_late_errors
from .engine.keywords import (
    SMALL_MODELS,
    check_batch_keywords,
    check_keywords,
    check_partners,
    check_without_strategy,
    chosen,
    own_keywords,
)
from .engine.preparation import decode_within, generation_setting, may_sample
from .engine.small_model import small_models
from .engine.strategy import StrategyConfig
from .errors import WSDValueError
from .strategies import STRATEGIES
from .strategies.wsd.logits_process import WSDLogitsProcessor

Model = TypeVar("Model", bound=PreTrainedModel)


class WSDGenerationMixin(GenerationMixin):
    """Adds `strategy=` to `generate`. Put it first: `class MyModel(WSDGenerationMixin, LlamaForCausalLM)`."""

    def generate(self, *args: Any, strategy: str | StrategyConfig | None = None, **kwargs: Any) -> Any:
        """`transformers.GenerationMixin.generate`, and with `strategy=` a base and small models that decode together.

        `strategy="nudging", nudging_threshold=0.5` is the same call as `strategy=NudgingConfig(threshold=0.5)`. A keyword
        beats the settings object, which beats the call's and then the model's generation config.

        Everything of ordinary greedy decoding and sampling goes on working: batches with left padding,
        `num_return_sequences`, processors and warpers (they shape the base's own tokens), stopping criteria, stop strings,
        streamers, `return_dict_in_generate`. `max_new_tokens` counts the whole response.

        Args:
            *args: as for transformers' `generate`.
            strategy: None (plain transformers), the name of a strategy, or its settings object: "wsd" (`WSDConfig`), "two_way"
                (`TwoWayConfig`), "nudging" (`NudgingConfig`), "emulated_fine_tuning" (`EmulatedFineTuningConfig`), "product"
                (`ProductConfig`), "ensemble" (`EnsembleConfig`), "blend" (`BlendConfig`), "weak_to_strong_search"
                (`SearchConfig`), "reward_guided" (`RewardGuidedConfig`).
            assistant_model: the pilot, a loaded causal model. Of `torch.compile(model)` the model inside is used, as of a base
                in transformers; `model.compile()` compiles the forwards that are run.
            assistant_input_ids: the pilot's prompt, LongTensor[batch, prompt]; default: the base's, or its text.
            assistant_attention_mask: its mask, [batch, prompt]; padding on the left. Default: nothing is padded.
            reference_model: the pilot as it was before its tuning, for emulated fine-tuning and search.
            reference_input_ids, reference_attention_mask: its prompt; default: the pilot's.
            tokenizer: the base's; needed for `stop_strings`, and together with the pilot's where the vocabularies differ: equal
                widths without tokenizers count as one vocabulary.
            assistant_tokenizer: of the small models. Its EOS ends a draft, beside those of the pilot's generation config.
            synced_gpus: in several processes, whether all ranks run the forwards of all models of the call together, so that
                their work may be unequal; None: of the models whose weights are sharded (FSDP, DeepSpeed ZeRO-3). False: of
                none, for ranks whose work is the same.
            **kwargs: settings of the strategy (`wsd_threshold`, `nudging_threshold`, `beta`, ...: see its settings object), and
                the arguments of transformers' `generate`.

        Returns:
            LongTensor[batch, prompt + response], or a `StrategyOutput` with `return_dict_in_generate=True`: for "wsd" a
            `WSDOutput`, for "two_way" a `TwoWayOutput`, for search a `SearchOutput`, for "reward_guided" a
            `RewardGuidedOutput`.

        Raises:
            WSDValueError: an unknown strategy or keyword, a keyword that would have no effect, an illegal setting, models or
                prompts that do not go together, beam search and other modes that cannot work, ranks of a tensor-parallel model
                that were given different calls; before any forward.
            WSDLogitsError: NaN or +inf in a model's logits, or -inf in all of them.
        """
        generate = super().generate
        if strategy is None:
            return generate_plainly(generate, self, *args, **kwargs)
        kwargs |= dict(zip(inspect.signature(generate).parameters, args, strict=False))
        return generate_with(strategy, generate, self, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.GenerationMixin.generate_batch`: continuous batching, in which the model decodes alone.

        Raises:
            WSDValueError: a strategy, one of its keywords, or a `WSDLogitsProcessor`, all of which transformers would ignore.
        """
        check_batch_keywords(STRATEGIES, kwargs)
        _check_processors("generate_batch", kwargs)
        return super().generate_batch(*args, **kwargs)


def _shown_signature() -> inspect.Signature:
    """The parameters of transformers' `generate`, and those of all strategies."""
    signature = inspect.signature(GenerationMixin.generate)
    *plain, rest = signature.parameters.values()
    own = [name for strategy in STRATEGIES.values() for name in own_keywords(strategy)]
    added = [name for name in dict.fromkeys(["strategy", *own]) if name not in signature.parameters]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in added]
    return signature.replace(parameters=[*plain, *parameters, rest])


vars(WSDGenerationMixin.generate)["__signature__"] = _shown_signature()


def generate_with(
    strategy: str | StrategyConfig, generate: Callable[..., Any], model: PreTrainedModel, /, **kwargs: Any
) -> Any:
    """One call of a strategy on a model that need not be enabled; `WSDGenerationMixin.generate` documents the arguments.

    `generate` is transformers' own of the model.
    """
    with streamer_ended_on_error(kwargs.get("streamer")):
        given = strategy if isinstance(strategy, StrategyConfig) else None
        run = models_among({"the model": model}, kwargs, vars(given) if given else {})
        with joint_forwards(run, kwargs.get("synced_gpus")):
            with refused_together(run):
                small = {name: kwargs[name] for name in SMALL_MODELS if kwargs.get(name) is not None}
                check_models({"the model": model, **small})
                kind = chosen(strategy, STRATEGIES)
                check_data(kwargs)
                check_keywords(kind, STRATEGIES, generate, model, kwargs)
                own = {name: kwargs.pop(name) for name in own_keywords(kind) if name in kwargs and name != "tokenizer"}
                config = kind.resolve(own, given, kwargs.get("generation_config"), model.generation_config)
                check_partners(config, own)
            check_same_call(run, {**kwargs, **own, **config.to_dict()}, may_sample(config, model, kwargs))
            kwargs["streamer"] = with_late_errors(kwargs.get("streamer"), run)
            return decode_within(config, generate, model, small_models(kind.partners, own), **kwargs)


def generate_plainly(generate: Callable[..., Any], model: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
    """One call of transformers' own `generate`.

    Raises:
        WSDValueError: a keyword that only strategies take; a `WSDLogitsProcessor` in a call that ignores processors.
    """
    with streamer_ended_on_error(kwargs.get("streamer")):
        check_without_strategy(STRATEGIES, generate, model, kwargs)
        named = {**dict(zip(inspect.signature(generate).parameters, args, strict=False)), **kwargs}
        configs = (named.get("generation_config"), model.generation_config)
        if generation_setting("cache_implementation", named, *configs) == "paged":  # which makes it a call of generate_batch
            _check_processors("cache_implementation='paged'", named)
    return generate(*args, **kwargs)


def _check_processors(batching: str, keywords: Mapping[str, Any]) -> None:
    """Raises if a call of transformers' continuous batching, which `batching` refers to, holds a `WSDLogitsProcessor`."""
    if any(isinstance(processor, WSDLogitsProcessor) for processor in keywords.get("logits_processor") or ()):
        raise WSDValueError(
            f"logits_processor holds a WSDLogitsProcessor, which has no effect with {batching}: call generate(strategy='wsd')"
        )


def enable_wsd(model: Model) -> Model:
    """Gives a loaded model `generate(..., strategy=...)`; the same object is returned, its weights untouched.

    Its class becomes a subclass of the same name, so it saves, pickles and copies as before. `disable_wsd` reverts it. Of
    `torch.compile(model)` it is the model inside that is enabled.

    Raises:
        WSDValueError: the model has no `generate` of transformers' to extend (for PEFT, enable the model inside).
    """
    inner = _compat.uncompiled(model)
    if isinstance(inner, WSDGenerationMixin):
        return model
    if not isinstance(inner, GenerationMixin):
        raise WSDValueError(f"{type(inner).__name__} is no generating transformers model: enable one that is")
    inner.__class__ = _enabled_class(inner.__class__)
    return model


def disable_wsd(model: Model) -> Model:
    """Reverts `enable_wsd`; a model that was never enabled is returned as it is.

    Raises:
        WSDValueError: the model's own class inherits from `WSDGenerationMixin`, or wraps the enabled one.
    """
    inner = _compat.uncompiled(model)
    if isinstance(inner, WSDGenerationMixin):
        if _Enabled not in type(inner).__bases__:
            raise WSDValueError(f"{type(inner).__name__} is itself written with WSDGenerationMixin: it cannot be disabled")
        inner.__class__ = _plain_class(type(inner))
    return model


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM` whose models take `generate(..., strategy=...)`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a pair (model, loading info) with `output_loading_info=True`."""
        loaded = super().from_pretrained(*args, **kwargs)
        return (enable_wsd(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else enable_wsd(loaded)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        return enable_wsd(super().from_config(*args, **kwargs))


class _Enabled(WSDGenerationMixin):
    """What the class of an enabled model has beyond its own; pickled as its own class plus the wish to enable it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _constructor, _arguments, *state = super().__reduce_ex__(protocol)
        return _restore, (_plain_class(type(self)),), *state


@functools.cache
def _enabled_class(plain: type) -> Any:
    return type(plain.__name__, (_Enabled, plain), {"__module__": plain.__module__, "__doc__": plain.__doc__})


def _plain_class(enabled: type) -> Any:
    return enabled.__bases__[1]


def _restore(plain: type) -> Any:
    enabled = _enabled_class(plain)
    return enabled.__new__(enabled)


@contextmanager
def streamer_ended_on_error(streamer: BaseStreamer | None) -> Iterator[None]:
    """transformers ends a streamer on success only; its reader would wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            with suppress(Exception):
                streamer.end()
        raise
