"""Steps of a response, and the base's turn to write one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ...speculation.rule import Rule
from ...text.settled_tokens import ContinuationTokenizer


class StepText:
    """The texts of one model's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str) -> None:
        self.decode = ContinuationTokenizer(tokenizer).decode
        self._delimiter = delimiter

    def ends(self, step: list[int]) -> bool:
        """True if the delimiter follows other text than white space in a step."""
        return self._delimiter in self.decode(step).lstrip()


class Steps(Rule):
    """The base's steps: a row waits, but for the turns at which the base writes a step in it."""

    def __init__(self, rows: int, longest: int, text: StepText) -> None:
        super().__init__(rows)
        self.waiting = [True] * rows
        self._steps: list[list[int]] = [[] for _ in range(rows)]
        self._longest, self._text = longest, text

    def begin(self, row: int) -> None:
        """Begins a step of the base."""
        self.waiting[row] = False
        self._steps[row] = []

    def written(self, row: int, token: int, pilot_log_prob: float) -> None:
        step = self._steps[row]
        step.append(token)
        self.waiting[row] = len(step) >= self._longest or self._text.ends(step)
