"""Predicted costs of the methods of a comparison: the pace of the fast path, replayed along texts that a diagnosis holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..engine.checks import vocabulary_size
from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from ..pair import Pair
from ..speculation.config import SpeculativeConfig
from ..speculation.pace import Price
from ..speculation.target import TargetConfig
from ..strategies.nudging.config import NudgingConfig
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch import window_mean
from ..strategies.wsd.two_way import TwoWayConfig
from ..text.vocabulary import same_vocabulary
from .paths import Path, switch_of
from .reading import Reading
from .replay import Costs, Replay

END = -1
"""Token in place of the one that ends a response elsewhere than its path."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Costs of a method for each token of its responses.

    Attributes:
        method: its name.
        base_forwards, pilot_forwards, reference_forwards: mean number.
        pilot_share: share of the tokens that the pilot writes; None where every token is the work of several models.
        time: as a multiple of the base's alone; None where it depends on more than forwards over the answer.
    """

    method: str
    base_forwards: float = 0.0
    pilot_forwards: float = 0.0
    reference_forwards: float = 0.0
    pilot_share: float | None = None
    time: float | None = None


def costs(pair: Pair, drafts: Sequence[Reading], own: Sequence[Reading]) -> Costs:
    """Prices of a pair's forwards, and their mean time in the readings."""
    sizes = vocabulary_size(pair.base), vocabulary_size(pair.pilot)
    base, pilot = (Price.of(model, captured=model.device.type == "cuda") for model in (pair.base, pair.pilot))
    base_seconds, pilot_seconds = (
        sum(one.seconds for one in readings) / sum(one.forwards for one in readings) for readings in (own, drafts)
    )
    return Costs(
        base=base,
        pilot=pilot,
        base_alone=Price.of(pair.base, captured=False),
        base_seconds=base_seconds,
        pilot_seconds=pilot_seconds,
        one_vocabulary=same_vocabulary(*sizes, pair.tokenizer, pair.pilot_tokenizer),
    )


def predict(
    methods: Mapping[str, StrategyConfig | None],
    drafts: Sequence[Reading],
    paths: Sequence[Sequence[Path]],
    costs: Costs,
    max_new_tokens: int,
) -> list[Prediction]:
    """Costs of methods that answer one prompt at a time, greedily.

    Args:
        methods: settings of strategies by any name; None for "base", "pilot" and "urial", which run one model.
        drafts: the pilot's, one for each prompt.
        paths: of each prompt, made by `find_paths` for these methods.
        costs: of the pair.
        max_new_tokens: most tokens of an answer.

    Raises:
        WSDValueError: a strategy whose costs depend on more than greedy texts: search and reward-guided decoding.
    """
    return [_predicted(name, settings, drafts, paths, costs, max_new_tokens) for name, settings in methods.items()]


def _predicted(
    name: str,
    settings: StrategyConfig | None,
    drafts: Sequence[Reading],
    paths: Sequence[Sequence[Path]],
    costs: Costs,
    limit: int,
) -> Prediction:
    if name == "pilot":
        return Prediction(method=name, pilot_forwards=1, pilot_share=1, time=costs.pilot_seconds / costs.base_seconds)
    if settings is None:
        return Prediction(method=name, base_forwards=1, pilot_share=0, time=1.0 if name == "base" else None)
    replays = [_replayed(name, settings, *of_prompt, costs, limit) for of_prompt in zip(drafts, paths, strict=True)]
    tokens = sum(replay.at for replay in replays)
    return Prediction(
        method=name,
        base_forwards=sum(replay.base_forwards for replay in replays) / tokens,
        pilot_forwards=sum(replay.pilot_forwards for replay in replays) / tokens,
        reference_forwards=sum(replay.reference_forwards for replay in replays) / tokens,
        pilot_share=None if isinstance(settings, TargetConfig) else sum(replay.by_pilot for replay in replays) / tokens,
        time=sum(replay.seconds for replay in replays) / tokens / costs.base_seconds,
    )


def _replayed(name: str, settings: StrategyConfig, draft: Reading, paths: Sequence[Path], costs: Costs, limit: int) -> Replay:
    if isinstance(settings, WSDConfig):
        return _weak_to_strong(settings, draft, paths, costs, limit)
    if isinstance(settings, TargetConfig):
        return _target(name, settings, draft, paths, costs, limit)
    if isinstance(settings, NudgingConfig):
        return _nudging(settings, draft, paths, costs, limit)
    raise WSDValueError(f"{name}: strategy={settings.name!r} cannot be predicted, since it depends on samples or scores")


# Weak-to-Strong Decoding, and its two-way form


def _weak_to_strong(config: WSDConfig, draft: Reading, paths: Sequence[Path], costs: Costs, limit: int) -> Replay:
    """The draft up to its switch, and the path that leaves it next."""
    reach = paths[-1].pilot_reach
    most = int(reach[config.max_draft_tokens - 1]) if config.max_draft_tokens <= len(reach) else limit
    switch = switch_of(draft, config)
    length = min(switch or limit, most, len(draft.tokens))
    confident, by_pilot = switch == length, length == len(draft.tokens) < most and draft.ended
    path = next(path for path in paths if path.drafted >= length)
    if config.draft_end == "stop" and not confident and length < limit:
        path = replace(path, tokens=[*draft.tokens[:length], END])
    two_way = isinstance(config, TwoWayConfig) and config.handback_threshold > 0
    replay = Replay(path, draft.base_prompt, costs, config, limit, reads_pilot=two_way and costs.one_vocabulary)
    one_by_one = two_way and not costs.one_vocabulary
    replay.draft(length, by_pilot and not confident, one_by_one)
    if isinstance(config, TwoWayConfig) and two_way:
        _hand_back(config, replay, length, one_by_one)
    while not replay.ended:
        replay.step()
    return replay


def _hand_back(config: TwoWayConfig, replay: Replay, begun: int, one_by_one: bool) -> None:
    """The path to its end; where the base leaves the pilot's, a further draft of one window is taken to lead back to it."""
    path, least, window = replay.path, math.log(config.handback_threshold), list[float]()
    read = begun
    while True:
        left = _leaves(path, window, read, replay.at, config.window_size, least)
        read = replay.at
        if left is not None:
            replay.at, window = left, []
        if replay.ended:
            return
        if left is not None:
            read = min(replay.at + config.window_size, len(path.tokens))
            replay.draft(read, one_by_one=one_by_one)
        elif one_by_one:
            before = replay.place
            replay.step_alone()
            replay.run_pilot(int(replay.place > before))
        else:
            replay.step()


def _leaves(path: Path, window: list[float], begin: int, end: int, size: int, least: float) -> int | None:
    """Place after the first of some tokens at which the pilot's mean log-probability of the last is too low."""
    for place, reached in enumerate(path.pilot_reach):
        if begin < reached <= end:
            window[:] = [] if path.pilot_ends[place] else [*window, path.pilot_log_probs[place]][-size:]
            if len(window) == size and window_mean(window) < least:
                return math.ceil(reached)
    return None


# Targets


def _target(name: str, config: TargetConfig, draft: Reading, paths: Sequence[Path], costs: Costs, limit: int) -> Replay:
    """The path that the target's own text follows longest, up to the end of the target's."""
    path = max(paths, key=lambda path: path.targets[name])
    length, ends = path.targets[name]
    if ends:
        tokens, followed = [*path.tokens[:length], END], [*path.pilot_followed[:length], path.pilot_ends[length]]
        path = replace(path, tokens=tokens, pilot_followed=followed)
    path = replace(path, followed=[True] * len(path.tokens))
    replay = Replay(path, draft.base_prompt, costs, config, limit, True, "reference" in config.partners)
    while not replay.ended:
        replay.step()
    return replay


# Nudging


def _nudging(config: NudgingConfig, draft: Reading, paths: Sequence[Path], costs: Costs, limit: int) -> Replay:
    """The path that nudging's own text follows longest."""
    replays = [_nudged(config.threshold, path, draft, costs, limit) for path in paths]
    return max(replays, key=lambda one: one[0])[1]


def _nudged(threshold: float, path: Path, draft: Reading, costs: Costs, limit: int) -> tuple[int, Replay]:
    """Number of tokens before the first that nudging would not write, and the whole path."""
    replay = Replay(path, draft.base_prompt, costs, SpeculativeConfig(), limit)
    alike, new, known = len(path.tokens), 1, False  # known: the pilot's next token, since its last word has just ended
    while not replay.ended:
        at, place = replay.at, replay.place
        replay.run_base(new)
        pilot_ends = place < len(path.pilot_ends) and path.pilot_ends[place]
        if path.certainties[at] >= threshold and not (known and pilot_ends):
            replay.at, new, known = at + 1, 1, False
            follows = path.followed[at]
        else:
            end = at + 1 if pilot_ends else _word_end(path.texts, at)
            replay.at, new = end, end - at
            words = 0 if pilot_ends else max(1, replay.place - place)
            replay.run_pilot(words + (not known))
            replay.by_pilot += end - at
            follows, known = all(path.pilot_followed[place : place + words]), True
            if pilot_ends:
                break
        if not follows:
            alike = min(alike, at)
    return alike, replay


def _word_end(texts: Sequence[str], begin: int) -> int:
    """Place of the token that begins the next word."""
    return next((place for place in range(begin + 1, len(texts)) if texts[place].startswith(" ")), len(texts))
