"""Names of models, as every command and loader takes them (docs/loading.md)."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ..errors import WSDHubError

FILE_ON_HUB = re.compile(r"(?P<place>[^/\\]+/[^/\\]+)/(?P<file>[^\\]+\.gguf)", re.IGNORECASE)
"""A GGUF file in a repository of the Hub."""

PATHS = ("/", ".", "~")
"""Beginnings of names that are paths, and no Hub ids."""


class Source(NamedTuple):
    """The place of a model or of an adapter."""

    place: str
    """A folder, or the Hub id of a repository."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""
    file: str | None = None
    """Path of a GGUF file in it; None for all of its files."""

    def __str__(self) -> str:
        return self.place + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


class ModelName(NamedTuple):
    """A model, and the adapter over it."""

    model: Source
    adapter: Source | None = None


def parse_name(name: str) -> ModelName:
    """The places that a name refers to.

    A path that exists is itself, whatever characters it has. In other names the first `+` comes before an adapter, unless a
    longer beginning exists, and the first `@` of each part comes before a revision.

    >>> parse_name("meta/base@v1+me/adapter").model
    Source(place='meta/base', revision='v1', file=None)
    >>> parse_name("me/models/small.Q4_K_M.gguf").model
    Source(place='me/models', revision=None, file='small.Q4_K_M.gguf')

    Raises:
        WSDHubError: an empty part, or a revision of a path.
    """
    if _exists(name) or "+" not in name:
        return ModelName(_source(name))
    cuts = [number for number, character in enumerate(name) if character == "+"]
    cut = next((number for number in reversed(cuts) if _exists(name[:number])), cuts[0])
    return ModelName(_source(name[:cut]), _source(name[cut + 1 :]))


def _source(name: str) -> Source:
    if not name:
        raise WSDHubError('the name of a model or adapter is empty: give a folder ("." is the current one), or namespace/name')
    path = os.path.expanduser(name)
    if path.lower().endswith(".gguf") and os.path.isfile(path):
        return Source(os.path.dirname(path) or ".", file=os.path.basename(path))
    place, at, revision = name.partition("@")
    if not at or os.path.exists(path):
        place, revision = name, ""
    elif not revision:
        raise WSDHubError(f"{name} has no revision after its @: give a branch, tag or commit")
    elif _exists(place):
        raise WSDHubError(f"{name}: {place} is a path, which has no revisions; leave @{revision} out")
    if (found := FILE_ON_HUB.fullmatch(place)) and not place.startswith(PATHS):
        return Source(found["place"], revision or None, found["file"])
    return Source(os.path.expanduser(place), revision or None)


def _exists(name: str) -> bool:
    return bool(name) and os.path.exists(os.path.expanduser(name))
