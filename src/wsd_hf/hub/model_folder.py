"""Files of a model folder, whose author is not trusted: data and code, links, and names of other files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import WSDHubError

DATA = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE", "LICENSE.md")
"""Patterns of all files but weights and code."""

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys under which transformers looks for classes in Python files, of the same repository or another."""

TEMPLATES = "additional_chat_templates"
"""The only subfolder that transformers always reads from."""


def data_files(folder: Path) -> list[Path]:
    """Data files directly in a folder."""
    return sorted({file for pattern in DATA for file in folder.glob(pattern) if file.is_file()})


def check_links(place: Path, folder: Path) -> None:
    """Raises a WSDHubError if `folder` or a file in it is a symbolic link in a circle, or one that leads out of `place`.

    A snapshot in the cache of the Hub's client consists of links to that client's store of contents, which are permitted.
    """
    real = place.resolve()
    homes = [real]
    for parent in real.parents:
        if parent.name == "snapshots":
            homes += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    files = (file for file in folder.iterdir() if file.name == TEMPLATES or not file.is_dir())
    for file in (folder, *files, *(folder / TEMPLATES).glob("*")):
        target = file.resolve()
        if target.is_symlink():  # Python before 3.13 raises an error of its own
            raise WSDHubError(f"{file} is a link in a circle: put the file itself there")
        if not any(target.is_relative_to(home) for home in homes):
            raise WSDHubError(
                f"{file} is a link that leads out of {place}: put the file itself there. If `pack` wrote the folder, "
                "trust_remote_code=True follows its links"
            )


def check_subfolder(subfolder: str) -> None:
    """Raises a WSDHubError unless `subfolder` is a relative path without `..`."""
    if any(path.anchor or ".." in path.parts for path in (PurePosixPath(subfolder), PureWindowsPath(subfolder))):
        raise WSDHubError(f"subfolder={subfolder!r}: must be a relative path without '..'")


def json_object(file: Path, parse_int: Callable[[str], int] = int) -> dict[str, Any]:
    """The object in a JSON file; a WSDHubError if the file holds anything else."""
    value = _json(file, parse_int=parse_int)
    if not isinstance(value, dict):
        raise WSDHubError(f"{file} must hold a JSON object, and holds a {type(value).__name__}: get it again")
    return value


def int64(digits: str) -> int:
    """An integer of a JSON file that fits into a tensor."""
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:20]}... is beyond 64 bits")
    return value


def shards(index: Path, ending: str) -> list[str]:
    """Files named by an index of weights, all in its folder; a WSDHubError if it names anything else."""
    content = json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict) or not isinstance(weight_map, dict) or not weight_map:
        raise WSDHubError(f"{index} must hold two objects, metadata and weight_map, and weights in it: get it again")
    check_file_names(index, list(weight_map.values()), ending)
    return sorted(set(weight_map.values()))


def check_file_names(where: Path, names: object, ending: str) -> None:
    """Raises a WSDHubError unless `names`, found in the file `where`, are a list of plain file names with that ending."""
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not re.fullmatch(rf"[^/\\:\x00-\x1f]{{1,200}}{re.escape(ending)}", name):
            raise WSDHubError(f"{where} names {name!r:.200}: must be a file *{ending} in the same folder, without a path")


def check_tokenizer_files(folder: Path) -> None:
    """Raises a WSDHubError if settings of a tokenizer name files that are not directly in its folder."""
    # transformers passes these settings to the tokenizer's class as arguments, and some arguments are paths that are opened.
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = json_object(file)
        check_file_names(file, settings.get("fast_tokenizer_files", []), ".json")
        for key in ("vocab", "merges", "init_inputs"):
            if (value := settings.get(key)) and (isinstance(value, str) or key == "init_inputs"):
                raise WSDHubError(f"{file} has {key}={value!r:.200}, which may name a file elsewhere: remove it")
    file = folder / "special_tokens_map.json"
    if file.exists():
        for key in json_object(file):
            if not key.endswith(("_token", "_tokens")):
                raise WSDHubError(f"{file} has {key!r:.200}, which is not a special token: remove it")


def check_kernels(file: Path) -> None:
    """Raises a WSDHubError if a config names an implementation of attention or experts that transformers would fetch."""
    # A name of the form `namespace/name` is a repository of compiled code, loaded where the package `kernels` is installed.
    for value in _objects(file):
        for key, named in value.items():
            if "_implementation" in key and "/" in json.dumps(named):
                raise WSDHubError(f"{file} has {key}={named!r:.200}, which would load code from the Hub: remove it")


def code_in(folder: Path) -> str | None:
    """The first place where a folder names Python code ("auto_map in config.json"), or None."""
    # transformers looks for these keys in many files and in parts of them, so each object in each JSON file is searched.
    if (folder / "custom_generate").exists():
        return "a folder custom_generate"
    for file in data_files(folder):
        for value in _objects(file) if file.suffix.lower() == ".json" else ():
            for key in CODE_KEYS:
                if value.get(key):
                    return f"{key} in {file.name}"
    return None


def _objects(file: Path) -> list[dict[str, Any]]:
    """All objects in a JSON file, at any depth."""
    found: list[dict[str, Any]] = []

    def keep(value: dict[str, Any]) -> dict[str, Any]:
        found.append(value)
        return value

    _json(file, object_hook=keep)
    return found


def _json(file: Path, **hooks: Any) -> Any:
    # Not parse_json: transformers reads no byte order mark, and silently leaves out a generation_config.json that has one.
    try:
        return json.loads(file.read_text(encoding="utf-8"), **hooks)
    except (OSError, ValueError, RecursionError) as error:
        raise WSDHubError(f"{file} is not a valid JSON file ({' '.join(str(error).split())}): get it again") from error
