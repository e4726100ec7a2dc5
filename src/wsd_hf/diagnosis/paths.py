"""Texts that strategies may write, and each model's first choices along them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.checks import check_room, eos_token_ids, vocabulary_size
from ..engine.likelihoods import log_probs
from ..engine.small_model import left_padded
from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from ..pair import Pair
from ..speculation.rule import Logits, over_vocabulary
from ..speculation.target import TargetConfig
from ..strategies.wsd.config import WSDConfig
from ..text.bridge import TwoVocabularies
from ..text.chat import Messages
from ..text.vocabulary import same_vocabulary
from ..trace import added_texts
from .reading import Reading
from .switches import switch_index


class Agreement(NamedTuple):
    """The part of a path that a target would write itself."""

    length: int
    """Tokens before the first that it would not have chosen."""
    ends: bool
    """True if it would have ended the text there."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """One text that a strategy may write: a beginning of the pilot's draft, and the base's greedy text after it.

    Attributes:
        prompt: number of the prompt, counted from 0.
        drafted: number of its tokens that are the draft's; 0 for the base's own answer.
        tokens: of the text and its end, in the base's vocabulary.
        texts: part of the text that each token adds.
        certainties: the base's largest probability in each place.
        followed: whether the base's first choice in each place is the token.
        pilot_reach: number of the base's tokens that are complete after each of the pilot's tokens of the same text, and a half
            where that token ends within another.
        pilot_followed: whether the pilot's first choice is that token.
        pilot_certainties: the pilot's probability of its first choice.
        pilot_log_probs: of that token.
        pilot_ends: whether the pilot's first choice ends the text.
        targets: by the names of strategies that choose from several models' probabilities.
    """

    prompt: int
    drafted: int
    tokens: list[int]
    texts: list[str]
    certainties: list[float]
    followed: list[bool]
    pilot_reach: list[float]
    pilot_followed: list[bool]
    pilot_certainties: list[float]
    pilot_log_probs: list[float]
    pilot_ends: list[bool]
    targets: dict[str, Agreement]


def find_paths(
    pair: Pair,
    chats: Sequence[Messages],
    drafts: Sequence[Reading],
    max_new_tokens: int,
    methods: Mapping[str, StrategyConfig | None],
) -> Iterator[list[Path]]:
    """The base's own answer to each prompt, and its continuations of the pilot's draft.

    The base writes the same text after all switches that lie between two tokens in whose place it would have written another.
    So the draft is continued before the first such token, before the next one after each switch of the methods, and at its end.
    That takes one batch of the base for each prompt, and one forward of each model over each text.

    Args:
        pair: the models.
        chats: the prompts.
        drafts: the pilot's, one for each prompt.
        max_new_tokens: most tokens of an answer.
        methods: those that are to be predicted; see `predict`.

    Yields:
        The paths of one prompt, those with the fewest drafted tokens first; the last begins with the whole draft.

    Raises:
        WSDValueError: methods that mix probabilities for a pair of two vocabularies.
    """
    settings = [one for one in methods.values() if isinstance(one, WSDConfig)]
    reader = _Reader(pair, {name: one for name, one in methods.items() if isinstance(one, TargetConfig)})
    for chat, draft in zip(chats, drafts, strict=True):
        inputs = pair.inputs([chat])
        limit = min(max_new_tokens, int(check_room("base", pair.base, inputs["attention_mask"])))
        kept = [0, *cuts(draft, [draft_length(draft, one) for one in settings])]
        texts = _continued(pair, draft, kept, limit, inputs.get("stopping_criteria", []))
        pilot_prompt = inputs["assistant_input_ids"][0].tolist()
        yield [reader.read(draft, length, text, pilot_prompt) for length, text in zip(kept, texts, strict=True)]


def draft_length(draft: Reading, settings: WSDConfig) -> int:
    """Number of the draft's tokens that a response begins with, if the limit of a draft counts tokens of the base."""
    return min(switch_of(draft, settings) or len(draft.tokens), settings.max_draft_tokens)


def switch_of(draft: Reading, settings: WSDConfig) -> int | None:
    """The switch index of a draft; None if the rule never fires."""
    return switch_index(draft, settings.switch_rule())


def cuts(draft: Reading, lengths: Sequence[int]) -> list[int]:
    """Lengths at which the base continues a draft: before the first token that it would not have written, before the next one
    after each of some lengths, and at the end.
    """
    choices = zip(draft.log_probs, draft.best_log_probs, strict=True)
    end = len(draft.tokens)
    places = [*(place for place, (own, best) in enumerate(choices) if place and own < best), end]
    return sorted({next(place for place in places if place >= length) for length in (1, *lengths, end)}) if end else []


def _continued(pair: Pair, draft: Reading, kept: list[int], limit: int, criteria: Sequence[Any]) -> list[list[int]]:
    """Texts that begin with so many tokens of a draft, from one batch of the base."""
    ids, mask = left_padded([draft.base_prompt + draft.tokens[:length] for length in kept], pair.base.device)
    stops = {"stopping_criteria": criteria} if criteria else {}
    sequences = pair.base.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, **stops)
    eos = eos_token_ids(pair.base.generation_config)
    texts = []
    for length, row in zip(kept, sequences[:, ids.shape[1] :].tolist(), strict=True):
        text = draft.tokens[:length]
        for token in row[: limit - length]:
            if text and (text[-1] in eos or any(rule.ends(draft.base_prompt, text) for rule in criteria)):
                break
            text = [*text, token]
        texts.append(text)
    return texts


class _Reader:
    """Models that read texts."""

    def __init__(self, pair: Pair, targets: Mapping[str, TargetConfig]) -> None:
        sizes = vocabulary_size(pair.base), vocabulary_size(pair.pilot)
        self._one_vocabulary = same_vocabulary(*sizes, pair.tokenizer, pair.pilot_tokenizer)
        if targets and not self._one_vocabulary:
            raise WSDValueError(f"{', '.join(targets)}: need one vocabulary, and the pair has two: leave them out")
        self._pair, self._targets = pair, targets
        self._base_ends = eos_token_ids(pair.base.generation_config)
        self._pilot_ends = eos_token_ids(pair.pilot.generation_config) | eos_token_ids(pair.pilot_tokenizer)

    @torch.no_grad()
    def read(self, draft: Reading, drafted: int, text: list[int], pilot_prompt: list[int]) -> Path:
        pair = self._pair
        own, reach = (text, [*map(float, range(1, 1 + len(text)))]) if self._one_vocabulary else self._in_pilot_tokens(text)
        base, pilot = _logits(pair.base, draft.base_prompt, text), _logits(pair.pilot, pilot_prompt, own)
        choices, pilot_choices = base.argmax(dim=-1).tolist(), pilot.argmax(dim=-1).tolist()
        return Path(
            prompt=draft.prompt,
            drafted=drafted,
            tokens=text,
            texts=[*added_texts(text, pair.tokenizer)],
            certainties=base.softmax(dim=-1).amax(dim=-1).tolist(),
            followed=[choice == token for choice, token in zip(choices, text, strict=True)],
            pilot_reach=reach,
            pilot_followed=[choice == token for choice, token in zip(pilot_choices, own, strict=True)],
            pilot_certainties=pilot.softmax(dim=-1).amax(dim=-1).tolist(),
            pilot_log_probs=log_probs(pilot, torch.tensor(own, device=pilot.device)).tolist(),
            pilot_ends=[choice in self._pilot_ends for choice in pilot_choices],
            targets=self._agreements(base, pilot, pilot_prompt, text) if self._targets else {},
        )

    def _agreements(self, base: torch.Tensor, pilot: torch.Tensor, prompt: list[int], text: list[int]) -> dict[str, Agreement]:
        size = base.shape[-1]
        logits = Logits(base, over_vocabulary(pilot.to(base.device), size))
        if self._pair.reference is not None:
            reference = _logits(self._pair.reference, prompt, text).to(base.device)
            logits = logits._replace(reference=over_vocabulary(reference, size))
        found = {}
        for name, target in self._targets.items():
            choices = target.target(logits).argmax(dim=-1).tolist()
            others = (place for place, (choice, token) in enumerate(zip(choices, text, strict=True)) if choice != token)
            length = next(others, len(text))
            found[name] = Agreement(length, length < len(text) and choices[length] in self._base_ends | self._pilot_ends)
        return found

    def _in_pilot_tokens(self, text: list[int]) -> tuple[list[int], list[float]]:
        """The pilot's tokens of a text, and their reach."""
        tokenizer, pilot_tokenizer = self._pair.tokenizer, self._pair.pilot_tokenizer
        own = TwoVocabularies(tokenizer, pilot_tokenizer, self._pilot_ends, [0]).pilot_tokens(0, text)
        ends = _text_ends(tokenizer, text)
        complete = [(sum(end <= reached for end in ends), reached in ends) for reached in _text_ends(pilot_tokenizer, own)]
        return own, [count + (0.0 if whole else 0.5) for count, whole in complete]


def _logits(model: PreTrainedModel, prompt: list[int], text: list[int]) -> torch.Tensor:
    """float32 logits before each token of a text, [tokens, V]."""
    ids = torch.tensor([prompt + text], device=model.device)
    logits: torch.Tensor = model(ids, logits_to_keep=len(text) + 1).logits[0, :-1].float()
    return logits


def _text_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Length of the whole characters' text after each token."""
    texts = (tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(1, 1 + len(ids)))
    return [len(text.rstrip("\ufffd")) for text in texts]
