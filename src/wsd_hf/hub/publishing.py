"""Pilots published on the Hub: weights, tokenizer and model card in one commit."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.checks import check_causal
from ..errors import WSDValueError
from .card import pilot_card
from .errors import explained
from .model_folder import code_in

WEIGHTS = r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?"
"""File names under which transformers looks for weights; it loads the first that it finds."""


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
    """Pushes a pilot to the Hub: weights, tokenizer and model card in one commit, or nothing.

    The repository is created if there is none. Its earlier weights and model card are replaced; other files stay.

    Args:
        model: the pilot.
        tokenizer: its tokenizer, with the chat template that it was tuned with.
        repo_id: `"namespace/name"`, or a name in your own namespace.
        base: Hub id of the base that the pilot is meant for; see `pilot_card`.
        finetuned_from: Hub id of the model that the pilot was tuned from.
        results: measured values; see `pilot_card`.
        private: whether a new repository is private; default: the namespace's setting.
        token: one with write access; default: that of `hf auth login`.

    Returns:
        The commit: `commit_url`, `oid`, ...

    Raises:
        WSDValueError: the model is not a causal model of transformers, the tokenizer has no chat template, or a config names
            Python code, as after loading from a repository with code; before any request.
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
                f"{code}: users of the pilot with trust_remote_code=True would run Python code from elsewhere; remove that "
                "from its config, if transformers knows the type without it, or use transformers' push_to_hub"
            )
        with explained(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            pilot_card(repo_id, base=base, finetuned_from=finetuned_from, results=results).save(folder / "README.md")
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            old_weights = {name for name in api.list_repo_files(repo_id) if re.fullmatch(WEIGHTS, name)} - files.keys()
            added = [CommitOperationAdd(name, file) for name, file in files.items()]
            deleted = [CommitOperationDelete(name) for name in sorted(old_weights)]
            # upload_folder may split an upload into several commits
            return api.create_commit(repo_id, [*added, *deleted], commit_message="A pilot for Weak-to-Strong Decoding")
