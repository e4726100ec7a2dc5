"""Work of the host between forwards: how much there is, that it doesn't grow, and that it changes nothing."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import EosTokenCriteria, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

import wsd_hf
from every_strategy import TARGETS
from families import PAD, tiny_model
from oracle import left_padded, random_prompt
from test_bridge import (
    FRAGMENTS,
    LOSSY,
    MAKERS,
    chunks,
    complete_text,
    crossed,
    encode,
    examples,
    in_chunks,
    offers,
    tokenizer,
)
from test_fast_path import FiresAt, both, decode, pair
from test_two_vocabularies import agreeing
from wsd_hf.engine.ragged_stream import RaggedStream
from wsd_hf.strategies import STRATEGIES
from wsd_hf.text import bridge as bridges
from wsd_hf.text import settled_tokens
from wsd_hf.text.bridge import TwoVocabularies

SWEEP = pytest.mark.sweep
NEVER = 10**6  # an EOS that no model writes
BEFORE = {  # tensor operations between forwards in a step, as they were while all of this was computed with tensors
    ("drafting", 1, 4): 708,
    ("drafting", 32, 4): 1932,
    ("drafting", 32, 8): 3340,
    ("free", 1, 4): 187,
    ("free", 32, 4): 902,
    ("free", 32, 8): 926,
}


@functools.cache
def roomy_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a pilot with room for a thousand tokens."""
    models = [copy.deepcopy(tiny_model("llama", seed=seed, max_position_embeddings=4096)) for seed in (0, 5)]
    models[1].generation_config.eos_token_id = None
    return wsd_hf.enable_wsd(models[0]), models[1]


class Steps:
    """Counts in each step of a call, from one forward of the base to the next; forwards themselves don't count."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.inside, self.counts = base, False, [0]

    @contextmanager
    def forwards(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        run = RaggedStream.run

        def counted(stream: RaggedStream, *args: Any, **kwargs: Any) -> Any:
            if stream.model is self.base:
                self.counts.append(0)
            self.inside = True
            try:
                return self.mark(run(stream, *args, **kwargs))
            finally:
                self.inside = False

        with monkeypatch.context() as patched:
            patched.setattr(RaggedStream, "run", counted)
            yield

    def mark(self, outputs: Any) -> Any:
        return outputs

    @property
    def steps(self) -> list[int]:
        """Counts of the steps between the base's first forward and its last."""
        return self.counts[1:-1]


class Operations(Steps, TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self, base: PreTrainedModel) -> None:
        TorchDispatchMode.__init__(self)
        Steps.__init__(self, base)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[-1] += not self.inside
        return func(*args, **(kwargs or {}))


class Transfers(Steps, TorchFunctionMode):
    """Counts values that the host reads of the models' outputs, and of all tensors that are computed from them."""

    READS = frozenset({"cpu", "tolist", "item", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__float__"})

    def __init__(self, base: PreTrainedModel) -> None:
        TorchFunctionMode.__init__(self)
        Steps.__init__(self, base)
        self._on_device = WeakIdKeyDictionary()

    def mark(self, outputs: Any) -> Any:
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._on_device[leaf] = True
        return outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.inside or not any(
            isinstance(leaf, torch.Tensor) and leaf in self._on_device for leaf in tree_leaves((args, kwargs))
        ):
            return output
        if func.__name__ in self.READS:
            self.counts[-1] += 1
            return output.clone() if isinstance(output, torch.Tensor) else output
        return self.mark(output)


def many_steps(state: str, rows: int, chunk: int, steps: int, **kwargs: Any) -> Any:
    """A call of more than so many steps in which no row ends before."""
    drafting = {"wsd_threshold": 1.0, "wsd_max_draft_tokens": 4096, "max_new_tokens": (steps + 2) * chunk}
    free = {"switch_criteria": FiresAt(1), "max_new_tokens": steps + 30}
    ids = torch.cat([random_prompt(seed, 6) for seed in range(rows)])
    more = drafting if state == "drafting" else free
    return decode(*roomy_pair(), ids, wsd_chunk=chunk, eos_token_id=NEVER, pad_token_id=PAD, **more, **kwargs)


@pytest.mark.parametrize(
    ("state", "rows", "chunk"), [pytest.param(*case, marks=[SWEEP] if case[2] == 8 else []) for case in BEFORE], ids=str
)
@pytest.mark.parametrize("steps", [40, pytest.param(100, marks=SWEEP)])
def test_a_step_takes_at_most_a_third_of_the_operations_and_no_more_as_text_grows(
    state: str, rows: int, chunk: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations(roomy_pair()[0])
    with operations.forwards(monkeypatch), operations:
        many_steps(state, rows, chunk, steps, wsd_speculate="pilot")  # n-grams would take its place in some of the steps
    assert len(operations.steps) > steps
    assert 3 * operations.steps[9] <= BEFORE[state, rows, chunk]
    assert operations.steps[steps - 1] == operations.steps[9]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("state", ["drafting", "free"])
@pytest.mark.parametrize("steps", [40, pytest.param(100, marks=SWEEP)])
def test_the_host_reads_from_the_device_once_a_step(
    state: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers = Transfers(roomy_pair()[0])
    with transfers.forwards(monkeypatch), transfers:
        many_steps(state, 3, 4, steps, **options)
    assert set(transfers.steps) == {1}


def of_a_target(strategy: str, rows: int, **kwargs: Any) -> Any:
    """A call of more than forty steps of a strategy that is a function of logits."""
    base, pilot = roomy_pair()
    partners = {"assistant_model": pilot, "reference_model": tiny_model("llama", seed=7, max_position_embeddings=4096)}
    taken = {f"{name}_model": partners[f"{name}_model"] for name in STRATEGIES[strategy].partners}
    ids, prefix = torch.cat([random_prompt(seed, 6) for seed in range(rows)]), STRATEGIES[strategy].prefix
    engine = {f"{prefix}engine": "fast", f"{prefix}chunk": 3, f"{prefix}speculate": "pilot"}  # n-grams take other operations
    return base.generate(
        ids, strategy=strategy, **taken, **engine, max_new_tokens=150, eos_token_id=NEVER, pad_token_id=PAD, **kwargs
    )


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="greedy"), pytest.param({"do_sample": True, "top_k": 5}, id="sampled", marks=SWEEP)]
)
@pytest.mark.parametrize("strategy", ["emulated_fine_tuning", *(pytest.param(one, marks=SWEEP) for one in TARGETS[1:])])
def test_it_does_so_for_targets_and_runs_no_more_operations_as_text_grows(
    strategy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for counts in (Transfers(roomy_pair()[0]), Operations(roomy_pair()[0])):
        with counts.forwards(monkeypatch), counts:
            of_a_target(strategy, 2, **options)
        assert len(counts.steps) > 40
        assert counts.steps[39] == counts.steps[9]
        if isinstance(counts, Transfers):
            assert set(counts.steps) == {1}


@pytest.mark.parametrize("state", ["drafting", "free"])
def test_with_two_vocabularies_it_reads_the_proposals_and_what_the_base_makes_of_them(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = agreeing()
    ids = torch.tensor([world.tokenizer.encode("The quick brown fox", add_special_tokens=False)])
    kwargs = {"max_new_tokens": 60, "wsd_chunk": 4, "eos_token_id": NEVER, **world.tokenizers}
    transfers = Transfers(world.base)
    with transfers.forwards(monkeypatch), transfers:
        decode(world.base, world.pilot, ids, switch_criteria=FiresAt(60 if state == "drafting" else 1), **kwargs)
    assert len(transfers.steps) > 10
    assert set(transfers.steps) == {2}


# The same decisions


log_probabilities = st.floats(-40, 0, width=32) | st.sampled_from([math.log(0.8), -0.25, -0.5, 0.0, -math.inf])


@given(values=st.lists(log_probabilities, max_size=24), window=st.integers(1, 8), data=st.data())
def test_a_draft_switches_where_its_list_its_tensor_and_its_confidence_cross(
    values: list[float], window: int, data: Any
) -> None:
    means = [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    threshold = data.draw(st.sampled_from([0.8, 0.5, *(math.exp(mean) for mean in means if mean > -700)]))
    want = next((window + place for place, mean in enumerate(means) if mean >= math.log(threshold)), None)
    criteria, tensor = wsd_hf.SwitchCriteria(threshold, window), torch.tensor([values], dtype=torch.float64)
    assert wsd_hf.switch_index(values, threshold, window) == wsd_hf.switch_index(tensor[0], threshold, window) == want
    ends = range(1, len(values) + 1)
    assert next((end for end in ends if criteria.fires(values[:end])), None) == want
    assert next((end for end in ends if bool(criteria(torch.zeros(1, end), tensor[:, :end]))), None) == want
    full = wsd_hf.confidence(tensor, window)[0, window - 1 :]
    assert full.tolist() == torch.tensor(means, dtype=torch.float64).exp().tolist()


class SeesDrafts(FiresAt):
    """Keeps what it is shown."""

    def __init__(self, *indices: int) -> None:
        super().__init__(*indices)
        self.seen: list[tuple[list[list[int]], list[list[float]]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert (input_ids.dtype, scores.dtype) == (torch.long, torch.float32)
        self.seen.append((input_ids.tolist(), scores.tolist()))
        return super().__call__(input_ids, scores, **kwargs)


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_criteria_of_the_callers_are_shown_drafts_of_one_length_newest_last(engine: str) -> None:
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], PAD)
    criteria = SeesDrafts(2, 5, 7)
    kwargs = {"attention_mask": mask, "eos_token_id": None, "wsd_engine": engine, "switch_criteria": criteria}
    out = decode(*pair("llama"), ids, **kwargs)
    assert out.draft_length.tolist() == [2, 5, 7]
    response = out.sequences[:, ids.shape[1] :].tolist()
    assert len(criteria.seen) == 7
    for length, (tokens, scores) in enumerate(criteria.seen, start=1):
        for row, drafted in enumerate(out.draft_length.tolist()):
            if length <= drafted:
                assert tokens[row] == response[row][:length]
                assert scores[row] == out.draft_log_probs[row, :length].tolist()


class Ended(EosTokenCriteria):
    """Not transformers' own, so that it must be called; keeps each row's last prefix."""

    def __init__(self, *tokens: int) -> None:
        super().__init__(list(tokens))
        self.prefixes: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.prefixes |= {tuple(row) for row in input_ids.tolist()}
        return super().__call__(input_ids, scores, **kwargs)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_subclass_of_a_known_criterion_is_called_with_each_exact_prefix(chunk: int) -> None:
    ids, mask = left_padded([random_prompt(seed, 3 + 2 * seed) for seed in range(4)], PAD)
    criterion = Ended(2, 46, 27)
    kwargs = {"attention_mask": mask, "wsd_chunk": chunk, "stopping_criteria": [criterion], "max_new_tokens": 20}
    fast, _ = both(*pair("llama"), ids, **kwargs)
    assert {len(row) for row in trimmed(fast)} != {20}
    for row, response in zip(ids.tolist(), trimmed(fast), strict=True):
        assert {(*row, *response[:end]) for end in range(1, len(response) + 1)} <= criterion.prefixes


def trimmed(out: Any) -> list[list[int]]:
    responses = out.sequences[:, out.prompt_length :].tolist()
    return [row[: row.index(PAD)] if PAD in row else row for row in responses]


class Slow(StoppingCriteria):
    """Lets the clock of `max_time` run on by a second for each token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.time", lambda: self.now)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.now = float(input_ids.shape[1] - 6)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_time_runs_out_where_it_does_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    base, pilot = pair("llama")
    lengths = []
    for engine in ("fast", "step"):
        kwargs = {"stopping_criteria": [Slow(monkeypatch)], "max_time": 5.5, "wsd_engine": engine, "eos_token_id": None}
        lengths.append(decode(base, pilot, **kwargs).sequences.shape[1] - 6)
    assert lengths == [7, 7]


# Text that crosses


class Counted:
    """Counts calls of all tokenizers, and the characters or tokens that they get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.read = 0
        for name in ("encode", "decode"):
            monkeypatch.setattr(PreTrainedTokenizerBase, name, self._count(getattr(PreTrainedTokenizerBase, name)))

    def _count(self, function: Any) -> Any:
        @functools.wraps(function)
        def counted(tokenizer: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls, self.read = self.calls + 1, self.read + len(given)
            return function(tokenizer, given, *args, **kwargs)

        return counted

    def take(self) -> tuple[int, int]:
        taken = self.calls, self.read
        self.calls = self.read = 0
        return taken


PAIRS = [("base", "pilot_other_vocab"), ("B_base", "A_pilot_llama3"), ("C_base", "A_pilot_llama3"), ("C2_base", "llama2")]
ENGLISH = "Hello world, it's there: the quick brown fox and the lazy dogs don't jump over the other words then. " * 80


@pytest.mark.parametrize(("base", "pilot"), PAIRS)
def test_no_step_after_the_switch_reads_more_as_the_response_grows(
    base: str, pilot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = TwoVocabularies(tokenizer(base), tokenizer(pilot), {-1}, [1])
    bridge.offer(0, [-1])
    response, counted = encode(base)(ENGLISH)[:1200], Counted(monkeypatch)
    work = {}
    for end in range(3, len(response), 3):
        counted.take()
        known = bridge.pilot_tokens(0, response[:end])
        bridge.guess(0, known[:4])
        work[end] = counted.take()
    early, late = ([work[end] for end in work if first <= end < first + 150] for first in (150, 1000))
    for one, other in zip(map(sorted, zip(*early, strict=True)), map(sorted, zip(*late, strict=True)), strict=True):
        assert other[-1] <= 1.25 * one[-1]
        assert sum(other) <= 1.1 * sum(one)


@pytest.mark.parametrize(("base", "pilot"), PAIRS)
def test_no_step_of_a_draft_reads_more_as_the_draft_grows(base: str, pilot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = encode(pilot)(ENGLISH)[:1200]
    bridge, counted, work = TwoVocabularies(tokenizer(base), tokenizer(pilot), {-1}, [2000]), Counted(monkeypatch), []
    for chunk in in_chunks(drafted, [4]):
        counted.take()
        bridge.offer(0, chunk)
        work.append(counted.take())
    early, late = work[40:80], work[250:290]
    for one, other in zip(zip(*early, strict=True), zip(*late, strict=True), strict=True):
        assert max(other) <= 1.25 * max(one)
        assert sum(other) <= 1.1 * sum(one)


@contextmanager
def short_sighted() -> Iterator[None]:
    """So little is read again that the place from which texts are read moves in these texts too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bridges, "LOOK_BACK", 8)
        patched.setattr(settled_tokens, "LOOK_BACK", 8)
        yield


long_texts = st.lists(st.sampled_from(FRAGMENTS), min_size=20, max_size=60).map("".join)
EXACT = sorted(set(MAKERS) - LOSSY)


@examples(80, 300, pilot=st.sampled_from(sorted(MAKERS)), base=st.sampled_from(sorted(MAKERS)), text=long_texts, sizes=chunks)
def test_a_long_draft_crosses_as_its_text_encoded_on_its_own(pilot: str, base: str, text: str, sizes: list[int]) -> None:
    ids = encode(pilot)(text)
    with short_sighted():
        parts = offers(pilot, base, ids, sizes)
    assert crossed(parts) == encode(base)(complete_text(pilot, ids))


@examples(
    80,
    300,
    pilot=st.sampled_from(EXACT),
    base=st.sampled_from(EXACT),
    text=long_texts,
    sizes=chunks,
    guesses=st.lists(st.sampled_from(FRAGMENTS) | st.just(""), min_size=1, max_size=9),
)
def test_a_long_response_is_read_as_a_whole_one(pilot: str, base: str, text: str, sizes: list[int], guesses: list[str]) -> None:
    far, near = (TwoVocabularies(tokenizer(base), tokenizer(pilot), {-1}, [1]) for _ in range(2))
    for bridge in (far, near):
        bridge.offer(0, [-1])
    response: list[int] = []
    for piece, guess in zip(in_chunks(encode(base)(text), sizes), itertools.cycle(guesses), strict=False):
        response = response + piece
        want = far.pilot_tokens(0, response), far.complete(0), far.guess(0, encode(pilot)(guess))
        with short_sighted():
            assert (near.pilot_tokens(0, response), near.complete(0), near.guess(0, encode(pilot)(guess))) == want
