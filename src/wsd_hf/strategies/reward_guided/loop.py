"""The loop of reward-guided decoding: the pilot's steps, and the base's in place of those of a low reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...engine.call import Call
from ...engine.checks import closing_token_id, eos_token_ids, vocabulary_size
from ...engine.pilot_writer import Piece, PilotWriter
from ...engine.sampling import split
from ...engine.text_scores import TextScore, text_scores
from ...speculation.config import SpeculativeConfig
from ...speculation.loop import Decoding, open_decoding
from ...speculation.setup import Setup
from ...text.token_texts import INCOMPLETE
from .output import JudgedStep, RewardGuidedOutput
from .steps import Steps, StepText


class Rejected(NamedTuple):
    """A step that the base is to write."""

    tokens: list[int]
    """The pilot's in its place, of the base's vocabulary; none where it wrote none."""
    reward: float
    """Of these; NaN without them."""


@dataclass(frozen=True)
class Judge:
    """The reward of one call.

    Attributes:
        reward: of texts.
        threshold: least reward of a step that is kept.
        text: of the base's tokens.
        copies: responses to each prompt.
    """

    reward: TextScore
    threshold: float
    text: StepText
    copies: int

    def rewards(self, responses: Mapping[int, list[int]], ended: list[bool]) -> dict[int, float]:
        """The rewards of some rows' responses, from one call; an incomplete last character is no part of a text."""
        if not responses:
            return {}
        texts = [self.text.decode(response).rstrip(INCOMPLETE) for response in responses.values()]
        of = [row // self.copies for row in responses]
        return dict(zip(responses, text_scores("reward", self.reward, texts, ended, of), strict=True))


class RewardGuided:
    """One call.

    Attributes:
        steps: of each row, in their order.
    """

    def __init__(self, call: Call, decoding: Decoding, pilot: PilotWriter, rule: Steps, judge: Judge) -> None:
        self.steps: list[list[JudgedStep]] = [[] for _ in call.input_ids]
        self._decoding, self._rows = decoding, decoding.rows
        self._pilot, self._rule, self._judge = pilot, rule, judge
        self._processors, _ = split(call.processors)
        self._vocabulary = vocabulary_size(call.base)
        self._closing_token_id = closing_token_id(eos_token_ids(call.generation_config), self._vocabulary)

    def run(self) -> None:
        """Decodes until every row has finished.

        The pilot writes in every row until a step is rejected; only then does the base, in all of them together.
        """
        while self._rows.unfinished:
            rejected: dict[int, Rejected] = {}
            while turn := [row for row in self._rows.unfinished if row not in rejected]:
                rejected |= self._pilots_turn(turn)
            self._bases_turn(rejected)

    def _pilots_turn(self, turn: list[int]) -> dict[int, Rejected]:
        """One step of the pilot in some rows; returns the steps that the base is to write."""
        self._decoding.shrink()
        responses = self._rows.responses
        written = self._pilot.write(turn, self._rows)
        steps = {row: step for row, step in written.items() if step.tokens or step.ended}
        judged = {row: responses[row] + step.tokens for row, step in steps.items()}
        rewards = self._judge.rewards(judged, [step.ended for step in steps.values()])
        accepted = {row: step for row, step in steps.items() if rewards[row] >= self._judge.threshold}
        endless = self._accept(accepted)
        for row in accepted:
            self.steps[row].append(JudgedStep(len(responses[row]), rewards[row], accepted=True))
        rejected = {row: Rejected(step.tokens, rewards[row]) for row, step in steps.items() if row not in accepted}
        unwritten = [row for row in turn if row not in steps]
        return rejected | dict.fromkeys([*unwritten, *endless], Rejected([], math.nan))

    def _accept(self, steps: dict[int, Piece]) -> list[int]:
        """Appends steps of the pilot; returns rows that it ends with them, and that must not end there."""
        rows, decoding = self._rows, self._decoding
        before = sum(rows.lengths)
        rows.extend({row: step.tokens for row, step in steps.items()}, by_pilot=steps)
        ended = [row for row, step in steps.items() if step.ended and not rows.finished[row]]
        closing = self._closing_token_id
        endings = {} if closing is None else {row: closing for row in ended if self._may_end(row, closing)}
        if endings:
            rows.append(endings, by_pilot=steps)
        decoding.proposed += sum(len(step.tokens) for step in steps.values()) + len(endings)
        decoding.kept += sum(rows.lengths) - before
        return [row for row in ended if row not in endings]

    def _may_end(self, row: int, closing: int) -> bool:
        """True if the processors allow a response to end with the base's EOS, whatever its logits."""
        [(prefix, _)] = self._rows.prefixes([row], self._rows.device)
        scores = torch.zeros(len(prefix), self._vocabulary, dtype=torch.float32, device=prefix.device)
        # Where the caller has infinities removed, what is forbidden has the lowest finite score.
        return bool(self._processors(prefix, scores)[row, closing] > torch.finfo(scores.dtype).min)

    def _bases_turn(self, rejected: dict[int, Rejected]) -> None:
        """One step of the base in some rows, to which the rejected ones are proposed."""
        for row in rejected:
            self._rule.begin(row)
            self._pilot.drop(row)
            self._decoding.base.rewind(row, len(self._rows.responses[row]) - 1)
        # Their last tokens are the base's to write: a kept one that ends a step would be read without need.
        left = self._rows.left
        given = {row: tokens[:-1][: left[row]] for row, (tokens, _) in rejected.items() if tokens[:-1]}
        while not all(self._rule.waiting[row] for row in self._rows.unfinished):
            self._decoding.step(given)
            given = {}
        for row, (_, reward) in rejected.items():
            self.steps[row].append(JudgedStep(len(self._rows.responses[row]), reward, accepted=False))


def decode(call: Call, setup: Setup[Steps], judge: Judge, pilot_text: StepText) -> RewardGuidedOutput:
    """Decodes a call that is supported; `pilot_text` is of the pilot's tokens."""
    with open_decoding(call, setup, SpeculativeConfig()) as decoding:
        stream = decoding.proposer.stream
        pilot = PilotWriter(call, setup.side, setup.bridge, stream, setup.longest, lambda step, _: pilot_text.ends(step))
        guided = RewardGuided(call, decoding, pilot, setup.rule, judge)
        guided.run()
        return RewardGuidedOutput(
            **decoding.output(), stats=decoding.stats(), written_by_pilot=decoding.rows.written_by_pilot, steps=guided.steps
        )
