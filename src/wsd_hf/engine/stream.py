"""One model's side of a call, whatever it keeps of the texts that it has read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import _compat
from ..text.settled_tokens import common_prefix


class Stream(ABC):
    """A model that reads growing texts: each row is its prompt and the response so far, of which the model holds a prefix.

    Args:
        model: a model without an `unsupported_model` reason.
        prompts: token ids of each row's prompt.

    Attributes:
        workspace: buffers of what is held, as `Workspace` describes them.
        live: rows of the batch that tensors have a row for, in order.
        lengths: number of tokens of each row that are held.
        responses: tokens of each row after its prompt that `resume` was last asked to continue, and those that followed them.
        tokens: number of token positions fed, padding not counted.
    """

    workspace: Any

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self.model = model
        self.device = _compat.input_device(model)
        self.prompts = prompts
        self.live = list(range(len(prompts)))
        self.lengths = [0] * len(prompts)
        self.responses: list[list[int]] = [[] for _ in prompts]
        self.forwards = self.tokens = 0

    def missing(self, row: int, response: list[int]) -> list[int]:
        """Tokens of a row that are not held."""
        ahead = self.lengths[row] - len(self.prompts[row])
        return self.prompts[row][ahead:] + response if ahead < 0 else response[ahead:]

    def resume(self, row: int, response: list[int], last: int = 1) -> list[int]:
        """Tokens to feed so that the logits after each of the `last` tokens of `response` result: those not held, and these.

        Rewinds the row to the prefix that `response` shares with the tokens in `responses`, and replaces them.
        """
        self.rewind(row, min(len(common_prefix(self.responses[row], response)), len(response) - last))
        self.responses[row] = [*response]
        return self.missing(row, response)

    def logits(self, block: Any, keep: int) -> torch.Tensor:
        """float32 logits of a block's last positions, [rows, keep, vocabulary]; meaningless at padding."""
        logits: torch.Tensor = self.run("logits", lambda logits: logits, block, keep)
        return logits

    @abstractmethod
    def block(
        self, missing: list[list[int] | None], proposals: torch.Tensor | None = None, counts: list[int] | None = None
    ) -> Any:
        """Block of tokens that are not held, padded on the left, and each row's count of proposals after them.

        A live row whose `missing` is None is fed nothing; `proposals` are LongTensor[rows, chunk].
        """

    @abstractmethod
    def run(self, name: str, function: Callable[..., Any], block: Any, keep: int, *inputs: torch.Tensor) -> Any:
        """A function of such logits and further inputs, captured together with the forward if CUDA graphs are on.

        It must not wait for the device, and have a name of its own among the functions that run on this model.
        """

    @abstractmethod
    def rewind(self, row: int, response: int) -> None:
        """Drops a row's tokens after its prompt and the first `response` tokens, and more where it can't go back to them."""

    @abstractmethod
    def select(self, live: list[int]) -> None:
        """Drops all live rows but these."""

    def upload(self, values: list[list[int]]) -> torch.Tensor:
        """Integers on the model's device, without waiting for it."""
        tensor = torch.tensor(values, device="cpu", pin_memory=self.device.type == "cuda")
        return tensor.to(self.device, non_blocking=True)
