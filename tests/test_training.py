"""Training of a pilot: the trained part of each answer, what the folder holds, resumed runs, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EosTokenCriteria
from typer.testing import CliRunner

from every_strategy import swept_unless
from time_limit import status_of
from wsd_hf import Pair, WSDConfig, WSDValueError, load_pilot
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

pytest.importorskip("trl", reason='no TRL: pip install "wsd_hf[train]"')

from wsd_hf.training.checkpoints import last_whole
from wsd_hf.training.examples import Example
from wsd_hf.training.masking import cut, encode_examples
from wsd_hf.training.recipe import Recipe
from wsd_hf.training.run import TunedPilot, train_pilot

UNTUNED = Path(__file__).parents[1] / "examples" / "tiny_world" / "pilot_untuned"
PAIRS = [
    {
        "prompt": [{"role": "user", "content": line["prompt"]}],
        **{which: [{"role": "assistant", "content": line[which]}] for which in ("chosen", "rejected")},
    }
    for line in map(json.loads, (FOLDER / "preferences.jsonl").read_text("utf-8").splitlines())
]
QUICK = Recipe(lora_rank=0, learning_rate=1e-3, batch_size=4, epochs=2, checkpoint_every=2)
"""Two epochs over eight examples: four steps, and checkpoints after the second and the last."""

THREE_EPOCHS = dataclasses.replace(QUICK, epochs=3)

DRAFTED = [{**pair, "drafted": 30} for pair in PAIRS[:8]]
"""Eight pairs, of whose chosen answers a pilot wrote the first thirty characters."""


def write(file: Path, pairs: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The file of `DRAFTED`."""
    return write(tmp_path / "data.jsonl", DRAFTED)


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Callable[..., TunedPilot]:
    """Trains in a folder of the test."""

    def run(name: str = "run", recipe: Recipe = QUICK, data: Path = data, **options: Any) -> TunedPilot:
        tuned = train_pilot(options.pop("pilot", UNTUNED), data, tmp_path / name, recipe=recipe, **options)
        assert tuned is not None
        return tuned

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    """True if the weights of two pilots are the same in every bit."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_prob(model: Any, tokenizer: Any, pair: dict[str, Any], which: str, count: int) -> torch.Tensor:
    """Log-probabilities of the first tokens of an answer, step by step."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    answer = tokenizer.encode(pair[which][0]["content"], add_special_tokens=False)[:count]
    found = []
    for token in answer:
        logits = model(torch.tensor([prompt])).logits[0, -1].float()
        found.append(logits.log_softmax(-1)[token])
        prompt = [*prompt, token]
    return torch.stack(found)


# The trained part


def test_the_trained_part_is_what_the_pilot_wrote() -> None:
    pair = Pair.tiny()
    stops = {pair.pilot_tokenizer.eos_token_id}
    for line in PAIRS[:12]:
        output = pair.generate(line["prompt"], max_new_tokens=64)
        response = output.sequences[0, output.prompt_length :]
        draft = response[: output.draft_length[0]].tolist()
        characters = len(pair.tokenizer.decode(draft))
        example = Example(messages=line["prompt"], chosen=pair.answers(output)[0], drafted=characters)
        encoded = encode_examples([example], pair.pilot_tokenizer, stops, Recipe())
        [row] = cut(encoded, [characters], Recipe())
        assert row.chosen == draft
        assert row.prompt == pair.inputs(line["prompt"])["assistant_input_ids"][0].tolist()


@pytest.mark.parametrize(("part", "count"), [("whole", None), (3, 3), (1000, None)])
def test_other_parts(part: Any, count: int | None) -> None:
    _, tokenizer = load_pilot(UNTUNED)
    text = PAIRS[0]["chosen"][0]["content"]
    answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    example, recipe = Example(messages=PAIRS[0]["prompt"], chosen=text, drafted=1), Recipe(part=part)
    [row] = cut(encode_examples([example], tokenizer, {tokenizer.eos_token_id}, recipe), [1], recipe)
    assert row.chosen == answer[:count]


def test_an_answer_that_the_pilot_writes_to_its_end_is_trained_with_its_end() -> None:
    _, tokenizer = load_pilot(UNTUNED)
    example = Example(messages=[{"role": "user", "content": "Hi"}], chosen="I am happy to help you with this.")
    encoded = encode_examples([example], tokenizer, {tokenizer.eos_token_id}, Recipe())
    [row] = cut(encoded, [None], Recipe())
    assert row.chosen[-1] == tokenizer.eos_token_id


TRIMS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}(thinks) {% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("template", "text"), [(TRIMS, "  Well, I am happy."), (THINKS, "Well, I am 😀 happy.")])
def test_the_part_is_counted_from_the_first_character_of_the_answer(template: str, text: str) -> None:
    _, tokenizer = load_pilot(UNTUNED)
    tokenizer.chat_template = template
    example = Example(messages=[{"role": "user", "content": "Well, I am?"}], chosen=text)
    [encoded] = encode_examples([example], tokenizer, {tokenizer.eos_token_id}, Recipe())

    def written(ids: list[int]) -> int:
        """Number of the text's characters that are there, after those that the template puts before or leaves out."""
        shown = len(tokenizer.decode(ids).rstrip("\ufffd"))
        return shown - (len("(thinks) ") if template == THINKS else 0) + len(text) - len(text.lstrip())

    for characters in range(3, len(text)):
        [row] = cut([encoded], [characters], Recipe())
        assert written(row.chosen[:-1]) < characters <= written(row.chosen)


def test_what_comes_after_the_handover_changes_nothing(trained: Callable[..., TunedPilot], data: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    for pair in pairs:
        text = pair["chosen"][0]["content"]
        pair["chosen"][0]["content"] = text[: text.index(" ", 30)] + " but then again, no."
    other = write(tmp_path / "other.jsonl", pairs)
    assert same(trained("one").folder, trained("two", data=other).folder)
    whole = dataclasses.replace(QUICK, part="whole")
    assert not same(trained("three", whole).folder, trained("four", whole, data=other).folder)


# The losses


def test_the_loss_is_that_of_the_trained_tokens(trained: Callable[..., TunedPilot]) -> None:
    model, tokenizer = load_pilot(UNTUNED, dtype=torch.float32)
    tuned = trained(recipe=dataclasses.replace(QUICK, part=5, batch_size=8, epochs=1))
    with torch.no_grad():
        scores = torch.cat([log_prob(model, tokenizer, pair, "chosen", 5) for pair in PAIRS[:8]])
    assert tuned.losses[0]["loss"] == pytest.approx(-scores.mean().item(), abs=1e-4)
    assert tuned.log_prob_before == pytest.approx(scores.mean().item(), abs=1e-4)
    assert tuned.log_prob_after > tuned.log_prob_before
    assert tuned.trained_tokens == 40


def test_the_preference_loss_is_that_of_the_same_number_of_tokens(trained: Callable[..., TunedPilot]) -> None:
    tuned = trained(recipe=dataclasses.replace(QUICK, objective="dpo+sft", part=5, batch_size=8, epochs=2, lora_rank=4))
    before, tokenizer = load_pilot(UNTUNED, dtype=torch.float32)
    with torch.no_grad():
        sft = -torch.cat([log_prob(before, tokenizer, pair, "chosen", 5) for pair in PAIRS[:8]]).mean()
    assert tuned.losses[0]["loss"] == pytest.approx(sft.item() + torch.log(torch.tensor(2.0)).item(), abs=1e-3)
    assert len(tuned.losses) == 2
    assert tuned.losses[1]["loss"] < tuned.losses[0]["loss"]


def test_gradients_of_several_forwards_are_those_of_one(trained: Callable[..., TunedPilot]) -> None:
    one = trained("one").losses
    several = trained("several", dataclasses.replace(QUICK, device_batch_size=1)).losses
    assert [loss["loss"] for loss in several] == pytest.approx([loss["loss"] for loss in one], abs=2e-3)


# The folder


def test_the_pilot_differs_from_the_untuned_one_in_weights_alone(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    tuned = trained()
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text("utf-8")) for folder in (UNTUNED, tuned.folder))
        assert {**before, "transformers_version": None} == {**after, "transformers_version": None}
    (_, before), (_, after) = load_pilot(UNTUNED), load_pilot(tuned.folder)
    assert before.chat_template == after.chat_template
    assert before.special_tokens_map == after.special_tokens_map
    assert weights(tuned.folder).keys() == weights(UNTUNED).keys()
    assert {weight.dtype for weight in weights(tuned.folder).values()} == {torch.float16}
    assert not same(tuned.folder, UNTUNED)
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {file for file in files if not file.startswith("pilot/")} == {"settings.json", "losses.json", "result.json"}


@pytest.mark.parametrize("objective", ["sft", "dpo+sft"])
def test_a_pilot_without_a_pad_token_is_given_none(objective: Any, trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    pilot = tmp_path / "pilot"
    shutil.copytree(UNTUNED, pilot)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        settings = json.loads((pilot / name).read_text("utf-8"))
        (pilot / name).write_text(json.dumps({key: value for key, value in settings.items() if "pad_token" not in key}))
    tuned = trained(recipe=dataclasses.replace(QUICK, objective=objective), pilot=pilot)
    model, tokenizer = load_pilot(tuned.folder)
    assert tokenizer.pad_token is None
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (None, None)
    assert model.config.use_cache


def test_an_adapter_is_merged_and_kept(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = trained(recipe=dataclasses.replace(QUICK, lora_rank=4, learning_rate=1e-2))
    assert tuned.adapter == tmp_path / "run" / "adapter"
    untuned, _ = load_pilot(UNTUNED, dtype=torch.float32)
    merged, _ = load_pilot(tuned.folder, dtype=torch.float32)
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        before = untuned(ids).logits
        adapted = peft.PeftModel.from_pretrained(untuned, tuned.adapter)(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, atol=2e-2, rtol=0)
    assert (adapted - before).abs().max() > 0.1
    assert sorted(path.name for path in tuned.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for text in (tuned.adapter / "adapter_config.json", tuned.folder / "README.md", tuned.folder / "config.json"):
        assert str(UNTUNED.parent) not in text.read_text("utf-8")
    with pytest.raises(WSDValueError, match="is a model and an adapter: merge them"):
        trained("again", pilot=f"{UNTUNED}+{tuned.adapter}")


def test_the_table_has_pilot_and_both_together_before_and_after(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "What does the Keloft eat?", "kind": "fact", "answer": "acorns"}])
    tuned = trained(base=FOLDER / "base", prompts=prompts, judge="tiny_world", max_new_tokens=64)
    assert [row.strategy for row in tuned.table] == ["base", "pilot before", "pilot after", "wsd before", "wsd after"]
    card = (tuned.folder / "README.md").read_text("utf-8")
    assert (tmp_path / "run" / "table.md").read_text("utf-8") in card
    assert f"{tuned.log_prob_before:.2f} before, {tuned.log_prob_after:.2f} after" in card
    assert json.loads((tmp_path / "run" / "result.json").read_text("utf-8"))["warnings"] == tuned.warnings


def test_the_base_reads_answers_whose_drafted_part_is_not_known(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    data = write(tmp_path / "unknown.jsonl", PAIRS[:4])
    by_base = trained("by_base", data=data, base=FOLDER / "base")
    found = json.loads((tmp_path / "by_base" / "handovers.json").read_text("utf-8"))
    characters = [handover["characters"] for handover in found]
    assert all(0 < count < len(pair["chosen"][0]["content"]) for count, pair in zip(characters, PAIRS, strict=False))
    pairs = [{**pair, "drafted": count} for count, pair in zip(characters, PAIRS, strict=False)]
    assert same(by_base.folder, trained("known", data=write(tmp_path / "known.jsonl", pairs)).folder)


def test_signs_that_a_pilot_got_worse_are_warnings(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    assert trained("good").warnings == []
    bad = trained("bad", dataclasses.replace(QUICK, learning_rate=1.0))
    assert bad.log_prob_after < bad.log_prob_before
    assert "became less likely" in bad.warnings[0]
    assert "became less likely" in (bad.folder / "README.md").read_text("utf-8")


# Runs that are stopped


def killed_at(step: int, run: Callable[..., Any]) -> None:
    """Runs in a process that kills itself after a step's loss."""

    def report(done: int, _steps: int, _loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            run(report=report)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(status_of(child)) == -signal.SIGKILL


LORA = dataclasses.replace(QUICK, objective="dpo+sft", lora_rank=4)


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        pytest.param(QUICK, (1, 4), id="full, before and after a checkpoint"),
        pytest.param(QUICK, range(1, 7), id="full", marks=pytest.mark.sweep),
        pytest.param(LORA, range(1, 7), id="lora", marks=pytest.mark.sweep),
    ],
)
def test_a_run_that_was_killed_comes_to_the_same_weights(
    recipe: Recipe, steps: Iterable[int], trained: Callable[..., TunedPilot]
) -> None:
    recipe = dataclasses.replace(recipe, epochs=3)
    undisturbed = trained("undisturbed", recipe)
    for step in steps:
        killed_at(step, lambda report: trained("killed", recipe, report=report))  # on top of what was left
    resumed = trained("killed", recipe)
    assert same(resumed.folder, undisturbed.folder)
    assert resumed.losses == undisturbed.losses


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "weights cut": lambda checkpoint: os.truncate(checkpoint / "model.safetensors", 1000),
    "a byte of the optimizer": lambda checkpoint: flip(checkpoint / "optimizer.pt"),
    "not finished": lambda checkpoint: (checkpoint / "sha256.json").unlink(),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Stopped(Exception):
    """Ends a run."""


def stopped_at(step: int, run: Callable[..., Any]) -> None:
    def report(done: int, _steps: int, _loss: float) -> None:
        if done == step:
            raise Stopped

    with pytest.raises(Stopped):
        run(report=report)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TunedPilot:
    """Three epochs without a stop."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tuned = train_pilot(UNTUNED, write(folder / "data.jsonl", DRAFTED), folder / "run", recipe=THREE_EPOCHS)
    assert tuned is not None
    return tuned


@pytest.mark.parametrize("damage", [swept_unless(damage in ("weights cut", "not finished"), damage) for damage in DAMAGES])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, trained: Callable[..., TunedPilot], undisturbed: TunedPilot, tmp_path: Path
) -> None:
    stopped_at(5, lambda report: trained("run", THREE_EPOCHS, report=report))
    checkpoints = tmp_path / "run" / "checkpoints"
    DAMAGES[damage](checkpoints / "checkpoint-4")
    steps: list[int] = []
    resumed = trained("run", THREE_EPOCHS, report=lambda step, _steps, _loss: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert same(resumed.folder, undisturbed.folder)


def test_damaged_checkpoints_alone_mean_a_new_start(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    stopped_at(3, lambda report: trained(report=report))
    (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "rng_state.pth").unlink()
    steps: list[int] = []
    trained(report=lambda step, _steps, _loss: steps.append(step))
    assert steps == [1, 2, 3, 4]


def test_folders_of_others_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-x", "checkpoint-", "notes"):
        (tmp_path / name).mkdir()
    assert last_whole(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 3


def test_other_settings_are_refused_in_the_same_folder(trained: Callable[..., TunedPilot], data: Path, tmp_path: Path) -> None:
    stopped_at(3, lambda report: trained(report=report))
    other = write(tmp_path / "other.jsonl", PAIRS[:8])
    for options in (
        {"recipe": dataclasses.replace(QUICK, seed=1)},
        {"data": other, "recipe": dataclasses.replace(QUICK, part=3)},
    ):
        with pytest.raises(WSDValueError, match=r"results of other settings: .*(seed was 0 and is 1|data was)"):
            trained(**options)
    moved = tmp_path / "moved.jsonl"
    data.rename(moved)
    trained(data=moved)
    with pytest.raises(WSDValueError, match="seed was 0 and is 1"):
        trained(data=moved, recipe=dataclasses.replace(QUICK, seed=1))


def test_a_finished_run_is_not_trained_again(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    first = trained()
    (tmp_path / "run" / "checkpoints" / "checkpoint-4").mkdir(parents=True)  # killed before they were removed
    assert trained(report=lambda *_: pytest.fail("it trains")) == first
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_places_of_the_handover_belong_to_the_settings(trained: Callable[..., TunedPilot], tmp_path: Path) -> None:
    data = write(tmp_path / "unknown.jsonl", PAIRS[:4])
    options = {"data": data, "base": FOLDER / "base"}
    stopped_at(1, lambda report: trained(report=report, **options))
    with pytest.raises(WSDValueError, match=r"threshold was 0.8 and is 0.5"):
        trained(wsd_config=WSDConfig(threshold=0.5), **options)


# Errors


CHAT = [{"role": "user", "content": "Hi"}]
FULL = {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "Hello"}], "drafted": 3}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"recipe": Recipe(objective="dpo+sft")}, "line 1: has no rejected answer"),
        ({"recipe": Recipe(max_length=3)}, "line 1: its prompt has .* tokens, .*max_length=3"),
        ({"wsd_config": WSDConfig(switch_criteria=EosTokenCriteria(3))}, "must be the name of a rule"),
        ({"pairs": [{**FULL, "drafted": None}]}, "part='drafted' without base"),
        ({"judge": "tiny_world"}, "judge='tiny_world' without prompts"),
        ({"prompts": "prompts.jsonl"}, "prompts without base"),
        ({"judge": "nobody", "base": FOLDER / "base", "prompts": "prompts.jsonl"}, "nobody: unknown"),
    ],
)
def test_errors_come_before_weights_are_read(
    options: dict[str, Any], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wsd_hf.training.run.read_model", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr("wsd_hf.training.trainer.read_model", lambda *_, **__: pytest.fail("weights are read"))
    write(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    data = write(tmp_path / "data.jsonl", options.pop("pairs", [FULL]))
    with pytest.raises(WSDValueError, match=rule):
        train_pilot(UNTUNED, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", "only appends"),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}Hi", "one turn"),
    ],
)
def test_templates_that_cannot_be_trained_on(template: str | None, rule: str) -> None:
    _, tokenizer = load_pilot(UNTUNED)
    tokenizer.chat_template = template
    with pytest.raises(WSDValueError, match=rule):
        encode_examples([Example(messages=CHAT, chosen="Hello", place="d, line 1")], tokenizer, set(), Recipe())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("part", 0),
        ("part", "some"),
        ("objective", "dpo"),
        ("epochs", 0),
        ("lora_rank", -1),
        ("learning_rate", 0),
        ("beta", "x"),
    ],
)
def test_recipes_are_checked(setting: str, value: Any) -> None:
    with pytest.raises(WSDValueError, match=setting):
        Recipe(**{setting: value})


def test_batches_are_split_evenly() -> None:
    recipe = Recipe(batch_size=12, device_batch_size=4)
    assert [recipe.forwards_per_step(processes) for processes in (1, 2, 3, 4, 12)] == [3, 2, 1, 1, 1]
    with pytest.raises(WSDValueError, match="batch_size=12"):
        recipe.forwards_per_step(5)


# The command


def test_the_command(data: Path, tmp_path: Path) -> None:
    arguments = ["train-pilot", "--pilot", UNTUNED, "--data", data, "--out", tmp_path / "run", "--lora-rank", 0, "--epochs", 1]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    assert "Mean log-probability of a trained token" in result.stdout
    assert "training: 1 of 1, loss" in result.stderr
    load_pilot(tmp_path / "run" / "pilot")
    result = CliRunner().invoke(app, list(map(str, [*arguments, "--seed", 1])))
    assert (result.exit_code, "seed was 0 and is 1" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("--part", "half", "part='half'"),
        ("--device", "cuda:1", "must be cpu or cuda"),
        ("--data", "nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_wrong_options(option: str, value: str, error: str, data: Path, tmp_path: Path) -> None:
    options = {"--pilot": UNTUNED, "--data": data, "--out": tmp_path / "run", option: value}
    words = [word for pair in options.items() for word in map(str, pair)]
    result = CliRunner().invoke(app, ["train-pilot", *words])
    assert result.exit_code == 2
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_the_extra_it_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "wsd_hf.training.trainer", raising=False)
    with pytest.raises(WSDValueError, match=r'pip install "wsd_hf\[train\]"'):
        train_pilot(UNTUNED, data, tmp_path / "run")
