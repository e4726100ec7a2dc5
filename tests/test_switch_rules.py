"""Switch rules by name: each ends a draft where a slow recomputation from one forward without a cache ends it."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList, pipeline
from typer.testing import CliRunner

import wsd_hf
from families import EOS, PAD
from oracle import left_padded, ones, plain_tokens
from test_fast_path import FiresAt, both, pair, random_rows
from test_two_vocabularies import GOLDEN, a_pilot_prompt, a_prompt, composed, golden
from test_two_vocabularies import both as both_vocabularies
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

RULES: dict[str, tuple[type[wsd_hf.SwitchRule], float, int]] = {
    "confidence": (wsd_hf.SwitchCriteria, 0.8, 6),
    "relative_confidence": (wsd_hf.RelativeConfidenceCriteria, 0.8, 8),
    "entropy": (wsd_hf.EntropyCriteria, 0.5, 8),
    "agreement": (wsd_hf.AgreementCriteria, 0.8, 8),
}
"""Class, threshold and window of each rule."""

every_rule = pytest.mark.parametrize("rule", RULES)
repeats_or_not = pytest.mark.parametrize("ignore_repeats", [False, True], ids=["all", "no repeats"])


# The oracle


def repeats(text: list[int]) -> bool:
    """Whether the last four tokens are somewhere before, too."""
    return any(text[start : start + 4] == text[-4:] for start in range(len(text) - 4))


@torch.no_grad()
def crossing(
    base: Any, ids: torch.Tensor, draft: list[int], rule: str, threshold: float, window: int, ignore_repeats: bool
) -> int | None:
    """The switch index of a draft, by the definitions, from one forward over prompt and draft."""
    text = torch.cat([ids, torch.tensor([draft], dtype=torch.long)], dim=1)
    p = base(text, attention_mask=ones(text)).logits[0, ids.shape[1] - 1 : -1].double().softmax(dim=-1)
    counted: list[int] = []
    for place, _ in enumerate(draft):
        if ignore_repeats and repeats(text[0, : ids.shape[1] + place + 1].tolist()):
            continue
        counted.append(place)
        last = counted[-window:]
        if len(last) < window:
            continue
        chosen, best = p[last, [draft[one] for one in last]], p[last].amax(dim=-1)
        first = p[last].argmax(dim=-1) == torch.tensor([draft[one] for one in last])
        crosses = {
            "confidence": chosen.prod() ** (1 / window) >= threshold,
            "relative_confidence": (chosen / best).prod() ** (1 / window) >= threshold,
            "entropy": -(p[last] * p[last].log()).sum(dim=-1).mean() <= threshold,
            "agreement": first.sum() >= threshold * window,
        }
        if crosses[rule]:
            return place + 1
    return None


def a_threshold(rng: random.Random, rule: str) -> float:
    """A threshold that random models reach in the middle of a short draft."""
    bounds = {"confidence": (0.01, 0.15), "relative_confidence": (0.1, 0.7), "entropy": (1.5, 3.5), "agreement": (0.2, 1.0)}
    return rng.uniform(*bounds[rule])


def drafted(pilot: Any, ids: torch.Tensor, budget: int) -> list[int]:
    """The pilot's greedy text before its EOS."""
    tokens = plain_tokens(pilot, ids, budget)
    return tokens[:-1] if tokens[-1] == EOS else tokens


def a_row(rng: random.Random, pilot: Any, budget: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Prompts of base and pilot, and the pilot's draft; some prompts of the base hold a part of the draft."""
    ids, pilot_ids = (random_rows(rng, 1, 9, padded=False)[0] for _ in range(2))
    draft = drafted(pilot, pilot_ids, budget)
    part = draft[rng.randint(0, 3) : rng.randint(4, 12)] if rng.random() < 0.7 else []
    return torch.cat([torch.tensor([part], dtype=torch.long), ids], dim=1), pilot_ids, draft


@every_rule
@repeats_or_not
def test_drafts_end_where_the_definitions_end_them(rule: str, ignore_repeats: bool) -> None:
    rng = random.Random(f"{rule} {ignore_repeats}")
    base, pilot = pair("llama")
    switches = ignored = 0
    for _ in range(9):
        window, budget, threshold = rng.randint(1, 4), 20, a_threshold(rng, rule)
        prompts, pilot_prompts, drafts = zip(*(a_row(rng, pilot, budget) for _ in range(rng.randint(1, 4))), strict=True)
        ids, mask = left_padded(prompts, PAD)
        pilot_ids, pilot_mask = left_padded(pilot_prompts, PAD)
        outputs = both(
            base,
            pilot,
            ids,
            attention_mask=mask,
            assistant_input_ids=pilot_ids,
            assistant_attention_mask=pilot_mask,
            max_new_tokens=budget,
            eos_token_id=None,
            pad_token_id=PAD,
            switch_criteria=rule,
            wsd_threshold=threshold,
            wsd_window_size=window,
            wsd_ignore_repeats=ignore_repeats,
            wsd_chunk=rng.choice([None, 1, 3, 16]),
        )
        for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            k = crossing(base, prompt, draft, rule, threshold, window, ignore_repeats)
            switches += k is not None
            ignored += ignore_repeats and k != crossing(base, prompt, draft, rule, threshold, window, False)
            kept = torch.cat([prompt, torch.tensor([draft[:k]], dtype=torch.long)], dim=1)
            want = draft[:k] + plain_tokens(base, kept, budget - len(draft[:k]), eos_token_id=None)
            for out in outputs:
                assert int(out.switch_index[row]) == (k or -1)
                assert out.sequences[row, ids.shape[1] :].tolist() == want
    assert switches >= 5
    assert ignored >= 1 or not ignore_repeats


@pytest.mark.parametrize(
    ("name", "rule", "ignore_repeats"),
    [
        pytest.param(name, rule, ignore_repeats, marks=[] if (place + number) % 2 == ignore_repeats else [pytest.mark.sweep])
        for place, name in enumerate(GOLDEN)
        for number, rule in enumerate(RULES)
        for ignore_repeats in (False, True)
    ],
    ids=str,
)
def test_with_two_vocabularies_too(name: tuple[str, str], rule: str, ignore_repeats: bool) -> None:
    rng, world = random.Random(f"{name} {rule}"), golden(*name)
    switches = 0
    for _ in range(4):
        ids = a_prompt(rng, world.tokenizer)
        pilot_ids = a_pilot_prompt(world, ids)
        window, budget = rng.randint(1, 3), 16
        threshold = rng.uniform(2, 5) if rule == "entropy" else rng.uniform(0.02, 0.3)
        whole = composed(world, ids, pilot_ids, threshold=1.0, window=budget + 1, budget=budget, limit=20)
        draft = whole.tokens[: whole.draft_length]
        k = crossing(world.base, ids, draft, rule, threshold, window, ignore_repeats)
        switches += k is not None
        settings = {"wsd_threshold": threshold, "wsd_window_size": window, "wsd_ignore_repeats": ignore_repeats}
        settings |= {"assistant_input_ids": pilot_ids, "wsd_max_draft_tokens": 20, "max_new_tokens": budget}
        for out in both_vocabularies(world, ids, switch_criteria=rule, **settings):
            assert out.draft_length.tolist() == [k or len(draft)]
            assert out.switch_index.tolist() == [k or -1]
            assert out.sequences[0, ids.shape[1] :][: k or len(draft)].tolist() == draft[:k]
    assert switches


@pytest.mark.parametrize("seed", range(3))
@every_rule
def test_a_rule_by_name_is_the_object(rule: str, seed: int) -> None:
    rng = random.Random(seed)
    ids, mask = random_rows(rng, 3, 9, padded=True)
    call: dict[str, Any] = {"attention_mask": mask, "eos_token_id": None, "pad_token_id": PAD, "wsd_threshold": None}
    settings = {"threshold": a_threshold(rng, rule), "window_size": 2, "ignore_repeats": seed == 1}
    named = wsd_hf.WSDConfig(switch_criteria=rule, **settings)
    base, pilot = pair("llama")
    want = base.generate(ids, assistant_model=pilot, strategy=named, attention_mask=mask, max_new_tokens=14, eos_token_id=None)
    criteria = RULES[rule][0](**settings)
    for one in (criteria, StoppingCriteriaList([FiresAt(99), criteria]), Wrapped(rule, **settings)):
        for out in both(base, pilot, ids, **call, switch_criteria=one):
            assert out.sequences.tolist() == want.tolist()


def test_the_papers_rule_is_the_default() -> None:
    assert wsd_hf.WSDConfig().switch_criteria == "confidence"
    base, pilot = pair("llama")
    for plain, named in zip(both(base, pilot), both(base, pilot, switch_criteria="confidence"), strict=True):
        assert plain.sequences.tolist() == named.sequences.tolist()
        assert plain.draft_log_probs.tolist() == named.draft_log_probs.tolist()
        assert plain.strategy == named.strategy


# Criteria of the caller's


class Wrapped(StoppingCriteria):
    """A rule that is called with tensors, by another criterion."""

    def __init__(self, rule: str, **settings: Any) -> None:
        self.rule = RULES[rule][0](**settings)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, best_log_probs: Any, entropies: Any, prompts: Any, **kwargs: Any
    ) -> torch.Tensor:
        more = {"best_log_probs": best_log_probs, "entropies": entropies, "prompts": prompts}
        return self.rule(input_ids, scores, **more)


class TwoArguments(StoppingCriteria):
    """As criteria were before there were more arguments."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 4)


class AnyArguments(StoppingCriteria):
    """Of transformers' signature; keeps the names of further arguments."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.names |= kwargs.keys()
        return torch.full((len(input_ids),), input_ids.shape[1] >= 5)


class Named(StoppingCriteria):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(
        self, input_ids: Any, scores: Any, prompts: Any = None, *, best_log_probs: Any, entropies: Any
    ) -> torch.Tensor:
        self.seen.append((input_ids.tolist(), scores.tolist(), best_log_probs.clone(), entropies.clone(), prompts))
        return torch.tensor([input_ids.shape[1] >= 6])  # for all rows


class Twice(wsd_hf.RelativeConfidenceCriteria):
    """A rule that fires one token later."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs |= {"best_log_probs": kwargs["best_log_probs"][:, :-1]}
        return super().__call__(input_ids[:, :-1], scores[:, :-1], **kwargs)


class Inverse(wsd_hf.SwitchCriteria):
    """Another measure for the paper's window: fires where the base is surprised."""

    def measure(self, drafted: Any) -> float:
        return math.log(-math.expm1(drafted.log_prob))


@pytest.mark.parametrize(
    ("criteria", "length"),
    [
        (TwoArguments(), 4),
        (AnyArguments(), 5),
        (Named(), 6),
        (StoppingCriteriaList([AnyArguments(), TwoArguments(), Named()]), 4),
    ],
    ids=["two", "any", "named", "list"],
)
def test_a_criterion_gets_the_arguments_that_it_names(criteria: Any, length: int) -> None:
    ids, mask = random_rows(random.Random(3), 3, 9, padded=True)
    for out in both(*pair("llama"), ids, attention_mask=mask, eos_token_id=None, pad_token_id=PAD, switch_criteria=criteria):
        assert out.draft_length.tolist() == [length] * 3
        assert out.switch_reason == ["confident"] * 3


def test_what_is_not_named_is_not_handed_over() -> None:
    criterion = AnyArguments()
    both(*pair("llama"), switch_criteria=criterion)
    assert criterion.names == set()


@torch.no_grad()
@pytest.mark.parametrize("engine", ["fast", "step"])
def test_the_arguments_are_those_of_a_forward_without_a_cache(engine: str) -> None:
    ids, mask = random_rows(random.Random(4), 3, 9, padded=True)
    criterion, (base, pilot) = Named(), pair("llama")
    settings = {"strategy": wsd_hf.WSDConfig(switch_criteria=criterion, engine=engine), "max_new_tokens": 9}
    base.generate(ids, attention_mask=mask, assistant_model=pilot, eos_token_id=None, pad_token_id=PAD, **settings)
    assert [len(tokens[0]) for tokens, *_ in criterion.seen] == [1, 2, 3, 4, 5, 6]
    tokens, log_probs, best, entropies, prompts = criterion.seen[-1]
    assert prompts == [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    assert best.dtype == entropies.dtype == torch.float32
    for row, prompt in enumerate(prompts):
        logits = base(torch.tensor([prompt + tokens[row]])).logits[0, len(prompt) - 1 : -1]
        p = logits.double().softmax(dim=-1)
        torch.testing.assert_close(best[row].double(), p.amax(dim=-1).log(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropies[row].double(), -(p * p.log()).sum(dim=-1), atol=1e-5, rtol=1e-5)
        chosen = p[range(6), tokens[row]].log()
        torch.testing.assert_close(torch.tensor(log_probs[row]).double(), chosen, atol=1e-5, rtol=1e-5)


def test_forbidden_tokens_have_no_part_in_entropy() -> None:
    base, pilot = pair("llama")
    hook = base.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([7, 9]), -torch.inf)
    )
    try:
        criterion = Named()
        both(base, pilot, switch_criteria=criterion)
    finally:
        hook.remove()
    assert all(bool(entropies.isfinite().all()) for *_, entropies, _ in criterion.seen)


def test_a_subclass_passes_on_what_its_rule_takes() -> None:
    base, pilot = pair("llama")
    rule = {"threshold": 0.3, "window_size": 3}
    once, _ = both(base, pilot, switch_criteria=wsd_hf.RelativeConfidenceCriteria(**rule), max_new_tokens=20, eos_token_id=None)
    later, _ = both(base, pilot, switch_criteria=Twice(**rule), max_new_tokens=20, eos_token_id=None)
    assert int(once.switch_index[0]) > 0
    assert later.switch_index.tolist() == (once.switch_index + 1).tolist()


def test_a_subclass_may_measure_something_else() -> None:
    out, _ = both(*pair("llama"), switch_criteria=Inverse(0.9, 2), max_new_tokens=20, eos_token_id=None)
    k = int(out.switch_index[0])
    p = out.draft_log_probs[0].double().exp()
    assert k == next(end for end in range(2, len(p) + 1) if ((1 - p[end - 2 : end]).prod() ** 0.5) >= 0.9)


@pytest.mark.parametrize(
    ("rule", "settings", "missing"),
    [
        ("relative_confidence", {}, "best_log_probs"),
        ("agreement", {}, "best_log_probs"),
        ("entropy", {}, "entropies"),
        ("confidence", {"ignore_repeats": True}, "prompts"),
    ],
)
def test_an_argument_that_a_rule_lacks_is_named(rule: str, settings: dict[str, Any], missing: str) -> None:
    criteria = RULES[rule][0](**settings)
    with pytest.raises(wsd_hf.WSDValueError, match=f"{missing}=None: {type(criteria).__name__} needs them"):
        criteria(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9))


@every_rule
def test_rows_that_drafted_nothing_do_not_fire(rule: str) -> None:
    nothing = torch.tensor([[0.0] * 8 + [math.nan]])
    given = {"best_log_probs": nothing, "entropies": nothing, "prompts": [[]]}
    tokens = torch.arange(9)[None]
    assert RULES[rule][0]()(
        tokens[:, :8], nothing[:, :8], **{**given, "best_log_probs": nothing[:, :8], "entropies": nothing[:, :8]}
    )
    assert not RULES[rule][0]()(tokens, nothing, **given)
    assert not RULES[rule][0]()(
        tokens[:, :0], nothing[:, :0], **{**given, "best_log_probs": nothing[:, :0], "entropies": nothing[:, :0]}
    )


def test_repetitions_of_prompt_and_draft_do_not_count() -> None:
    rule = wsd_hf.SwitchCriteria(0.5, 2, ignore_repeats=True)

    def fires(prompt: list[int], *draft: int) -> bool:
        return bool(rule(torch.tensor([draft]), torch.zeros(1, len(draft)), prompts=[prompt]))

    assert fires([], 1, 2)
    assert not fires([1, 2, 3, 4, 5, 1, 2, 3], 4, 5)
    assert not fires([1, 2, 3, 4, 5, 1, 2, 3], 4, 6)  # one token counts
    assert fires([1, 2, 3, 4, 5, 1, 2, 3], 4, 6, 7)
    assert not wsd_hf.SwitchCriteria(0.5, 5, ignore_repeats=True)(torch.ones(1, 6).long(), torch.zeros(1, 6), prompts=[[]])
    assert wsd_hf.SwitchCriteria(0.5, 5)(torch.ones(1, 6).long(), torch.zeros(1, 6))


# Settings


@every_rule
def test_each_rule_has_a_threshold_and_a_window_of_its_own(rule: str) -> None:
    kind, threshold, window = RULES[rule]
    config = wsd_hf.WSDConfig(switch_criteria=rule)
    assert (config.threshold, config.window_size) == (kind().threshold, kind().window_size) == (threshold, window)
    assert config == wsd_hf.WSDConfig(switch_criteria=rule, threshold=None, window_size=None)
    given = wsd_hf.WSDConfig(switch_criteria=rule, threshold=0.3, window_size=4)
    assert (given.threshold, given.window_size) == (0.3, 4)


@every_rule
def test_settings_hold_the_rule_that_ends_a_draft(rule: Any) -> None:
    found = wsd_hf.WSDConfig(threshold=0.4, window_size=3, switch_criteria=rule, ignore_repeats=True).switch_rule()
    assert type(found) is RULES[rule][0]
    assert (found.threshold, found.window_size, found.ignore_repeats) == (0.4, 3, True)
    assert wsd_hf.WSDConfig(switch_criteria=found).switch_rule() is found
    assert type(wsd_hf.WSDConfig(switch_criteria=StoppingCriteriaList()).switch_rule()) is wsd_hf.SwitchCriteria
    with pytest.raises(wsd_hf.WSDValueError, match="must be a switch rule, or the name of one"):
        wsd_hf.WSDConfig(switch_criteria=FiresAt(1)).switch_rule()


def test_another_rule_leaves_threshold_and_window_of_the_one_before() -> None:
    resolve, model = wsd_hf.WSDConfig.resolve, GenerationConfig(wsd_threshold=0.9, wsd_window_size=6)
    own = wsd_hf.WSDConfig(switch_criteria="relative_confidence")
    assert resolve({"switch_criteria": "relative_confidence"}, None, model) == own
    assert resolve({"switch_criteria": "relative_confidence"}, wsd_hf.WSDConfig(threshold=0.9)) == own
    assert resolve({}, None, GenerationConfig(switch_criteria="relative_confidence"), model) == own
    assert resolve({"switch_criteria": "relative_confidence"}, own.__class__(switch_criteria="entropy", window_size=3)) == own
    assert resolve({"switch_criteria": "relative_confidence", "wsd_window_size": 6}, None, model).window_size == 6
    assert resolve({"switch_criteria": "confidence"}, None, model).threshold == 0.9
    assert resolve({"switch_criteria": FiresAt(3)}, None, model).threshold == 0.9


@every_rule
@repeats_or_not
def test_names_travel_in_generation_configs(rule: str, ignore_repeats: bool, tmp_path: Any) -> None:
    config = wsd_hf.WSDConfig(switch_criteria=rule, ignore_repeats=ignore_repeats, window_size=3)
    config.to_generation_config(GenerationConfig()).save_pretrained(tmp_path)
    assert wsd_hf.WSDConfig.resolve({}, None, GenerationConfig.from_pretrained(tmp_path)) == config


def test_a_rule_as_an_object_does_not_travel(tmp_path: Any) -> None:
    config = wsd_hf.WSDConfig(switch_criteria=wsd_hf.EntropyCriteria())
    assert "switch_criteria" not in config.to_dict()
    with pytest.raises(wsd_hf.WSDValueError, match="switch_criteria: an object can't be saved"):
        config.to_generation_config(GenerationConfig())
    with pytest.raises(wsd_hf.WSDValueError, match="switch_criteria: an object can't be saved"):
        wsd_hf.pack(FOLDER / "base", FOLDER / "pilot", tmp_path / "new", wsd_config=config)
    assert not (tmp_path / "new").exists()


NAMES = "'confidence' or 'relative_confidence' or 'entropy' or 'agreement'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"switch_criteria": "confident"}, f"switch_criteria='confident': must be {NAMES}"),
        ({"switch_criteria": ""}, f"switch_criteria='': must be {NAMES}"),
        ({"switch_criteria": 1}, "switch_criteria is of type int: must be a StoppingCriteria"),
        ({"switch_criteria": wsd_hf.SwitchCriteria}, "switch_criteria is of type ABCMeta: must be a StoppingCriteria"),
        ({"wsd_ignore_repeats": 2}, "ignore_repeats=2: must be True or False"),
        ({"wsd_ignore_repeats": True, "switch_criteria": FiresAt(1)}, "ignore_repeats=True belongs to a switch rule by name"),
        ({"switch_criteria": "relative_confidence", "wsd_threshold": 1.5}, r"threshold=1\.5: must be a number above 0"),
        ({"switch_criteria": "agreement", "wsd_threshold": 0}, "threshold=0: must be a number above 0 and at most 1"),
        ({"switch_criteria": "entropy", "wsd_threshold": -1.0}, r"threshold=-1\.0: must be a finite number of at least 0"),
        ({"switch_criteria": "entropy", "wsd_threshold": math.inf}, "threshold=inf: must be a finite number"),
        ({"switch_criteria": "entropy", "wsd_window_size": 0}, "window_size=0: must be an integer of at least 1"),
    ],
)
def test_illegal_settings_are_refused_before_any_forward(settings: dict[str, Any], message: str) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    base, pilot = pair("llama")
    hooks = [model.register_forward_pre_hook(fail) for model in (base, pilot)]
    try:
        with pytest.raises(wsd_hf.WSDValueError, match=message):
            base.generate(torch.tensor([[3, 4]]), assistant_model=pilot, strategy="wsd", **settings)
    finally:
        for hook in hooks:
            hook.remove()


# Doors


QUESTION = "What does the Keloft eat?"


def shipped(**settings: Any) -> Any:
    return wsd_hf.Pair.tiny().generate([{"role": "user", "content": QUESTION}], max_new_tokens=64, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "the base's confidence reached 0.8 over 6 tokens"),
        ({"switch_criteria": "relative_confidence"}, "the base's relative confidence reached 0.8 over 8 tokens"),
        ({"switch_criteria": "entropy", "wsd_threshold": 0.1}, "the base's entropy fell to 0.1 over 8 tokens"),
        ({"switch_criteria": "agreement"}, "the base's agreement reached 0.8 over 8 tokens"),
        ({"wsd_ignore_repeats": True}, "the base's confidence reached 0.8 over 6 tokens that repeat nothing"),
        ({"switch_criteria": wsd_hf.SwitchCriteria(0.5, 2)}, "the caller's switch criteria fired"),
    ],
)
def test_a_trace_names_the_rule_that_fired(settings: dict[str, Any], words: str) -> None:
    trace = wsd_hf.Pair.tiny().explain(shipped(**settings))
    assert trace.summary().endswith(f"; there {words}")
    assert any(token.confidence for token in trace.tokens) == (not settings)
    assert all(token.probability for token in trace.tokens[: trace.switch.index])


def test_the_command_line_takes_rules() -> None:
    run = CliRunner().invoke(app, ["generate", QUESTION, "--switch-criteria", "relative_confidence", "--ignore-repeats"])
    want = wsd_hf.Pair.tiny().explain(shipped(switch_criteria="relative_confidence", wsd_ignore_repeats=True))
    assert run.exit_code == 0
    assert run.stderr.splitlines()[-1] == want.summary()
    wrong = CliRunner().invoke(app, ["generate", QUESTION, "--switch-criteria", "sure"])
    assert (wrong.exit_code, wrong.stderr) == (2, f"wsd-hf: switch_criteria='sure': must be {NAMES}\n")
    other = CliRunner().invoke(app, ["generate", QUESTION, "--strategy", "nudging", "--ignore-repeats"])
    assert "--ignore-repeats has no effect with --strategy nudging" in other.stderr


def test_a_comparison_takes_rules(tmp_path: Any) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": QUESTION}), "utf-8")
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path), "--max-new-tokens", "64"]
    command = ["compare", *options, "--strategies", "wsd", "--switch-criteria", "entropy", "--ignore-repeats"]
    assert CliRunner().invoke(app, command).exit_code == 0
    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    names = ("--switch-criteria", "--threshold", "--window-size", "--ignore-repeats")
    assert [table["settings"][name] for name in names] == ["entropy", 0.5, 8, True]
    want = shipped(switch_criteria="entropy", wsd_ignore_repeats=True)
    assert table["strategies"][1]["switch_index"] == int(want.switch_index[0]) != int(shipped().switch_index[0])
    again = CliRunner().invoke(app, command[:-1])
    assert "--ignore-repeats was True and is None" in again.stderr


def test_the_harnesses_take_rules() -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("inspect_ai")
    from inspect_ai.model import GenerateConfig

    from wsd_hf.integrations.inspect_ai import WSDModelAPI
    from wsd_hf.integrations.lm_eval import WSDHFLM

    message = f"switch_criteria='sure': must be {NAMES}"
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        WSDHFLM("a base", pilot="a pilot", switch_criteria="sure")
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        WSDModelAPI("a base", None, None, GenerateConfig(), pilot="a pilot", switch_criteria="sure")


def test_a_packed_folder_keeps_its_rule(tmp_path: Any) -> None:
    options = ["--base", str(FOLDER / "base"), "--pilot", str(FOLDER / "pilot")]
    rule = ["--switch-criteria", "entropy", "--threshold", "0.1", "--window-size", "3", "--ignore-repeats"]
    assert CliRunner().invoke(app, ["pack", str(tmp_path / "model"), *options, *rule]).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    call = {**inputs, "max_new_tokens": 64, "return_dict_in_generate": True}
    kept = wsd_hf.WSDConfig(switch_criteria="entropy", threshold=0.1, window_size=3, ignore_repeats=True)
    assert model.generate(**call).strategy == kept
    other = model.generate(**call, switch_criteria="relative_confidence", wsd_ignore_repeats=False).strategy
    assert other == wsd_hf.WSDConfig(switch_criteria="relative_confidence")


def test_a_pipeline_takes_rules() -> None:
    tiny = wsd_hf.Pair.tiny()
    models = {"model": tiny.base, "tokenizer": tiny.tokenizer}
    pilot = {"assistant_model": tiny.pilot, "assistant_tokenizer": tiny.pilot_tokenizer}
    pipe = pipeline(
        "text-generation",
        device="cpu",
        strategy="wsd",
        switch_criteria="entropy",
        wsd_threshold=3.0,
        wsd_window_size=1,
        **models,
        **pilot,
    )
    chat = [{"role": "user", "content": QUESTION}]
    [answer] = pipe(chat, max_new_tokens=64, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == tiny.answers(shipped(switch_criteria="entropy", wsd_threshold=3.0, wsd_window_size=1))[0]
    own = {"wsd_threshold": None, "wsd_window_size": None}
    [other] = pipe(chat, max_new_tokens=64, do_sample=False, return_full_text=False, switch_criteria="confidence", **own)
    assert other["generated_text"] == tiny.answers(shipped())[0] != answer["generated_text"]


@every_rule
def test_the_logits_processor_takes_rules(rule: str) -> None:
    base, pilot = pair("llama")
    config = wsd_hf.WSDConfig(switch_criteria=rule, threshold=a_threshold(random.Random(rule), rule), window_size=2)
    ids, mask = random_rows(random.Random(5), 3, 9, padded=True)
    call = {"attention_mask": mask, "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": PAD}
    got = base.generate(ids, logits_processor=[wsd_hf.WSDLogitsProcessor(pilot, config)], **call)
    assert got.tolist() == base.generate(ids, assistant_model=pilot, strategy=config, **call).tolist()
    named = wsd_hf.WSDLogitsProcessor(pilot, config, switch_criteria="agreement")
    want = base.generate(ids, assistant_model=pilot, strategy=config, switch_criteria="agreement", **call)
    assert base.generate(ids, logits_processor=[named], **call).tolist() == want.tolist()
