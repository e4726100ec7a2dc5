"""Offloaded, wrapped, compiled, adapted and training models: every strategy serves them as the plain model, or names them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import wsd_hf
from every_strategy import CASES, Case, counting, each, every_case, every_model
from families import tiny_model, tiny_parts, tiny_pilot
from oracle import left_padded, ones, random_prompt
from wsd_hf.errors import WSDValueError

NAMES = {"base": "the model"}
"""What errors call a model whose argument has another name."""


@functools.cache
def prompts(case: Case) -> dict[str, torch.Tensor]:
    """Two prompts of unequal length."""
    ids, mask = left_padded([case.prompt(1), case.prompt(2, length=9)], pad=0)
    return {"input_ids": ids, "attention_mask": mask}


def sequences(case: Case, models: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
    """A call that depends on no random number, in which some models have the parts of the case's."""
    small = {**case.models, **(models or {})}
    base = small.pop("base")
    choice = {"top_k": 1} if case.samples else {"do_sample": False}
    settings = {**prompts(case), **case.settings, **small, **choice, "pad_token_id": 0, "max_new_tokens": 6, **kwargs}
    written: torch.Tensor = base.generate(**settings)
    return written


plain = functools.cache(sequences)


def refused(case: Case, models: dict[str, Any], match: str, **kwargs: Any) -> None:
    """The call raises, before any forward of any model."""
    with ExitStack() as stack:
        inside = [model for model in {**case.models, **models}.values() if isinstance(model, torch.nn.Module)]
        forwards = [stack.enter_context(counting(model)) for model in inside]
        with pytest.raises(WSDValueError, match=match):
            sequences(case, models, **kwargs)
        assert not any(forwards)


@every_model
def test_a_model_of_another_dtype_writes_the_same(case: Case, role: str) -> None:
    """Two dtypes of one call; no token of these models hangs on what float32 rounds."""
    assert torch.equal(sequences(case, {role: copy.deepcopy(case.models[role]).float()}), plain(case))


@functools.cache
def own(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that a test leaves as it got it."""
    return copy.deepcopy(model)


# Where a model is


def all_on_disk(model: PreTrainedModel, folder: str) -> None:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def embeddings_on_disk(model: PreTrainedModel, folder: str) -> None:
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
    accelerate.dispatch_model(model, {**places, "lm_head": "cpu"}, offload_dir=folder)


def layers_on_disk(model: PreTrainedModel, folder: str) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    accelerate.dispatch_model(model, {**places, "lm_head": "cpu"}, offload_dir=folder)


@pytest.fixture(scope="session")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    """Copies of models whose weights accelerate brings in for every forward, each made once."""

    @functools.cache
    def make(model: PreTrainedModel, offload: Callable[[PreTrainedModel, str], None]) -> PreTrainedModel:
        model = copy.deepcopy(model)
        offload(model, str(tmp_path_factory.mktemp("weights")))
        return model

    return make


@pytest.mark.parametrize(
    ("case", "role", "offload"),
    [
        pytest.param(case, role, offload, id=f"{case}, {role}, {offload.__name__}", marks=marks)
        for case in CASES
        for role in case.roles
        for offload, marks in {
            all_on_disk: case.marks,
            embeddings_on_disk: case.marks_of_long_checks,
            layers_on_disk: case.marks_of_long_checks,
        }.items()
    ],
)
def test_an_offloaded_model_writes_what_it_writes_elsewhere(
    case: Case, role: str, offload: Callable[..., None], offloaded: Callable[..., PreTrainedModel], tried: Any
) -> None:
    model = offloaded(case.models[role], offload)
    assert any(weight.is_meta for weight in model.parameters())
    assert torch.equal(sequences(case, {role: model}), plain(case))
    tried("models with offloaded weights")


@every_model
@pytest.mark.parametrize("part", ["all", "lm_head"])
def test_a_model_without_data_is_refused(case: Case, role: str, part: str, tried: Any) -> None:
    model = copy.deepcopy(case.models[role])
    (model if part == "all" else model.get_submodule(part)).to("meta")
    refused(case, {role: model}, f"{NAMES.get(role, role)} has weights on the meta device")
    tried("models that can't run as they are")


@every_case
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "assistant_input_ids"])
def test_a_prompt_without_data_is_refused(case: Case, name: str) -> None:
    refused(case, {}, f"{name} is on the meta device", **{name: prompts(case)["input_ids"].to("meta")})


# Wrappers


@every_case
def test_of_a_compiled_module_the_model_inside_is_used(case: Case) -> None:
    compiled = {role: torch.compile(model, backend=_unused) for role, model in case.models.items()}
    assert torch.equal(sequences(case, compiled), plain(case))


def _unused(*args: Any) -> Any:
    raise AssertionError("compiled")


def test_a_compiled_module_is_enabled_and_disabled_as_the_model_inside() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    compiled = torch.compile(model, backend=_unused)
    assert wsd_hf.enable_wsd(compiled) is compiled
    assert isinstance(model, wsd_hf.WSDGenerationMixin)
    assert wsd_hf.disable_wsd(compiled) is compiled
    assert type(model) is type(tiny_model("llama"))


@pytest.fixture
def compiler() -> Iterator[None]:
    """Whatever torch.compile keeps in this process is gone afterwards."""
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("budget", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_compiled_forwards_are_used_for_every_shape(budget: int) -> None:
    """The pilot is compiled in place, and the base's forward by itself; a second size of batch makes shapes symbols."""
    base, pilot = (copy.deepcopy(tiny_model("llama", num_hidden_layers=1)) for _ in range(2))
    runs: list[str] = []

    def backend(name: str) -> Callable[..., Any]:
        return lambda graph, _: lambda *arguments: (runs.append(name), graph.forward(*arguments))[1]

    settings = {"strategy": "wsd", "wsd_engine": "fast", "wsd_chunk": 1, "max_new_tokens": budget, "eos_token_id": None}
    batches = [random_prompt(rows, 5 * rows).view(rows, 5) for rows in (2, 3)]

    def answers() -> list[torch.Tensor]:
        return [base.generate(ids, attention_mask=ones(ids), assistant_model=pilot, **settings) for ids in batches]

    wsd_hf.enable_wsd(base)
    want = answers()
    pilot.compile(backend=backend("pilot"), dynamic=True)
    base.forward = torch.compile(base.forward, backend=backend("base"), dynamic=True)
    assert all(map(torch.equal, answers(), want))
    assert {*runs} == {"pilot", "base"}


@every_case
def test_a_forward_wrapped_by_a_decorator_is_transparent(case: Case) -> None:
    models = {role: copy.deepcopy(model) for role, model in case.models.items()}
    calls = {role: _counted(model) for role, model in models.items()}
    assert torch.equal(sequences(case, models), plain(case))
    assert all(calls.values())


def _counted(model: PreTrainedModel) -> list[int]:
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    return calls


@every_model
def test_a_forward_of_unknown_behaviour_is_served_step_by_step_or_refused(case: Case, role: str) -> None:
    """The output of a model whose logits are scaled: what the strategy gives with a model of scaled weights."""
    model, scaled = copy.deepcopy(case.models[role]), copy.deepcopy(case.models[role])
    with torch.no_grad():
        scaled.lm_head.weight *= 2
    head = model.lm_head
    model.forward = functools.partial(_doubled, model.forward)
    if case.way in ("nudging", "reward guided") or case.engine == "fast":
        name = {"base": "base", "assistant_model": "pilot", "reference_model": "reference"}[role]
        refused(case, {role: model}, f"the {name} has a forward of its own")
    else:
        assert torch.equal(sequences(case, {role: model}), sequences(case, {role: scaled}))
    if case.engine == "fast" and case.goes_step_by_step:
        automatic, step = {case.keyword("engine"): "auto"}, {case.keyword("engine"): "step"}
        assert torch.equal(sequences(case, {role: model}, **automatic), sequences(case, {role: scaled}, **step))
    assert model.lm_head is head


def _doubled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    output.logits = 2 * output.logits
    return output


class Sharded(torch.nn.Module):
    """As FullyShardedDataParallel and DeepSpeed's engine: holds a model as `module`, and has its attributes."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Delegates(torch.nn.Module):
    """A wrapper of somebody's own, with the attributes of the model inside."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.config, self.generation_config = inside.config, inside.generation_config


WRAPPERS = {torch.nn.DataParallel: "wrapped in DataParallel: .* its .module", Sharded: "wrapped in Sharded: .* its .module"}
WRAPPERS |= {Delegates: "Delegates: must be a causal language model", lambda model: model.model: "LlamaModel: must be a causal"}


@every_model
@pytest.mark.parametrize(("wrap", "reason"), WRAPPERS.items(), ids=["DataParallel", "sharded", "own", "without a head"])
def test_other_wrappers_are_refused(case: Case, role: str, wrap: Callable[..., Any], reason: str, tried: Any) -> None:
    model = wrap(own(case.models[role]))
    if role == "base":
        with pytest.raises((WSDValueError, AttributeError), match=f"{reason}|{type(model).__name__}"):
            wsd_hf.enable_wsd(model)
        with pytest.raises(WSDValueError, match=reason):
            wsd_hf.generation.generate_with("wsd", case.world.base.generate, model)
    else:
        refused(case, {role: model}, f"{role}.*{reason}")
    tried("models that can't run as they are")


# Modes


@every_model
def test_gradient_checkpointing_in_training_mode_is_refused(case: Case, role: str, tried: Any) -> None:
    model, name = copy.deepcopy(case.models[role]), NAMES.get(role, role)
    assert torch.equal(sequences(case, {role: model.train()}), plain(case))  # no dropout in these
    checkpoint_gradients(model)
    assert torch.equal(sequences(case, {role: model.eval()}), plain(case))
    for part in (model, model.model.layers[-1]):
        part.train()
        refused(case, {role: model}, f"{name} is in training mode with gradient checkpointing.*eval\\(\\) or gradient_check")
        model.eval()
    tried("models that can't run as they are", 2)


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """By the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


# Adapters


def adapted(model: PreTrainedModel, seed: int = 0) -> PeftModel:
    """The model itself with adapters put into it, in their wrapper."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).double().eval()


@every_case
def test_adapters_within_and_around_compiled_modules_take_part(case: Case) -> None:
    merged, inside, around = ({role: copy.deepcopy(model) for role, model in case.models.items()} for _ in range(3))
    for seed, role in enumerate(case.models):
        merged[role] = adapted(merged[role], seed).merge_and_unload()
        inside[role] = torch.compile(adapted(inside[role], seed), backend=_unused)
        around[role] = adapted(torch.compile(around[role], backend=_unused), seed)
    want = sequences(case, merged)
    assert not torch.equal(want, plain(case))
    assert torch.equal(sequences(case, inside), want)
    assert torch.equal(sequences(case, around), want)


@every_case
def test_models_that_share_adapters_are_refused(case: Case, tried: Any) -> None:
    model = copy.deepcopy(case.models["base"])
    with_adapters = adapted(model)
    for pair in combinations(case.models, 2):
        one, other = (NAMES.get(name, name) for name in pair)
        for models in ((model, with_adapters), (with_adapters, model), (torch.compile(model, backend=_unused), with_adapters)):
            refused(case, dict(zip(pair, models, strict=True)), f"{one} and {other} share layers that have adapters")
            tried("models that can't run as they are")


@every_case
def test_a_layer_with_adapters_that_two_models_share_is_found(case: Case) -> None:
    first, second = list(case.models)[-2:]
    models = {name: copy.deepcopy(case.models[name]) for name in (first, second)}
    models[second].model.layers[1] = models[first].model.layers[1]
    assert sequences(case, models).shape[0] == 2
    adapted(models[second])
    refused(case, models, f"{NAMES.get(first, first)} and {second} share layers that have adapters")


@each(case for case in CASES if case.vocabularies == "one")
def test_models_may_share_weights_and_have_adapters_of_their_own(case: Case) -> None:
    """Two models over the same parameters, of which one has adapters; and one model in all roles."""
    base = copy.deepcopy(case.models["base"])
    memo = {id(weight): weight for weight in base.parameters()}
    twin = adapted(wsd_hf.disable_wsd(copy.deepcopy(base, memo)))
    assert twin.get_base_model().lm_head.weight is base.lm_head.weight
    separate = adapted(wsd_hf.disable_wsd(copy.deepcopy(base)))
    small = {name: model for name, model in case.models.items() if name != "base"}
    got = sequences(case, {"base": base, **small, "assistant_model": twin})
    assert torch.equal(got, sequences(case, {**small, "assistant_model": separate}))
    everywhere = dict.fromkeys(case.models, base)
    assert sequences(case, everywhere).shape[0] == 2


@pytest.mark.parametrize("role", ["tuned", "reference", "the model"])
def test_a_value_of_the_callers_is_checked_with_the_base(role: str) -> None:
    case = Case("one", "search")
    world, ids = case.world, case.prompt(1)
    models = {"the model": world.base, "tuned": world.pilot, "reference": world.reference}
    models = {name: copy.deepcopy(model) for name, model in models.items()}
    value = wsd_hf.ImplicitValue(models["tuned"], models["reference"], world.tokenizer, [ids[0].tolist()])
    search = {"strategy": "weak_to_strong_search", "value": value, "tokenizer": world.tokenizer, "max_new_tokens": 3}
    checkpoint_gradients(models[role].train())
    with pytest.raises(WSDValueError, match=f"{role} is in training mode with gradient checkpointing"):
        models["the model"].generate(ids, attention_mask=ones(ids), **search)
    models[role].eval()
    models["the model"].generate(ids, attention_mask=ones(ids), **search)
    if role != "the model":
        inner = models[role]
        shared = adapted(wsd_hf.enable_wsd(inner))
        with pytest.raises(WSDValueError, match=f"the model and value.{role} share layers that have adapters"):
            shared.generate(input_ids=ids, attention_mask=ones(ids), **search)
        with pytest.raises(WSDValueError, match="tuned and reference share layers"):
            wsd_hf.ImplicitValue(shared, inner, world.tokenizer, [ids[0].tolist()])


@pytest.mark.parametrize("role", ["the model", "assistant_model"])
def test_a_processor_checks_both_models_when_a_call_begins(role: str) -> None:
    ids, base, pilot = random_prompt(1, 6), copy.deepcopy(tiny_model("llama")), copy.deepcopy(tiny_pilot("llama"))
    processor = wsd_hf.WSDLogitsProcessor(pilot)
    model = {"the model": base, "assistant_model": pilot}[role]
    call = {"attention_mask": ones(ids), "logits_processor": [processor], "max_new_tokens": 4}
    want = base.generate(ids, **call)
    checkpoint_gradients(model.train())
    with pytest.raises(WSDValueError, match=f"{role} is in training mode with gradient checkpointing"):
        base.generate(ids, **call)
    assert torch.equal(base.generate(ids, **call) if model.eval() else want, want)
    shared = adapted(base)
    with pytest.raises(WSDValueError, match="the model and assistant_model share layers"):
        base.generate(ids, **{**call, "logits_processor": [wsd_hf.WSDLogitsProcessor(shared)]})


# Other doors


def test_a_packed_base_that_is_offloaded_leaves_its_pilot_where_it_can_run(tmp_path: Path) -> None:
    tiny = Path(wsd_hf.tiny.__file__).parent
    folder = wsd_hf.pack(tiny / "base", tiny / "pilot", tmp_path / "bundle").folder
    ids = AutoTokenizer.from_pretrained(folder)("What does the Keloft eat?", return_tensors="pt")
    load = functools.partial(AutoModelForCausalLM.from_pretrained, folder, trust_remote_code=True)
    want = load().generate(**ids, max_new_tokens=8)
    base = load(device_map={"": "disk"}, offload_folder=str(tmp_path / "weights"))
    assert base.device.type == "meta"
    assert torch.equal(base.generate(**ids, max_new_tokens=8), want)


def test_a_pipeline_with_an_offloaded_pilot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": pilot_tokenizer}
    chat = [{"role": "user", "content": "What does the Keloft eat?"}]

    def answer() -> Any:
        ask = pipeline("text-generation", base, assistant_model=pilot, **tokenizers)
        return ask(chat, strategy="wsd", do_sample=False, max_new_tokens=8)

    want = answer()
    all_on_disk(pilot, str(tmp_path))
    assert answer() == want
    assert "move one of them" not in caplog.text
