"""Log-probabilities of growing texts under a model."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import _compat
from ...engine.cache import RaggedCache
from ...engine.checks import context_size, logits_error, not_finite, rotary, vocabulary_size
from ...engine.cuda_graphs import Workspace
from ...engine.ragged_stream import RaggedStream
from ...engine.recurrent_support import is_recurrent
from ...engine.supported import unsupported_model
from ...errors import WSDValueError
from ...text.settled_tokens import common_prefix

LOGITS = 2**26
"""Most logits to hold at a time: 256 MiB in float32."""


class Reader:
    """A model that reads texts, and of texts like those before only the new part.

    Keys and values of the texts read last are kept, and a text continues the one with which it shares the longest beginning.
    Models whose cache can't be rewound read every text anew. `forwards` counts them, and `tokens` the positions fed, without
    padding.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self.forwards = self.tokens = 0
        self._keeps = not is_recurrent(model) and unsupported_model(name, model) is None
        self._forget()

    @torch.no_grad()
    def read(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of each text's tokens after its prompt.

        Args:
            texts: token ids, prompts included; none is empty.
            prompts: length of each text's prompt in tokens, at least 1.

        Raises:
            WSDValueError: a text that is longer than learned positions.
            WSDLogitsError: NaN or +inf among the logits.
        """
        if (longest := max(map(len, texts))) > context_size(self.model) and not rotary(self.model):
            raise WSDValueError(
                f"{self.name} is to read {longest} tokens and its context holds {context_size(self.model)}: "
                "shorten the prompt or max_new_tokens"
            )
        if self._made_with != self._precision():
            self._forget()
        self._stream.renew()
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
        self._log_probs: list[list[float]] = [[]]  # of every token but the first; NaN inside prompts
        self._stream = RaggedStream(self.model, [[]], Workspace(RaggedCache(self.model.config)))
        self._made_with = self._precision()

    def _precision(self) -> tuple[Any, ...]:
        """Device and precision of a forward now; keys and values made with others can't be continued."""
        device = _compat.input_device(self.model)
        return device, self.model.dtype, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def _share(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> None:
        """Makes each text's row a copy of the row that holds the longest beginning of it."""
        common = [
            [self._holds(row, text, prompt) for row in range(len(self._texts))]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        shared = [max(lengths) for lengths in common]
        rows = [lengths.index(most) for lengths, most in zip(common, shared, strict=True)]
        self._stream.gather(rows)
        # The last shared token is read again, at its place: its logits are those of the first new token.
        before = [max(0, most - 1) for most in shared]
        for row, length in enumerate(before):
            self._stream.rewind(row, length)
        self._log_probs = [self._log_probs[row][:length] for row, length in zip(rows, before, strict=True)]
        self._texts, self._prompts = [list(text) for text in texts], list(prompts)

    def _holds(self, row: int, text: list[int], prompt: int) -> int:
        """Tokens of a text that a row holds with their log-probabilities; the row's prompt may be longer than the text's."""
        length = len(common_prefix(text, self._texts[row]))
        return length if prompt >= self._prompts[row] else min(length, prompt)

    def _read_slice(self, texts: Sequence[list[int]], prompts: Sequence[int]) -> bool:
        """Reads on, as far as logits may be held; False if all was read. A text's last token is not fed: nothing follows it."""
        width = max(1, LOGITS // (len(texts) * vocabulary_size(self.model)))
        missing = [self._stream.missing(row, text[:-1])[:width] for row, text in enumerate(texts)]
        if not any(missing):
            return False
        starts = list(self._stream.lengths)
        ends = [start + len(new) for start, new in zip(starts, missing, strict=True)]
        asked = max(1, *(min(len(new), end - prompt + 1) for new, end, prompt in zip(missing, ends, prompts, strict=True)))
        before = self._stream.forwards
        logits = self._stream.logits(self._stream.block([new or None for new in missing], keep=asked), asked)
        self.forwards += self._stream.forwards - before
        self.tokens += sum(map(len, missing))
        for row, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
            following = text[start + 1 : end + 1]
            scored = following[-len(logits[row]) :]
            self._log_probs[row] += [nan] * (len(following) - len(scored))
            self._log_probs[row] += self._chosen(row, logits[row, logits.shape[1] - len(scored) :], scored)
        return True

    def _anew(self, row: int, text: list[int]) -> list[float]:
        self.forwards += 1
        self.tokens += len(text) - 1
        if len(text) == 1:
            return []
        logits = self.model(torch.tensor([text[:-1]], device=self._stream.device), use_cache=False).logits[0].float()
        return self._chosen(row, logits, text[1:])

    def _chosen(self, row: int, logits: torch.Tensor, tokens: list[int]) -> list[float]:
        """Log-probabilities of some tokens, each by its own logits, [tokens, vocabulary]."""
        bad = not_finite(logits)
        if bad.any():
            raise logits_error(self.name, int(bad.nonzero()[0]), row)
        index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
        log_probs: list[float] = logits.log_softmax(dim=-1).gather(1, index).flatten().tolist()
        return log_probs
