"""Files of a model, in a folder or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .. import _compat
from ..errors import WSDHubError
from .names import Source

WEIGHTS = {f"{file}{index}" for file in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")}
"""Names of files by which a folder has weights that are not in GGUF format."""


class Files(NamedTuple):
    """Files of a model."""

    folder: Path
    """The folder that has all but the weights."""
    fetch: Callable[[str], Path]
    """Fetches a file of the weights."""
    gguf: list[str]
    """Names of GGUF files, if there are no other weights."""


@contextmanager
def model_files(source: Source, subfolder: str, cache: dict[str, Any], patterns: Iterable[str]) -> Iterator[Files]:
    """The files of a source: those that match the patterns are in the folder, others are fetched."""
    place = Path(source.place)
    if place.is_dir():
        folder = place / subfolder

        def local(file: str) -> Path:
            if not (folder / file).is_file():
                raise EntryNotFoundError(f"no {file} in {folder}")
            return folder / file

        yield Files(folder, local, _gguf(os.listdir(folder)) if folder.is_dir() else [])
        return
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in patterns]
    gap = None
    try:
        place = Path(
            snapshot_download(
                source.place, revision=source.revision, allow_patterns=patterns, ignore_patterns=prefix + "*/*", **cache
            )
        )
    except LocalEntryNotFoundError as error:  # offline; the files that the cache lacks may not be needed
        if not hasattr(error, "snapshot_path"):
            raise
        place, gap = Path(error.snapshot_path), error
    folder = place / subfolder

    def remote(file: str) -> Path:
        return Path(hf_hub_download(source.place, prefix + file, revision=place.name, **cache))

    may_be_gguf = not (folder / "config.json").is_file() or "gguf" in source.place.lower()
    names = _names(source.place, place, cache) if may_be_gguf else []
    try:
        yield Files(folder, remote, _gguf(name.removeprefix(prefix) for name in names if name.startswith(prefix)))
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


def _names(repo_id: str, snapshot: Path, cache: dict[str, Any]) -> list[str]:
    """Names of all files of a commit; offline, of those in the cache."""
    with suppress(_compat.HTTPError, OSError):  # no connection
        if not cache.get("local_files_only"):
            return HfApi(token=cache.get("token")).list_repo_files(repo_id, revision=snapshot.name)
    return [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")]


def _gguf(names: Iterable[str]) -> list[str]:
    names = [name for name in names if "/" not in name]
    return [] if WEIGHTS & set(names) else sorted(name for name in names if name.lower().endswith(".gguf"))
