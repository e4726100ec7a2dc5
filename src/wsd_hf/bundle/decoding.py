"""`generate` of a packed model: finds its pilot, and the chats in its prompts."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer
from transformers.utils import logging

from .. import _compat
from ..engine.checks import check_prompt, check_token_ids, eos_token_ids, known_ids, vocabulary_size
from ..engine.ragged_stream import real_tokens
from ..engine.small_model import left_padded
from ..errors import WSDValueError
from ..generation import generate_with, streamer_ended_on_error
from ..hub.loading import load_pilot
from ..strategies.wsd.config import WSDConfig
from ..text.chat import BASE_CHAT_TEMPLATE, encode_turns
from ..text.chat_parser import ChatLayout
from ..text.next_turn import answer_length, next_turn_criteria
from ..text.streaming import AnswerStreamer, takes_likelihoods
from ..text.token_texts import plain_text
from ..text.visible import visible
from ..text.vocabulary import same_vocabulary

logger = logging.get_logger(__name__)

PILOT = "pilot"
"""Folder of a bundle that holds the pilot."""

ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
"""Names of the positional arguments of transformers' `generate`."""


def generate(*args: Any, model: PreTrainedModel, **kwargs: Any) -> Any:
    """`generate` of a packed model; its pilot is loaded at the first call, and kept as long as the model.

    A prompt that is a chat in the bundle's chat template reaches the pilot in the pilot's own template (see `ChatLayout` for
    losses); other prompts reach it as text. A base without a template of its own writes a transcript: responses to batches with
    a chat end before the header of the next turn, with the base's EOS, unless `return_dict_in_generate=True` is given.

    Args:
        *args: positional arguments of transformers' `generate`.
        model: the base.
        **kwargs: keywords of `WSDGenerationMixin.generate`, except the pilot; None counts as not given.

    Raises:
        WSDValueError: a pilot is given, or `generate(strategy=...)` refuses the call.
        WSDHubError: the folder or repository of the model has no pilot.
    """
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    given = {name: value for name, value in given.items() if value is not None}
    streamer = given.get("streamer")
    if streamer is None:
        return _generate(model, given)
    given["streamer"] = _Unended(streamer)
    with streamer_ended_on_error(streamer if isinstance(streamer, Iterator | AsyncIterator) else None):
        output = _generate(model, given)
    streamer.end()
    return output


def _generate(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    for name in ("assistant_model", "assistant_tokenizer"):
        if name in given:
            raise WSDValueError(
                f"{name} is given, and this model brings its own pilot: leave it out, or load the model without "
                "trust_remote_code, with wsd_hf.AutoModelForCausalLM"
            )
    strategy = given.pop("strategy", "wsd")
    partner = _partner(model, given.pop("revision", None))
    if strategy == "wsd" and partner.wsd_config is not None:
        strategy = partner.wsd_config
    prompt = given.get("input_ids", given.get("inputs"))
    chats = prompt is not None and partner.add_pilot_prompt(given, prompt, model)
    transcript = chats and BASE_CHAT_TEMPLATE in partner.tokenizer.chat_template
    if transcript:
        given["stopping_criteria"] = [*given.get("stopping_criteria", []), *next_turn_criteria(partner.tokenizer)]
        if "streamer" in given:
            given["streamer"] = AnswerStreamer(given["streamer"], partner.tokenizer)
    given |= {"tokenizer": partner.tokenizer, "assistant_tokenizer": partner.pilot_tokenizer}
    plain_generate = functools.partial(type(model).generate, model)  # model.generate is this module's
    output = generate_with(strategy, plain_generate, model, assistant_model=partner.pilot, **given)
    if prompt is None or not transcript or not isinstance(output, torch.Tensor):
        return output
    return _before_next_turn(output, prompt.shape[1], partner.tokenizer, model.generation_config)


class _Unended(BaseStreamer):
    """A streamer that errors do not end: a server would take that for the end of the answer, and hide the error."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.put, self.takes_writers = streamer.put, getattr(streamer, "takes_writers", False)
        self.takes_likelihoods = takes_likelihoods(streamer)

    def end(self) -> None:
        """Does nothing; `generate` ends the streamer."""


class _Partner(NamedTuple):
    """A bundle's additions to its base; holds no reference to the base."""

    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pilot_tokenizer: PreTrainedTokenizerBase
    layout: ChatLayout
    wsd_config: WSDConfig | None
    """Settings of the bundle; None if the base carries them."""

    def add_pilot_prompt(self, given: dict[str, Any], ids: torch.Tensor, base: PreTrainedModel) -> bool:
        """Adds the pilot's prompts to the arguments if there are chats among the base's; returns True if there are."""
        check_token_ids("input_ids", ids)
        mask = given.get("attention_mask")
        if mask is None:
            mask = _unpadded(ids, self.tokenizer)
        check_prompt("input_ids", ids, mask, rows=len(ids))
        known_ids("input_ids", ids, mask, "the base", base)
        rows = real_tokens(ids, mask)
        prompts = [self._chat_prompt(row) for row in rows]
        if not any(prompts):
            return False
        if "assistant_input_ids" not in given:
            same = same_vocabulary(vocabulary_size(base), vocabulary_size(self.pilot), self.tokenizer, self.pilot_tokenizer)
            texts = (row if same else self.pilot_tokenizer.encode(plain_text(self.tokenizer, row)) for row in rows)
            padded = left_padded([prompt or text for prompt, text in zip(prompts, texts, strict=True)], ids.device)
            given["assistant_input_ids"], given["assistant_attention_mask"] = padded
        return True

    def _chat_prompt(self, row: list[int]) -> list[int] | None:
        chat = self.layout.read(row)
        if chat is None:
            return None
        try:
            return encode_turns("the pilot", chat.turns, chat.prefill, self.pilot_tokenizer)
        except WSDValueError as error:
            logger.warning_once(visible(f"{error}; the pilot gets the text of the base"))
            return None


_LOADING = threading.Lock()
_PARTNERS: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, str | None], _Partner]] = weakref.WeakKeyDictionary()


def _partner(model: PreTrainedModel, revision: str | None) -> _Partner:
    """Partner of a model, from the bundle that `generate` was called with or else the model was loaded from."""
    source = _compat.custom_generate_source(model)
    own = source is None
    if source is None:
        source, revision = model.name_or_path, _compat.commit(model)
    with _LOADING:
        partners = _PARTNERS.setdefault(model, {})
        if (source, revision) not in partners:
            # The caller trusts the bundle's code, so its links may lead elsewhere too.
            pilot, pilot_tokenizer = load_pilot(source, revision, model.dtype, subfolder=PILOT, trust_remote_code=True)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            config = None if own else WSDConfig.resolve({}, None, GenerationConfig.from_pretrained(source, revision=revision))
            partners[source, revision] = _Partner(pilot, tokenizer, pilot_tokenizer, ChatLayout(tokenizer), config)
        partner = partners[source, revision]
        partner.pilot.to(_compat.input_device(model))
    return partner


def _unpadded(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Mask of prompts without one; as in transformers, pad tokens are padding unless they are an EOS too."""
    pad = tokenizer.pad_token_id
    if pad is None or pad in eos_token_ids(tokenizer):
        return torch.ones_like(ids)
    return ids.ne(pad).cumsum(dim=1).clamp(max=1)


def _before_next_turn(
    sequences: torch.Tensor, prompt: int, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> torch.Tensor:
    """Sequences whose responses end with an EOS instead of the header of the next turn."""
    eos = min(eos_token_ids(config) or eos_token_ids(tokenizer), default=None)
    if eos is None:
        return sequences
    pad = eos if config.pad_token_id is None else config.pad_token_id
    end = prompt
    for row in sequences:
        length = answer_length(row[prompt:].tolist(), tokenizer)
        if length is not None:
            row[prompt + length :] = pad
            row[prompt + length] = eos
        end = max(end, sequences.shape[1] if length is None else prompt + length + 1)
    return sequences[:, :end]
