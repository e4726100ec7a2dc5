"""Rewards by a sequence-classification model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import _compat
from ...engine.checks import check_kind, check_tokenizer, context_size, vocabulary_size
from ...engine.text_scores import ModelScore
from ...errors import WSDValueError
from ...text.chat import check_text


class RewardModel(ModelScore):
    """Rewards of responses: the logit of a sequence-classification model with one label, float32.

    The model reads a prompt and a response as one text, and all texts of a call in one forward, padded on the right. It is the
    `reward=` of reward-guided decoding, and may be the `value=` of weak-to-strong search.

    Args:
        model: of `AutoModelForSequenceClassification`, with `num_labels=1`.
        tokenizer: its own.
        prompts: texts before the responses, complete with the marks of the model's chat template.
        add_special_tokens: whether the tokenizer adds its special tokens to a text; chat templates write them.

    Raises:
        WSDValueError: another kind of model, a model without weights, a tokenizer that is not its own, a pad token that is
            missing or another than that of the model's config, prompts that are not texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        add_special_tokens: bool = False,
    ) -> None:
        self._model = _checked(model)
        self.models = [self._model]
        _check_tokenizer(tokenizer, self._model)
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise WSDValueError(f"prompts={prompts!r}: must be a list of texts")
        for prompt in prompts:
            check_text("a prompt", prompt)
        self._tokenizer, self._prompts = tokenizer, list(prompts)
        self._add_special_tokens = add_special_tokens

    def __call__(self, texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> torch.Tensor:
        """The rewards of some responses, float32 [responses].

        Args:
            texts: responses, or their beginnings.
            ended: whether each is whole; the model is shown no end.
            of: number of each response's prompt.

        Raises:
            WSDValueError: a text that is longer than the model's context, a model with several logits for a text.
        """
        whole = [self._prompts[prompt] + text for prompt, text in zip(of, texts, strict=True)]
        inputs = self._tokenizer(
            whole, add_special_tokens=self._add_special_tokens, padding=True, padding_side="right", return_tensors="pt"
        )
        length, context = inputs["input_ids"].shape[1], context_size(self._model)
        if length > context:
            raise WSDValueError(
                f"a prompt and its response have {length} tokens for the reward model, whose context holds {context}: "
                "shorten the prompt, or lower max_new_tokens"
            )
        with torch.no_grad():
            logits: torch.Tensor = self._model(**inputs.to(_compat.input_device(self._model))).logits
        if logits.shape != (len(whole), 1):
            raise WSDValueError(f"the reward model gave logits of shape {tuple(logits.shape)}: must be {(len(whole), 1)}")
        return logits[:, 0].float().cpu()


def _checked(model: object) -> PreTrainedModel:
    """A sequence-classification model that returns one number, taken out of `torch.compile` and PEFT; raises for others."""
    inner = _compat.unwrapped(model) if isinstance(model, torch.nn.Module) else None
    if not isinstance(inner, PreTrainedModel) or inner.config.num_labels != 1:
        labels = f" with num_labels={inner.config.num_labels}" if isinstance(inner, PreTrainedModel) else ""
        raise WSDValueError(
            f"the reward model is a {type(model).__name__}{labels}: must be a sequence-classification model with num_labels=1; "
            "pass a function for any other reward"
        )
    if _compat.lacks_weights(inner):
        raise WSDValueError(
            "the reward model has weights on the meta device, which holds no data: load it with from_pretrained"
        )
    return inner


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises unless a tokenizer may be the model's own, and pads with the token that the model takes for padding."""
    if tokenizer is None:
        raise WSDValueError("the reward model needs its tokenizer: pass reward_tokenizer=")
    check_kind("the tokenizer of the reward model", tokenizer, PreTrainedTokenizerBase)
    check_tokenizer("the tokenizer of the reward model", tokenizer, "the reward model", model)
    pad, known = tokenizer.pad_token_id, model.config.get_text_config(decoder=True).pad_token_id
    if pad is None or pad != known or pad >= vocabulary_size(model):
        raise WSDValueError(
            f"the reward model's tokenizer pads with token id {pad}, and its config has pad_token_id={known}: must be one "
            "token that the model has; set the tokenizer's pad_token and the config's pad_token_id"
        )
