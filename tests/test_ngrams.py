"""N-grams of prompt and response as the second proposer: their index, the choice between proposers, and exact responses."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import wsd_hf
from families import PAD, tiny_model, tiny_pilot
from oracle import left_padded, ones, plain_tokens, random_prompt
from test_acceptance import chi_squared
from test_fast_path import FiresAt, Watch, exact, tiny
from test_pace import CAPTURED, CPU, FREE_POSITIONS, expected, pace, settle
from wsd_hf.speculation.ngrams import NGrams

NO_MATCH = [0.0] * 16
CERTAIN = [float(count) for count in range(16)]


# The index


def looked_up(text: list[int]) -> tuple[int, int] | None:
    """By a search through the whole text: the latest place after the longest of three endings, and what matches before it."""
    for size in (3, 2, 1):
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == text[-size:]:
                before = 0
                while before < min(place, 16) and text[place - 1 - before] == text[-1 - before]:
                    before += 1
                return place, before
    return None


@pytest.mark.parametrize("letters", [2, 4, 12])
def test_guesses_are_those_of_a_search_through_the_whole_text(letters: int) -> None:
    rng = random.Random(letters)
    for _ in range(60):
        prompt = [rng.randrange(letters) for _ in range(rng.randint(1, 12))]
        response = [rng.randrange(letters) for _ in range(rng.randint(0, 4))]
        ngrams, found = NGrams(prompt), looked_up(prompt + response)
        ngrams.read(response)
        for _ in range(40):
            text = prompt + response
            want = [] if found is None else [text[found[0] + index % (len(text) - found[0])] for index in range(9)]
            assert ngrams.guess(9) == want
            assert bool(ngrams.kept(4)[-1]) == (found is not None)
            token = want[0] if want and rng.random() < 0.6 else rng.randrange(letters)
            response.append(token)
            right = found is not None and text[found[0]] == token  # such a place is followed
            found = (found[0] + 1, found[1] + 1) if found and right else looked_up(prompt + response)
            ngrams.read(response)


def test_a_text_that_repeats_itself_up_to_its_end_goes_on_repeating_itself() -> None:
    ngrams = NGrams([9, 1, 2, 3, 1, 2, 3])
    ngrams.read([])
    assert ngrams.guess(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_longer_matches_are_trusted_more_and_outcomes_move_the_trust() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    trust = []
    for matched in (1, 2, 3, 6):
        ngrams = NGrams([*prompt, 0, *prompt[:matched]])
        ngrams.read([])
        trust.append(ngrams.kept(1)[1])
    assert trust == sorted(trust)
    assert 0 < trust[0] < 0.2 < 0.7 < trust[-1] < 1

    def after(outcomes: list[int]) -> float:
        """Trust in a match of two, once some tokens have been written."""
        ngrams = NGrams([1, 2, 3, 4, 1, 2])
        ngrams.read([])
        ngrams.read([*outcomes, 20, 21, 30, 20, 21])
        return ngrams.kept(1)[1]

    assert after([3, 4, 1, 2, 3, 4, 1, 2]) > after([])  # right eight times
    assert after([7, 3, 8, 4, 9, 3, 10, 2, 11]) < after([])  # wrong after each match


def test_expected_tokens_are_sums_of_chances_that_all_so_far_are_right() -> None:
    ngrams = NGrams([1, 2, 3, 0, 1, 2])
    ngrams.read([])
    kept = ngrams.kept(6)
    gains = [more - less for less, more in itertools.pairwise(kept)]
    assert len(kept) == 7
    assert kept[0] == 0.0
    assert gains == sorted(gains, reverse=True)
    assert ngrams.kept(2) == kept[:3]


class Counted(list[int]):
    """A list that counts the items taken out of it."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.taken += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.taken += len(self)
        return super().__iter__()


def test_nothing_is_indexed_before_it_is_needed_and_each_token_is_read_once() -> None:
    prompt, response = Counted(range(5000)), Counted()
    ngrams = NGrams(prompt)
    assert prompt.taken == 0
    for token in range(200):
        ngrams.read(response)
        response.append(token)
    assert prompt.taken <= 2 * len(prompt)
    assert response.taken <= 2 * len(response)


# The choice between proposers


def test_each_row_gets_the_proposals_of_which_more_are_expected_to_be_kept() -> None:
    plan = settle(pace(0.01), 0.8).plan(drafting=0, free={3: NO_MATCH, 5: CERTAIN, 6: [0.1 * count for count in range(16)]})
    assert plan.by_pilot
    assert plan.ngrams == [5]


def test_the_pilot_rests_where_ngrams_promise_more_for_their_price() -> None:
    for agreement, cost in ((0.2, 0.1), (0.8, 0.9)):
        plan = settle(pace(cost, CPU), agreement).plan(drafting=0, free={0: CERTAIN, 1: CERTAIN})
        assert not plan.by_pilot
        assert plan.ngrams == [0, 1]
        assert plan.chunk > 0


@pytest.mark.parametrize("rates", [FREE_POSITIONS, CPU, CAPTURED])
@pytest.mark.parametrize("sure", [0.05, 0.3, 0.6, 0.9])
def test_ngrams_alone_get_the_chunk_of_most_tokens_for_their_price(rates: Any, sure: float) -> None:
    alone = pace(1.0, rates, speculate=False)
    kept = [expected(sure, count) - 1 for count in range(16)]
    price = [1 + (rates.several + rates.token * (count + 1) if count else 0) for count in range(16)]
    best = max((0, 7, 15), key=lambda count: (1 + kept[count]) / price[count] / (1.1 if count else 1.0))
    plan = alone.plan(drafting=0, free={4: kept})
    assert plan == (best, False, [4] if best else [])


def test_rows_that_draft_need_the_pilot_and_free_ones_still_take_their_ngrams() -> None:
    plan = pace(0.1, CPU, speculate=False).plan(drafting=1, free={1: CERTAIN, 2: NO_MATCH})
    assert plan.by_pilot
    assert plan.chunk > 0
    assert plan.ngrams == [1]


def test_a_fixed_chunk_is_shared_by_both_proposers() -> None:
    kept = [0.0, 0.9, 1.7, 2.5, 3.2, 3.9]
    assert settle(pace(0.1, fixed=5), 0.3).plan(0, {0: kept, 1: NO_MATCH[:6]}) == (5, True, [0])
    assert pace(0.1, fixed=5, speculate=False).plan(0, {0: kept, 1: NO_MATCH[:6]}) == (5, False, [0])


def test_a_pilot_that_only_reads_is_paid_for() -> None:
    free = {0: [expected(0.75, count) - 1 for count in range(16)]}
    prices = {"cheap": 0.01, "dear": 40.0}
    chunks = {}
    for name, cost in prices.items():
        one = pace(cost, CPU, speculate=False)
        one._reads_pilot = True
        chunks[name] = one.plan(0, free).chunk
    assert chunks["cheap"] >= chunks["dear"]


# The setting


def test_configs_of_earlier_versions_mean_the_better_of_both() -> None:
    assert wsd_hf.WSDConfig(speculate=True) == wsd_hf.WSDConfig()
    assert wsd_hf.WSDConfig().speculate == "auto"
    assert wsd_hf.WSDConfig(speculate=False).speculate is False


@pytest.mark.parametrize("value", ["both", "", 2, None])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"speculate=.*must be 'auto' or 'pilot' or 'ngram' or True or False"):
        wsd_hf.WSDConfig(speculate=value)


# Less work


TEXT, OTHER = list(range(3, 43)), 50


def successors(seed: int, after: dict[int, int]) -> PreTrainedModel:
    """A model that writes a certain token after each token: its head finds the token before in the residual stream."""
    model = copy.deepcopy(tiny_model("llama", seed=seed)).double()
    embeddings, head = model.get_input_embeddings().weight, torch.nn.Linear(model.config.hidden_size, 64, bias=False).double()
    with torch.no_grad():
        embeddings.copy_(1000 * torch.nn.functional.normalize(embeddings))
        head.weight.zero_()
        for token, successor in after.items():
            head.weight[successor] = embeddings[token]
    model.set_output_embeddings(head)
    return model


def copying(edits: list[int]) -> tuple[PreTrainedModel, PreTrainedModel, torch.Tensor, list[int]]:
    """A base that writes a text twice, a prompt with that text but for some tokens, and a pilot that never agrees."""
    base = successors(0, dict(zip([OTHER, *TEXT], [*TEXT, OTHER], strict=True)))
    pilot = successors(0, dict.fromkeys([OTHER, *TEXT], OTHER))
    prompt = [60 if place in edits else token for place, token in enumerate(TEXT)]
    return wsd_hf.enable_wsd(base), pilot, torch.tensor([prompt]), [OTHER, *TEXT, OTHER, *TEXT]


def answered(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor, speculate: Any, **kwargs: Any) -> Any:
    settings = {
        "attention_mask": ones(ids),
        "strategy": "wsd",
        "wsd_engine": "fast",
        "switch_criteria": FiresAt(1),
        "return_dict_in_generate": True,
        "wsd_speculate": speculate,
    }
    return base.generate(ids, assistant_model=pilot, **{**settings, **kwargs})


@pytest.mark.parametrize("speculate", ["auto", "ngram"])
@pytest.mark.parametrize("edits", [[], [5, 20, 33]])
def test_a_text_that_repeats_its_prompt_takes_fewer_forwards_without_agreement(speculate: str, edits: list[int]) -> None:
    base, pilot, ids, want = copying(edits)
    forwards = {}
    for proposer in ("pilot", speculate):
        with Watch(base) as watch:
            out = answered(base, pilot, ids, proposer, max_new_tokens=len(want), eos_token_id=None)
        assert out.sequences[0, ids.shape[1] :].tolist() == want
        assert watch.forwards == out.stats.base.forwards
        forwards[proposer] = watch.forwards
    assert forwards["pilot"] >= 0.9 * len(want)
    assert forwards[speculate] <= 0.4 * forwards["pilot"]


def test_ngrams_alone_leave_the_pilot_at_rest_after_the_switch() -> None:
    base, pilot, ids, want = copying([5, 20])
    with Watch(pilot) as watch:
        out = answered(base, pilot, ids, "ngram", max_new_tokens=len(want), eos_token_id=None, wsd_chunk=3)
    assert watch.forwards == 3  # one chunk, to which the switch belongs
    assert out.stats.proposed > out.stats.kept > 10


def test_a_pilot_that_agrees_is_not_given_up_for_ngrams_that_do_not() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")).double())
    ids = random_prompt(3, 9)
    forwards = {
        proposer: answered(base, copy.deepcopy(base), ids, proposer, max_new_tokens=60, eos_token_id=None, wsd_chunk=5).stats
        for proposer in ("pilot", "auto")
    }
    assert forwards["auto"].base.forwards <= forwards["pilot"].base.forwards + 1


# The same responses


@pytest.mark.parametrize("speculate", ["auto", "ngram"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("calls", [6, pytest.param(24, marks=pytest.mark.sweep)])
def test_batches_that_repeat_their_prompts_are_those_of_plain_decoding(speculate: str, chunk: int | None, calls: int) -> None:
    base, pilot = (copy.deepcopy(model).double() for model in (tiny_model("llama"), tiny_pilot("llama", noise=0.4)))
    wsd_hf.enable_wsd(base)
    rng = random.Random(f"{speculate} {chunk}")
    proposed = 0
    for _ in range(calls):
        pieces = [random_prompt(rng.randrange(99), rng.randint(1, 4)) for _ in range(rng.randint(1, 5))]
        ids, mask = left_padded([piece.repeat(1, rng.randint(2, 4)) for piece in pieces], PAD)
        budget = rng.randint(1, 40)
        kwargs = {"attention_mask": mask, "max_new_tokens": budget, "eos_token_id": None, "wsd_chunk": chunk}
        out = answered(base, pilot, ids, speculate, **kwargs)
        proposed += out.stats.proposed
        for row, (given, used) in enumerate(zip(ids, mask, strict=True)):
            first = out.sequences[row, ids.shape[1] : ids.shape[1] + 1]
            prompt = torch.cat([given[used.bool()], first])[None]
            assert out.sequences[row, ids.shape[1] + 1 :].tolist() == plain_tokens(base, prompt, budget - 1, eos_token_id=None)
    assert proposed > 8 * calls


SAMPLING: dict[str, dict[str, Any]] = {
    "n-grams alone": {"wsd_speculate": "ngram"},
    "at their own pace": {"wsd_speculate": "ngram", "wsd_chunk": None},
    "beside the pilot": {"wsd_speculate": "auto"},
    "warped": {"wsd_speculate": "ngram", "temperature": 0.7, "top_k": 3},
    "penalised": {"wsd_speculate": "auto", "repetition_penalty": 1.4},
}


SWEPT = {"n-grams alone", "penalised"}
"""Those whose loop another one takes too."""


@pytest.mark.parametrize("sampling", [pytest.param(n, marks=[pytest.mark.sweep] if n in SWEPT else []) for n in SAMPLING])
@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_continuations_with_guesses_are_distributed_as_the_bases(sampling: str, draws: int) -> None:
    options = {"do_sample": True, "top_k": 0, "wsd_chunk": 3, **SAMPLING[sampling]}
    speculate = options.pop("wsd_speculate")
    base, pilot = wsd_hf.enable_wsd(tiny(5, 0)), tiny(5, 7)
    prompt = torch.tensor([[1, 3, 2, 4, 1, 3, 2, 4, 1, 3]])
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 4, "num_return_sequences": draws // 4, "pad_token_id": 0}
    outs = [answered(base, pilot, prompt, speculate, **kwargs, **options) for _ in range(4)]
    drawn = torch.cat([out.sequences[:, prompt.shape[1] :] for out in outs])
    with torch.no_grad():
        kept = (pilot(prompt).logits[0, -1].float() / options.get("temperature", 1.0)).topk(options["top_k"] or 5)
    first = torch.zeros(5).scatter(0, kept.indices, kept.values.softmax(-1))
    want = exact(base, first, 4, 5, prompt, **options)
    cells = (drawn * torch.tensor([125, 25, 5, 1])).sum(dim=1).bincount(minlength=625)
    assert chi_squared(cells, draws * want) > 1e-3
