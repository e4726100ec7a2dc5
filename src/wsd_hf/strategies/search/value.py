"""The implicit value of a response: the log-probability that tuning added to it (Zhou et al., arXiv 2405.19262)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...engine.checks import check_models, check_tokenizer, vocabulary_size
from ...engine.text_scores import ModelScore
from ...errors import WSDValueError
from ...text.chat import check_text
from ...text.settled_tokens import ContinuationTokenizer, common_prefix
from .reader import Reader

Prompt = str | list[int]


class ImplicitValue(ModelScore):
    """log π_tuned(response | prompt) - log π_reference(response | prompt), summed over the response's tokens in float32.

    Each small model has prompts of its own. With prompt p and response text t, the model reads the encoding of p + t, with the
    EOS if the response has ended; the tokens after those that it shares with the encoding of p count. A prompt given as token
    ids is followed by the encoding of t on its own. Beginnings that earlier responses share are read once.

    Args:
        tuned: the small model after tuning.
        reference: the small model before.
        tokenizer: of both; that of the model that wrote the responses may be another.
        prompts: the tuned model's, as text or as token ids.
        reference_prompts: the reference model's; default: the same.
        add_special_tokens: whether the tokenizer adds its special tokens to prompts that are text.

    Raises:
        WSDValueError: models that cannot run (`check_models`), a tokenizer that is not theirs or has no EOS, prompts empty, of
            another kind or not in pairs.
    """

    def __init__(
        self,
        tuned: PreTrainedModel,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        reference_prompts: Sequence[Prompt] | None = None,
        *,
        add_special_tokens: bool = False,
    ) -> None:
        models = check_models({"tuned": tuned, "reference": reference})
        for name, model in models.items():
            check_tokenizer("the tokenizer", tokenizer, f"the {name} model", model)
        if tokenizer.eos_token_id is None:
            raise WSDValueError("the small models' tokenizer has no EOS token, which ends a response: set its eos_token")
        reference_prompts = prompts if reference_prompts is None else reference_prompts
        for name, given in (("prompts", prompts), ("reference_prompts", reference_prompts)):
            if isinstance(given, str) or not all(isinstance(prompt, str | list) for prompt in given):
                raise WSDValueError(f"{name}={given!r}: must be a list of prompts, each a text or a list of token ids")
        if len(prompts) != len(reference_prompts) or not len(prompts):
            raise WSDValueError(
                f"prompts and reference_prompts are {len(prompts)} and {len(reference_prompts)}: must be in pairs"
            )
        self._prompts = len(prompts)
        self.tuned = Reader("tuned model", models["tuned"])
        self.reference = Reader("reference model", models["reference"])
        self.models = [*models.values()]
        sides = (self.tuned, prompts), (self.reference, reference_prompts)
        self._sides = [_Side(reader, tokenizer, given, add_special_tokens) for reader, given in sides]

    def __call__(self, texts: Sequence[str], ended: Sequence[bool], of: Sequence[int] | None = None) -> torch.Tensor:
        """The values of some responses, float32 [responses]; 0 for one that is empty and has not ended.

        Args:
            texts: responses, or their beginnings.
            ended: whether each is whole: then its end counts too.
            of: number of each response's prompt; default: the first.

        Raises:
            WSDValueError: arguments of unlike lengths, a prompt that there is not.
        """
        of = [0] * len(texts) if of is None else of
        if not len(texts) == len(ended) == len(of):
            raise WSDValueError(
                f"texts, ended and of have {len(texts)}, {len(ended)} and {len(of)} entries: must have the same"
            )
        if outside := set(of) - set(range(self._prompts)):
            raise WSDValueError(f"of contains {min(outside)}, and the prompts are counted from 0 to {self._prompts - 1}")
        if not len(texts):
            return _on_host([])
        tuned, reference = [side.log_probs(texts, ended, of) for side in self._sides]
        return _on_host([_on_host(a).sum() - _on_host(b).sum() for a, b in zip(tuned, reference, strict=True)])


def _on_host(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


class _Side:
    """One of the two models, with its prompts."""

    def __init__(
        self, reader: Reader, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], add_special_tokens: bool
    ) -> None:
        self._reader, self._tokenizer, self._prompts = reader, tokenizer, prompts
        self._add_special_tokens = add_special_tokens
        self._pieces = ContinuationTokenizer(tokenizer)
        self._tokens = [self._prompt_tokens(prompt) for prompt in prompts]
        if not all(self._tokens):
            raise WSDValueError("a prompt has no tokens: the first token of a response needs one to follow")
        self._check_known("a prompt", self._tokens)
        self._check_known("the end of a response", [[int(tokenizer.eos_token_id)]])
        self._read = False

    def log_probs(self, texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[list[float]]:
        if not self._read:  # each prompt once, for all responses to it
            self._reader.read(self._tokens, [len(tokens) for tokens in self._tokens])
            self._read = True
        rows = [self._text_tokens(self._prompts[index], text, end) for index, text, end in zip(of, texts, ended, strict=True)]
        self._check_known("a response", rows)
        shared = [len(common_prefix(self._tokens[index], row)) for index, row in zip(of, rows, strict=True)]
        return self._reader.read(rows, [max(1, length) for length in shared])  # a text's first token has no logits

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            check_text("a prompt", prompt)
            return self._encode(prompt)
        if wrong := [token for token in prompt if isinstance(token, bool) or not hasattr(token, "__index__")]:
            raise WSDValueError(f"a prompt contains {wrong[0]!r}: must be a text or a list of token ids")
        return [operator.index(token) for token in prompt]

    def _text_tokens(self, prompt: Prompt, text: str, ended: bool) -> list[int]:
        check_text("a response", text)
        tokens = self._encode(prompt + text) if isinstance(prompt, str) else [*prompt, *self._pieces.encode(text)]
        return [*tokens, int(self._tokenizer.eos_token_id)] if ended else tokens

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens)
        return ids

    def _check_known(self, name: str, texts: Sequence[list[int]]) -> None:
        """Raises if token ids of a prompt or response have no embedding."""
        size = vocabulary_size(self._reader.model)
        if unknown := [token for tokens in texts for token in tokens if not 0 <= token < size]:
            raise WSDValueError(
                f"{name} contains token id {unknown[0]}, but the vocabulary of the {self._reader.name} has {size} tokens"
            )
