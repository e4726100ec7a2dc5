"""The places in given answers at which the base would take over from a pilot that drafts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .._compat import input_device
from ..engine.checks import (
    check_models,
    check_room,
    check_shared,
    check_tokenizer,
    eos_token_ids,
    logits_error,
    not_finite,
    vocabulary_size,
)
from ..errors import WSDValueError
from ..pair import Pair
from ..speculation.rule import Drafted
from ..speculation.verdict import entropies
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch_rules import RowSwitch, SwitchRule
from ..text.bridge import Bridge, OneVocabulary, TwoVocabularies
from ..text.chat import base_prompts
from ..text.settled_tokens import ContinuationTokenizer
from ..text.token_texts import INCOMPLETE
from ..text.vocabulary import same_vocabulary
from .examples import Example

LOGITS = 2**27
"""Most logits of a forward: 512 MiB in float32."""

SLICE = 64
"""Most tokens whose distributions are held at a time."""


@dataclass(frozen=True)
class Handover:
    """The place in an answer at which the base would take over.

    Attributes:
        tokens: number of drafted tokens up to there, in the base's vocabulary, as `WSDOutput.switch_index`; None: never.
        characters: number of the answer's characters up to there, one that is drafted in part included; of the whole draft if
            never.
        length: number of tokens of the whole draft.
    """

    tokens: int | None
    characters: int
    length: int


def handovers(
    pair: Pair,
    examples: Sequence[Example],
    rule: SwitchRule,
    which: Literal["chosen", "rejected"] = "chosen",
    *,
    max_draft_tokens: int = WSDConfig.max_draft_tokens,
    batch_size: int = 8,
    progress: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> list[Handover]:
    """The handovers of answers: those of `generate` if the pilot drafts exactly the answer, without a forward of the pilot.

    The base reads each answer once, in one forward per batch.

    Args:
        pair: its pilot lends its vocabulary only.
        examples: chats with the answers.
        rule: lets the base take over.
        which: answers to read; all examples must have them.
        max_draft_tokens: most tokens of a draft, in the pilot's vocabulary, as in `WSDConfig`.
        batch_size: most answers per forward; fewer where the logits would take more than about 512 MiB.
        progress: goes through the batches, each a list of numbers of examples, and shows how far that is.

    Raises:
        WSDValueError: an example without such an answer or whose prompt leaves no room for one, by its place, or a base that
            cannot run; before any forward.
        WSDLogitsError: NaN or +inf among the base's logits.
    """
    base = check_models({"base": pair.base})["base"]
    drafts = _drafts(pair, examples, which, max_draft_tokens)
    decoder = ContinuationTokenizer(pair.tokenizer)
    found: dict[int, Handover] = {}
    for rows in progress(list(_batches(drafts, batch_size, vocabulary_size(base)))):
        for row, opinions in zip(rows, _read(pair, base, [drafts[row] for row in rows]), strict=True):
            switch = RowSwitch(rule, drafts[row].prompt)
            end = next((number for number, drafted in enumerate(opinions, start=1) if switch.ends(drafted)), None)
            tokens = drafts[row].tokens
            found[row] = Handover(end, _characters(decoder, drafts[row].text, tokens[:end]), len(tokens))
    return [found[row] for row in range(len(examples))]


@dataclass(frozen=True)
class _Draft:
    text: str
    prompt: list[int]
    """Token ids that the base has read before."""
    tokens: list[int]
    """Of the draft, in the base's vocabulary."""


def _drafts(pair: Pair, examples: Sequence[Example], which: str, longest: int) -> list[_Draft]:
    """The drafts of a pilot that writes exactly the answers."""
    pilot = ContinuationTokenizer(pair.pilot_tokenizer)
    answers = [_answer(example, which) for example in examples]
    written = [pilot.encode(answer) for answer in answers]
    bridge = _bridge(pair, [min(len(tokens), longest) for tokens in written])
    drafts = []
    for row, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        try:
            prompt = base_prompts([example.messages], pair.tokenizer)
            room = int(check_room("base", pair.base, prompt["attention_mask"]))
            tokens = bridge.offer(row, written[row]).tokens[:room]
            check_shared(max(tokens, default=0), vocabulary_size(pair.base))
        except WSDValueError as error:
            raise WSDValueError(f"{example.place}: {error}") from None
        drafts.append(_Draft(answer, prompt["input_ids"][0].tolist(), tokens))
    return drafts


def _answer(example: Example, which: str) -> str:
    answer: str | None = getattr(example, which)
    if answer is None:
        raise WSDValueError(f"{example.place}: has no {which} answer")
    return answer


def _bridge(pair: Pair, limits: list[int]) -> Bridge:
    """The bridge of a call of `generate` whose pilot writes so many tokens in each row."""
    sizes = vocabulary_size(pair.base), vocabulary_size(pair.pilot)
    base_ends = eos_token_ids(pair.base.generation_config)
    ends = eos_token_ids(pair.pilot.generation_config) | eos_token_ids(pair.pilot_tokenizer)
    if same_vocabulary(*sizes, pair.tokenizer, pair.pilot_tokenizer):
        return OneVocabulary(base_ends | ends, limits)
    check_tokenizer("tokenizer", pair.tokenizer, "its model", pair.base)
    check_tokenizer("pilot_tokenizer", pair.pilot_tokenizer, "its model", pair.pilot)
    return TwoVocabularies(pair.tokenizer, pair.pilot_tokenizer, ends, limits, base_ends)


def _batches(drafts: Sequence[_Draft], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Numbers of drafts that are read together, the longest texts first, so that little is padded."""
    lengths = [len(draft.prompt) + len(draft.tokens) for draft in drafts]
    rows = sorted(range(len(drafts)), key=lambda row: -lengths[row])
    while rows:
        size = max(1, min(batch_size, LOGITS // (lengths[rows[0]] * vocabulary)))
        yield rows[:size]
        rows = rows[size:]


@torch.no_grad()
def _read(pair: Pair, base: torch.nn.Module, drafts: Sequence[_Draft]) -> Iterator[list[Drafted]]:
    """The base's opinion of each token of some drafts, from one forward; padding on the right is seen by no token."""
    texts = [draft.prompt + draft.tokens for draft in drafts]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=input_device(pair.base))
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=ids.device)
    logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, draft in enumerate(drafts):
        begin = len(draft.prompt) - 1
        yield [
            opinion
            for place in range(0, len(draft.tokens), SLICE)
            for opinion in _opinions(row, place, logits[row, begin + place :], draft.tokens[place : place + SLICE])
        ]


def _opinions(row: int, place: int, logits: torch.Tensor, tokens: list[int]) -> list[Drafted]:
    """The base's opinion of some tokens of a draft, from a place in it on, by the logits before them, [.., vocabulary]."""
    logits = logits[: len(tokens)].float()
    bad = not_finite(logits)
    if bad.any():
        raise logits_error("base", place + int(bad.nonzero()[0]), row)
    distributions = logits.log_softmax(dim=-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    columns = distributions.gather(1, index).squeeze(1), distributions.amax(dim=-1), entropies(distributions)
    return list(map(Drafted, tokens, *(column.tolist() for column in columns)))


def _characters(decoder: ContinuationTokenizer, answer: str, tokens: list[int]) -> int:
    """Number of an answer's characters that its first tokens write, one that they begin included."""
    text = decoder.decode(tokens)
    if answer.startswith(text):
        return len(text)
    text = text.rstrip(INCOMPLETE)
    if answer.startswith(text):
        return len(text) + 1
    # The tokenizer normalizes: its tokens spell another text.
    places = range(len(answer) + 1)
    return next((place for place in places if decoder.encode(answer[:place])[: len(tokens)] == tokens), len(answer))
