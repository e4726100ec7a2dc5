"""Models behind servers, and what their client has to know of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..engine.checks import eos_token_ids
from ..hub.loading import Kind
from ..hub.tokenizers import FetchedTokenizer, fetch_tokenizer
from .server import Server

PROBE = "What is the capital of France? The capital of France is Paris, and that of Italy is Rome."
"""Text on which a server is tried."""


@dataclass(frozen=True)
class RemoteModel:
    """A model behind a server.

    Attributes:
        server: its place.
        tokenizer: its own.
        end_token_ids: tokens that end its answers.
    """

    server: Server
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]

    async def check(self, scores: bool) -> None:
        """Tries all that a call needs; see `Server.check`."""
        ids = self.tokenizer.encode(PROBE, add_special_tokens=False)
        await self.server.check(ids[: self.server.context - 1], scores)


def known_model(
    server: Server, tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None, kind: Kind, trust_remote_code: bool
) -> RemoteModel:
    """A model and its tokenizer, an object or a name; None: the name that the server has for the model."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        fetched = FetchedTokenizer(tokenizer, len(tokenizer), eos_token_ids(tokenizer))
    else:
        fetched = fetch_tokenizer(server.model if tokenizer is None else os.fspath(tokenizer), kind, trust_remote_code)
    ends = fetched.end_token_ids | (eos_token_ids(fetched.tokenizer) if kind == "pilot" else set())
    return RemoteModel(replace(server, vocabulary=fetched.vocabulary), fetched.tokenizer, frozenset(ends))
