"""Pilots from the Hub, and to it: whole, checked, and in one commit."""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..engine.checks import check_causal
from ..errors import WSDHubError, WSDValueError
from .card import pilot_card
from .errors import explained, one_line, reading
from .model_folder import (
    DATA,
    check_kernels,
    check_links,
    check_subfolder,
    check_tokenizer_files,
    code_in,
    int64,
    json_object,
    shards,
)

WEIGHTS = r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?"
"""Where transformers looks for weights; the first that it finds are the ones it loads."""

GGUF = (
    "is in GGUF format, from which no tokenizer can be had that reads chats: give the model that it was made from, or make one "
    "with transformers, from_pretrained(..., gguf_file=...) and save_pretrained, and add the files of the original tokenizer"
)
"""transformers 5.17 and 5.23 split control tokens (`<|user|>`) of such a file into characters; 5.17 mistakes its EOS, too."""

READING = threading.Lock()
"""transformers replaces methods of its classes while it reads a model: two threads at a time leave them replaced."""


def load_pilot(
    repo_id: str | os.PathLike[str] = "songff/Pilot-3B",
    revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    *,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pilot and its tokenizer, from the Hub, from its cache, or from a folder.

    All files come from one commit. What can be told without the weights is told before they are fetched. A download that was
    interrupted is resumed by calling again. Files in the cache are read once more to compare them with the hashes that the
    Hub gave (about a second for each gigabyte).

    >>> from wsd_hf.tiny import FOLDER
    >>> pilot, tokenizer = load_pilot(FOLDER / "pilot")
    >>> tokenizer.chat_template is None
    False

    Args:
        repo_id: `"namespace/name"` on the Hub, or a folder.
        revision: branch, tag or commit; default: the main branch.
        dtype: of the weights; "auto" as they are stored.
        device_map: where the weights go; as in transformers.
        trust_remote_code: whether Python code that comes with the pilot may run, and links may lead out of its folder, as those
            that `pack` writes do. The default allows neither.
        use_safetensors: False loads `.bin` weights instead, which may run code when they are unpickled.
        subfolder: where in the repository or folder the pilot lies.
        token: for private and gated repositories; default: that of `hf auth login`.
        cache_dir: where downloads are kept; default: the cache of the Hub's client.
        local_files_only: whether to stay offline, as with HF_HUB_OFFLINE=1.
        force_download: whether to fetch again what is in the cache.
        **kwargs: as `AutoModelForCausalLM.from_pretrained` takes them (`attn_implementation`, `quantization_config`, ...).

    Returns:
        The model, ready to be an `assistant_model`, and its tokenizer.

    Raises:
        WSDHubError: the pilot cannot be had (not found, gated, no such revision, no connection and not in the cache,
            interrupted), is damaged, is no pilot (no chat template, no safetensors, encoder-decoder, weights missing, own
            code), or names files elsewhere; says what to do. The original error is its `__cause__`. What `from_pretrained`
            raises about `device_map` and `kwargs` passes through.
        WSDValueError: `variant` or `gguf_file` is given.
    """
    if "variant" in kwargs:
        raise WSDValueError(f"variant={kwargs['variant']!r}: pilots are loaded from model.safetensors; rename the file")
    if "gguf_file" in kwargs:
        raise WSDValueError(f"gguf_file={kwargs['gguf_file']!r} {GGUF}")
    cache = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    fetched = fetch_model(os.fspath(repo_id), "pilot", revision, subfolder, cache, trust_remote_code, use_safetensors)
    check_whole(fetched.weights)
    return read_model(fetched, dtype, device_map, **kwargs), fetched.tokenizer


def push_pilot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    base: str,
    finetuned_from: str | None = None,
    results: Mapping[str, Mapping[str, object]] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Puts a pilot on the Hub: weights, tokenizer and model card in one commit, or nothing.

    The repository is made if there is none. Weights and model card that it had before are replaced; other files stay.

    Args:
        model: the pilot.
        tokenizer: its tokenizer, with the chat template that it was tuned with.
        repo_id: `"namespace/name"`, or a name of your own namespace.
        base: Hub id of the base that the pilot is meant for; see `pilot_card`.
        finetuned_from: Hub id of the model that the pilot was tuned from.
        results: what was measured; see `pilot_card`.
        private: whether a new repository is private; default: as your namespace has it.
        token: one that may write; default: that of `hf auth login`.

    Returns:
        The commit: `commit_url`, `oid`, ...

    Raises:
        WSDValueError: the model is no causal model of transformers', the tokenizer has no chat template, or what would be
            pushed names Python code, as all that was made from a repository with code does; before any request.
        WSDHubError: the Hub refused, or could not be reached. Nothing of the pilot is visible then: call again.
    """
    if not isinstance(model, PreTrainedModel):
        raise WSDValueError(
            f"model is a {type(model).__name__}: must be transformers' own (merge adapters: merge_and_unload())"
        )
    check_causal("model", model)
    if not tokenizer.chat_template:
        raise WSDValueError("tokenizer has no chat template: a pilot needs the one it was tuned with; set its chat_template")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if code := code_in(folder):
            raise WSDValueError(
                f"{code}: whoever trusts the repository would run Python code that a pilot pushed from here must not bring; "
                "remove that from its config, if transformers knows the type without it, or use transformers' push_to_hub"
            )
        with explained(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            pilot_card(repo_id, base=base, finetuned_from=finetuned_from, results=results).save(folder / "README.md")
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            old_weights = {name for name in api.list_repo_files(repo_id) if re.fullmatch(WEIGHTS, name)} - files.keys()
            # upload_folder may split what it uploads into several commits
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, file) for name, file in files.items()),
                    *(CommitOperationDelete(name) for name in sorted(old_weights)),
                ],
                commit_message="A pilot for Weak-to-Strong Decoding",
            )


class Fetched(NamedTuple):
    """A model all of whose files are on this machine."""

    name: str
    """Hub id or path, as the user gave it."""
    folder: Path
    weights: list[Path]
    tokenizer: Any
    """Its tokenizer; None for a reference, which works with the pilot's."""
    trust_remote_code: bool
    use_safetensors: bool | None


def fetch_model(
    name: str,
    kind: Literal["base", "pilot", "reference"],
    revision: str | None = None,
    subfolder: str = "",
    cache: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool | None = True,
    only_data: bool = False,
) -> Fetched:
    """A model of which all has been checked but the hashes and the content of its weights; see `load_pilot`.

    `use_safetensors=None` takes `.bin` weights where there are no others. `only_data` refuses a model that names Python
    code, even where transformers would do without it.
    """
    if not name:
        raise WSDHubError(f'the name of the {kind} is empty: give a folder ("." is the current one), or namespace/name')
    source = os.path.expanduser(name)
    if source.lower().endswith(".gguf") and os.path.exists(source):
        raise WSDHubError(f"{name} {GGUF}")
    check_subfolder(subfolder)
    patterns = (*DATA, "*.py") if trust_remote_code else DATA
    with explained(name, revision), _files(source, revision, subfolder, cache or {}, patterns) as (folder, fetch):
        shown = f"{name}/{subfolder}" if subfolder else name
        if subfolder and not folder.is_dir():
            raise WSDHubError(f"{name} has no folder {subfolder}: get all of it again, or give another subfolder")
        if (folder / "adapter_config.json").exists():
            raise WSDHubError(f"{shown} has an adapter (adapter_config.json): merge it into its model (merge_and_unload) first")
        if not trust_remote_code and Path(source).is_dir():
            check_links(Path(source), folder)
        check_whole(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
        if only_data and (code := code_in(folder)):
            raise WSDHubError(
                f"{shown} has {code}: its Python code would run in a packed model, loaded with trust_remote_code=True; "
                "remove that, if transformers knows this type of model without it, or give another model"
            )
        config = _config(shown, folder, trust_remote_code, kind)
        tokenizer = None if kind == "reference" else _tokenizer(shown, folder, trust_remote_code, kind)
        weights = _weights(shown, folder, fetch, use_safetensors)
        _check_sizes(shown, config, weights, trust_remote_code)
    return Fetched(name, folder, weights, tokenizer, trust_remote_code, use_safetensors)


def read_model(fetched: Fetched, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> PreTrainedModel:
    """The model itself; `load_pilot` documents arguments and errors."""
    sizes = {"ignore_mismatched_sizes": True} | kwargs
    try:
        with READING:
            model, report = AutoModelForCausalLM.from_pretrained(
                fetched.folder,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=fetched.trust_remote_code,
                use_safetensors=fetched.use_safetensors,
                output_loading_info=True,
                **sizes,
            )
    except Exception as error:
        if kwargs or device_map is not None or not (dtype == "auto" or isinstance(dtype, torch.dtype)):
            raise  # the arguments may be to blame
        raise WSDHubError(f"{fetched.name} cannot be loaded ({one_line(error)})") from error
    if report["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
        key, stored, asked = sorted(report["mismatched_keys"])[0]
        raise WSDHubError(
            f"{fetched.name} has weights of other sizes than its config asks for ({key}: {tuple(stored)}, not {tuple(asked)}): "
            "give a whole model"
        )
    if missing := sorted(report["missing_keys"]):
        raise WSDHubError(f"{fetched.name} lacks weights that its config asks for ({missing[0]}, ...): give a whole model")
    for named in (model, model.config, fetched.tokenizer):
        if named is not None:
            named.name_or_path = fetched.name
    return model


@contextmanager
def _files(
    name: str, revision: str | None, subfolder: str, cache: dict[str, Any], patterns: Iterable[str]
) -> Iterator[tuple[Path, Callable[[str], Path]]]:
    """The folder that holds all but the weights, and what fetches a file of weights into it."""
    place = Path(name)
    if place.is_dir():
        yield place / subfolder, functools.partial(_local_file, place / subfolder)
        return
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in patterns]
    gap = None
    try:
        place = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=prefix + "*/*", **cache)
        )
    except LocalEntryNotFoundError as error:  # offline; of the files that the cache lacks, none may be needed
        if not hasattr(error, "snapshot_path"):
            raise
        place, gap = Path(error.snapshot_path), error
    try:
        yield place / subfolder, lambda file: Path(hf_hub_download(name, prefix + file, revision=place.name, **cache))
    except WSDHubError:
        if gap:
            raise gap from None
        raise


def _local_file(folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        raise EntryNotFoundError(f"no {file} in {folder}")
    return folder / file


def _config(name: str, folder: Path, trust_remote_code: bool, kind: str) -> PreTrainedConfig:
    """The config of a model that can be a base or a pilot, as far as its config shows."""
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")) or "gguf" in name.lower():
            raise WSDHubError(f"{name} {GGUF}")
        raise WSDHubError(f"{name} has no config.json: give a whole transformers model (an adapter is merged into one first)")
    for file in ("config.json", "generation_config.json"):
        if (folder / file).exists():
            json_object(folder / file, parse_int=int64)
    if not trust_remote_code:
        check_kernels(folder / "config.json")
    with reading(f"{name} has a config that no model can be made from"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise WSDHubError(f"{name} is an encoder-decoder: a {kind} must be a decoder-only model")
    if getattr(config, "transformers_weights", None):
        raise WSDHubError(f"{name} names its weights in its config (transformers_weights): they must be in model.safetensors")
    for size in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if isinstance(number := getattr(text, size, None), int) and number < 1:
            raise WSDHubError(f"{name} has {size}={number} in its config: must be at least 1")
    return config


def _tokenizer(name: str, folder: Path, trust_remote_code: bool, kind: str) -> PreTrainedTokenizerBase:
    check_tokenizer_files(folder)
    with reading(f"{name} has no tokenizer that can be loaded: a {kind} needs its own"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if kind == "pilot" and not tokenizer.chat_template:
        raise WSDHubError(
            f"{name} has no chat template: a pilot needs the one it was tuned with; give a model tuned for chats, or load both "
            "parts with transformers and set the tokenizer's chat_template"
        )
    return tokenizer


def _weights(name: str, folder: Path, fetch: Callable[[str], Path], use_safetensors: bool | None) -> list[Path]:
    """The files that hold the weights: one, or else those that the index names; of both formats if the caller has no wish."""
    missing, wanted = None, ["model.safetensors", "pytorch_model.bin"]
    if use_safetensors is not None:
        wanted = [wanted[0 if use_safetensors else 1]]
    for whole in wanted:
        index = folder / f"{whole}.index.json"
        sharded = index.is_file() and not (folder / whole).is_file()  # where both exist, transformers reads the whole one
        files = shards(index, Path(whole).suffix) if sharded else [whole]
        try:
            return [fetch(file) for file in files]
        except EntryNotFoundError as error:
            missing = missing or error
    if isinstance(missing, LocalEntryNotFoundError):
        raise missing
    if any(folder.glob("*.gguf")):
        raise WSDHubError(f"{name} {GGUF}") from missing
    other = " (use_safetensors=False loads .bin files, which may run code as they are read)" if use_safetensors else ""
    raise WSDHubError(f"{name} has no {' or '.join(wanted)}, or not all its parts: give a model that has{other}") from missing


def _check_sizes(name: str, config: PreTrainedConfig, weights: list[Path], trust_remote_code: bool) -> None:
    """Raises a WSDHubError unless a model can be made from the config, and is no larger than its weights can fill."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    tensors = sum(map(_tensors, weights))
    if isinstance(layers, int) and layers > tensors:
        raise WSDHubError(f"{name} has num_hidden_layers={layers} in its config, and {tensors:.0f} weights: give a whole model")
    if trust_remote_code:
        return  # a model with code of its own may need more than its config
    with reading(f"{name} has a config that no model can be made from"), READING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    numbers, size = sum(weight.numel() for weight in model.parameters()), sum(file.stat().st_size for file in weights)
    if numbers > 16 * size:
        raise WSDHubError(
            f"{name} has {size} bytes of weights, and a config that asks for {numbers} numbers: give a whole model"
        )


def _tensors(file: Path) -> float:
    """Number of weights in a file; infinity if it isn't a safetensors file, since others must be loaded to be counted."""
    if file.suffix != ".safetensors":
        return math.inf
    with reading(f"{file} is damaged (cut off or changed), get it again"), safe_open(file, "pt") as content:
        return len(content.keys())


def check_whole(files: Iterable[Path]) -> None:
    """Raises a WSDHubError if a file in the cache of the Hub's client is not what the Hub sent, going by its hash."""
    for file in files:
        if not _is_whole(file):
            raise WSDHubError(f"{file} is damaged (cut off or changed): get it again, from the Hub with force_download=True")


def _is_whole(file: Path) -> bool:
    """Whether a file is what it should be, as far as it can be told.

    The Hub's cache names what a snapshot links to after its content: sha256 for what LFS stores, git's sha1 for the rest.
    """
    blob = Path(os.readlink(file)) if file.is_symlink() else file
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        with file.open("rb") as content:
            return sha_fileobj(content).hex() == blob.name
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}", blob.name):
        return git_hash(file.read_bytes()) == blob.name
    return True
