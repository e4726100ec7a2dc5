"""What `generate(..., strategy="wsd")` returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

import wsd_hf
from families import EOS, PAD, tiny_model, tiny_pilot
from oracle import Expected, compose, first_crossing, left_padded, ones, plain_tokens, random_prompt, response
from scripted import EOS as SCRIPT_EOS
from scripted import PILOT_EOS, ScriptedModel, believe, scripted_model, write
from tokenizers_for_tests import letter_tokenizer

PROMPT = [5, 6, 7]
DRAFT = [8, 9, 10, 11, 12, 13]
IDS = torch.tensor([PROMPT])
STEP = {"wsd_engine": "step"}  # where a test counts the forwards and calls of one token after another


def scripted_pair(
    probabilities: list[float], draft: list[int] = DRAFT, ending: int = PILOT_EOS
) -> tuple[ScriptedModel, ScriptedModel]:
    """A base that believes the draft's tokens with these probabilities, and the pilot that writes it and ends."""
    base = believe(scripted_model(seed=1), PROMPT, draft, probabilities)
    pilot = write(scripted_model(seed=2, eos=PILOT_EOS), PROMPT, [*draft, ending])
    return wsd_hf.enable_wsd(base), pilot


def decode(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> wsd_hf.WSDOutput:
    kwargs = {"attention_mask": ones(ids), "max_new_tokens": 14, "return_dict_in_generate": True, **kwargs}
    return base.generate(ids, assistant_model=pilot, **{"strategy": "wsd", **kwargs})


def new_tokens(output: wsd_hf.WSDOutput, row: int = 0) -> list[int]:
    return output.sequences[row, output.prompt_length :].tolist()


def rule(threshold: float, window: int, **kwargs: Any) -> dict[str, Any]:
    return {"strategy": wsd_hf.WSDConfig(threshold=threshold, window_size=window, **kwargs)}


class Ends(StoppingCriteria):
    """Ends a row at its n-th new token, or at a token id."""

    def __init__(self, prompt_length: int, after: int | None = None, token: int | None = None) -> None:
        self.prompt_length, self.after, self.token = prompt_length, after, token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.after is not None:
            return torch.full((len(input_ids),), input_ids.shape[1] - self.prompt_length >= self.after)
        return input_ids[:, -1] == self.token


# The switch


@pytest.mark.parametrize("switch_at", range(1, len(DRAFT) + 1))
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_scripted_switch_at_every_index_gives_the_composition(switch_at: int, window: int) -> None:
    if switch_at < window:
        switch_at = window
    probabilities = [0.9 if index > switch_at - window else 1e-4 for index in range(1, len(DRAFT) + 1)]
    base, pilot = scripted_pair(probabilities)
    out = decode(base, pilot, IDS, **rule(0.8, window))
    want = compose(base, pilot, IDS, threshold=0.8, window=window, max_new_tokens=14)
    assert want.draft_length == switch_at
    assert new_tokens(out) == want.tokens
    assert (out.draft_length.tolist(), out.switch_reason) == ([switch_at], ["confident"])


@pytest.mark.parametrize("length", range(len(DRAFT) + 1))
def test_a_draft_that_the_pilot_ends_is_kept_whole(length: int) -> None:
    base, pilot = scripted_pair([1e-4] * length, DRAFT[:length])
    out = decode(base, pilot, IDS, **rule(0.8, 1))
    want = compose(base, pilot, IDS, threshold=0.8, window=1, max_new_tokens=14)
    assert (new_tokens(out)[:length], want.draft_length) == (DRAFT[:length], length)
    assert new_tokens(out) == want.tokens
    assert out.switch_reason == ["draft_ended"]


@pytest.mark.parametrize("ending", [SCRIPT_EOS, PILOT_EOS])
def test_an_eos_of_either_model_ends_the_draft_without_entering_the_response(ending: int) -> None:
    base, pilot = scripted_pair([1e-4] * 3, DRAFT[:3], ending)
    out = decode(base, pilot, IDS, **rule(0.8, 1))
    assert new_tokens(out) == DRAFT[:3] + plain_tokens(base, torch.tensor([PROMPT + DRAFT[:3]]), 11)
    assert ending not in new_tokens(out)


def test_an_eos_first_leaves_the_whole_response_to_the_base() -> None:
    base, pilot = scripted_pair([], [])
    out = decode(base, pilot, IDS)
    assert new_tokens(out) == plain_tokens(base, IDS, 14)
    assert (out.draft_length.tolist(), out.switch_reason, out.draft_log_probs.shape) == ([0], ["draft_ended"], (1, 0))


def test_the_base_may_end_the_response_right_at_the_switch() -> None:
    base, pilot = scripted_pair([1e-4, 0.9])
    write(base, PROMPT + DRAFT[:2], [SCRIPT_EOS])
    assert new_tokens(decode(base, pilot, IDS, **rule(0.8, 1))) == [*DRAFT[:2], SCRIPT_EOS]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_rule_that_fires_at_its_first_chance_keeps_one_window(base: Any, pilot: Any, window: int) -> None:
    prompt = random_prompt(0, 5)
    out = decode(base, pilot, prompt, **rule(1e-9, window))
    drafted = plain_tokens(pilot, prompt, window)
    assert new_tokens(out) == drafted + plain_tokens(base, torch.cat([prompt, torch.tensor([drafted])], 1), 14 - window)


def test_a_rule_that_never_fires_keeps_the_draft_up_to_its_limit(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    out = decode(base, pilot, prompt, **rule(1.0, 1, max_draft_tokens=6))
    drafted = plain_tokens(pilot, prompt, 6)
    assert new_tokens(out) == drafted + plain_tokens(base, torch.cat([prompt, torch.tensor([drafted])], 1), 8)
    assert out.switch_reason == ["draft_limit"]


def test_a_rule_that_never_fires_within_the_budget_gives_the_pilot_alone(base: Any, pilot: Any) -> None:
    prompt = random_prompt(2, 6)
    out = decode(base, pilot, prompt, **rule(1.0, 1))
    assert new_tokens(out) == plain_tokens(pilot, prompt, 14)
    assert out.switch_reason == ["budget"]


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("window", [1, 3])
def test_a_pilot_that_is_the_base_changes_nothing(base: Any, threshold: float, window: int) -> None:
    prompt = random_prompt(3, 5)
    assert new_tokens(decode(base, base, prompt, **rule(threshold, window))) == plain_tokens(base, prompt, 14)


def test_switch_index_and_log_probabilities_are_those_of_one_forward(base: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 6)
    out = decode(base, pilot, prompt, **rule(0.3, 2))
    drafted = int(out.draft_length)
    with torch.no_grad():
        rows = base(out.sequences[:, : 6 + drafted]).logits[0, 5:-1].log_softmax(-1)
    want = rows.gather(1, out.sequences[0, 6 : 6 + drafted, None])[:, 0]
    torch.testing.assert_close(out.draft_log_probs[0], want, atol=1e-5, rtol=1e-5)


def test_a_custom_switch_criterion_takes_the_place_of_the_rule(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)

    class AtFourth(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> bool:
            assert scores.shape == input_ids.shape
            return input_ids.shape[1] == 4

    out = decode(base, pilot, prompt, switch_criteria=AtFourth())
    assert (out.draft_length.tolist(), out.switch_reason) == ([4], ["confident"])
    assert new_tokens(out)[:4] == plain_tokens(pilot, prompt, 4)


# Where a response ends


@pytest.mark.parametrize("draft_end", ["continue", "stop"])
@pytest.mark.parametrize("limit", [1, 3, 20])
def test_draft_end_decides_who_has_the_last_word(draft_end: str, limit: int) -> None:
    base, pilot = scripted_pair([1e-4] * 6)
    out = decode(base, pilot, IDS, **rule(0.8, 1, max_draft_tokens=limit, draft_end=draft_end))
    want = compose(base, pilot, IDS, threshold=0.8, window=1, max_new_tokens=14, limit=limit, draft_end=draft_end)
    assert new_tokens(out) == want.tokens
    assert out.switch_reason == [want.reason]
    assert (new_tokens(out)[-1] == SCRIPT_EOS) is (draft_end == "stop")


def test_draft_end_stop_lets_a_confident_base_write_on() -> None:
    base, pilot = scripted_pair([1e-4, 0.9])
    out = decode(base, pilot, IDS, **rule(0.8, 1, draft_end="stop"))
    assert new_tokens(out) == DRAFT[:2] + plain_tokens(base, torch.tensor([PROMPT + DRAFT[:2]]), 12)


def test_draft_end_stop_ends_only_the_rows_whose_draft_ended() -> None:
    base, pilot = scripted_pair([1e-4, 0.9])
    other = [9, 5, 6, 7, 8]
    write(pilot, other, [14, 15, 3, PILOT_EOS])
    believe(base, other, [14, 15, 3], [1e-4] * 3)
    ids, mask = left_padded([IDS, torch.tensor([other])], 0)
    out = decode(base, pilot, ids, attention_mask=mask, **rule(0.8, 1, draft_end="stop"))
    assert new_tokens(out, 1) == [14, 15, 3, SCRIPT_EOS] + [0] * 10
    assert new_tokens(out, 0) == DRAFT[:2] + plain_tokens(base, torch.tensor([PROMPT + DRAFT[:2]]), 12)


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_the_budget_counts_the_whole_response(base: Any, pilot: Any, budget: int) -> None:
    prompt = random_prompt(0, 5)
    out = decode(base, pilot, prompt, max_new_tokens=budget, **rule(1e-9, 3))
    want = compose(base, pilot, prompt, threshold=1e-9, window=3, max_new_tokens=budget)
    assert new_tokens(out) == want.tokens
    assert len(new_tokens(out)) == budget
    assert out.switch_reason == [want.reason]


def test_max_length_counts_the_prompt(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    assert decode(base, pilot, prompt, max_new_tokens=None, max_length=9, **rule(0.3, 1)).sequences.shape == (1, 9)


@pytest.mark.parametrize("after", [1, 3, 4, 5, 8])
def test_a_criterion_stops_inside_the_draft_at_the_switch_and_behind_it(after: int) -> None:
    base, pilot = scripted_pair([1e-4, 1e-4, 1e-4, 0.9])
    whole = new_tokens(decode(base, pilot, IDS, **rule(0.8, 1)))
    out = decode(base, pilot, IDS, stopping_criteria=[Ends(3, after=after)], **rule(0.8, 1))
    assert new_tokens(out) == whole[:after]
    assert out.draft_length.tolist() == [min(after, 4)]
    assert out.switch_reason == ["stopped" if after < 4 else "confident"]


def test_a_criterion_stops_one_row_inside_its_draft_and_leaves_the_others(base: Any, pilot: Any) -> None:
    rows = [random_prompt(seed, 6) for seed in range(3)]
    ids = torch.cat(rows)
    alone = [new_tokens(decode(base, pilot, row, **rule(1.0, 1, max_draft_tokens=8))) for row in rows]
    token = alone[0][2]
    out = decode(base, pilot, ids, stopping_criteria=[Ends(6, token=token)], **rule(1.0, 1, max_draft_tokens=8))
    for row, tokens in enumerate(alone):
        end = tokens.index(token) + 1 if token in tokens else len(tokens)
        assert new_tokens(out, row)[:end] == tokens[:end]
        assert set(new_tokens(out, row)[end:]) <= {PAD}
    assert out.switch_reason[0] == "stopped"
    assert out.draft_length[0] == alone[0].index(token) + 1


def test_a_response_that_stops_and_is_full_at_once_ran_out_of_budget(base: Any, pilot: Any) -> None:
    out = decode(base, pilot, random_prompt(0, 5), max_new_tokens=3, stopping_criteria=[Ends(5, after=3)], **rule(1.0, 1))
    assert out.switch_reason == ["budget"]


@pytest.mark.parametrize("place", ["prompt into draft", "draft", "end of draft", "across the switch", "continuation"])
@pytest.mark.parametrize("door", ["keyword", "passed config", "model's config", "criterion"])
def test_a_stop_string_ends_the_response_where_it_becomes_complete(place: str, door: str) -> None:
    tokenizer = letter_tokenizer()
    base, pilot = scripted_pair([1e-4, 1e-4, 1e-4, 0.9])
    whole = PROMPT + new_tokens(decode(base, pilot, IDS, **rule(0.8, 1)))
    end = {"prompt into draft": 4, "draft": 6, "end of draft": 7, "across the switch": 8, "continuation": 10}[place]
    text = tokenizer.decode(whole[end - 2 : end])
    kwargs: dict[str, Any] = {"tokenizer": tokenizer, **rule(0.8, 1)}
    if door == "keyword":
        kwargs["stop_strings"] = [text]
    elif door == "passed config":
        kwargs["generation_config"] = GenerationConfig(stop_strings=text, max_new_tokens=14, return_dict_in_generate=True)
        out = base.generate(IDS, assistant_model=pilot, attention_mask=ones(IDS), **kwargs)
        assert out.sequences[0].tolist() == whole[:end]
        return
    elif door == "model's config":
        base.generation_config.stop_strings = [text]
    else:
        kwargs["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, [text])])
    assert decode(base, pilot, IDS, **kwargs).sequences[0].tolist() == whole[:end]


# Batches


@pytest.mark.parametrize("seed", range(3))
def test_padding_on_the_left_changes_no_token(base: Any, pilot: Any, seed: int) -> None:
    prompt = random_prompt(seed, 6)
    ids, mask = left_padded([prompt], PAD, width=6 + 32)
    alone = decode(base, pilot, prompt, **rule(0.3, 2))
    assert new_tokens(decode(base, pilot, ids, attention_mask=mask, **rule(0.3, 2))) == new_tokens(alone)


@pytest.mark.parametrize(("threshold", "window"), [(0.15, 1), (0.3, 2), (0.15, 3)])
def test_every_row_of_a_batch_equals_its_own_run(base: Any, pilot: Any, threshold: float, window: int) -> None:
    rows = [random_prompt(seed, 3 + seed) for seed in range(6)]
    ids, mask = left_padded(rows, PAD)
    out = decode(base, pilot, ids, attention_mask=mask, **rule(threshold, window, max_draft_tokens=10))
    for row, prompt in enumerate(rows):
        alone = decode(base, pilot, prompt, **rule(threshold, window, max_draft_tokens=10))
        want = Expected(new_tokens(alone), int(alone.draft_length), alone.switch_reason[0])
        assert response(out.sequences[row], ids.shape[1], want, PAD) == want.tokens
        assert (int(out.draft_length[row]), out.switch_reason[row]) == (want.draft_length, want.reason)
        torch.testing.assert_close(
            out.draft_log_probs[row, : want.draft_length], alone.draft_log_probs[0], atol=1e-5, rtol=1e-5
        )
        assert out.draft_log_probs[row, want.draft_length :].isnan().all()
    assert len(set(out.draft_length.tolist())) >= 3, "the rows should switch at different steps"


def test_num_return_sequences_samples_several_responses_per_prompt(base: Any, pilot: Any) -> None:
    ids = torch.cat([random_prompt(0, 5), random_prompt(1, 5)])
    pilot_ids, pilot_mask = left_padded([random_prompt(0, 9), random_prompt(1, 7)], PAD)
    torch.manual_seed(0)
    out = decode(
        base,
        pilot,
        ids,
        do_sample=True,
        num_return_sequences=3,
        assistant_input_ids=pilot_ids,
        assistant_attention_mask=pilot_mask,
        assistant_do_sample=False,
        **rule(1e-9, 2),
    )
    assert out.sequences.shape == (6, 19)
    for row in range(6):
        source = row // 3
        assert out.sequences[row, :5].tolist() == ids[source].tolist()
        prompt = pilot_ids[source : source + 1, pilot_mask[source].bool()]
        assert new_tokens(out, row)[:2] == plain_tokens(pilot, prompt, 2)
    assert len({tuple(row) for row in out.sequences.tolist()}) > 2


# Prompts of the pilot's own


def test_the_pilot_may_have_a_longer_left_padded_prompt_of_its_own(base: Any, pilot: Any) -> None:
    rows = [random_prompt(seed, 4 + seed) for seed in range(3)]
    pilot_rows = [random_prompt(10 + seed, 12 - 3 * seed) for seed in range(3)]
    ids, mask = left_padded(rows, PAD)
    pilot_ids, pilot_mask = left_padded(pilot_rows, PAD)
    out = decode(
        base,
        pilot,
        ids,
        attention_mask=mask,
        assistant_input_ids=pilot_ids,
        assistant_attention_mask=pilot_mask,
        **rule(0.1, 2, max_draft_tokens=9),
    )
    for row in range(3):
        want = compose(base, pilot, rows[row], pilot_ids=pilot_rows[row], threshold=0.1, window=2, max_new_tokens=14, limit=9)
        assert response(out.sequences[row], ids.shape[1], want, PAD) == want.tokens


# Caches and returned values


def test_the_bases_logits_at_every_step_are_those_of_a_forward_without_cache(base: Any, pilot: Any) -> None:
    ids, mask = left_padded([random_prompt(0, 4), random_prompt(1, 7)], PAD)
    out = decode(base, pilot, ids, attention_mask=mask, output_logits=True, **rule(0.15, 2, max_draft_tokens=8))
    for row, length in enumerate((4, 7)):
        tokens = out.sequences[row : row + 1, 7 - length :]
        with torch.no_grad():
            whole = base(tokens, attention_mask=ones(tokens), use_cache=False).logits[0]
        end = new_tokens(out, row).index(EOS) + 1 if EOS in new_tokens(out, row) else 14
        for step in range(end):
            torch.testing.assert_close(out.logits[step][row], whole[length - 1 + step], atol=1e-5, rtol=1e-5)


def test_both_caches_hold_what_the_tokens_say() -> None:
    base, pilot = scripted_pair([1e-4, 1e-4, 1e-4, 0.9])
    held: dict[str, list[list[int]]] = {"base": [], "pilot": []}

    def watch(name: str, model: PreTrainedModel) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            held[name].append(output.past_key_values.layers[0].keys[0, 0, :, 0].long().tolist())

        return model.register_forward_hook(hook, with_kwargs=True)

    hooks = [watch("base", base), watch("pilot", pilot)]
    out = decode(base, pilot, IDS, **rule(0.8, 1))
    for hook in hooks:
        hook.remove()
    tokens = out.sequences[0].tolist()
    assert held["base"] == [tokens[:end] for end in range(3, len(tokens))]
    assert held["pilot"] == [tokens[:end] for end in range(3, 3 + 4)]
    assert out.past_key_values.layers[0].keys[0, 0, :, 0].long().tolist() == tokens[:-1]


def test_scores_and_logits_have_an_entry_for_every_token(base: Any, pilot: Any) -> None:
    out = decode(base, pilot, random_prompt(1, 6), output_scores=True, output_logits=True, **rule(0.3, 2))
    assert len(out.scores) == len(out.logits) == len(new_tokens(out))
    assert [int(scores.argmax()) for scores in out.scores] == new_tokens(out)
    switch = int(out.draft_length)
    assert 0 < switch < 14
    assert [int(logits.argmax()) for logits in out.logits[switch:]] == new_tokens(out)[switch:]
    for step in range(switch, 14):
        assert torch.equal(out.scores[step], out.logits[step])


def test_a_plain_call_returns_the_same_tokens_as_a_tensor(base: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 6)
    tensor = decode(base, pilot, prompt, return_dict_in_generate=False, **rule(0.3, 2))
    assert torch.equal(tensor, decode(base, pilot, prompt, **rule(0.3, 2)).sequences)


@pytest.mark.parametrize("use_cache", [True, False])
def test_stats_count_the_forwards_and_tokens_of_both_models(base: Any, pilot: Any, use_cache: bool) -> None:
    fed = {"base": [0, 0], "pilot": [0, 0]}

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            fed[name][0] += 1
            fed[name][1] += kwargs["input_ids"].numel()

        return hook

    hooks = [
        model.register_forward_pre_hook(count(name), with_kwargs=True) for name, model in (("base", base), ("pilot", pilot))
    ]
    ids = torch.cat([random_prompt(1, 6), random_prompt(3, 6)])
    out = decode(base, pilot, ids, use_cache=use_cache, **STEP, **rule(0.3, 2))
    for hook in hooks:
        hook.remove()
    stats = out.stats
    assert fed["base"] == [stats.base.forwards, stats.base.tokens]
    assert fed["pilot"] == [stats.pilot.forwards, stats.pilot.tokens]


@pytest.mark.parametrize(
    "kwargs",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}],
    ids=["no cache", "static cache", "chunked prefill"],
)
def test_how_the_base_caches_changes_no_token(base: Any, pilot: Any, kwargs: dict[str, Any]) -> None:
    ids, mask = left_padded([random_prompt(1, 6), random_prompt(3, 8)], PAD)
    want = decode(base, pilot, ids, attention_mask=mask, **rule(0.3, 2)).sequences
    assert torch.equal(decode(base, pilot, ids, attention_mask=mask, **rule(0.3, 2), **kwargs).sequences, want)


def test_a_pilot_configured_for_a_static_cache_changes_no_token(base: Any, pilot: Any, own_pilot: Any) -> None:
    own_pilot.generation_config.cache_implementation = "static"
    prompt = random_prompt(1, 6)
    want = decode(base, pilot, prompt, **rule(0.3, 2)).sequences
    assert torch.equal(decode(base, own_pilot, prompt, **rule(0.3, 2)).sequences, want)


def test_a_prompt_whose_beginning_is_cached_gives_the_same_tokens(base: Any, pilot: Any) -> None:
    prompt = random_prompt(2, 8)
    with torch.no_grad():
        cache = base(prompt[:, :5], use_cache=True).past_key_values
    want = decode(base, pilot, prompt, **rule(0.3, 2)).sequences
    assert torch.equal(decode(base, pilot, prompt, past_key_values=cache, **rule(0.3, 2)).sequences, want)


# The caller's processors


PROCESSING: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "bad words": {"bad_words_ids": [[n] for n in range(20, 40)]},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(40, 60))},
}


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("seed", range(3))
def test_processors_shape_the_continuation_and_never_the_draft(base: Any, pilot: Any, processing: str, seed: int) -> None:
    prompt = random_prompt(seed, 6)
    kwargs = PROCESSING[processing]
    out = decode(base, pilot, prompt, **rule(0.15, 2, max_draft_tokens=8), **kwargs)
    want = compose(base, pilot, prompt, threshold=0.15, window=2, limit=8, max_new_tokens=14, **kwargs)
    assert new_tokens(out) == want.tokens
    assert int(out.draft_length) == want.draft_length
    plain = compose(base, pilot, prompt, threshold=0.15, window=2, limit=8, max_new_tokens=14)
    assert plain.draft_length == want.draft_length


def test_every_processor_sees_every_exact_prefix(base: Any, pilot: Any) -> None:
    seen: list[list[int]] = []

    class Records(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            return scores

    processors = LogitsProcessorList([Records()])
    out = decode(base, pilot, random_prompt(1, 6), logits_processor=processors, **STEP, **rule(0.3, 2))
    tokens = out.sequences[0].tolist()
    assert seen == [tokens[:end] for end in range(6, len(tokens))]


def test_min_new_tokens_keeps_the_base_from_ending_early() -> None:
    base, pilot = scripted_pair([1e-4, 0.9])
    write(base, PROMPT + DRAFT[:2], [SCRIPT_EOS])
    out = decode(base, pilot, IDS, min_new_tokens=5, **rule(0.8, 1))
    rest = plain_tokens(base, torch.tensor([PROMPT + DRAFT[:2]]), 12, min_new_tokens=3)
    assert len(rest) >= 3
    assert new_tokens(out) == DRAFT[:2] + rest


# Sampling


@pytest.mark.parametrize(
    "warpers",
    [
        {},
        {"temperature": 0.5, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02},
        {"top_h": 0.5, "top_k": 0},
        {"renormalize_logits": True},
    ],
    ids=lambda warpers: "+".join(warpers) or "plain",
)
def test_a_seed_repeats_sampling_with_every_warper(base: Any, pilot: Any, warpers: dict[str, Any]) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return decode(base, pilot, random_prompt(0, 5), do_sample=True, **rule(0.3, 2), **warpers).sequences.tolist()

    assert draw(0) == draw(0)


def test_a_pilot_with_top_k_1_drafts_greedily_while_the_base_samples(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    out = decode(base, pilot, prompt, do_sample=True, top_k=1, **rule(0.3, 2))
    assert new_tokens(out) == new_tokens(decode(base, pilot, prompt, **rule(0.3, 2)))


def test_assistant_do_sample_false_keeps_the_draft_greedy(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    responses = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = decode(base, pilot, prompt, do_sample=True, assistant_do_sample=False, **rule(1e-9, 4))
        assert new_tokens(out)[:4] == plain_tokens(pilot, prompt, 4)
        responses.add(tuple(new_tokens(out)))
    assert len(responses) > 1


def test_assistant_do_sample_true_samples_the_draft_of_a_greedy_base(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    drafts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = decode(base, pilot, prompt, assistant_do_sample=True, **rule(1e-9, 3))
        drafted = int(out.draft_length)
        drafts.add(tuple(new_tokens(out)[:drafted]))
        assert new_tokens(out)[drafted:] == plain_tokens(base, out.sequences[:, : 5 + drafted], 14 - drafted)
    assert len(drafts) > 1


def test_a_greedy_call_leaves_the_random_state_alone(base: Any, pilot: Any) -> None:
    before = torch.random.get_rng_state()
    decode(base, pilot, random_prompt(0, 5), **rule(0.3, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_sampling_call_advances_the_random_state(base: Any, pilot: Any) -> None:
    before = torch.random.get_rng_state()
    decode(base, pilot, random_prompt(0, 5), do_sample=True, **rule(0.3, 2))
    assert not torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.sweep)])
def test_greedy_decoding_is_identical_every_time(base: Any, pilot: Any, times: int) -> None:
    prompt = random_prompt(0, 5)
    first = decode(base, pilot, prompt, max_new_tokens=8, output_logits=True, **rule(0.3, 2))
    for _ in range(times):
        again = decode(base, pilot, prompt, max_new_tokens=8, output_logits=True, **rule(0.3, 2))
        assert torch.equal(again.sequences, first.sequences)
        assert all(torch.equal(x, y) for x, y in zip(again.logits, first.logits, strict=True))
        assert torch.equal(again.draft_log_probs, first.draft_log_probs)


# Settings


def test_a_keyword_beats_the_settings_object_beats_the_calls_config_beats_the_models(own_base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    own_base.generation_config.wsd_max_draft_tokens = 2
    own_base.generation_config.wsd_window_size = 1
    passed = GenerationConfig(max_new_tokens=14, return_dict_in_generate=True, eos_token_id=EOS, pad_token_id=PAD)
    passed.wsd_max_draft_tokens = 3

    def limit(**kwargs: Any) -> int:
        never = StoppingCriteriaList()
        out = own_base.generate(
            prompt,
            attention_mask=ones(prompt),
            assistant_model=pilot,
            **{"strategy": "wsd", "switch_criteria": never, **kwargs},
        )
        return int(out.draft_length)

    config = wsd_hf.WSDConfig(window_size=1, max_draft_tokens=4)
    assert limit(max_new_tokens=14, return_dict_in_generate=True) == 2
    assert limit(generation_config=passed) == 3
    assert limit(generation_config=passed, strategy=config) == 4
    assert limit(generation_config=passed, strategy=config, wsd_max_draft_tokens=5) == 5


@pytest.mark.parametrize("field", ["threshold", "window_size", "max_draft_tokens", "draft_end"])
def test_the_output_tells_the_settings_it_was_made_with(base: Any, pilot: Any, field: str) -> None:
    value = {"threshold": 0.25, "window_size": 2, "max_draft_tokens": 7, "draft_end": "stop"}[field]
    out = decode(base, pilot, random_prompt(0, 5), **{f"wsd_{field}": value})
    assert getattr(out.strategy, field) == value


def test_configs_and_arguments_of_the_caller_are_left_unchanged(base: Any, pilot: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, stop_strings=["zz"], wsd_threshold=0.3, eos_token_id=EOS, pad_token_id=PAD)
    criteria, processors = StoppingCriteriaList(), LogitsProcessorList()
    prompt = random_prompt(0, 5)
    held = [config, base.generation_config, pilot.generation_config, base.config, pilot.config]
    before = [copy.deepcopy(vars(item)) for item in held]
    base.generate(
        prompt,
        config,
        attention_mask=ones(prompt),
        assistant_model=pilot,
        strategy="wsd",
        tokenizer=letter_tokenizer(64),
        stopping_criteria=criteria,
        logits_processor=processors,
    )
    assert [vars(item) for item in held] == before
    assert (len(criteria), len(processors)) == (0, 0)
    assert torch.equal(prompt, random_prompt(0, 5))


def test_a_pilots_own_generation_config_does_not_steer_the_draft(base: Any, pilot: Any, own_pilot: Any) -> None:
    own_pilot.generation_config.update(
        num_beams=3, do_sample=True, max_length=6, repetition_penalty=3.0, stop_strings=["a"], use_cache=False
    )
    prompt = random_prompt(0, 5)
    want = decode(base, pilot, prompt, **rule(0.3, 2)).sequences
    assert torch.equal(decode(base, own_pilot, prompt, **rule(0.3, 2)).sequences, want)


def test_a_pilot_whose_config_asks_for_token_healing_drafts_all_the_same(base: Any, pilot: Any, own_pilot: Any) -> None:
    own_pilot.generation_config.token_healing = True
    prompt = random_prompt(0, 5)
    want = decode(base, pilot, prompt, **rule(0.3, 2)).sequences
    assert torch.equal(decode(base, own_pilot, prompt, **rule(0.3, 2)).sequences, want)


def test_the_eos_of_the_pilots_tokenizer_ends_a_draft(base: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 6)
    drafted = plain_tokens(pilot, prompt, 4)
    assert drafted[3] not in drafted[:3]
    tokenizer = letter_tokenizer(64)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(drafted[3])
    out = decode(base, pilot, prompt, assistant_tokenizer=tokenizer, **rule(1.0, 1))
    assert (out.draft_length.tolist(), out.switch_reason) == ([3], ["draft_ended"])
    assert new_tokens(out) == drafted[:3] + plain_tokens(base, torch.cat([prompt, torch.tensor([drafted[:3]])], 1), 11)


def test_attentions_and_hidden_states_have_an_entry_for_every_token(base: Any, pilot: Any) -> None:
    out = decode(base, pilot, random_prompt(1, 6), output_hidden_states=True, **rule(0.3, 2))
    assert len(out.hidden_states) == len(new_tokens(out))


def test_a_prompt_may_be_given_by_name_or_by_position(base: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 6)
    kwargs = {"attention_mask": ones(prompt), "assistant_model": pilot, "strategy": "wsd", "max_new_tokens": 6}
    want = base.generate(prompt, **kwargs)
    assert torch.equal(base.generate(input_ids=prompt, **kwargs), want)
    assert torch.equal(base.generate(inputs=prompt, **kwargs), want)


def test_inference_mode_changes_no_token(base: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 6)
    want = decode(base, pilot, prompt, **rule(0.3, 2)).sequences
    with torch.inference_mode():
        assert torch.equal(decode(base, pilot, prompt, **rule(0.3, 2)).sequences, want)


def test_without_a_strategy_generate_is_transformers_own(base: Any) -> None:
    prompt = random_prompt(0, 5)
    plain = tiny_model("llama").generate(prompt, attention_mask=ones(prompt), max_new_tokens=9)
    assert torch.equal(base.generate(prompt, attention_mask=ones(prompt), max_new_tokens=9), plain)


def test_without_a_strategy_an_assistant_means_assisted_generation(base: Any, pilot: Any) -> None:
    prompt = random_prompt(0, 5)
    plain = base.generate(prompt, attention_mask=ones(prompt), max_new_tokens=9)
    assert torch.equal(base.generate(prompt, attention_mask=ones(prompt), max_new_tokens=9, assistant_model=pilot), plain)


def test_a_sliding_window_shorter_than_the_prompt_changes_nothing() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("mistral")))
    pilot = tiny_pilot("mistral")
    prompt = random_prompt(5, 20)
    want = compose(base, pilot, prompt, threshold=0.3, window=2, max_new_tokens=14)
    assert new_tokens(decode(base, pilot, prompt, **rule(0.3, 2))) == want.tokens


def test_first_crossing_of_the_oracle_agrees_with_the_public_rule() -> None:
    base, _ = scripted_pair([0.2, 0.9, 0.7, 0.9])
    assert first_crossing(base, IDS, DRAFT[:4], 0.79, 2) == 3
