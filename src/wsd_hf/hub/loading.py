"""Models fetched from the Hub or taken from a folder, checked, and read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import WSDHubError, WSDValueError
from .contents import GGUF, READING, auto_class, check_sizes, fetch_weights, read_config, read_tokenizer
from .errors import explained, one_line
from .model_folder import DATA, check_links, check_subfolder, code_in

Kind = Literal["base", "pilot", "reference", "reward model"]


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
    """Loads a pilot and its tokenizer from the Hub, from its cache, or from a folder.

    All files come from one commit, and all checks that don't need the weights run before these are fetched. A second call
    resumes an interrupted download. Cached files are compared with the hashes that the Hub gave, about a second per gigabyte.

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
        subfolder: of the repository or folder, with the pilot.
        token: for private and gated repositories; default: that of `hf auth login`.
        cache_dir: of downloads; default: the cache of the Hub's client.
        local_files_only: whether to stay offline, as with HF_HUB_OFFLINE=1.
        force_download: whether to download cached files again.
        **kwargs: as `AutoModelForCausalLM.from_pretrained` takes them (`attn_implementation`, `quantization_config`, ...).

    Returns:
        The model, ready to be an `assistant_model`, and its tokenizer.

    Raises:
        WSDHubError: the pilot cannot be had (not found, gated, no such revision, no connection and not in the cache,
            interrupted), is damaged, is not a pilot (no chat template, no safetensors, encoder-decoder, weights missing, own
            code), or names files elsewhere; with a remedy. The original error is its `__cause__`. Errors of
            `from_pretrained` about `device_map` and `kwargs` pass through.
        WSDValueError: `variant` or `gguf_file` is given.
    """
    if "variant" in kwargs:
        raise WSDValueError(f"variant={kwargs['variant']!r}: pilots are loaded from model.safetensors; rename the file")
    if "gguf_file" in kwargs:
        raise WSDValueError(f"gguf_file={kwargs['gguf_file']!r} {GGUF}")
    cache = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
    fetched = fetch_model(os.fspath(repo_id), "pilot", revision, subfolder, cache, trust_remote_code, use_safetensors)
    check_whole(fetched.weights)
    return read_model(fetched, dtype, device_map, **kwargs), fetched.tokenizer


class Fetched(NamedTuple):
    """A model all of whose files are on this machine."""

    name: str
    """Hub id or path, as the user gave it."""
    kind: Kind
    folder: Path
    weights: list[Path]
    tokenizer: Any
    """Its tokenizer; None for a reference, which works with the pilot's."""
    trust_remote_code: bool
    use_safetensors: bool | None


def fetch_model(
    name: str,
    kind: Kind,
    revision: str | None = None,
    subfolder: str = "",
    cache: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool | None = True,
    only_data: bool = False,
) -> Fetched:
    """Fetches a model and checks all but the hashes and the content of its weights; see `load_pilot`.

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
        config = read_config(shown, folder, trust_remote_code, kind)
        tokenizer = None if kind == "reference" else read_tokenizer(shown, folder, trust_remote_code, kind)
        weights = fetch_weights(shown, folder, fetch, use_safetensors)
        check_sizes(shown, config, weights, trust_remote_code, kind)
    return Fetched(name, kind, folder, weights, tokenizer, trust_remote_code, use_safetensors)


def read_model(fetched: Fetched, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Reads the weights of a fetched model; `load_pilot` documents arguments and errors."""
    try:
        with READING:
            model, report = auto_class(fetched.kind).from_pretrained(
                fetched.folder,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=fetched.trust_remote_code,
                use_safetensors=fetched.use_safetensors,
                output_loading_info=True,
                **{"ignore_mismatched_sizes": True} | kwargs,
            )
    except Exception as error:
        if kwargs or device_map is not None or not (dtype == "auto" or isinstance(dtype, torch.dtype)):
            raise  # the arguments may be to blame
        raise WSDHubError(f"{fetched.name} cannot be loaded ({one_line(error)})") from error
    if report["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
        key, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise WSDHubError(
            f"{fetched.name} has weights of other sizes than its config needs ({key}: {tuple(stored)}, not {tuple(wanted)}): "
            "give a whole model"
        )
    if missing := sorted(report["missing_keys"]):
        raise WSDHubError(f"{fetched.name} lacks weights that its config needs ({missing[0]}, ...): give a whole model")
    for named in (model, model.config, fetched.tokenizer):
        if named is not None:
            named.name_or_path = fetched.name
    return model


@contextmanager
def _files(
    name: str, revision: str | None, subfolder: str, cache: dict[str, Any], patterns: Iterable[str]
) -> Iterator[tuple[Path, Callable[[str], Path]]]:
    """The folder with all files but the weights, and a function that fetches a file of the weights."""
    place = Path(name)
    if place.is_dir():

        def local(file: str) -> Path:
            if not (place / subfolder / file).is_file():
                raise EntryNotFoundError(f"no {file} in {place / subfolder}")
            return place / subfolder / file

        yield place / subfolder, local
        return
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in patterns]
    gap = None
    try:
        place = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=prefix + "*/*", **cache)
        )
    except LocalEntryNotFoundError as error:  # offline; the files that the cache lacks may not be needed
        if not hasattr(error, "snapshot_path"):
            raise
        place, gap = Path(error.snapshot_path), error
    try:
        yield place / subfolder, lambda file: Path(hf_hub_download(name, prefix + file, revision=place.name, **cache))
    except WSDHubError:
        if gap:
            raise gap from None
        raise


def check_whole(files: Iterable[Path]) -> None:
    """Raises a WSDHubError if a file in the cache of the Hub's client has not the hash that is its name; others pass."""
    for file in files:
        blob = Path(os.readlink(file)) if file.is_symlink() else file
        found = blob.name
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):  # sha256, for files in LFS
            with file.open("rb") as content:
                found = sha_fileobj(content).hex()
        elif blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}", blob.name):
            found = git_hash(file.read_bytes())
        if found != blob.name:
            raise WSDHubError(f"{file} is damaged (cut off or changed): get it again, from the Hub with force_download=True")
