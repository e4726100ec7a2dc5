"""Nudging writes what a loop of plain forwards writes, with little work, and refuses what it can't serve."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SynthIDTextWatermarkingConfig,
)

import tokenizers_for_tests as make
import wsd_hf
from families import PAD, VOCABULARY, tiny_model, tiny_parts, tiny_pilot
from oracle import eos_ids, left_padded, ones, plain_tokens, random_prompt
from scripted import scripted_model
from slow_decoding import Nudging, Reader, slow_response
from test_acceptance import chi_squared
from test_fast_path import Ends, Recorder, Watch
from test_graphs import Captures, captures  # noqa: F401
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.strategies.nudging.word import LONGEST

PROMPT = random_prompt(1, 6)


# What it should write


def logits_behind(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].float()


def expected(
    base: PreTrainedModel,
    pilot: PreTrainedModel,
    ids: torch.Tensor,
    *,
    threshold: float,
    max_new_tokens: int,
    tokenizer: Any = None,
) -> tuple[list[int], list[bool]]:
    """One greedy response without an end and who wrote which token, with one vocabulary."""
    readers = (Reader(model, ids[0].tolist()) for model in (base, pilot))
    rule = Nudging(*readers, eos_ids(pilot), set(), threshold, tokenizer or spaced_tokenizer())
    tokens = slow_response(base, ids, ones(ids), rule, max_new_tokens=max_new_tokens, eos_token_id=None)
    return tokens, rule.by_pilot


# The models of these tests


@functools.cache
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """For `VOCABULARY` ids: letters, letters behind a space, the end of one word with the next, and a space."""
    shapes = ("{0}", " {0}", "{0}", "{0} {0}", " {0}")
    tokens = ["<", " ", *(shapes[index % 5].format(letter) for index, letter in enumerate(make.LETTERS[1 : VOCABULARY - 1]))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<", clean_up_tokenization_spaces=False)


@functools.cache
def pair(family: str = "llama", noise: float = 0.4) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base that takes `strategy=`, and its pilot, in float64; no test changes them."""
    base, pilot = (copy.deepcopy(model).double() for model in (tiny_model(family), tiny_pilot(family, noise=noise)))
    return wsd_hf.enable_wsd(base), pilot


def nudge(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor = PROMPT, **kwargs: Any) -> Any:
    kwargs = {
        "attention_mask": ones(ids),
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "tokenizer": spaced_tokenizer(),
        "nudging_threshold": 0.5,
        "return_dict_in_generate": True,
        **kwargs,
    }
    return base.generate(ids, assistant_model=pilot, strategy="nudging", **kwargs)


def responses(out: Any) -> list[list[int]]:
    return out.sequences[:, out.prompt_length :].tolist()


def assert_as_expected(out: Any, wanted: list[tuple[list[int], list[bool]]]) -> None:
    """Rows, who wrote what, and nothing but padding behind a row's end."""
    width = max(len(tokens) for tokens, _ in wanted)
    assert responses(out) == [tokens + [PAD] * (width - len(tokens)) for tokens, _ in wanted]
    assert out.written_by_pilot.tolist() == [flags + [False] * (width - len(flags)) for _, flags in wanted]


# The same tokens


def test_a_threshold_next_to_0_leaves_the_base_alone_and_never_asks_the_pilot() -> None:
    base, pilot = pair()
    out = nudge(base, pilot, nudging_threshold=1e-6, max_new_tokens=20)
    assert responses(out)[0] == plain_tokens(base, PROMPT, 20, eos_token_id=None)
    assert not out.written_by_pilot.any()
    assert out.stats.pilot.forwards == 0


def test_at_threshold_1_the_pilot_writes_what_it_would_write_alone() -> None:
    base, pilot = pair()
    out = nudge(base, pilot, nudging_threshold=1.0, max_new_tokens=20)
    assert responses(out)[0] == plain_tokens(pilot, PROMPT, 20, eos_token_id=None)
    assert out.written_by_pilot.all()


def test_the_pilots_eos_ends_the_response_with_the_bases() -> None:
    base, pilot = pair("llama")[0], copy.deepcopy(pair("llama")[1])
    alone = plain_tokens(pilot, PROMPT, 12, eos_token_id=None)
    pilot.generation_config.eos_token_id = next(token for token in alone[4:] if token not in alone[:4])
    end = alone.index(pilot.generation_config.eos_token_id)
    out = nudge(base, pilot, nudging_threshold=1.0, eos_token_id=1)
    assert responses(out)[0] == [*alone[:end], 1]
    assert out.written_by_pilot.all()
    longer = nudge(base, pilot, nudging_threshold=1.0, eos_token_id=1, min_new_tokens=end + 1)
    assert responses(longer)[0][:end] == alone[:end]
    assert not longer.written_by_pilot[0, end], "where no response may end, the base writes on"
    sampled = nudge(base, pilot, nudging_threshold=1.0, eos_token_id=1, do_sample=True, top_k=1, assistant_do_sample=False)
    assert responses(sampled)[0] == [*alone[:end], 1], "what the base finds unlikely is not forbidden"
    endless = nudge(base, pilot, nudging_threshold=1.0, eos_token_id=None)
    assert len(responses(endless)[0]) == 16


def ending_pilot() -> tuple[PreTrainedModel, list[int]]:
    """A pilot, and what it writes before it ends its response."""
    pilot = copy.deepcopy(pair()[1])
    alone = plain_tokens(pilot, PROMPT, 12, eos_token_id=None)
    pilot.generation_config.eos_token_id = next(token for token in alone[4:] if token not in alone[:4])
    return pilot, alone[: alone.index(pilot.generation_config.eos_token_id)]


def test_renormalizing_forbids_no_eos() -> None:
    pilot, alone = ending_pilot()
    sampling = {"do_sample": True, "top_k": 1, "assistant_do_sample": False, "renormalize_logits": True}
    assert responses(nudge(pair()[0], pilot, nudging_threshold=1.0, eos_token_id=1, **sampling))[0] == [*alone, 1]


def test_an_eos_stays_forbidden_where_infinities_are_removed() -> None:
    pilot, alone = ending_pilot()
    case = {"eos_token_id": 1, "min_new_tokens": len(alone) + 1, "nudging_threshold": 1.0}
    cleaned = nudge(pair()[0], pilot, **case, remove_invalid_values=True)
    assert responses(cleaned) == responses(nudge(pair()[0], pilot, **case))


@pytest.mark.parametrize("unknown", [-1, VOCABULARY])
def test_an_eos_that_the_base_does_not_know_ends_nothing(unknown: int) -> None:
    pilot, alone = ending_pilot()
    case = {"nudging_threshold": 1.0, "pad_token_id": PAD}
    endless = nudge(pair()[0], pilot, **case, eos_token_id=unknown)
    assert responses(endless) == responses(nudge(pair()[0], pilot, **case, eos_token_id=None))
    ended = nudge(pair()[0], pilot, **case, eos_token_id=[unknown, 1])
    assert responses(ended)[0] == [*alone, 1]


def test_a_pilot_whose_context_is_full_leaves_the_rest_to_the_base() -> None:
    base, pilot = pair("llama")[0], copy.deepcopy(pair("llama")[1])
    pilot.config.max_position_embeddings = PROMPT.shape[1] + 5
    out = nudge(base, pilot, nudging_threshold=1.0, max_new_tokens=12)
    begun = plain_tokens(pilot, PROMPT, 5, eos_token_id=None)
    rest = plain_tokens(base, torch.cat([PROMPT, torch.tensor([begun])], dim=1), 7, eos_token_id=None)
    assert responses(out)[0] == begun + rest
    assert out.written_by_pilot[0].tolist() == [True] * 5 + [False] * 7


# Sampling


@pytest.mark.parametrize("threshold", [0.4, 0.8])
def test_sampling_from_one_candidate_is_greedy(threshold: float) -> None:
    base, pilot = pair()
    greedy = nudge(base, pilot, nudging_threshold=threshold)
    sampled = nudge(base, pilot, nudging_threshold=threshold, num_return_sequences=2, do_sample=True, top_k=1)
    assert_as_expected(sampled, [(responses(greedy)[0], greedy.written_by_pilot[0].tolist())] * 2)


@pytest.mark.parametrize(("threshold", "writer"), [(1e-6, 0), (1.0, 1)], ids=["base", "pilot"])
def test_whoever_writes_samples_from_the_warped_distribution(threshold: float, writer: int) -> None:
    """Of two tokens, so also where a word ends between them: the token that shows the end is the one that follows."""
    torch.manual_seed(0)
    draws, model = 2000, pair()[writer]
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": draws}
    observed = torch.tensor(responses(nudge(*pair(), nudging_threshold=threshold, max_new_tokens=2, **sampling)))
    first = (logits_behind(model, PROMPT[0].tolist()) / 1.5).softmax(dim=-1)
    behind = torch.cat([PROMPT.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    with torch.no_grad():
        second = first @ (model(behind).logits[:, -1].float() / 1.5).softmax(dim=-1)
    for place, wanted in enumerate((first, second)):
        assert chi_squared(observed[:, place].bincount(minlength=VOCABULARY), wanted * draws) > 1e-3


def test_a_greedy_pilot_may_nudge_a_base_that_samples() -> None:
    base, pilot = pair()
    sampling = {"do_sample": True, "assistant_do_sample": False, "temperature": 5.0}
    out = nudge(base, pilot, nudging_threshold=1.0, **sampling)
    assert responses(out)[0] == plain_tokens(pilot, PROMPT, 16, eos_token_id=None)


# Everything else of generate


def test_a_stop_string_ends_a_response_inside_a_word_too() -> None:
    base, pilot = pair()
    for threshold in (0.4, 1.0):
        case = {"tokenizer": letters(), "nudging_threshold": threshold}
        whole = responses(nudge(base, pilot, **case))[0]
        for end in (3, 7):
            stop = letters().decode(whole[end - 1 : end + 1])
            length = letters().decode(whole).index(stop) + len(stop)
            assert responses(nudge(base, pilot, **case, stop_strings=[stop]))[0] == whole[:length]


def test_criteria_and_a_streamer_see_every_token_once() -> None:
    base, pilot = pair()
    ids, mask = left_padded([random_prompt(seed, 2 + 3 * seed) for seed in range(3)], PAD)
    whole = nudge(base, pilot, ids, attention_mask=mask)
    streamer, ends = Recorder(), Ends(*{row[9] for row in responses(whole)})
    out = nudge(base, pilot, ids, attention_mask=mask, stopping_criteria=[ends], streamer=streamer, pad_token_id=PAD)
    for row, stopped in zip(responses(whole), responses(out), strict=True):
        end = 1 + next(place for place, token in enumerate(row) if token in ends.tokens.tolist())
        assert stopped == row[:end] + [PAD] * (len(stopped) - end)
    assert torch.stack(streamer.puts[1:], dim=1).tolist() == responses(out)
    assert streamer.ends == 1


def test_without_a_dict_the_tokens_come_alone() -> None:
    base, pilot = pair()
    assert nudge(base, pilot, return_dict_in_generate=False).tolist() == nudge(base, pilot).sequences.tolist()


# Two vocabularies


@functools.cache
def letters(start: str = "") -> PreTrainedTokenizerFast:
    """One letter, one token; `start` comes first. One of the letters is a space."""
    alphabet = start + "".join(letter for letter in make.LETTERS.replace("g", " ") if letter not in start)
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(alphabet[:64])}, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_words_cross_to_another_vocabulary_as_text() -> None:
    """A pilot whose ids are permuted says what it says with the base's ids."""
    base, pilot = pair()
    other = copy.deepcopy(pilot)
    own_ids = torch.tensor(letters().convert_tokens_to_ids(letters("<zyx").convert_ids_to_tokens(range(VOCABULARY))))
    other.model.embed_tokens.weight.data = pilot.model.embed_tokens.weight.data[own_ids]
    other.lm_head.weight.data = pilot.lm_head.weight.data[own_ids]
    other.generation_config.eos_token_id = own_ids.tolist().index(1)
    for seed in range(4):
        ids = random_prompt(seed, 5)
        case = {"max_new_tokens": 24, "nudging_threshold": [0.3, 0.5, 0.8, 1.0][seed], "eos_token_id": [1, 9]}
        one = nudge(base, pilot, ids, tokenizer=letters(), **case)
        two = nudge(base, other, ids, tokenizer=letters(), assistant_tokenizer=letters("<zyx"), **case)
        assert_as_expected(two, list(zip(responses(one), one.written_by_pilot.tolist(), strict=True)))


@functools.cache
def tiny_world() -> tuple[Any, Any, Any, Any]:
    return tiny_parts(pilot="pilot_other_vocab")


def expected_text(world: tuple[Any, Any, Any, Any], ids: list[int], pilot_ids: list[int], threshold: float, budget: int) -> Any:
    """One greedy response of two vocabularies, everything encoded anew for every token."""
    base, pilot, tokenizer, assistant_tokenizer = world

    def pilots(text: str) -> str | None:
        token = int(logits_behind(pilot, pilot_ids + assistant_tokenizer.encode(text, add_special_tokens=False)).argmax())
        return None if token == assistant_tokenizer.eos_token_id else assistant_tokenizer.decode([token])

    response: list[int] = []
    by_pilot: list[bool] = []
    said_a_word = False
    while len(response) < budget:
        logits, text, word = logits_behind(base, ids + response), tokenizer.decode(response), ""
        unsure = bool(logits.softmax(dim=-1).max() < threshold)
        if (unsure or said_a_word) and pilots(text) is None:
            return [*response, tokenizer.eos_token_id], [*by_pilot, True]
        while unsure and (more := pilots(text + word)) is not None and not (word.strip() and more.startswith(" ")):
            word += more
        tokens = tokenizer.encode(word, add_special_tokens=False) if unsure else [int(logits.argmax())]
        tokens, said_a_word = tokens[: budget - len(response)], unsure
        response, by_pilot = response + tokens, by_pilot + [unsure] * len(tokens)
    return response, by_pilot


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_trained_models_with_two_vocabularies_are_what_plain_forwards_give(threshold: float) -> None:
    world = base, pilot, tokenizer, assistant_tokenizer = tiny_world()
    chats = [question["messages"] for question in wsd_hf.tiny.demo_questions()[:4]]
    inputs = wsd_hf.build_inputs(chats, tokenizer, assistant_tokenizer)
    tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    case = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": PAD, "max_new_tokens": 24, "nudging_threshold": threshold}
    out = nudge(base, pilot, inputs.pop("input_ids"), **inputs, **tokenizers, **case)
    wanted = []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = out.sequences[row, : out.prompt_length][mask].tolist()
        pilot_ids = inputs["assistant_input_ids"][row][inputs["assistant_attention_mask"][row].bool()].tolist()
        wanted.append(expected_text(world, ids, pilot_ids, threshold, 24))
    assert_as_expected(out, wanted)


@pytest.mark.parametrize("capturing", [False, True])
def test_a_pilot_that_takes_many_tokens_for_the_same_text_finds_room(
    capturing: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget counts the base's tokens; the beginning of a long response is a short one."""
    if capturing:
        request.getfixturevalue("captures")
        monkeypatch.setattr(graphs, "STEP", 16)
    base, _, tokenizer, _ = tiny_world()
    single_bytes = make.byte_level_tokenizer(size=257)
    pilot = tiny_model("llama", vocab_size=len(single_bytes))
    ids = tokenizer("Thank you for asking", return_tensors="pt")["input_ids"]
    case = {"tokenizer": tokenizer, "assistant_tokenizer": single_bytes, "nudging_threshold": 0.27}
    short, long = (nudge(base, pilot, ids, **case, max_new_tokens=budget) for budget in (26, 200))
    again = nudge(base, pilot, ids, **case, max_new_tokens=26)  # on the buffers that have grown
    unsure = short.written_by_pilot[0].tolist().index(True)
    assert len(tokenizer.decode(responses(short)[0][:unsure])) > 26 + LONGEST
    for out in (short, again):
        assert_as_expected(out, [(responses(long)[0][:26], long.written_by_pilot[0, :26].tolist())])


def test_the_pilot_ends_no_response_within_a_character() -> None:
    """A pilot that always wants to end, and a base that is held to the two bytes of a character."""
    single_bytes, other = (make.byte_level_tokenizer(size=size) for size in (257, 300))
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama", vocab_size=len(single_bytes))))
    pilot = copy.deepcopy(tiny_model("llama", vocab_size=len(other)))
    pilot.lm_head.weight.data.zero_()
    pilot.generation_config.eos_token_id = int(logits_behind(pilot, [1]).argmax())
    (first, second), eos = single_bytes.encode("é"), single_bytes.eos_token_id

    def spell(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        held = torch.full_like(scores, -torch.inf)
        begun = input_ids.shape[1] > PROMPT.shape[1]
        held[:, [second, eos] if begun else [first]] = scores.new_tensor([0.0, -1.0] if begun else [0.0])
        return held

    out = nudge(
        base,
        pilot,
        tokenizer=single_bytes,
        assistant_tokenizer=other,
        eos_token_id=eos,
        nudging_threshold=1.0,
        logits_processor=LogitsProcessorList([spell]),  # type: ignore[list-item]
    )
    assert responses(out) == [[first, second, eos]]
    assert out.written_by_pilot.tolist() == [[False, False, True]]


# Little work


def test_every_token_is_fed_once_to_either_model() -> None:
    base, pilot = pair()
    with Watch(base) as at_base, Watch(pilot) as at_pilot:
        out = nudge(base, pilot, nudging_threshold=0.5, max_new_tokens=40)
    flags = out.written_by_pilot[0].tolist()
    assert 0 < sum(flags) < 40
    for watch in (at_base, at_pilot):
        positions = [position for forward in watch.fed for position in forward[0]]
        assert positions == list(range(len(positions)))
    assert (at_base.forwards, at_base.tokens) == (out.stats.base.forwards, out.stats.base.tokens)
    assert (at_pilot.forwards, at_pilot.tokens) == (out.stats.pilot.forwards, out.stats.pilot.tokens)


def test_the_base_runs_once_for_each_word_and_the_pilot_only_where_it_is_asked() -> None:
    base, pilot = pair()
    out = nudge(base, pilot, nudging_threshold=0.5, max_new_tokens=40)
    flags = out.written_by_pilot[0].tolist()
    begun = sum(flag and not (place and flags[place - 1]) for place, flag in enumerate(flags))
    assert 40 - sum(flags) + begun <= out.stats.base.forwards < 40
    # One for each of its tokens, one that shows each of its runs to be over, one word that the budget may cut.
    assert out.stats.pilot.forwards <= sum(flags) + begun + LONGEST


def test_rows_that_finish_cost_nothing_more() -> None:
    base, pilot = pair()
    ids, mask = left_padded([random_prompt(seed, 4) for seed in range(4)], PAD)
    whole = nudge(base, pilot, ids, attention_mask=mask, max_new_tokens=30)
    ends = Ends(*{row[5] for row in responses(whole)[:3]})
    with Watch(base) as watch:
        nudge(base, pilot, ids, attention_mask=mask, max_new_tokens=30, stopping_criteria=[ends], pad_token_id=PAD)
    assert watch.rows[0] == 4 > watch.rows[-1]


def test_replayed_forwards_give_the_same(captures: Captures) -> None:  # noqa: F811
    base, pilot = pair()
    for seed in range(3):
        row = random_prompt(seed, 6)
        out = nudge(base, pilot, row, max_new_tokens=20, nudging_threshold=0.6)
        assert_as_expected(out, [expected(base, pilot, row, threshold=0.6, max_new_tokens=20)])
    assert captures.replays > 10


# What it refuses


@pytest.mark.parametrize("threshold", [0, 1.5, -0.1, "high", True])
def test_a_threshold_that_is_no_probability(threshold: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"^threshold=.*above 0 and at most 1"):
        nudge(*pair(), nudging_threshold=threshold)


def test_words_need_a_tokenizer() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="tokenizer="):
        nudge(*pair(), tokenizer=None)
    base, pilot = pair()
    out = nudge(base, pilot, tokenizer=None, assistant_tokenizer=spaced_tokenizer())
    assert out.sequences.tolist() == nudge(base, pilot).sequences.tolist()


def test_a_pilot_is_needed() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="strategy='nudging' needs a pilot: pass assistant_model="):
        nudge(pair()[0], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"output_scores": True}, "output_scores=True"),
        ({"output_logits": True}, "output_logits=True"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2])}, "SynthIDTextWatermarkLogitsProcessor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_it_cannot_serve(option: dict[str, Any], reason: str) -> None:
    base, pilot = pair()
    with Watch(base) as watch, pytest.raises(wsd_hf.WSDValueError, match=reason):
        nudge(base, pilot, **option)
    assert watch.forwards == 0


def test_models_that_it_cannot_serve() -> None:
    for model in (tiny_model("bloom"), scripted_model(vocab_size=VOCABULARY)):
        with pytest.raises(wsd_hf.WSDValueError, match=r"cannot serve this call: the pilot (has|raises) "):
            nudge(pair()[0], model)


def test_a_processor_of_ones_own_sees_exact_prefixes() -> None:
    seen: list[list[int]] = []

    def record(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids[0, PROMPT.shape[1] :].tolist())
        return scores

    out = nudge(*pair(), logits_processor=LogitsProcessorList([record]))  # type: ignore[list-item]
    assert all(prefix == responses(out)[0][: len(prefix)] for prefix in seen)
    assert len(seen) == out.stats.base.forwards
