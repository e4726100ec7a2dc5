"""A base and a pilot that answer together: loading, calls and answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ._compat import input_device
from .engine.keywords import chosen, own_keywords
from .engine.strategy import StrategyConfig, StrategyOutput
from .errors import WSDValueError
from .generation import WSDGenerationMixin, enable_wsd, streamer_ended_on_error
from .hub.files import check_whole
from .hub.loading import Fetched, Kind, check_keywords, fetch_model, read_model
from .strategies import STRATEGIES
from .text.chat import Messages, build_inputs
from .text.next_turn import answer_text, turn_headers
from .tiny import FOLDER
from .trace import Trace, explain

OF_ONE_MODEL = ("revision", "subfolder", "use_safetensors")
"""Arguments of `load_pilot` that cannot hold for all models of a pair."""

Chats = str | Messages | Sequence[str | Messages]
"""A question, a chat, or several of either."""

P = TypeVar("P", bound="Pair")


def as_messages(chats: Chats) -> list[Messages]:
    """Each chat as its messages.

    Raises:
        WSDValueError: chats of another form; `build_inputs` checks the messages.
    """
    chats = [chats] if isinstance(chats, str) else chats
    if not isinstance(chats, Sequence) or not all(isinstance(chat, str | Mapping | Sequence) for chat in chats):
        raise WSDValueError(f"chats={chats!r}: must be a question, a list of messages, or a list of either")
    if chats and isinstance(chats[0], Mapping):
        return [cast("Messages", chats)]
    return [[{"role": "user", "content": chat}] if isinstance(chat, str) else cast("Messages", chat) for chat in chats]


@dataclass(frozen=True)
class Pair:
    """A base and its pilot, with their tokenizers.

    >>> pair = Pair.tiny()
    >>> output = pair.generate("What does the Keloft eat?", max_new_tokens=64)
    >>> print(pair.answers(output)[0])
    That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day.

    Attributes:
        base: a model that takes `generate(..., strategy=...)`; see `enable_wsd`.
        pilot: the small aligned model.
        tokenizer: the base's.
        pilot_tokenizer: the pilot's, with the chat template that it was tuned with.
        reference: the pilot before its alignment, for the strategies that need it.

    Raises:
        WSDValueError: a base that is not enabled.
    """

    base: PreTrainedModel
    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pilot_tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        if isinstance(self.base, PreTrainedModel) and not isinstance(self.base, WSDGenerationMixin):
            raise WSDValueError(f"base is a {type(self.base).__name__} that takes no strategy=: pass wsd_hf.enable_wsd(base)")

    @classmethod
    def from_pretrained(
        cls: type[P],
        base: str | os.PathLike[str],
        pilot: str | os.PathLike[str],
        *,
        reference: str | os.PathLike[str] | None = None,
        dtype: Any = "auto",
        device_map: Any = None,
        quantization_config: Any = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> P:
        """Loads the models and their tokenizers, and enables the base; `load_pilot` documents the checks.

        Args:
            base: name of the base, as for `load_pilot`; its weights may be safetensors or `.bin` files.
            pilot: name of the pilot.
            reference: name of the pilot before its alignment; default: none is loaded.
            dtype: of the weights; "auto" as they are stored.
            device_map: places of the weights, as in transformers, which needs accelerate for it. Default: the CPU.
            quantization_config: of the base alone; `load_pilot` takes one for a pilot.
            trust_remote_code, token, cache_dir, local_files_only, force_download: as for `load_pilot`.
            **kwargs: as `AutoModelForCausalLM.from_pretrained` takes them, for all models (`attn_implementation`, ...).

        Raises:
            WSDHubError: a model cannot be had, is damaged, or is of the wrong kind; see `load_pilot`.
            WSDValueError: an argument that can hold for one model only, such as `revision`.
        """
        for name in OF_ONE_MODEL:
            if name in kwargs:
                raise WSDValueError(
                    f"{name}={kwargs[name]!r}: can hold for one model only; load each with load_pilot or transformers, and "
                    "give them to Pair(base, pilot, tokenizer, pilot_tokenizer)"
                )
        cache: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        check_keywords(kwargs)
        kwargs |= {"dtype": dtype, "device_map": device_map}

        def fetch(name: str | os.PathLike[str], kind: Kind, use_safetensors: bool | None = None) -> Fetched:
            return fetch_model(
                os.fspath(name), kind, cache=cache, trust_remote_code=trust_remote_code, use_safetensors=use_safetensors
            )

        # The small models first, and no weights are read before all models are checked: faults show sooner.
        fetched_pilot = fetch(pilot, "pilot", use_safetensors=True)
        check_whole(fetched_pilot.weights)
        fetched_reference = None if reference is None else fetch(reference, "reference")
        fetched_base = fetch(base, "base")
        loaded = read_model(fetched_pilot, **kwargs)
        small = None if fetched_reference is None else read_model(fetched_reference, **kwargs)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        large = enable_wsd(read_model(fetched_base, **kwargs))
        return cls(large, loaded, fetched_base.tokenizer, fetched_pilot.tokenizer, small)

    @classmethod
    def tiny(
        cls: type[P],
        pilot: str = "pilot",
        *,
        reference: str | os.PathLike[str] | None = None,
        dtype: Any = torch.float32,
        **kwargs: Any,
    ) -> P:
        """Loads the shipped pair of a few megabytes; it was trained on one made-up world only.

        Args:
            pilot: "pilot", or "pilot_other_vocab", which has a vocabulary of its own.
            reference: as for `from_pretrained`; the repository has one in `examples/tiny_world/pilot_untuned`.
            dtype, **kwargs: as for `from_pretrained`.
        """
        return cls.from_pretrained(FOLDER / "base", FOLDER / pilot, reference=reference, dtype=dtype, **kwargs)

    def inputs(self, chats: Chats) -> BatchEncoding:
        """The prompts of both models, on the base's device; `build_inputs` documents the keys.

        Args:
            chats: a question, a chat (a list of messages), or a list of either.

        Raises:
            WSDValueError: a chat of another form, or a tokenizer that cannot render it.
        """
        return build_inputs(as_messages(chats), self.tokenizer, self.pilot_tokenizer).to(input_device(self.base))

    def generate(self, chats: Chats | BatchEncoding, strategy: str | StrategyConfig = "wsd", **kwargs: Any) -> Any:
        """Answers chats: one call of `base.generate` with the models and tokenizers of the pair.

        Args:
            chats: as for `inputs`, or inputs that were made before.
            strategy: a name or a settings object; see `WSDGenerationMixin.generate`. The reference goes to those that take one.
            **kwargs: as `WSDGenerationMixin.generate` takes them.

        Returns:
            A `StrategyOutput`, whose sequences are LongTensor[batch, prompt + response]; these alone with
            `return_dict_in_generate=False`.

        Raises:
            WSDValueError: any call that `generate` refuses; before any forward.
        """
        with streamer_ended_on_error(kwargs.get("streamer")):
            own = own_keywords(chosen(strategy, STRATEGIES))
            inputs = chats if isinstance(chats, BatchEncoding) else self.inputs(chats)
        models = {"assistant_model": self.pilot, "reference_model": self.reference}
        tokenizers = {"tokenizer": self.tokenizer, "assistant_tokenizer": self.pilot_tokenizer}
        parts = {**inputs, **models, **tokenizers}
        taken = {name: part for name, part in parts.items() if name in own or not name.startswith(("assistant_", "reference_"))}
        return self.base.generate(strategy=strategy, **{"return_dict_in_generate": True, **taken, **kwargs})

    def answers(self, output: StrategyOutput) -> list[str]:
        """The texts of an output's responses, each without the header of a next turn.

        Args:
            output: of `generate`.
        """
        return [answer_text(response, self.tokenizer) for response in output.sequences[:, output.prompt_length :]]

    def explain(self, output: StrategyOutput, row: int = 0) -> Trace:
        """The writer of each token of a response, without the header of a next turn; see `wsd_hf.explain`."""
        return explain(output, self.tokenizer, row, stop_strings=turn_headers(self.tokenizer))
