"""Errors of the Hub's client and of transformers' readers, turned into a WSDHubError with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from .. import _compat
from ..errors import WSDError, WSDHubError


@contextmanager
def reading(problem: str) -> Iterator[None]:
    """Turns any error of a reader of untrusted files into a WSDHubError."""
    try:
        yield
    except WSDError:
        raise
    except Exception as error:
        raise WSDHubError(f"{problem} ({one_line(error)})") from error


@contextmanager
def explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors of the Hub's client and of transformers' readers into a WSDHubError with a remedy."""
    try:
        yield
    except (_compat.HTTPError, hub_errors.EntryNotFoundError, OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, WSDError):
            raise
        raise WSDHubError(_explanation(name, error, revision)) from error


def _explanation(name: str, error: Exception, revision: str | None) -> str:
    log_in = "log in (`hf auth login`) or pass token="
    match error:
        case hub_errors.GatedRepoError():
            return f"{name} is gated: accept its conditions at {constants.ENDPOINT}/{name}, then {log_in}"
        case hub_errors.RepositoryNotFoundError():
            return f"{name} is neither a folder nor known at {constants.ENDPOINT}: check the name; if it is private, {log_in}"
        case hub_errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: give one of its branches, tags or commits"
        case hub_errors.HFValidationError():
            return (
                f"{name} is neither a folder nor a name on the Hub: check the path, or give namespace/name ({one_line(error)})"
            )
        case hub_errors.LocalEntryNotFoundError():
            return (
                f"{name} is not in the cache, or not all of it, and {constants.ENDPOINT} was not reached: call again with a "
                "connection, and without HF_HUB_OFFLINE and local_files_only"
            )
        case hub_errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{name} is closed to you: {log_in} that may do this ({one_line(error)})"
        case _compat.HTTPError() | RuntimeError():
            return f"{name} was interrupted: call again, files that arrived whole are kept ({one_line(error)})"
    return f"{name}: {one_line(error)}"


def one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if " " in line else f"{type(error).__name__}: {line}"
