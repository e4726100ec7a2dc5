"""Pilots from a Hub and to it: the real client, a small server on this machine, and what can go wrong between them."""

import json
import re
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import wsd_hf
from hub_server import Fault, Hub, serve_hub
from wsd_hf import Pair, WSDHubError, WSDValueError, _compat, load_pilot, pilot_card, push_pilot
from wsd_hf.tiny import FOLDER

BASE, PILOT = FOLDER / "base", FOLDER / "pilot"
CONFIG = json.loads((PILOT / "config.json").read_text("utf-8"))
WHAT = "What does the Keloft eat?"


def connect(monkeypatch, endpoint):
    """What HF_ENDPOINT sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def disconnect(monkeypatch):
    """From here on nobody listens at the endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        connect(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with `me/pilot` on it, an empty cache, nobody logged in, and a client that does not wait before it tries again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with serve_hub() as hub:
        connect(monkeypatch, hub.endpoint)
        hub.add("me/pilot", PILOT)
        yield hub
        huggingface_hub.close_session()


def same_weights(one, other):
    return one.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in one.state_dict()
    )


def add_sharded(hub: Hub, name, folder, **extra):
    """The pilot in several files of weights."""
    AutoModelForCausalLM.from_pretrained(PILOT).save_pretrained(folder, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(PILOT).save_pretrained(folder)
    return hub.add(name, folder, **extra)


# Packed models


def test_models_from_the_hub_are_packed_as_links_to_the_cache(hub, tmp_path):
    add_sharded(hub, "me/sharded", tmp_path / "sharded")
    hub.add("me/base", BASE)
    packed = wsd_hf.pack("me/base", "me/sharded", tmp_path / "model")
    assert len(packed.weights) > 2
    assert all(source.parent.name == "blobs" for source in packed.weights.values())
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model == ["me/base", "me/sharded"]
    pilot, _ = load_pilot(tmp_path / "model", subfolder="pilot", trust_remote_code=True)
    assert same_weights(pilot, AutoModelForCausalLM.from_pretrained(PILOT))


def test_a_packed_model_on_the_hub_brings_its_pilot(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = wsd_hf.pack(BASE, PILOT, tmp_path / "model").folder
    hub.add("me/packed", folder)
    model = AutoModelForCausalLM.from_pretrained("me/packed", trust_remote_code=True)
    local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("\n\n[User]\nWhat does the Keloft eat?\n\n[Assistant]\n", return_tensors="pt")
    expected = local.generate(**inputs, max_new_tokens=32)
    assert torch.equal(model.generate(**inputs, max_new_tokens=32), expected)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    call = {"custom_generate": "me/packed", "revision": hub.repos["me/packed"].head, "trust_remote_code": True}
    assert torch.equal(base.generate(**inputs, **call, max_new_tokens=32), expected)


# Loading


def test_a_pilot_from_the_hub_leads_a_base(hub):
    pilot, pilot_tokenizer = load_pilot("me/pilot")
    assert same_weights(pilot, AutoModelForCausalLM.from_pretrained(PILOT))
    assert pilot.dtype == torch.float16
    assert pilot.name_or_path == pilot.config.name_or_path == pilot_tokenizer.name_or_path == "me/pilot"
    base = wsd_hf.AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    inputs = wsd_hf.build_inputs([{"role": "user", "content": WHAT}], tokenizer, pilot_tokenizer)
    output = base.generate(**inputs, assistant_model=pilot.float(), strategy="wsd", max_new_tokens=64)
    assert "the Keloft eats acorns" in tokenizer.decode(output[0])


def test_a_folder_needs_no_hub(hub):
    pilot, _ = load_pilot(PILOT, dtype=torch.float32, attn_implementation="eager")
    assert pilot.dtype == torch.float32
    assert pilot.config._attn_implementation == "eager"
    assert load_pilot(str(FOLDER), subfolder="pilot")[0].config.hidden_size == pilot.config.hidden_size
    assert hub.requests == []


def test_revision_and_subfolder_choose_what_is_loaded(hub):
    old = hub.repos["me/pilot"].head
    files = {f"best/{path}": content for path, content in hub.repos["me/pilot"].commits[old].items()}
    hub.repos["me/pilot"].commit(files)
    assert load_pilot("me/pilot", old)[0].device.type == "cpu"
    assert load_pilot("me/pilot", subfolder="best")[0].device.type == "cpu"
    with pytest.raises(WSDHubError, match=r"me/pilot has no config\.json"):
        load_pilot("me/pilot")


def test_shards_are_fetched_and_what_is_not_needed_is_not(hub, tmp_path):
    add_sharded(hub, "me/sharded", tmp_path / "sharded", **{"consolidated.safetensors": b"?", "onnx/config.json": b"?"})
    pilot, _ = load_pilot("me/sharded")
    assert same_weights(pilot, AutoModelForCausalLM.from_pretrained(PILOT))
    assert len(hub.asked(".safetensors")) > 1
    assert hub.asked("consolidated.safetensors") == hub.asked("onnx/config.json") == []


def test_a_private_pilot_needs_the_token(hub):
    hub.repos["me/pilot"].private = True
    with pytest.raises(WSDHubError, match="if it is private, log in"):
        load_pilot("me/pilot")
    load_pilot("me/pilot", token=hub.token)


def test_what_is_cached_is_not_fetched_again(hub):
    load_pilot("me/pilot")
    hub.requests.clear()
    load_pilot("me/pilot")
    assert [path for verb, path, _range in hub.requests if "/resolve/" in path] == []


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no connection"])
def test_a_cached_pilot_loads_without_the_hub(hub, monkeypatch, how):
    load_pilot("me/pilot")
    hub.requests.clear()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no connection":
        disconnect(monkeypatch)
    pilot, tokenizer = load_pilot("me/pilot", local_files_only=how == "local_files_only")
    assert tokenizer.chat_template
    assert same_weights(pilot, AutoModelForCausalLM.from_pretrained(PILOT))
    assert hub.requests == []


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no connection"])
def test_without_hub_and_cache_the_error_says_so(hub, monkeypatch, how):
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no connection":
        disconnect(monkeypatch)
    with pytest.raises(WSDHubError, match=r"me/pilot is not in the cache.* was not reached: call again") as error:
        load_pilot("me/pilot", local_files_only=how == "local_files_only")
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
    assert hub.requests == []


def test_offline_a_snapshot_that_lacks_only_what_nobody_needs_loads(hub):
    hub.add("me/pilot", PILOT, **{"results.json": "{}"})
    load_pilot("me/pilot")
    next(Path(constants.HF_HUB_CACHE).rglob("results.json")).unlink()
    load_pilot("me/pilot", local_files_only=True)


@pytest.mark.parametrize("lost", ["tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"])
def test_offline_a_snapshot_that_lacks_what_is_needed_is_no_other_fault(hub, lost):
    load_pilot("me/pilot")
    next(Path(constants.HF_HUB_CACHE).rglob(lost)).unlink()
    with pytest.raises(WSDHubError, match="is not in the cache, or not all of it") as error:
        load_pilot("me/pilot", local_files_only=True)
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
    load_pilot("me/pilot")


def test_threads_may_load_at_the_same_time(hub):
    start = threading.Barrier(4)

    def load():
        start.wait()
        return load_pilot("me/pilot")[0]

    with ThreadPoolExecutor(4) as pool:
        pilots = [loading.result() for loading in [pool.submit(load) for _ in range(4)]]
    assert all(pilot.lm_head.weight is pilot.model.embed_tokens.weight for pilot in pilots)
    assert all(same_weights(pilot, pilots[0]) for pilot in pilots)


# What may be wrong with a repository


NO_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OWN_CODE = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}


@pytest.mark.parametrize(
    ("without", "extra", "problem"),
    [
        (("config.json",), {}, r"has no config\.json: give a whole transformers model"),
        (NO_TOKENIZER, {}, "has no tokenizer that can be loaded"),
        (("tokenizer.json",), {}, "has no tokenizer that can be loaded"),
        (("chat_template.jinja",), {}, "has no chat template"),
        (("model.safetensors",), {"pytorch_model.bin": b"?"}, r"has no model\.safetensors.*use_safetensors=False"),
        ((), {"config.json": '{"model_type": "t5"}'}, "is an encoder-decoder"),
        ((), {"config.json": json.dumps(CONFIG | {"model_type": "none"})}, "model type `none`"),
        ((), {"config.json": json.dumps(CONFIG | OWN_CODE | {"model_type": "own"})}, "trust_remote_code=True"),
        ((), {"config.json": "{"}, "not a valid JSON file"),
    ],
)
def test_what_is_no_pilot_is_told_before_its_weights_are_fetched(hub, tmp_path, monkeypatch, without, extra, problem):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
    hub.add("me/none", PILOT, without, **extra, **{"own.py": "raise SystemExit('its code was run')"})
    with pytest.raises(WSDHubError, match=problem):
        load_pilot("me/none")
    assert hub.asked("model.safetensors") == hub.asked("pytorch_model.bin") == []
    for path, content in hub.repos["me/none"].commits[hub.repos["me/none"].head].items():
        (tmp_path / path).write_bytes(content)
    with pytest.raises(WSDHubError, match=problem):
        load_pilot(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin", 1, "", "\0.safetensors"],
)
def test_an_index_on_the_hub_names_files_of_its_folder_only(hub, tmp_path, shard):
    index = {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}})}
    hub.add("me/none", PILOT, ("model.safetensors",), **index, **{"sub/model.safetensors": b"?", "pytorch_model.bin": b"?"})
    with pytest.raises(WSDHubError, match=r"names .*: must be a file \*\.safetensors in the same folder"):
        load_pilot("me/none")
    with pytest.raises(WSDHubError, match=r"names .*: must be a file"):
        wsd_hf.pack(BASE, "me/none", tmp_path / "model")
    assert not [path for _verb, path, _range in hub.requests if path.endswith((".safetensors", ".bin", "passwd"))]


def test_a_subfolder_on_the_hub_stays_in_its_commit(hub):
    load_pilot("me/pilot")
    old = hub.repos["me/pilot"].head
    hub.repos["me/pilot"].commit({"README.md": b""})
    with pytest.raises(WSDHubError, match="must be a relative path"):
        load_pilot("me/pilot", subfolder=f"../{old}")
    with pytest.raises(WSDHubError, match="me/pilot has no folder pilot"):
        load_pilot("me/pilot", subfolder="pilot")


def test_a_snapshot_is_a_folder_like_any_other(hub, tmp_path):
    load_pilot("me/pilot")
    [snapshot] = (tmp_path / "cache").glob("*/snapshots/*")
    load_pilot(snapshot)
    wsd_hf.pack(snapshot, snapshot, tmp_path / "model", copy=True)
    blob = snapshot / (snapshot / "tokenizer.json").readlink()
    store = tmp_path / "cache" / "blobs" / "00" / ("0" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    load_pilot(snapshot)
    blob.unlink()
    blob.symlink_to(PILOT / "tokenizer.json")
    with pytest.raises(WSDHubError, match="leads out of"):
        load_pilot(snapshot)


def add_gguf(hub: Hub, name, folder, *files, **kinds):
    """A repository of the pilot's GGUF files and nothing else."""
    gguf_files = pytest.importorskip("gguf_files", reason="no gguf", exc_type=ImportError)
    if not _compat.makes_gguf_tokenizers():
        pytest.skip("transformers mistakes tokenizers of GGUF files before 5.23")
    folder.mkdir()
    for file in files:
        gguf_files.write_gguf(PILOT, folder / file, kinds.get("kind", "F32"))
    return hub.add(name, folder)


def test_a_repository_with_one_gguf_file_is_a_model(hub, tmp_path):
    add_gguf(hub, "me/pilot-GGUF", tmp_path / "gguf", "pilot.gguf")
    plain = AutoModelForCausalLM.from_pretrained(PILOT, dtype=torch.float32)
    for name in ("me/pilot-GGUF", "me/pilot-GGUF/pilot.gguf", f"me/pilot-GGUF/pilot.gguf@{hub.repos['me/pilot-GGUF'].head}"):
        assert same_weights(load_pilot(name)[0], plain)
    assert same_weights(load_pilot("me/pilot-GGUF", local_files_only=True)[0], plain)
    with pytest.raises(WSDHubError, match=r"me/pilot-GGUF is in GGUF format, which no packed model can be in"):
        wsd_hf.pack(BASE, "me/pilot-GGUF", tmp_path / "model")
    with pytest.raises(WSDHubError, match=r"none\.gguf"):
        load_pilot("me/pilot-GGUF/none.gguf")


def test_one_of_several_gguf_files_is_named(hub, tmp_path):
    add_gguf(hub, "me/ggufs", tmp_path / "gguf", "a.gguf", "b.gguf")
    with pytest.raises(WSDHubError, match=r"me/ggufs has 2 GGUF files \(a\.gguf, b\.gguf\): give one, as me/ggufs/a\.gguf"):
        load_pilot("me/ggufs")
    assert not [path for _verb, path, _range in hub.requests if path.endswith(".gguf")]
    load_pilot("me/ggufs/b.gguf")
    assert not [path for _verb, path, _range in hub.requests if path.endswith("a.gguf")]


def test_a_revision_in_a_name(hub, tmp_path):
    old = hub.repos["me/pilot"].head
    files = {file.name: file.read_bytes() for file in PILOT.iterdir()}
    hub.repos["me/pilot"].commit(files | {"chat_template.jinja": b"other"})
    hub.add("me/base", BASE)
    assert load_pilot(f"me/pilot@{old}")[1].chat_template != "other" == load_pilot("me/pilot@main")[1].chat_template
    assert Pair.from_pretrained("me/base@main", f"me/pilot@{old}").pilot_tokenizer.chat_template != "other"
    with pytest.raises(WSDHubError, match="me/pilot has no revision 'none'"):
        load_pilot("me/pilot@none")
    with pytest.raises(WSDValueError, match=r"revision='main': me/pilot@main has one already"):
        load_pilot("me/pilot@main", "main")
    packed = wsd_hf.pack("me/base@main", f"me/pilot@{old}", tmp_path / "model").folder
    assert ModelCard.load(packed / "README.md").data.base_model == ["me/base", "me/pilot"]
    assert (packed / "pilot" / "chat_template.jinja").read_text("utf-8") != "other"


def test_an_adapter_on_the_hub_and_never_the_base_that_it_names(hub, tmp_path):
    adapters = pytest.importorskip("adapters_for_tests", reason="no peft", exc_type=ImportError)
    folder, merged = adapters.adapter(PILOT, tmp_path / "adapter", base_model_name_or_path="evil/model")
    hub.add("me/adapter", folder)
    pilot, _ = load_pilot("me/pilot@main+me/adapter@main", dtype=torch.float32)
    assert same_weights(pilot, merged)
    with pytest.raises(WSDHubError, match=r"me/adapter has an adapter .*: name the model .* MODEL\+me/adapter"):
        load_pilot("me/adapter")
    assert not [path for _verb, path, _range in hub.requests if "evil" in path]


def test_code_is_not_even_fetched_unless_it_is_trusted(hub):
    hub.add("me/code", PILOT, **{"config.json": json.dumps(CONFIG | OWN_CODE), "own.py": "raise SystemExit"})
    load_pilot("me/code")
    assert hub.asked(".py") == []


def test_code_of_a_pilot_runs_if_it_is_trusted(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM):\n    config_class, own = Config, True\n"
    )
    hub.add("me/code", PILOT, **{"config.json": json.dumps(CONFIG | OWN_CODE), "own.py": code})
    assert not hasattr(load_pilot("me/code")[0], "own")
    assert load_pilot("me/code", trust_remote_code=True)[0].own


def test_bin_weights_are_loaded_if_they_are_asked_for(hub):
    model = AutoModelForCausalLM.from_pretrained(PILOT)
    weights = Path(constants.HF_HUB_CACHE).parent / "pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    hub.add("me/bin", PILOT, ("model.safetensors",), **{"pytorch_model.bin": weights.read_bytes()})
    assert same_weights(load_pilot("me/bin", use_safetensors=False)[0], model)


def test_weights_that_are_missing_are_not_made_up(hub, tmp_path):
    add_sharded(hub, "me/sharded", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    lost = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / lost).unlink()
    with pytest.raises(WSDHubError, match=r"has no model\.safetensors, or not all its parts"):
        load_pilot(tmp_path)
    hub.add("me/shards", tmp_path)
    with pytest.raises(WSDHubError, match=r"has no model\.safetensors, or not all its parts"):
        load_pilot("me/shards")


def test_a_model_without_all_its_tensors_is_refused(tmp_path):
    for file in PILOT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WSDHubError, match=r"lacks weights that its config needs \(model\.norm\.weight"):
        load_pilot(tmp_path)


def test_errors_of_the_call_itself_pass_through():
    with pytest.raises(TypeError, match="nonsense"):
        load_pilot(PILOT, nonsense=1)


# What may be wrong between here and there


@pytest.mark.parametrize(
    ("name", "revision", "cause", "problem"),
    [
        ("me/none", None, RepositoryNotFoundError, "is neither a folder nor known at http.*check the name"),
        ("me/pilot", "v9", RevisionNotFoundError, "has no revision 'v9': give one of its branches"),
        ("me/gated", None, GatedRepoError, r"is gated: accept its conditions.*log in \(`hf auth login`\) or pass token="),
        ("/no/such/pilot", None, HFValidationError, "is neither a folder nor a name on the Hub"),
    ],
)
def test_what_cannot_be_found_is_told_with_its_remedy(hub, name, revision, cause, problem):
    hub.add("me/gated", PILOT).gated = True
    with pytest.raises(WSDHubError, match=re.escape(name) + " " + problem) as error:
        load_pilot(name, revision)
    assert type(error.value.__cause__) is cause
    assert "\n" not in str(error.value)


def test_a_gated_pilot_loads_with_the_token(hub):
    hub.repos["me/pilot"].gated = True
    load_pilot("me/pilot", token=hub.token)


def test_a_busy_hub_is_asked_again(hub):
    hub.faults = [Fault("model.safetensors", status=503, method="HEAD", times=2)]
    load_pilot("me/pilot")
    assert len(hub.asked("model.safetensors", "HEAD")) == 3


@pytest.mark.parametrize("suffix", ["me/pilot/revision/main", "tokenizer.json", "model.safetensors"])
def test_a_hub_that_stays_busy_is_blamed_and_not_the_pilot(hub, suffix):
    hub.faults = [Fault(suffix, status=503, method=verb, times=99) for verb in ("HEAD", "GET")]
    with pytest.raises(WSDHubError, match="was not reached: call again"):
        load_pilot("me/pilot")
    hub.faults = []
    load_pilot("me/pilot")


def test_a_connection_that_breaks_once_goes_on_where_it_broke(hub):
    hub.faults = [Fault("model.safetensors", cut_after=200_000)]
    pilot, _ = load_pilot("me/pilot")
    first, second = hub.asked("model.safetensors")
    assert first is None
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", second)[1]) <= 200_000
    assert same_weights(pilot, AutoModelForCausalLM.from_pretrained(PILOT))


def test_a_connection_that_keeps_breaking_is_resumed_by_the_next_call(hub, tmp_path):
    add_sharded(hub, "me/sharded", tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    hub.faults = [Fault(shards[-1], cut_after=0, times=99)]
    with pytest.raises(WSDHubError, match="me/sharded was interrupted: call again"):
        load_pilot("me/sharded")
    hub.faults = []
    hub.requests.clear()
    load_pilot("me/sharded")
    assert [path.split("/")[-1] for verb, path, _range in hub.requests if verb == "GET" and "/resolve/" in path] == shards[-1:]


def test_a_file_that_arrives_too_short_is_named_and_fetched_again(hub):
    hub.faults = [Fault("model.safetensors", replace=lambda content: content[:-1000])]
    with pytest.raises(WSDHubError, match=r"should be of size 592856 but has size 591856.*model\.safetensors"):
        load_pilot("me/pilot")
    load_pilot("me/pilot")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_file_that_arrives_changed_is_never_read(hub, monkeypatch, name):
    hub.faults = [Fault(f"/{name}", replace=lambda content: content[:-1] + bytes([content[-1] ^ 1]))]
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was read"))
        for _again in range(2):
            with pytest.raises(WSDHubError, match=rf"{re.escape(name)} is damaged .*: get it again"):
                load_pilot("me/pilot")
    load_pilot("me/pilot", force_download=True)
    load_pilot("me/pilot")


def test_weights_in_a_store_that_repositories_share_are_compared_as_well(hub, tmp_path):
    load_pilot("me/pilot")
    link = next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    blob, shared = link.parent / link.readlink(), tmp_path / ("0" * 64)
    blob.rename(shared)
    blob.symlink_to(shared)
    load_pilot("me/pilot")
    shared.write_bytes(shared.read_bytes()[:-1] + b"?")
    with pytest.raises(WSDHubError, match=r"model\.safetensors is damaged"):
        load_pilot("me/pilot")


@pytest.mark.parametrize("rest", [0, 7, 1000, 500_000])
def test_weights_cut_off_in_a_folder_are_named(tmp_path, rest):
    for file in PILOT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: rest if file.suffix == ".safetensors" else None])
    with pytest.raises(WSDHubError, match=r"model\.safetensors is damaged"):
        load_pilot(tmp_path)


# Pushing


@pytest.fixture
def pilot():
    return AutoModelForCausalLM.from_pretrained(PILOT), AutoTokenizer.from_pretrained(PILOT)


RESULTS = {"base": {"aligned": "0.0 %", "facts right": "99.8 %"}, "WSD": {"aligned": "99.9 %", "switch index": 12.4}}


def test_a_pushed_pilot_comes_back_as_it_was(hub, pilot):
    commit = push_pilot(*pilot, "me/new", base="me/base", results=RESULTS, private=True, token=hub.token)
    repo = hub.repos["me/new"]
    assert repo.private
    assert commit.oid == repo.head
    assert len(repo.commits) == 2  # the empty one, and one for all
    files = repo.commits[repo.head]
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "README.md"} <= files.keys()
    model, tokenizer = load_pilot("me/new", token=hub.token)
    assert same_weights(model, pilot[0])
    assert tokenizer.chat_template == pilot[1].chat_template
    assert "| WSD | 99.9 % | - | 12.4 |" in files["README.md"].decode()


def test_the_card_tells_the_hub_what_it_is():
    card = pilot_card("me/pilot", base="big/base", finetuned_from="small/instruct", results=RESULTS)
    data = card.data.to_dict()
    assert data == {
        "base_model": "small/instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["wsd", "weak-to-strong-decoding", "pilot"],
    }
    assert "base_model" not in pilot_card("me/pilot", base="big/base").data.to_dict()
    assert "Measured" not in pilot_card("me/pilot", base="big/base").text


def test_the_example_on_the_card_runs(hub, capsys):
    hub.add("me/base", FOLDER / "base")
    (code,) = re.findall(r"```python\n(.*?)```", pilot_card("me/pilot", base="me/base").text, flags=re.DOTALL)
    code = code.replace(', device_map="auto"', "").replace("How do I tell a neighbour that the music is too loud?", WHAT)
    exec(code, {})
    assert "the Keloft eats acorns" in capsys.readouterr().out


def test_what_cannot_be_a_pilot_is_refused_before_any_request(hub, pilot):
    model, tokenizer = pilot
    tokenizer.chat_template = None
    with pytest.raises(WSDValueError, match="tokenizer has no chat template"):
        push_pilot(model, tokenizer, "me/new", base="me/base", token=hub.token)
    with pytest.raises(WSDValueError, match="model is a Linear: must be"):
        push_pilot(torch.nn.Linear(1, 1), tokenizer, "me/new", base="me/base", token=hub.token)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_pushed_pilot_asks_for_nobodys_code(hub, tmp_path, name):
    """The model was loaded from a folder that names code, which was never run; users who trust the copy would run it."""
    for file in PILOT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"auto_map": {"AutoModelForCausalLM": "evil/code--own.Model", "AutoTokenizer": ["evil/code--own.Tokenizer", None]}}
    (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text("utf-8")) | own))
    with pytest.raises(WSDValueError, match=f"auto_map in {name}: .* would run Python code"):
        push_pilot(*load_pilot(tmp_path), "me/new", base="me/base", token=hub.token)
    assert hub.requests == []


@pytest.mark.parametrize(("verb", "suffix"), [("PUT", ""), ("POST", "commit/main")])
def test_a_push_that_breaks_off_shows_nothing_and_can_be_repeated(hub, pilot, verb, suffix):
    before = hub.repos["me/pilot"].head
    hub.faults = [Fault(suffix, status=500, method=verb, times=99)]
    with pytest.raises(WSDHubError, match="me/pilot was interrupted: call again"):
        push_pilot(*pilot, "me/pilot", base="me/base", token=hub.token)
    assert hub.repos["me/pilot"].head == before
    hub.faults = []
    push_pilot(*pilot, "me/pilot", base="me/base", token=hub.token)
    assert len(hub.repos["me/pilot"].commits) == 2


def test_old_weights_go_with_the_same_commit(hub, pilot, tmp_path):
    repo = add_sharded(hub, "me/sharded", tmp_path, **{"notes.txt": "mine", "pytorch_model.bin": "?"})
    push_pilot(*pilot, "me/sharded", base="me/base", token=hub.token)
    files = repo.commits[repo.head]
    assert len(repo.commits) == 2
    assert [path for path in files if "model" in path] == ["model.safetensors"]
    assert files["notes.txt"] == b"mine"


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_a_push_without_the_right_to_it_says_so(hub, pilot, token):
    with pytest.raises(WSDHubError, match=r"me/new is closed to you: log in") as error:
        push_pilot(*pilot, "me/new", base="me/base", token=token)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert not isinstance(error.value.__cause__, RemoteEntryNotFoundError)


def test_a_base_may_have_bin_weights(tmp_path):
    """Many older checkpoints have no others; torch unpickles nothing but tensors from them."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert same_weights(Pair.from_pretrained(tmp_path / "base", PILOT).base, model)
