"""Emulated fine-tuning: golden data of an official implementation, and a slow rule inside transformers' plain `generate`."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedModel, TextIteratorStreamer

import wsd_hf
from families import EOS, PAD, tiny_model, tiny_pilot
from oracle import left_padded, random_prompt
from test_vectors import DATA
from tokenizers_for_tests import letter_tokenizer

VECTORS = DATA / "weak_to_strong_search"
EFT = json.loads((VECTORS / "eft.json").read_text("utf-8"))
STRATEGY = "emulated_fine_tuning"


@functools.cache
def golden(name: str) -> PreTrainedModel:
    name = name.removesuffix(" (default)")
    return wsd_hf.AutoModelForCausalLM.from_pretrained(VECTORS / name, dtype=torch.float32)


def emulate(base: PreTrainedModel, ids: Any, tuned: PreTrainedModel, untuned: PreTrainedModel, **kwargs: Any) -> Any:
    return base.generate(
        torch.as_tensor(ids), assistant_model=tuned, reference_model=untuned, strategy=STRATEGY, **{"pad_token_id": 3, **kwargs}
    )


def close(scores: torch.Tensor, logits: torch.Tensor) -> None:
    torch.testing.assert_close(scores, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    torch.testing.assert_close(scores.softmax(dim=-1), logits.softmax(dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", EFT["direct"], ids=lambda case: f"{case['w']} {case['base_r']}")
def test_official_runs_with_one_prompt(case: dict[str, Any]) -> None:
    models = golden("base"), golden(case["tune_r"]), golden(case["base_r"])
    for run in case["prompts"]:
        call = functools.partial(emulate, models[0], [run["input_ids"]], *models[1:], beta=case["w"], max_new_tokens=16)
        logits = torch.tensor(run["logits"])  # float32: up to 1.9e-5 from what the same models give in float64
        for engine in ("fast", "step"):
            out = call(do_sample=False, eft_engine=engine, return_dict_in_generate=True, output_scores=True)
            close(out.scores[0][0], logits)
            assert out.sequences[0].tolist() == run["greedy_ids"]
            assert call(do_sample=False, eft_engine=engine)[0].tolist() == run["greedy_ids"]
        torch.manual_seed(7)  # step by step: the fast path draws in another order
        assert (
            call(eft_engine="step", do_sample=True, temperature=0.7, top_k=50)[0].tolist() == run["sampled_ids_seed7_t0.7_k50"]
        )


@pytest.mark.parametrize("case", EFT["prefix_wrapped"], ids=lambda case: f"{case['w']} {case['raw_prompt']}")
def test_official_runs_with_a_prompt_for_each_model(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VECTORS / "tok_a")
    prompt, tuned, untuned = (torch.tensor([tokenizer.encode(prefix)]) for prefix in case["prefixes"])
    models = golden("base"), prompt, golden("small_a_tuned"), golden("small_a_untuned")
    call = functools.partial(emulate, *models, assistant_input_ids=tuned, reference_input_ids=untuned, beta=case["w"])
    for engine in ("fast", "step"):
        out = call(do_sample=False, eft_engine=engine, max_new_tokens=16)
        assert [1, *out[0, prompt.shape[1] :].tolist()] == case["greedy_ids_with_leading_bos"]
    torch.manual_seed(3)
    out = call(eft_engine="step", do_sample=True, temperature=0.7, top_k=50, max_new_tokens=16)
    assert [1, *out[0, prompt.shape[1] :].tolist()] == case["sampled_ids_seed3"]


class Rule(LogitsProcessor):
    """base + β (tuned - untuned) by forwards over everything, in transformers' plain `generate`; prompts have no padding.

    Args:
        small: the tuned and the untuned model, each with its prompt [1, prompt] for every row.
        prompt: columns of the base's prompt.
        beta: β.
    """

    def __init__(self, small: list[tuple[PreTrainedModel, list[torch.Tensor]]], prompt: int, beta: float) -> None:
        self.small, self.prompt, self.beta = small, prompt, beta

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, own in enumerate(scores):
            tuned, untuned = (
                model(torch.cat([prompts[row], input_ids[row : row + 1, self.prompt :]], dim=1)).logits[0, -1].float()
                for model, prompts in self.small
            )
            rows.append(own + self.beta * (tuned - untuned))
        return torch.stack(rows)


@functools.cache
def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A base, and a tuned and an untuned small model, in float64."""
    base, tuned, untuned = tiny_model(family), tiny_pilot(family, noise=0.3), tiny_model(family, seed=5)
    base, tuned, untuned = (copy.deepcopy(model).double() for model in (base, tuned, untuned))
    return wsd_hf.enable_wsd(base), tuned, untuned


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mamba", "bamba"])
def test_equals_the_rule_in_plain_generate(family: str, settings: dict[str, Any]) -> None:
    base, tuned, untuned = models(family)
    prompts = [[random_prompt(10 * kind + row, 9 - 3 * row) for row in range(3)] for kind in range(3)]
    if family in ("mamba", "bamba"):  # whose small kernels see padding
        prompts = [[random_prompt(10 * kind + row, 9 - kind) for row in range(3)] for kind in range(3)]
    (ids, mask), (tuned_ids, tuned_mask), (untuned_ids, untuned_mask) = (left_padded(kind, PAD) for kind in prompts)
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD, **settings}
    rule = Rule([(tuned, prompts[1]), (untuned, prompts[2])], ids.shape[1], beta=0.7)
    torch.manual_seed(11)
    expected = base.generate(ids, logits_processor=[rule], **common)
    small = {"assistant_input_ids": tuned_ids, "assistant_attention_mask": tuned_mask}
    small |= {"reference_input_ids": untuned_ids, "reference_attention_mask": untuned_mask}
    torch.manual_seed(11)
    engine = "step" if settings["do_sample"] else "auto"  # the fast path draws in another order
    got = emulate(base, ids, tuned, untuned, **small, beta=0.7, eft_engine=engine, **common)
    assert got.tolist() == expected.tolist()


def test_the_callers_processors_shape_the_sum() -> None:
    base, tuned, untuned = models("llama")
    ids = random_prompt(3, 6)
    free = emulate(base, ids, tuned, untuned, do_sample=False, max_new_tokens=6)[0, 6:].tolist()
    out = emulate(base, ids, tuned, untuned, do_sample=False, max_new_tokens=6, suppress_tokens=[free[0]])
    assert free[0] not in out[0, 6:].tolist()


def test_beta_0_is_the_base_and_base_tuned_from_itself_is_the_tuned_model() -> None:
    base, tuned, untuned = models("llama")
    ids = random_prompt(1, 5)
    plain = [model.generate(ids, do_sample=False, max_new_tokens=10).tolist() for model in (base, tuned)]
    assert emulate(base, ids, tuned, untuned, beta=0, do_sample=False, max_new_tokens=10).tolist() == plain[0]
    assert emulate(base, ids, tuned, base, do_sample=False, max_new_tokens=10, pad_token_id=PAD).tolist() == plain[1]


def test_each_model_reads_its_prompt_once_and_every_token_once() -> None:
    base, tuned, untuned = models("llama")
    fed: dict[str, list[int]] = {"base": [], "tuned": [], "untuned": []}
    hooks = [
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs, name=name: fed[name].append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for name, model in zip(fed, (base, tuned, untuned), strict=True)
    ]
    try:
        out = emulate(
            base,
            random_prompt(2, 7),
            tuned,
            untuned,
            max_new_tokens=5,
            eos_token_id=63,
            eft_engine="step",
            return_dict_in_generate=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert fed == {name: [7, 1, 1, 1, 1] for name in fed}
    assert (out.stats.base.forwards, out.stats.pilot.forwards, out.stats.reference.forwards) == (5, 5, 5)
    assert (out.stats.base.tokens, out.stats.pilot.tokens, out.stats.reference.tokens) == (11, 11, 11)
    assert out.prompt_length == 7


def test_copies_stop_strings_and_streamers_work() -> None:
    base, tuned, untuned = models("llama")
    tokenizer = letter_tokenizer(60)
    ids = random_prompt(4, 5, 60)
    torch.manual_seed(0)
    out = emulate(base, ids, tuned, untuned, do_sample=True, num_return_sequences=3, max_new_tokens=6, pad_token_id=PAD)
    assert out.shape[0] == 3
    assert len({tuple(row) for row in out.tolist()}) > 1
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    free = emulate(base, ids, tuned, untuned, do_sample=False, max_new_tokens=8, streamer=streamer)[0, 5:].tolist()
    assert "".join(streamer) == tokenizer.decode(free)
    stop = tokenizer.decode(free[2:4])
    out = emulate(base, ids, tuned, untuned, do_sample=False, max_new_tokens=8, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, 5:]) == tokenizer.decode(free)[: tokenizer.decode(free).index(stop) + len(stop)]


def test_vocabularies_are_compared_by_what_they_do() -> None:
    base, tuned, untuned = models("llama")
    tokenizer, other = letter_tokenizer(60), letter_tokenizer(60, start="qwertz")
    call = functools.partial(emulate, base, random_prompt(1, 5, 60), tuned, untuned, max_new_tokens=2, tokenizer=tokenizer)
    assert call(assistant_tokenizer=tokenizer).shape[1] > 5
    with pytest.raises(wsd_hf.WSDValueError, match="two vocabularies"):
        call(assistant_tokenizer=other)


def test_padded_embeddings_are_one_vocabulary_if_the_tokenizers_are() -> None:
    base, tuned, untuned = models("llama")
    wide = copy.deepcopy(tuned)
    wide.resize_token_embeddings(80, mean_resizing=False)
    tokenizer, ids = letter_tokenizer(60), random_prompt(1, 5, 60)
    call = functools.partial(emulate, base, ids, do_sample=False, max_new_tokens=8)
    with pytest.raises(wsd_hf.WSDValueError, match=r"64 entries and that of assistant_model 80: .* pass tokenizer="):
        call(wide, untuned)
    both = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    assert call(wide, untuned, **both).tolist() == call(tuned, untuned).tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": float("nan")}, "beta=nan: must be a finite number"),
        ({"beta": "1"}, "beta='1': must be a finite number"),
        (
            {"reference_model": None},
            "needs the small model before its tuning: pass reference_model=",
        ),
        ({"assistant_model": None}, "strategy='emulated_fine_tuning' needs a pilot: pass assistant_model="),
        ({"reference_attention_mask": torch.ones(1, 5)}, "reference_attention_mask belongs to reference_input_ids"),
        ({"reference_input_ids": [[1]]}, "reference_input_ids is of type list: must be a Tensor"),
        (
            {"reference_input_ids": torch.tensor([[64]])},
            "reference_input_ids contains token id 64, but the vocabulary of",
        ),
        ({"reference_input_ids": torch.tensor([[2, -1]])}, "reference_input_ids contains token id -1, but the vocabulary of"),
        ({"reference_input_ids": torch.tensor([[2.0]])}, "reference_input_ids is of torch.float32: must be token ids"),
        ({"guidance_scale": 1.5}, "guidance_scale is not supported by strategy='emulated_fine_tuning'"),
        ({"num_beams": 2}, "strategy='emulated_fine_tuning' decodes greedily or samples"),
        ({"max_new_tokens": 252, "assistant_input_ids": torch.tensor([[2]])}, "the end of the context of the base, 256 tokens"),
        (
            {"max_new_tokens": 250, "assistant_input_ids": torch.full((1, 7), 2)},
            "the end of the context of assistant_model, 256 tokens",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "assistant_input_ids": torch.tensor([[2]])},
            "input_ids is padded on the right",
        ),
        ({"tokenizer": "letters"}, "tokenizer is of type str"),
        ({"synced_gpus": True}, "synced_gpus=True is not supported by strategy='emulated_fine_tuning'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_is_refused_by_name_before_any_forward(kwargs: dict[str, Any], message: str) -> None:
    base, tuned, untuned = (copy.deepcopy(model) for model in models("gpt2"))
    forwards: list[str] = []
    for model in (base, tuned, untuned):
        model.register_forward_pre_hook(lambda *_: forwards.append("one"))
    call = {"assistant_model": tuned, "reference_model": untuned, "max_new_tokens": 4, **kwargs}
    with pytest.raises(wsd_hf.WSDValueError) as caught:
        base.generate(random_prompt(0, 5), strategy=STRATEGY, pad_token_id=PAD, **call)
    assert message in str(caught.value)
    assert not forwards


def test_logits_that_are_no_numbers_are_blamed_on_their_model() -> None:
    base, tuned, untuned = models("llama")
    broken = copy.deepcopy(untuned)
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(wsd_hf.WSDLogitsError, match=r"the reference returned NaN .* at response token 1 of row 0"):
        emulate(base, random_prompt(0, 4), tuned, broken, max_new_tokens=3, pad_token_id=PAD)


def test_tokens_that_no_small_model_ever_says_are_the_bases() -> None:
    base, *small = models("llama")
    ids = random_prompt(3, 6)
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    expected = emulate(base, ids, *small, **settings, suppress_tokens=[9])
    silent = [copy.deepcopy(model) for model in small]
    for model in silent:
        model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.index_fill(-1, torch.tensor([9]), -torch.inf))
    assert emulate(base, ids, *silent, **settings, suppress_tokens=[9]).tolist() == expected.tolist()
    assert emulate(base, ids, *silent, **settings, beta=0).tolist() == base.generate(ids, **settings).tolist()


def test_a_sum_that_is_no_number_is_told() -> None:
    base, *small = models("llama")
    with pytest.raises(wsd_hf.WSDLogitsError, match="the target returned NaN or infinite logits at response token 1"):
        emulate(base, random_prompt(0, 4), *small, beta=1e40, max_new_tokens=2, pad_token_id=PAD)


def test_rows_end_on_their_own() -> None:
    base, tuned, untuned = models("llama")
    prompts = [random_prompt(seed, 4) for seed in range(6)]
    alone = [
        emulate(base, p, tuned, untuned, do_sample=False, max_new_tokens=20, pad_token_id=PAD)[0, 4:].tolist() for p in prompts
    ]
    ids, mask = left_padded(prompts, PAD, 9)
    out = emulate(base, ids, tuned, untuned, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=PAD)
    assert any(EOS in row for row in alone)
    for row, expected in zip(out[:, 9:].tolist(), alone, strict=True):
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {PAD}


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_the_pilots_eos_ends_a_response_unless_the_call_has_its_own(engine: str) -> None:
    base, tuned, untuned = models("llama")
    ids = random_prompt(8, 6)
    settings = {"do_sample": False, "max_new_tokens": 12, "eft_engine": engine, "pad_token_id": PAD}
    free = emulate(base, ids, tuned, untuned, **settings, eos_token_id=63)[0, 6:].tolist()
    ending = copy.deepcopy(tuned)
    ending.generation_config.eos_token_id = free[4]
    end = free.index(free[4]) + 1
    assert emulate(base, ids, ending, untuned, **settings)[0, 6:].tolist() == free[:end]
    assert emulate(base, ids, ending, untuned, **settings, eos_token_id=63)[0, 6:].tolist() == free
    assert free[4] not in emulate(base, ids, ending, untuned, **settings, min_new_tokens=12)[0, 6:].tolist()
