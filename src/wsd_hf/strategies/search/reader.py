"""How likely a model finds the tokens of growing texts."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import _compat
from ...engine.cache import RaggedCache
from ...engine.checks import context_size, logits_error, not_finite, vocabulary_size
from ...engine.cuda_graphs import Workspace
from ...engine.ragged_stream import RaggedStream
from ...engine.supported import rotary, unsupported_model
from ...errors import WSDValueError
from ...text.settled_tokens import common_prefix

LOGITS = 2**26
"""Most logits to hold at a time: 256 MiB in float32."""


class Reader:
    """A model that reads texts, and of texts like those before only what is new.

    Keys and values of the texts read last are kept, and a text goes on from the one that it shares the longest beginning with.
    Models whose cache can't be rewound read every text anew.

    Args:
        name: of the model, for errors.
        model: any causal model.

    Attributes:
        forwards: forwards run.
        tokens: token positions fed, padding not counted.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name = name
        self.model = model
        self.forwards = 0
        self.tokens = 0
        self._keeps = unsupported_model(name, model) is None
        self._forget()

    @torch.no_grad()
    def read(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> list[list[float]]:
        """The log-probabilities of each text's tokens behind its prompt.

        Args:
            texts: token ids, prompts included; none is empty.
            prompts: how many tokens of each text come before those that are asked for, at least 1.

        Raises:
            WSDValueError: a text that learned positions have no room for.
            WSDLogitsError: logits that are no numbers.
        """
        if (longest := max(map(len, texts))) > context_size(self.model) and not rotary(self.model):
            raise WSDValueError(
                f"{self.name} is to read {longest} tokens and its context holds {context_size(self.model)}: "
                "shorten the prompt or max_new_tokens"
            )
        if self._made_with != self._precision():
            self._forget()
        if not self._keeps:
            return [self._anew(row, text)[prompt - 1 :] for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))]
        try:
            self._share(texts, prompts)
            while self._read_slice(texts, prompts):
                pass
        except BaseException:
            self._forget()
            raise
        return [known[prompt - 1 :] for known, prompt in zip(self._log_probs, prompts, strict=True)]

    def _forget(self) -> None:
        self._texts: list[list[int]] = [[]]
        self._prompts = [0]
        self._log_probs: list[list[float]] = [[]]  # of every token but the first; NaN where nobody asked
        self._stream = RaggedStream(self.model, [[]], Workspace(RaggedCache(self.model.config)))
        self._made_with = self._precision()

    def _precision(self) -> tuple[Any, ...]:
        """Device and precision of a forward now; keys and values made with others can't be gone on with."""
        device = _compat.input_device(self.model)
        return device, self.model.dtype, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def _share(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> None:
        """Each text's row becomes a copy of the one that holds most of it, as far as it does."""
        common = [
            [self._holds(row, text, prompt) for row in range(len(self._texts))]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        shared = [max(lengths) for lengths in common]
        rows = [lengths.index(most) for lengths, most in zip(common, shared, strict=True)]
        self._stream.gather(rows)
        # The last token that is shared is read again, where it was read: it is what the first new one follows.
        before = [max(0, most - 1) for most in shared]
        for row, length in enumerate(before):
            self._stream.rewind(row, length)
        self._log_probs = [self._log_probs[row][:length] for row, length in zip(rows, before, strict=True)]
        self._texts, self._prompts = [list(text) for text in texts], list(prompts)

    def _holds(self, row: int, text: list[int], prompt: int) -> int:
        """How many tokens of a text a row holds, with the log-probabilities behind its prompt: the row's may be longer."""
        length = len(common_prefix(text, self._texts[row]))
        return length if prompt >= self._prompts[row] else min(length, prompt)

    def _read_slice(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> bool:
        """Reads on, as far as logits may be held; whether there was anything left. Nothing follows a text's last token."""
        width = max(1, LOGITS // (len(texts) * vocabulary_size(self.model)))
        missing = [self._stream.missing(row, text[:-1])[:width] for row, text in enumerate(texts)]
        if not any(missing):
            return False
        starts = list(self._stream.lengths)
        ends = [start + len(new) for start, new in zip(starts, missing, strict=True)]
        block = self._stream.block([new or None for new in missing])
        asked = [min(len(new), end - prompt + 1) for new, end, prompt in zip(missing, ends, prompts, strict=True)]
        self.forwards += 1
        self.tokens += sum(map(len, missing))
        logits = self._stream.logits(block, keep=max(1, *asked))
        for row, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
            behind = text[start + 1 : end + 1]
            told = behind[-len(logits[row]) :]
            self._log_probs[row] += [nan] * (len(behind) - len(told))
            self._log_probs[row] += self._chances(row, logits[row, logits.shape[1] - len(told) :], told)
        return True

    def _anew(self, row: int, text: list[int]) -> list[float]:
        self.forwards += 1
        self.tokens += len(text) - 1
        if len(text) == 1:
            return []
        logits = self.model(torch.tensor([text[:-1]], device=self._stream.device), use_cache=False).logits[0].float()
        return self._chances(row, logits, text[1:])

    def _chances(self, row: int, logits: torch.Tensor, tokens: list[int]) -> list[float]:
        """The log-probabilities of some tokens, each by its own logits, [tokens, vocabulary]."""
        bad = not_finite(logits)
        if bad.any():
            raise logits_error(self.name, int(bad.nonzero()[0]), row)
        index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
        log_probs: list[float] = logits.log_softmax(dim=-1).gather(1, index).flatten().tolist()
        return log_probs
