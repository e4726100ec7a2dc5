"""A model's tokenizer, and the facts beside it, fetched without the model's weights."""

from __future__ import annotations

from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..engine.checks import eos_token_ids
from ..errors import WSDHubError
from .contents import check_template, read_config, read_tokenizer
from .errors import explained, reading
from .files import model_files
from .loading import Kind, check_files
from .model_folder import DATA
from .names import parse_name


class FetchedTokenizer(NamedTuple):
    """A tokenizer, and facts about its model."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    """Width of the model's logits; without a config, the number of the tokenizer's tokens."""
    end_token_ids: set[int]
    """EOS ids of the model's generation config; without configs, the tokenizer's."""


def fetch_tokenizer(name: str, kind: Kind, trust_remote_code: bool = False) -> FetchedTokenizer:
    """The tokenizer of a folder, or of a model on the Hub.

    Raises:
        WSDHubError: it can't be had or read, or a pilot's has no chat template.
    """
    source, adapter = parse_name(name)
    if adapter or source.file:
        raise WSDHubError(f"{name} names an adapter or a GGUF file: give the folder or the Hub id of the {kind}'s tokenizer")
    shown, patterns = str(source), (*DATA, "*.py") if trust_remote_code else DATA
    with explained(source.place, source.revision), model_files(source, "", {}, patterns) as files:
        check_files(source, files.folder, patterns, trust_remote_code)
        tokenizer = read_tokenizer(shown, files.folder, trust_remote_code, kind)
        check_template(shown, tokenizer, kind)
        generation_config = None
        vocabulary = len(tokenizer)
        if (files.folder / "config.json").is_file():
            config = read_config(shown, files.folder, trust_remote_code, kind)
            vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None) or vocabulary
            generation_config = GenerationConfig.from_model_config(config)
        if (files.folder / "generation_config.json").is_file():
            with reading(f"{shown} has a generation_config.json that can't be read"):
                generation_config = GenerationConfig.from_pretrained(files.folder)
    return FetchedTokenizer(tokenizer, vocabulary, eos_token_ids(generation_config or tokenizer))
