"""Pilots from the Hub, and to it: whole, checked, and in one commit."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import _compat
from .card import pilot_card
from .checks import check_causal
from .errors import WSDError, WSDHubError, WSDValueError

ALL_BUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")

WEIGHTS = r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?"
"""Where transformers looks for weights; the first that it finds are the ones it loads."""

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
        trust_remote_code: whether Python code that comes with the pilot may run. It never does unasked.
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
            interrupted), is damaged, or is no pilot (no chat template, no safetensors, encoder-decoder, weights missing, own
            code); says what to do. The original error is its `__cause__`. What `from_pretrained` raises about `kwargs` passes
            through.
    """
    name = os.fspath(repo_id)
    cache = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    folder, _, tokenizer = fetch_model(name, revision, subfolder, cache, "pilot", trust_remote_code, use_safetensors)
    with READING:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **kwargs,
        )
    if missing := sorted(report["missing_keys"]):
        raise WSDHubError(f"{name} lacks weights that its config asks for ({missing[0]}, ...): give a whole model")
    for named in (model, model.config, tokenizer):
        named.name_or_path = name
    return model, tokenizer


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
        WSDValueError: the model is no causal model of transformers', or the tokenizer has no chat template; before any request.
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
        with _explained(repo_id):
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


def fetch_model(
    name: str,
    revision: str | None,
    subfolder: str,
    cache: dict[str, Any],
    kind: Literal["base", "pilot"],
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
) -> tuple[Path, list[Path], PreTrainedTokenizerBase]:
    """A folder with a whole model, its files of weights, and its tokenizer; `load_pilot` documents arguments and errors."""
    with _explained(name, revision), _files(name, revision, subfolder, cache) as (folder, fetch):
        _check_whole(file for pattern in ALL_BUT_WEIGHTS for file in folder.glob(pattern))
        tokenizer = _tokenizer(name, folder, trust_remote_code, kind)
        weights = _weights(name, folder, fetch, use_safetensors)
        _check_whole(weights)
    return folder, weights, tokenizer


@contextmanager
def _files(
    name: str, revision: str | None, subfolder: str, cache: dict[str, Any]
) -> Iterator[tuple[Path, Callable[[str], Path]]]:
    """The folder that holds all but the weights, and what fetches a file of weights into it."""
    place = Path(name).expanduser()
    if place.is_dir():
        yield place / subfolder, functools.partial(_local_file, place / subfolder)
        return
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in ALL_BUT_WEIGHTS]
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


def _tokenizer(name: str, folder: Path, trust_remote_code: bool, kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer, of what its config and its template show to be a base or a pilot."""
    if not (folder / "config.json").is_file():
        raise WSDHubError(f"{name} has no config.json: give a whole transformers model (an adapter is merged into one first)")
    if getattr(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), "is_encoder_decoder", False):
        raise WSDHubError(f"{name} is an encoder-decoder: a {kind} must be a decoder-only model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise WSDHubError(f"{name} has no tokenizer that can be loaded: a {kind} needs its own ({_line(error)})") from error
    if kind == "pilot" and not tokenizer.chat_template:
        raise WSDHubError(
            f"{name} has no chat template: a pilot needs the one it was tuned with; give a model tuned for chats, or load both "
            "parts with transformers and set the tokenizer's chat_template"
        )
    return tokenizer


def _weights(name: str, folder: Path, fetch: Callable[[str], Path], use_safetensors: bool) -> list[Path]:
    """The files that hold the weights: one, or those that the index names."""
    whole = "model.safetensors" if use_safetensors else "pytorch_model.bin"
    index = folder / f"{whole}.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {whole}
    try:
        return [fetch(shard) for shard in sorted(shards)]
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        other = " (use_safetensors=False loads .bin files, which may run code as they are read)" if use_safetensors else ""
        raise WSDHubError(f"{name} has no {whole}, or not all its parts: give a model that has{other}") from error


def _check_whole(files: Iterable[Path]) -> None:
    for file in files:
        if not _is_whole(file):
            raise WSDHubError(f"{file} is damaged (cut off or changed): get it again, from the Hub with force_download=True")


def _is_whole(file: Path) -> bool:
    """Whether a file is what it should be, as far as it can be told.

    The Hub's cache names what a snapshot links to after its content: sha256 for what LFS stores, git's sha1 for the rest.
    Elsewhere only safetensors can tell whether something is missing.
    """
    blob = Path(os.readlink(file)) if file.is_symlink() else file
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        with file.open("rb") as content:
            return sha_fileobj(content).hex() == blob.name
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}", blob.name):
        return git_hash(file.read_bytes()) == blob.name
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    return True


@contextmanager
def _explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Errors of the Hub's client and of transformers' readers as one of ours, which says what to do."""
    try:
        yield
    except (_compat.HTTPError, EntryNotFoundError, OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, WSDError):
            raise
        raise WSDHubError(_explanation(name, error, revision)) from error


def _explanation(name: str, error: Exception, revision: str | None) -> str:
    log_in = "log in (`hf auth login`) or pass token="
    match error:
        case GatedRepoError():
            return f"{name} is gated: accept its conditions at {constants.ENDPOINT}/{name}, then {log_in}"
        case RepositoryNotFoundError():
            return f"{name} is neither a folder nor known at {constants.ENDPOINT}: check the name; if it is private, {log_in}"
        case RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: give one of its branches, tags or commits"
        case HFValidationError():
            return f"{name} is neither a folder nor a name on the Hub: check the path, or give namespace/name ({_line(error)})"
        case LocalEntryNotFoundError():
            return (
                f"{name} is not in the cache, or not all of it, and {constants.ENDPOINT} was not reached: call again with a "
                "connection, and without HF_HUB_OFFLINE and local_files_only"
            )
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{name} is closed to you: {log_in} that may do this ({_line(error)})"
        case _compat.HTTPError() | RuntimeError():
            return f"{name} was interrupted: call again, files that arrived whole are kept ({_line(error)})"
    return f"{name}: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
