"""Models behind servers, and what their client has to know of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..engine.checks import eos_token_ids
from ..errors import WSDHubError
from ..hub.loading import Kind
from ..hub.tokenizers import FetchedTokenizer, fetch_tokenizer
from ..text.token_texts import INCOMPLETE, plain_text
from .server import TRIED, Server

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
        """Tries all that a call needs; see `Server.check`.

        Raises:
            WSDServerError: the server lacks something, or has another tokenizer.
        """
        ids = self.tokenizer.encode(PROBE, add_special_tokens=False)
        written = await self.server.check(ids[: max(2, self.server.context - TRIED)], scores)
        ids = [token for tokens in written for token in tokens.ids]
        theirs, ours = "".join(tokens.text for tokens in written), plain_text(self.tokenizer, ids)
        if not _letters(ours).startswith(_letters(theirs)):
            problem = (
                f"writes the tokens {ids} as {theirs!r}, and the tokenizer that was given as {ours!r}: give the model's own"
            )
            raise self.server.failure(problem)


def _letters(text: str) -> str:
    """A text without spaces and incomplete characters, of which servers make more or less."""
    return "".join(text.replace(INCOMPLETE, "").split())


def known_model(
    server: Server, tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None, kind: Kind, trust_remote_code: bool
) -> RemoteModel:
    """A model and its tokenizer, an object or a name; None: the name that the server has for the model."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        fetched = FetchedTokenizer(tokenizer, len(tokenizer), eos_token_ids(tokenizer))
    elif tokenizer is not None:
        fetched = fetch_tokenizer(os.fspath(tokenizer), kind, trust_remote_code)
    else:
        try:
            fetched = fetch_tokenizer(server.model, kind, trust_remote_code)
        except WSDHubError as error:
            argument = "tokenizer" if kind == "base" else "pilot_tokenizer"
            raise WSDHubError(f"{error}; {server.model} is the server's name for the model: give {argument}=") from error
    ends = fetched.end_token_ids | (eos_token_ids(fetched.tokenizer) if kind == "pilot" else set())
    return RemoteModel(replace(server, vocabulary=fetched.vocabulary, role=kind), fetched.tokenizer, frozenset(ends))
