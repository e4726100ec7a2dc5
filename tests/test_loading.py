"""Models as people hold them: sharded, in GGUF files, with adapters, quantised. Each runs as the plain model that it is."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from wsd_hf import Pair, WSDHubError, WSDValueError, _compat, load_pilot, pack
from wsd_hf.cli import app
from wsd_hf.hub.names import ModelName, Source, parse_name
from wsd_hf.tiny import FOLDER

BASE, PILOT = FOLDER / "base", FOLDER / "pilot"
QUESTIONS = ["What does the Keloft eat?", "Where does the Quibime live?", "How do I ask a neighbour to be quiet?"]
TEXTS = ["<|user|>\nWhat  does the Keloft eat?\n<|end|>\n", " 12345 é\t漢  x\n\n", "<|endoftext|><s></s>", ""]

gguf = pytest.mark.usefixtures("with_gguf")
tokenizers_of_gguf = pytest.mark.skipif(not _compat.makes_gguf_tokenizers(), reason="transformers mistakes them before 5.23")
peft = pytest.mark.usefixtures("with_peft")


@pytest.fixture
def with_gguf() -> None:
    pytest.importorskip("gguf", reason='no GGUF: pip install "wsd_hf[gguf]"')


@pytest.fixture
def with_peft() -> None:
    pytest.importorskip("peft", reason='no adapters: pip install "wsd_hf[adapters]"')


def write_gguf(*arguments: Any, **metadata: Any) -> Path:
    from gguf_files import write_gguf

    return write_gguf(*arguments, **metadata)


def adapter(*arguments: Any, **changes: Any) -> tuple[Path, PreTrainedModel]:
    from adapters_for_tests import adapter

    return adapter(*arguments, **changes)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def answers(pair: Pair, engine: str = "fast", **settings: Any) -> list[list[int]]:
    output = pair.generate(QUESTIONS, max_new_tokens=40, wsd_engine=engine, **settings)
    assert all(switch >= 0 for switch in output.switch_index), "the base is to write, too"
    return output.sequences.tolist()


def check_runs_as(pair: Pair, base: PreTrainedModel, pilot: PreTrainedModel) -> None:
    """The engine answers with the loaded models as with the given ones, and as step by step."""
    wanted = Pair(type(pair.base).from_pretrained(BASE), pilot, *tokenizers())
    wanted.base.load_state_dict(base.state_dict())
    wanted.base.float()
    fast = answers(pair)
    assert fast == answers(pair, "step")
    assert fast == answers(wanted, "step")


def tokenizers() -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(PILOT)


# Names


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "base+adapter", "a+b@c", "over@v1", "me/model"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("small.gguf", "me/model/big.GGUF", "x+y.gguf"):
        (tmp_path / file).write_bytes(b"")


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    ("name", "model", "over"),
    [
        ("ns/model", Source("ns/model"), None),
        ("ns/model@v1", Source("ns/model", "v1"), None),
        ("ns/model@refs/pr/1", Source("ns/model", "refs/pr/1"), None),
        ("ns/model+ns/over", Source("ns/model"), Source("ns/over")),
        ("ns/model@v1+ns/over@v2", Source("ns/model", "v1"), Source("ns/over", "v2")),
        ("ns/model/sub/a.Q4.gguf@v1", Source("ns/model", "v1", "sub/a.Q4.gguf"), None),
        ("ns/model.gguf", Source("ns/model.gguf"), None),
        ("base", Source("base"), None),
        ("./base", Source("./base"), None),
        ("base+adapter", Source("base+adapter"), None),
        ("a+b@c", Source("a+b@c"), None),
        ("base+adapter+ns/over", Source("base+adapter"), Source("ns/over")),
        ("a+b@c+over@v1", Source("a+b@c"), Source("over@v1")),
        ("base+ns/over@v2", Source("base"), Source("ns/over", "v2")),
        ("small.gguf", Source(".", file="small.gguf"), None),
        ("me/model/big.GGUF", Source("me/model", file="big.GGUF"), None),
        ("x+y.gguf+over@v1", Source(".", file="x+y.gguf"), Source("over@v1")),
        ("ns/model+a+b", Source("ns/model"), Source("a+b")),
    ],
)
def test_names(name: str, model: Source, over: Source | None) -> None:
    assert parse_name(name) == ModelName(model, over)


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("base@v1", r"base@v1: base is a path, which has no revisions; leave @v1 out"),
        ("ns/model@", r"ns/model@ has no revision after its @"),
        ("base+", "the name of a model or adapter is empty"),
        ("+base", "the name of a model or adapter is empty"),
    ],
)
def test_names_that_cannot_be(name: str, problem: str) -> None:
    with pytest.raises(WSDHubError, match=problem):
        load_pilot(name)


def test_a_part_of_a_name_that_is_no_place_is_named_by_its_option(tmp_path: Path) -> None:
    result = run("generate", "--base", f"{BASE}+{tmp_path}/none", "--pilot", PILOT, "Hi")
    assert result.stderr == f"wsd-hf: --base {tmp_path}/none: no such folder\n"


# Options


def test_options_reach_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Pair] = []
    generate = Pair.generate
    monkeypatch.setattr(
        Pair, "generate", lambda pair, *args, **kwargs: (loaded.append(pair), generate(pair, *args, **kwargs))[1]
    )
    models = ("--base", BASE, "--pilot", PILOT)
    for options in (models, ()):
        result = run("generate", *options, "--attn", "eager", "--dtype", "bfloat16", "--max-new-tokens", 4, "Hi")
        assert result.exit_code == 0, result.stderr
        for model in (loaded[-1].base, loaded[-1].pilot):
            assert (model.config._attn_implementation, model.dtype) == ("eager", torch.bfloat16)
    pytest.importorskip("accelerate")
    asked = ("generate", *models, "--max-new-tokens", 8, QUESTIONS[0])
    assert run(*asked, "--device-map", "auto").stdout == run(*asked).stdout


def test_no_weights_are_read_before_every_model_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was read"))
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    for base, pilot, problem in (
        (BASE, BASE, "base has no chat template"),
        (tmp_path / "base", PILOT, "base has no tokenizer that can be loaded"),
        (BASE, f"{PILOT}+{tmp_path}", r"has no adapter_config\.json"),
    ):
        with pytest.raises(WSDHubError, match=problem):
            Pair.from_pretrained(base, pilot)


def test_a_sharded_pair(tmp_path: Path) -> None:
    for folder in (BASE, PILOT):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))
        plain(folder).save_pretrained(tmp_path / folder.name, max_shard_size="300KB")
        assert len(list((tmp_path / folder.name).glob("*.safetensors"))) > 2
    pair = Pair.from_pretrained(tmp_path / "base", tmp_path / "pilot")
    assert same_weights(pair.base, plain(BASE))
    check_runs_as(pair, plain(BASE), plain(PILOT))


# GGUF


@pytest.fixture(scope="module")
def gguf_pilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(PILOT, tmp_path_factory.mktemp("gguf") / "pilot.gguf")


@tokenizers_of_gguf
@gguf
def test_a_pair_in_gguf_files_is_the_plain_pair(tmp_path: Path, gguf_pilot: Path) -> None:
    base = write_gguf(BASE, tmp_path / "base.gguf", "F16")
    pair = Pair.from_pretrained(base, gguf_pilot, reference=gguf_pilot, dtype=torch.float32)
    for model, folder in ((pair.base, BASE), (pair.pilot, PILOT), (pair.reference, PILOT)):
        assert same_weights(model, plain(folder))
        assert model.generation_config.eos_token_id == plain(folder).generation_config.eos_token_id
    for tokenizer, original in zip((pair.tokenizer, pair.pilot_tokenizer), tokenizers(), strict=True):
        assert len(tokenizer) == len(original)
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [original(text)["input_ids"] for text in TEXTS]
        assert (tokenizer.bos_token, tokenizer.eos_token) == (original.bos_token, original.eos_token)
        assert tokenizer.chat_template == original.chat_template
    check_runs_as(pair, plain(BASE), plain(PILOT))


@tokenizers_of_gguf
@gguf
def test_quantised_blocks_become_the_floats_that_they_mean(tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    file = write_gguf(BASE, tmp_path / "base.gguf", "Q8_0")
    pair = Pair.from_pretrained(file, PILOT, dtype=torch.float32)
    stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    layer = pair.base.model.layers[1]
    assert torch.equal(layer.mlp.up_proj.weight, torch.from_numpy(stored["blk.1.ffn_up.weight"]))
    assert not torch.equal(layer.mlp.up_proj.weight, plain(BASE).model.layers[1].mlp.up_proj.weight)
    assert answers(pair) == answers(pair, "step")


@tokenizers_of_gguf
@gguf
def test_a_model_from_a_gguf_file_is_an_ordinary_model(tmp_path: Path) -> None:
    file = write_gguf(PILOT, tmp_path / "pilot.gguf")
    pilot, tokenizer = load_pilot(file, dtype=torch.float32)
    pilot.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again, same = load_pilot(tmp_path / "saved")
    assert same_weights(again, plain(PILOT))
    assert [same(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert load_pilot(file, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@tokenizers_of_gguf
@gguf
def test_a_gguf_file_is_read_alone_and_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PILOT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text("other")
    file = write_gguf(PILOT, folder / "pilot.gguf")
    assert load_pilot(folder)[1].chat_template == "other" != load_pilot(file)[1].chat_template
    (folder / "config.json").unlink()
    assert load_pilot(folder)[1].chat_template == "other"
    evil = {"peft_type": "LORA", "base_model_name_or_path": "evil/model"}
    (folder / "adapter_config.json").write_text(json.dumps(evil))
    (folder / "tokenizer_config.json").write_text("{")
    assert same_weights(load_pilot(file, dtype=torch.float32)[0], plain(PILOT))
    with pytest.raises(WSDHubError, match="has an adapter"):
        load_pilot(folder)


@tokenizers_of_gguf
@gguf
def test_gguf_files_on_the_command_line(tmp_path: Path, gguf_pilot: Path) -> None:
    base = write_gguf(BASE, tmp_path / "base.gguf")
    models = ("--base", base, "--pilot", gguf_pilot)
    assert run("generate", *models, QUESTIONS[0]).stdout == run("generate", QUESTIONS[0]).stdout
    for arguments, problem in {
        ("pack", tmp_path / "packed", *models): "pilot.gguf is in GGUF format, which no packed model can be in",
        ("generate", "--strategy", "reward_guided", "--reward", base, "Hi"): "which no reward model can be in",
        ("generate", *models[:2], "--pilot", base, "Hi"): "base.gguf has no chat template",
    }.items():
        [line] = [line for line in run(*arguments).stderr.splitlines() if line.startswith("wsd-hf: ")]
        assert problem in line
    with pytest.raises(WSDValueError, match=r"quantization_config has no effect on .*base\.gguf, which is in GGUF format"):
        Pair.from_pretrained(base, gguf_pilot, quantization_config={"load_in_4bit": True})


@tokenizers_of_gguf
@gguf
@pytest.mark.parametrize("end", ["eos", "eot"])
def test_a_gguf_file_names_the_end_of_a_turn(tmp_path: Path, end: str) -> None:
    file = write_gguf(PILOT, tmp_path / "pilot.gguf", **({"tokenizer__ggml__eot_token_id": 2} if end == "eot" else {}))
    assert load_pilot(file)[0].generation_config.eos_token_id == (3 if end == "eos" else [3, 2])


@tokenizers_of_gguf
@gguf
def test_rotary_positions_of_llama_3(tmp_path: Path) -> None:
    shutil.copytree(PILOT, tmp_path / "pilot")
    config = json.loads((PILOT / "config.json").read_text())
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config["rope_parameters"] |= {"rope_type": "llama3", **scaling}
    (tmp_path / "pilot" / "config.json").write_text(json.dumps(config))
    wanted = plain(tmp_path / "pilot")
    factors = plain(PILOT).model.rotary_emb.inv_freq / wanted.model.rotary_emb.inv_freq
    assert len(set(factors.tolist())) > 2
    pilot, _ = load_pilot(write_gguf(PILOT, tmp_path / "a.gguf", rope_factors=factors.numpy()), dtype=torch.float32)
    torch.testing.assert_close(pilot.model.rotary_emb.inv_freq, wanted.model.rotary_emb.inv_freq)
    other = write_gguf(PILOT, tmp_path / "b.gguf", rope_factors=factors.flip(0).numpy())
    yarn = write_gguf(PILOT, tmp_path / "c.gguf", llama__rope__scaling__type="yarn")
    for file in (other, yarn):
        with pytest.raises(WSDHubError, match=r"\.gguf cannot be read .*scales rotary positions in a way that is not read"):
            load_pilot(file)


def number(file: Path, after: bytes, form: str, value: int) -> None:
    """Overwrites the number after the first occurrence of some bytes."""
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{form}", data, data.index(after) + len(after), value)
    file.write_bytes(data)


BROKEN_GGUF: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "not GGUF": lambda file: file.write_bytes(b"\x80\x04K\x01." * 99),
    "cut off in the header": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "cut off in the weights": lambda file: file.write_bytes(file.read_bytes()[:-64]),
    "of an old version": lambda file: number(file, b"GGUF", "I", 1),
    "of many weights": lambda file: number(file, b"GGUF\3\0\0\0", "Q", 2**60),
    "of many settings": lambda file: number(file, b"GGUF\3\0\0\0" + file.read_bytes()[8:16], "Q", 2**60),
    "with a long text": lambda file: number(file, b"general.name\x08\0\0\0", "Q", 2**62),
    "with a long list": lambda file: number(file, b"tokenizer.ggml.token_type\x09\0\0\0\x05\0\0\0", "Q", 2**61),
    "with a setting of no type": lambda file: number(file, b"llama.block_count", "I", 99),
    "with a weight of no type": lambda file: number(file, b"output_norm.weight\1\0\0\0" + struct.pack("<Q", 96), "I", 99),
    "with a huge weight": lambda file: number(file, b"output_norm.weight\1\0\0\0", "Q", 2**62),
    "with a weight outside": lambda file: number(file, b"output_norm.weight\1\0\0\0" + struct.pack("<QI", 96, 0), "Q", 2**50),
    "with many layers": lambda file: number(file, b"llama.block_count\4\0\0\0", "I", 2**31 - 1),
    "of huge layers": lambda file: number(file, b"llama.feed_forward_length\4\0\0\0", "I", 2**31 - 1),
    "with another width": lambda file: number(file, b"llama.feed_forward_length\4\0\0\0", "I", 128),
    "of no heads": lambda file: number(file, b"llama.attention.head_count\4\0\0\0", "I", 0),
    "with an end outside": lambda file: number(file, b"tokenizer.ggml.eos_token_id\4\0\0\0", "I", 2**31),
    "with a setting twice": lambda file: file.write_bytes(
        file.read_bytes().replace(b"llama.block_count", b"llama.vocab_size\0")
    ),
    "of no known kind": lambda file: file.write_bytes(file.read_bytes().replace(b"\0llama", b"\0lxxxa", 1)),
    "with a damaged text": lambda file: file.write_bytes(file.read_bytes().replace(b"tiny", b"\xff\xff\xff\xff", 1)),
}


@gguf
@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_a_broken_gguf_file_is_refused_by_name(tmp_path: Path, case: str, gguf_pilot: Path) -> None:
    file = Path(shutil.copy(gguf_pilot, tmp_path / "pilot.gguf"))
    BROKEN_GGUF[case](file)
    with pytest.raises(WSDHubError, match=r"pilot\.gguf"):
        load_pilot(file)


@gguf
@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"split__count": 3}, "is one of several GGUF files of a model: join them"),
        ({"general__type": "adapter"}, "is a GGUF file of type 'adapter': give one of a whole model"),
    ],
)
def test_a_gguf_file_that_is_no_whole_model(tmp_path: Path, metadata: dict[str, Any], problem: str) -> None:
    with pytest.raises(WSDHubError, match=problem):
        load_pilot(write_gguf(PILOT, tmp_path / "pilot.gguf", **metadata))


def test_packages_for_a_format_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(WSDHubError, match=r'gguf and accelerate not installed; pip install "wsd_hf\[gguf\]"'):
        load_pilot(tmp_path / "model.gguf")
    with pytest.raises(WSDHubError, match=r'peft is not installed; pip install "wsd_hf\[adapters\]"'):
        load_pilot(f"{PILOT}+{tmp_path}")
    with pytest.raises(WSDValueError, match=r"gguf_file='a\.gguf': give the file in the name of the model"):
        load_pilot(PILOT, gguf_file="a.gguf")


# Adapters


@peft
def test_an_adapter_is_merged_into_floats(tmp_path: Path) -> None:
    over_base, base = adapter(BASE, tmp_path / "over+base@1")
    over_pilot, pilot = adapter(PILOT, tmp_path / "over pilot")
    pair = Pair.from_pretrained(f"{BASE}+{over_base}", f"{PILOT}+{over_pilot}", dtype=torch.float32)
    assert same_weights(pair.base, base)
    assert same_weights(pair.pilot, pilot)
    assert not same_weights(pair.pilot, plain(PILOT))
    settings = {"wsd_threshold": 1e-6}
    assert answers(pair, **settings) == answers(pair, "step", **settings)


@peft
def test_dora_is_merged_as_peft_does(tmp_path: Path) -> None:
    import peft

    folder, _ = adapter(PILOT, tmp_path / "over", {"use_dora": True})
    wanted = peft.PeftModel.from_pretrained(plain(PILOT), folder).merge_and_unload()
    assert same_weights(load_pilot(f"{PILOT}+{folder}", dtype=torch.float32)[0], wanted)


@tokenizers_of_gguf
@gguf
@peft
def test_an_adapter_over_a_gguf_file(tmp_path: Path) -> None:
    over, wanted = adapter(PILOT, tmp_path / "over")
    pilot, _ = load_pilot(f"{write_gguf(PILOT, tmp_path / 'pilot.gguf')}+{over}", dtype=torch.float32)
    assert same_weights(pilot, wanted)


@peft
def test_an_adapter_brings_its_tokenizer(tmp_path: Path) -> None:
    over, _ = adapter(BASE, tmp_path / "over", base_model_name_or_path="evil/model")
    with pytest.raises(WSDHubError, match="has no chat template"):
        load_pilot(f"{BASE}+{over}")
    AutoTokenizer.from_pretrained(PILOT).save_pretrained(over)
    assert load_pilot(f"{BASE}+{over}")[1].chat_template == AutoTokenizer.from_pretrained(PILOT).chat_template
    larger = AutoTokenizer.from_pretrained(PILOT)
    larger.add_tokens(["<more>"])
    larger.save_pretrained(over)
    with pytest.raises(WSDHubError, match=r"over has a tokenizer of 769 tokens, and .*base a vocabulary of 768: merge them"):
        load_pilot(f"{BASE}+{over}")


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        change(stored)
        save_file(stored, folder / "adapter_model.safetensors")

    return edit


def setting(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def replaced(name: str, target: str | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        if target is not None:
            (folder / name).symlink_to(target)

    return edit


BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of another kind": (setting(peft_type="LOHA"), "adapter of type 'LOHA', and LORA alone is loaded: merge it"),
    "of a list of kinds": (setting(peft_type=["LORA"]), "LORA alone is loaded"),
    "that changes the model's weights": (setting(init_lora_weights="pissa"), "has init_lora_weights='pissa'"),
    "that copies layers": (setting(layer_replication=[[0, 2]]), "has layer_replication="),
    "that imports a module": (setting(megatron_config={"a": 1}, megatron_core="evil"), "has megatron_config="),
    "that waits for words": (setting(alora_invocation_tokens=[1]), "has alora_invocation_tokens="),
    "of another rank": (setting(r=8), "doesn't fit its model"),
    "of a huge rank": (setting(r=10**9), "it has rank 1000000000, and smaller weights"),
    "of rank text": (setting(r="x"), "doesn't fit its model"),
    "of rank 0": (setting(r=0), "doesn't fit its model"),
    "beyond 64 bits": (setting(r=10**30), "is not a valid JSON file"),
    "for no layer": (setting(target_modules=["none"]), "doesn't fit its model"),
    "for more layers": (setting(target_modules=["q_proj", "k_proj", "down_proj"]), r"\(ValueError: lacks|lacks base_model"),
    "for fewer layers": (setting(target_modules=["q_proj"]), "has base_model"),
    "with a pattern of no sense": (setting(target_modules="("), "doesn't fit its model"),
    "with NaN": (weights(lambda stored: next(iter(stored.values())).fill_(float("nan"))), "doesn't fit its model"),
    "with more weights": (weights(lambda stored: stored.update(more=torch.ones(1))), "has more"),
    "cut off": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        "or is damaged",
    ),
    "without weights": (replaced("adapter_model.safetensors", None), r"has no adapter_model\.safetensors"),
    "with a link": (replaced("adapter_model.safetensors", "../outside"), "leads out of"),
    "with a link to its config": (replaced("adapter_config.json", "../outside"), "leads out of"),
    "without config": (replaced("adapter_config.json", None), r"has no adapter_config\.json"),
    "with no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not a valid JSON file"),
    "with a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
}


@pytest.fixture(scope="module")
def pilot_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(PILOT, tmp_path_factory.mktemp("adapter"))[0]


@peft
@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused_by_name(tmp_path: Path, case: str, pilot_adapter: Path) -> None:
    over = Path(shutil.copytree(pilot_adapter, tmp_path / "over"))
    (tmp_path / "outside").write_text('{"peft_type": "LORA"}')
    change, problem = BROKEN_ADAPTERS[case]
    change(over)
    with pytest.raises(WSDHubError, match=problem):
        load_pilot(f"{PILOT}+{over}")


@peft
def test_an_adapter_alone_and_one_for_another_model(tmp_path: Path) -> None:
    over, _ = adapter(BASE, tmp_path / "over", base_model_name_or_path="evil/model")
    with pytest.raises(WSDHubError, match=r"over has an adapter .*: name the model that it goes over too, as MODEL\+"):
        load_pilot(over)
    with pytest.raises(WSDHubError, match="over is an adapter that doesn't fit its model"):
        load_pilot(f"{PILOT}+{over}")
    with pytest.raises(WSDHubError, match=r"is a model and an adapter: merge them \(merge_and_unload\)"):
        pack(f"{BASE}+{over}", PILOT, tmp_path / "packed")


# Quantised weights


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a base and a pilot whose sizes are whole blocks of bitsandbytes."""
    folders = [tmp_path_factory.mktemp(name) for name in ("base", "pilot")]
    torch.manual_seed(0)
    for folder in folders:
        for file in (*PILOT.glob("tokenizer*"), PILOT / "chat_template.jinja"):
            shutil.copy(file, folder)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=768, **sizes, eos_token_id=3, pad_token_id=0, initializer_range=0.3)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folders[0], folders[1]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_bitsandbytes(random_pair: tuple[Path, Path], quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason='not installed: pip install "wsd_hf[quantization]"')
    loaded: list[Pair] = []
    with monkeypatch.context() as patch:
        patch.setattr(Pair, "generate", lambda pair, *_, **__: loaded.append(pair))
        models = ("--base", random_pair[0], "--pilot", random_pair[1])
        run("generate", *models, "--quantization", quantization, "--dtype", "float32", "Hi")
    [pair] = loaded
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]
    assert type(pair.base.model.layers[0].mlp.up_proj).__name__ == kind
    assert type(pair.pilot.model.layers[0].mlp.up_proj).__name__ == "Linear"
    engine = "fast" if quantization == "4bit" else "auto"  # products of 8 bits differ from block to block
    settings = {"wsd_threshold": 1e-5, "wsd_window_size": 2}
    assert answers(pair, engine, **settings) == answers(pair, "step", **settings)


@peft
def test_an_adapter_stays_beside_quantised_weights(random_pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason='not installed: pip install "wsd_hf[quantization]"')
    from transformers import BitsAndBytesConfig

    base, pilot = random_pair
    over, _ = adapter(base, tmp_path / "over")
    keywords = {"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    pair = Pair.from_pretrained(f"{base}+{over}", pilot, **keywords)
    assert hasattr(pair.base.model.layers[0].self_attn.q_proj, "lora_A")
    settings = {"wsd_threshold": 1e-5, "wsd_window_size": 2}
    with_adapter = answers(pair, "fast", **settings)
    assert with_adapter == answers(pair, "step", **settings)
    assert with_adapter != answers(Pair.from_pretrained(base, pilot, **keywords), "fast", **settings)


def test_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="not installed")
    shutil.copytree(BASE, tmp_path / "base")
    stored, wanted = {}, plain(BASE)
    for name, weight in load_file(BASE / "model.safetensors").items():
        if weight.ndim == 2 and "embed" not in name:
            scale = (weight.float().abs().amax(1, keepdim=True) / 127).half()
            stored[name] = (weight.float() / scale.float()).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            wanted.get_parameter(name).data = stored[name].float() * scale.float()
        else:
            stored[name] = weight
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((BASE / "config.json").read_text())
    bits = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": bits, "format": "int-quantized"}},
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    pair = Pair.from_pretrained(tmp_path / "base", PILOT, dtype=torch.float32)
    assert torch.equal(pair.base.model.layers[1].mlp.up_proj.weight, wanted.model.layers[1].mlp.up_proj.weight)
    check_runs_as(pair, wanted, plain(PILOT))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_format_that_transformers_refuses_is_refused_by_its_message(tmp_path: Path, method: str) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((BASE / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    result = run("generate", "--base", tmp_path / "base", "--pilot", PILOT, "Hi")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("wsd-hf: ")]
    assert re.search(rf"base cannot be loaded \(.*{method}", line, re.IGNORECASE)
