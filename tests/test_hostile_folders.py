"""Model folders that somebody prepared: each ends in one line, before anything outside of them is read, and no code runs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from wsd_hf import WSDHubError, load_pilot, pack
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

BASE, PILOT = FOLDER / "base", FOLDER / "pilot"
CONFIG = json.loads((PILOT / "config.json").read_text("utf-8"))
INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000


def write(name: str, content: Any) -> Callable[[Path], None]:
    """Puts a file into a folder; what is neither text nor bytes is written as JSON."""

    def change(folder: Path) -> None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file."""
    return lambda folder: write(name, json.loads((folder / name).read_text("utf-8")) | changes)(folder)


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", **changes)


def index(content: Any) -> Callable[[Path], None]:
    """Replaces the weights by an index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        write(INDEX, content)(folder)

    return change


def shard(name: Any) -> Callable[[Path], None]:
    return index({"metadata": {}, "weight_map": {"model.norm.weight": name}})


def link(name: str, target: str = "../outside/secret") -> Callable[[Path], None]:
    """Replaces a file by a symbolic link."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def directory(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def header(text: str, length: int | None = None) -> Callable[[Path], None]:
    return write("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text.encode() + b"\0" * 64)


def tensor(**changes: Any) -> Callable[[Path], None]:
    entry = {"dtype": "F16", "shape": [96], "data_offsets": [0, 192], **changes}
    return header(json.dumps({"model.norm.weight": entry}))


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


HOSTILE: dict[str, Callable[[Path], None]] = {
    # weight indexes
    "index not JSON": index("weights"),
    "index empty": index(""),
    "index list": index(["shard.safetensors"]),
    "index null": index("null"),
    "index without weight_map": index({"metadata": {}}),
    "index without metadata": index({"weight_map": {"model.norm.weight": "shard.safetensors"}}),
    "index with a metadata list": index({"metadata": [], "weight_map": {"model.norm.weight": "shard.safetensors"}}),
    "index with a list": index({"metadata": {}, "weight_map": ["shard.safetensors"]}),
    "index with an empty map": index({"metadata": {}, "weight_map": {}}),
    "index nested deep": index(DEEP),
    "index not UTF-8": index(b'{"metadata": {}, "weight_map": {"\xff": "shard.safetensors"}}'),
    "index with a BOM": index(b'\xef\xbb\xbf{"metadata": {}, "weight_map": {}}'),
    "index a folder": lambda folder: [(folder / "model.safetensors").unlink(), directory(INDEX)(folder)],
    "shard a number": shard(1),
    "shard null": shard(None),
    "shard a list": shard(["shard.safetensors"]),
    "shard empty": shard(""),
    "shard above": shard("../outside/model.safetensors"),
    "shard absolute": shard("/outside/model.safetensors"),
    "shard home": shard("~/model.safetensors"),
    "shard below": shard("sub/model.safetensors"),
    "shard by backslash": shard("..\\outside\\model.safetensors"),
    "shard on a drive": shard("C:model.safetensors"),
    "shard a pickle": shard("pytorch_model.bin"),
    "shard a pickle in part": shard("model.safetensors.bin"),
    "shard the folder": shard("."),
    "shard with NUL": shard("shard\0.safetensors"),
    "shard with newline": shard("shard.safetensors\n"),
    "shard with half a character": shard("\ud800.safetensors"),
    "shard of a long name": shard("x" * 5000 + ".safetensors"),
    "shard missing": shard("none.safetensors"),
    "shard a folder": lambda folder: [shard("deep.safetensors")(folder), (folder / "deep.safetensors").mkdir()],
    # code of the Hub
    "attention from the Hub": config(attn_implementation="somebody/attention"),
    "attention from the Hub, paged": config(_attn_implementation="paged|somebody/attention@main"),
    "attention from the Hub, by part": config(attn_implementation={"": "sdpa", "text_config": "somebody/attention"}),
    "experts from the Hub": config(text_config={"experts_implementation": "somebody/experts"}),
    # links
    "link: config": link("config.json"),
    "link: tokenizer": link("tokenizer.json"),
    "link: template": link("chat_template.jinja"),
    "link: weights": link("model.safetensors", "../outside/model.safetensors"),
    "link: licence": link("LICENSE"),
    "link: SentencePiece": link("tokenizer.model"),
    "link: absolute": link("notes.txt", "/etc/passwd"),
    "link: more templates": link("additional_chat_templates", "../outside"),
    "link: one of more templates": lambda folder: [
        directory("additional_chat_templates")(folder),
        link("additional_chat_templates/tools.jinja", "../../outside/secret")(folder),
    ],
    "link: index": lambda folder: [(folder / "model.safetensors").unlink(), link(INDEX)(folder)],
    "link: shard": lambda folder: [
        shard("a.safetensors")(folder),
        link("a.safetensors", "../outside/model.safetensors")(folder),
    ],
    "link: beside an index": lambda folder: [
        index({"metadata": {}, "weight_map": {"model.norm.weight": "shard.safetensors"}})(folder),
        link("model.safetensors", "../outside/model.safetensors")(folder),
    ],
    "link: circle": link("special_tokens_map.json", "special_tokens_map.json"),
    "link: config in a circle": link("config.json", "config.json"),
    # configs
    "config list": write("config.json", []),
    "config null": write("config.json", "null"),
    "config empty": write("config.json", ""),
    "config nested deep": write("config.json", DEEP),
    "config nested deep within": write("config.json", json.dumps(CONFIG)[:-1] + f', "more": {DEEP}}}'),
    "config not UTF-8": write("config.json", b'{"model_type": "\xff"}'),
    "config a folder": directory("config.json"),
    "config a pipe": pipe("config.json"),
    "model type null": config(model_type=None),
    "model type list": config(model_type=[]),
    "model type unknown": config(model_type="none"),
    "hidden size negative": config(hidden_size=-1),
    "hidden size zero": config(hidden_size=0),
    "hidden size huge": config(hidden_size=10**12),
    "hidden size text": config(hidden_size="x"),
    "hidden size null": config(hidden_size=None),
    "vocabulary null": config(vocab_size=None),
    "vocabulary negative": config(vocab_size=-5),
    "vocabulary zero": config(vocab_size=0),
    "vocabulary huge": config(vocab_size=10**9),
    "vocabulary beyond 64 bits": config(vocab_size=10**30),
    "vocabulary with a fraction": config(vocab_size=1.5),
    "layers negative": config(num_hidden_layers=-1),
    "layers huge": config(num_hidden_layers=10**9),
    "heads zero": config(num_attention_heads=0),
    "head size zero": config(head_dim=0),
    "inner size huge": config(intermediate_size=10**11),
    "inner size negative": config(intermediate_size=-1),
    "EOS huge": config(eos_token_id=10**30),
    "EOS text": config(eos_token_id="x"),
    "padding outside": config(pad_token_id=10**6),
    "dtype unknown": config(dtype="nonsense"),
    "activation unknown": config(hidden_act="x"),
    "positions a number": config(rope_parameters=3),
    "positions unknown": config(rope_parameters={"rope_type": "x"}),
    "quantization a number": config(quantization_config=3),
    "own code a number": config(auto_map=3),
    "weights elsewhere": config(transformers_weights="../outside/model.safetensors"),
    "weights a pickle": config(transformers_weights="adapter_model.bin"),
    "weights below": config(transformers_weights="sub/model.safetensors"),
    "an adapter": write("adapter_config.json", {"base_model_name_or_path": "evil/model", "peft_type": "LORA"}),
    "generation config list": write("generation_config.json", []),
    "generation config no JSON": write("generation_config.json", "{"),
    "generation config beyond 64 bits": edit("generation_config.json", eos_token_id=10**30),
    "generation config nested deep": write("generation_config.json", DEEP),
    # tokenizers
    "tokenizer cut off": write("tokenizer.json", (PILOT / "tokenizer.json").read_bytes()[:1000]),
    "tokenizer a list": write("tokenizer.json", []),
    "tokenizer empty": write("tokenizer.json", {}),
    "tokenizer nested deep": write("tokenizer.json", DEEP),
    "tokenizer of another model": edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": [["b", "c"]]}),
    "tokenizer with huge ids": edit("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 10**30}, "unk_token": "a"}),
    "tokenizer with an endless pattern": edit(
        "tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "tokenizer config list": write("tokenizer_config.json", []),
    "tokenizer config no JSON": write("tokenizer_config.json", "{"),
    "tokenizer config nested deep": write("tokenizer_config.json", DEEP),
    "tokenizer config names a file above": edit(
        "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.1.0.json"]
    ),
    "tokenizer config names a number": edit("tokenizer_config.json", fast_tokenizer_files=[1]),
    "tokenizer config names a file by number": edit("tokenizer_config.json", fast_tokenizer_files=1),
    "tokenizer config with a path": edit("tokenizer_config.json", tokenizer_class="BertTokenizer", vocab="../outside/secret"),
    "tokenizer config with paths": edit("tokenizer_config.json", tokenizer_class="BertTokenizer", init_inputs=["/etc/passwd"]),
    "special tokens with a path": write("special_tokens_map.json", {"vocab_file": "/etc/passwd"}),
    "special tokens a list": write("special_tokens_map.json", []),
    "tokenizer config without a class": edit("tokenizer_config.json", tokenizer_class=3),
    "template not UTF-8": write("chat_template.jinja", b"\xff"),
    "template a folder": directory("chat_template.jinja"),
    # weights
    "weights empty": write("model.safetensors", b""),
    "weights a pickle inside": write("model.safetensors", b"\x80\x04K\x01."),
    "weights with a huge header": header("{}", 2**62),
    "weights with a header of no JSON": header("{" * 64),
    "weights with a deep header": header(DEEP),
    "weights outside of the file": tensor(data_offsets=[0, 10**12]),
    "weights that overlap": tensor(data_offsets=[8, 4]),
    "weights of a huge shape": tensor(shape=[2**40, 2**40]),
    "weights of an unknown type": tensor(dtype="X1"),
    "weights of another shape": tensor(shape=[48], data_offsets=[0, 96]),
    "weights none": header("{}"),
    "weights a folder": directory("model.safetensors"),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
}

LOADED_ONLY = {"weights of another shape"}
"""What shows only when weights meet their model, which `pack` doesn't do."""

COMMANDS = [
    pytest.param(case, marks=() if number % 8 == 0 else pytest.mark.sweep)
    for number, case in enumerate(HOSTILE)
    if case != "template a folder"  # a base needs none
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pilot in a folder of its own, with things beside it that are none of its business."""
    shutil.copytree(PILOT, tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("SECRET")
    shutil.copy(PILOT / "model.safetensors", tmp_path / "outside" / "model.safetensors")
    shutil.copy(PILOT / "tokenizer.json", tmp_path / "outside" / "tokenizer.1.0.json")
    return tmp_path / "model"


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pilot_is_refused_in_one_line(folder: Path, case: str, tried: Callable[..., None]) -> None:
    tried("hostile model folders")
    HOSTILE[case](folder)
    with pytest.raises(WSDHubError) as error:
        load_pilot(folder)
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.sweep)])
def test_a_damaged_folder_is_refused_or_loads(folder: Path, count: int, tried: Callable[..., None]) -> None:
    tried("damaged files of a model folder", count)
    random = Random(count)
    for name in random.choices(sorted(os.listdir(folder)), k=count):
        content = (folder / name).read_bytes()
        damaged = bytearray(content)
        for _ in range(random.choice([1, 3, 20])):
            damaged[random.randrange(min(len(damaged), 40_000))] = random.randrange(256)
        (folder / name).write_bytes(damaged)
        with suppress(WSDHubError):
            load_pilot(folder)
        (folder / name).write_bytes(content)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_refused(result: Any, out: Path) -> None:
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("wsd-hf: ")]
    assert line == result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert "SECRET" not in result.output
    assert not out.exists()


@pytest.mark.parametrize("case", COMMANDS)
def test_a_hostile_pilot_on_the_command_line_is_one_line(folder: Path, case: str) -> None:
    HOSTILE[case](folder)
    check_refused(run("generate", "--base", BASE, "--pilot", folder, "Hi"), folder.parent / "out")
    if case not in LOADED_ONLY:
        check_refused(run("pack", "--base", BASE, "--pilot", folder, folder.parent / "out"), folder.parent / "out")


@pytest.mark.parametrize("case", COMMANDS)
def test_a_hostile_base_on_the_command_line_is_one_line(folder: Path, case: str) -> None:
    HOSTILE[case](folder)
    check_refused(run("generate", "--base", folder, "--pilot", PILOT, "Hi"), folder.parent / "out")
    if case not in LOADED_ONLY:
        check_refused(run("pack", "--copy", "--base", folder, "--pilot", PILOT, folder.parent / "out"), folder.parent / "out")


@pytest.mark.parametrize("case", [case for case in HOSTILE if case.startswith(("link: ", "shard ", "weights elsewhere"))])
def test_what_leads_elsewhere_is_refused_before_weights_are_read(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    HOSTILE[case](folder)
    for reader in ("transformers.AutoModelForCausalLM.from_pretrained", "wsd_hf.hub.contents.safe_open"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(WSDHubError):
        load_pilot(folder)
    with pytest.raises(WSDHubError):
        pack(folder, folder, folder.parent / "out", copy=True)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["../outside/model", "/outside/model", "sub/model", "..\\model", ""])
def test_shards_of_either_kind_lie_in_the_folder(folder: Path, ending: str, name: str) -> None:
    (folder / "model.safetensors").unlink()
    names = {"safetensors": INDEX, "bin": "pytorch_model.bin.index.json"}
    write(names[ending], {"metadata": {}, "weight_map": {"model.norm.weight": f"{name}.{ending}"}})(folder)
    with pytest.raises(WSDHubError, match=r"must be a file \*\.\w+ in the same folder|or not all its parts"):
        load_pilot(folder, use_safetensors=ending == "safetensors")


@pytest.mark.parametrize("keywords", [{"dtype": torch.float32}, {"attn_implementation": "eager"}, {"use_safetensors": False}])
def test_pickles_and_links_are_refused_with_any_keywords(folder: Path, keywords: dict[str, Any]) -> None:
    link("pytorch_model.bin", "../outside/secret")(folder)
    with pytest.raises(WSDHubError, match="leads out of"):
        load_pilot(folder, **keywords)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "files").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "files" / name)
        (folder / name).symlink_to(f"files/{name}")
    link("train.log", "/none")(folder)
    with pytest.raises(WSDHubError, match=r"train\.log is a link that leads out of"):
        load_pilot(folder)
    (folder / "train.log").unlink()
    link("runs", "/")(folder)  # nothing reads from a folder within a model folder
    load_pilot(folder)
    (folder.parent / "name").symlink_to(folder)
    load_pilot(folder.parent / "name")


def test_a_subfolder_may_link_to_its_place_and_not_beyond(folder: Path) -> None:
    shutil.copytree(folder, folder / "pilot")
    (folder / "pilot" / "model.safetensors").unlink()
    (folder / "pilot" / "model.safetensors").symlink_to("../model.safetensors")
    load_pilot(folder, subfolder="pilot")
    with pytest.raises(WSDHubError, match="leads out of"):
        load_pilot(folder / "pilot")
    for subfolder in ("../model", "pilot/../..", str(folder), "..", "..\\model", "C:\\"):
        with pytest.raises(WSDHubError, match="must be a relative path"):
            load_pilot(folder, subfolder=subfolder)
    link("elsewhere", "../outside")(folder)
    with pytest.raises(WSDHubError, match="leads out of"):
        load_pilot(folder, subfolder="elsewhere")


def test_a_packed_model_may_link_if_it_is_trusted(tmp_path: Path) -> None:
    bundle = pack(BASE, PILOT, tmp_path / "packed").folder
    for place, subfolder in ((bundle, "pilot"), (bundle / "pilot", "")):
        with pytest.raises(WSDHubError, match="trust_remote_code=True follows its links"):
            load_pilot(place, subfolder=subfolder)
        load_pilot(place, subfolder=subfolder, trust_remote_code=True)
    with pytest.raises(WSDHubError, match="leads out of"):
        pack(BASE, bundle / "pilot", tmp_path / "again")
    load_pilot(pack(BASE, PILOT, tmp_path / "copied", copy=True).folder, subfolder="pilot")


def test_a_folder_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    bundle = pack(BASE, PILOT, tmp_path / "packed").folder
    shutil.rmtree(bundle / "pilot")
    with pytest.raises(WSDHubError, match="has no folder pilot: get all of it again"):
        load_pilot(bundle, subfolder="pilot")
    (bundle / "pilot").mkdir()
    with pytest.raises(WSDHubError, match=r"packed/pilot has no config\.json"):
        load_pilot(bundle, subfolder="pilot")
    model = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
    shutil.rmtree(bundle / "pilot")
    with pytest.raises(WSDHubError, match="has no folder pilot"):
        model.generate(torch.tensor([[4, 5]]))


def test_names_that_are_no_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("", "a\0b", "x" * 5000, "~nobody/model", "model.safetensors", "/none"):
        with pytest.raises(WSDHubError):
            load_pilot(name, local_files_only=True)
    with pytest.raises(WSDHubError, match="the name of the base is empty"):
        pack("", PILOT, folder.parent / "out")
    load_pilot(".")
    load_pilot(Path(""))


def test_faults_of_a_call_are_its_own(folder: Path) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        load_pilot(folder, nonsense=1)
    with pytest.raises(ValueError, match="attn_implementation"):
        load_pilot(folder, attn_implementation="none")
    with pytest.raises((ValueError, AttributeError), match=r"none|dtype"):
        load_pilot(folder, dtype="none")
    with pytest.raises(ValueError, match=r"variant='fp16': .* model\.safetensors"):
        load_pilot(folder, variant="fp16")
    config(intermediate_size=8)(folder)
    with pytest.raises(WSDHubError, match="weights of other sizes than its config needs"):
        load_pilot(folder, dtype=torch.float32, attn_implementation="eager")
    assert load_pilot(folder, ignore_mismatched_sizes=True)[0].config.intermediate_size == 8


def test_an_index_beside_whole_weights_is_not_what_is_read(folder: Path) -> None:
    write(INDEX, {"metadata": {}, "weight_map": {"model.norm.weight": "none.safetensors"}})(folder)
    load_pilot(folder)
    save_file({"model.norm.weight": torch.ones(96)}, folder / "none.safetensors", metadata={"format": "pt"})
    assert not torch.equal(load_pilot(folder)[0].model.norm.weight, torch.ones(96))
