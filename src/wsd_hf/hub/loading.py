"""Models fetched from the Hub or taken from a folder, checked, and read."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import _compat
from ..errors import WSDHubError, WSDValueError
from .adapters import CONFIG as ADAPTER
from .adapters import adapter_settings, adapter_weights, check_vocabulary, with_adapter
from .contents import (
    READING,
    auto_class,
    check_sizes,
    check_template,
    count_tensors,
    fetch_weights,
    read_config,
    read_tokenizer,
)
from .errors import explained, one_line
from .files import check_whole, model_files
from .gguf_file import alone, read_gguf_config, read_gguf_tokenizer, read_header
from .model_folder import DATA, check_links, check_subfolder, code_in
from .names import Source, parse_name

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
        repo_id: the pilot's name: a folder, `"namespace/name"` on the Hub, `NAME@REVISION`, a GGUF file, or `MODEL+ADAPTER`;
            see the page "Loading models".
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
    check_keywords(kwargs)
    cache = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
    fetched = fetch_model(os.fspath(repo_id), "pilot", revision, subfolder, cache, trust_remote_code, use_safetensors)
    check_whole(fetched.weights)
    return read_model(fetched, dtype, device_map, **kwargs), fetched.tokenizer


def check_keywords(keywords: dict[str, Any]) -> None:
    """Raises a WSDValueError for keywords of `from_pretrained` that would name other files than those that are checked."""
    if "variant" in keywords:
        raise WSDValueError(f"variant={keywords['variant']!r}: pilots are loaded from model.safetensors; rename the file")
    if "gguf_file" in keywords:
        raise WSDValueError(f"gguf_file={keywords['gguf_file']!r}: give the file in the name of the model, FOLDER/FILE.gguf")


class Adapter(NamedTuple):
    """An adapter all of whose files are on this machine."""

    name: str
    settings: dict[str, Any]
    """Of `peft.LoraConfig`."""
    weights: Path
    tokenizer: Any
    """The tokenizer that it was trained with; None if it brings none."""


class Fetched(NamedTuple):
    """A model all of whose files are on this machine."""

    name: str
    """The model's name, as the user gave it."""
    kind: Kind
    folder: Path
    weights: list[Path]
    config: PreTrainedConfig
    tokenizer: Any
    """Its tokenizer; None for a reference, which works with the pilot's."""
    trust_remote_code: bool
    use_safetensors: bool | None
    adapter: Adapter | None = None

    @property
    def in_gguf(self) -> bool:
        """True for a model in a GGUF file."""
        return self.weights[0].suffix.lower() == ".gguf"


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

    `use_safetensors=None` takes `.bin` weights where there are no others. `only_data` refuses a model that is no folder of
    weights, or that names Python code, even where transformers would do without it.
    """
    if not name:
        raise WSDHubError(f'the name of the {kind} is empty: give a folder ("." is the current one), or namespace/name')
    check_subfolder(subfolder)
    source, over = parse_name(name)
    if revision and source.revision:
        raise WSDValueError(f"revision={revision!r}: {name} has one already, leave one out")
    source = source._replace(revision=revision or source.revision)
    shown = f"{source}/{subfolder}" if subfolder else str(source)
    if only_data and over:
        raise WSDHubError(f"{name} is a model and an adapter: merge them (merge_and_unload), save the result, and pack it")
    patterns = (*DATA, "*.py") if trust_remote_code else DATA
    adapter = _fetch_adapter(over, cache or {}, patterns, trust_remote_code) if over else None
    with explained(source.place, source.revision), model_files(source, subfolder, cache or {}, patterns) as files:
        if subfolder and not files.folder.is_dir():
            raise WSDHubError(f"{source} has no folder {subfolder}: get all of it again, or give another subfolder")
        if not source.file:  # such a file is read alone
            _check_folder(shown, source, files.folder, patterns, trust_remote_code, only_data)

        def tokenizer_of(read: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase | None:
            if kind == "reference":
                return None
            tokenizer = adapter.tokenizer if adapter and adapter.tokenizer else read()
            check_template(name if adapter else shown, tokenizer, kind)
            return tokenizer

        def in_folder() -> PreTrainedTokenizerBase:
            return read_tokenizer(shown, files.folder, trust_remote_code, kind)

        if gguf := source.file or _only(shown, files.gguf):
            if only_data or kind == "reward model":
                raise WSDHubError(f"{shown} is in GGUF format, which no {'packed' if only_data else 'reward'} model can be in")
            file = files.fetch(gguf)
            header = read_header(shown, file)
            config = read_gguf_config(shown, file, header, kind)
            beside = not source.file and (files.folder / "tokenizer.json").is_file()
            tokenizer = tokenizer_of(in_folder if beside else lambda: read_gguf_tokenizer(shown, file, header))
            weights, tensors = [file], float(len(header.weights))
        else:
            config = read_config(shown, files.folder, trust_remote_code, kind)
            tokenizer = tokenizer_of(in_folder)
            weights = fetch_weights(shown, files.folder, files.fetch, use_safetensors)
            tensors = sum(map(count_tensors, weights))
        check_sizes(shown, config, weights, tensors, trust_remote_code, kind)
        if adapter and adapter.tokenizer:
            check_vocabulary(adapter.name, adapter.tokenizer, shown, config)
    return Fetched(name, kind, files.folder, weights, config, tokenizer, trust_remote_code, use_safetensors, adapter)


def read_model(fetched: Fetched, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Reads the weights of a fetched model; `load_pilot` documents arguments and errors."""
    given = dict(kwargs)
    if fetched.in_gguf:
        if kwargs.get("quantization_config") is not None:
            raise WSDValueError(f"quantization_config has no effect on {fetched.name}, which is in GGUF format: leave it out")
        given |= {"config": fetched.config, "quantization_config": GgufConfig(dequantize=True)}
    place = alone(fetched.weights[0]) if fetched.in_gguf else nullcontext({"pretrained_model_name_or_path": fetched.folder})
    try:
        with READING, place as where:
            model, report = auto_class(fetched.kind).from_pretrained(
                **where,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=fetched.trust_remote_code,
                use_safetensors=fetched.use_safetensors,
                output_loading_info=True,
                **{"ignore_mismatched_sizes": True} | given,
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
    _compat.decompress(model)
    if fetched.in_gguf:
        _compat.forget_quantizer(model)
    if fetched.adapter:
        model = with_adapter(model, fetched.adapter.name, fetched.adapter.settings, fetched.adapter.weights)
    for named in (model, model.config, fetched.tokenizer):
        if named is not None:
            named.name_or_path = fetched.name
    return model


def _fetch_adapter(source: Source, cache: dict[str, Any], patterns: tuple[str, ...], trust_remote_code: bool) -> Adapter:
    with explained(source.place, source.revision), model_files(source, "", cache, patterns) as files:
        check_files(source, files.folder, patterns, trust_remote_code)
        settings = adapter_settings(str(source), files.folder)
        has_tokenizer = (files.folder / "tokenizer_config.json").is_file()
        tokenizer = read_tokenizer(str(source), files.folder, trust_remote_code, "adapter") if has_tokenizer else None
        return Adapter(str(source), settings, adapter_weights(str(source), files.fetch), tokenizer)


def check_files(source: Source, folder: Path, patterns: tuple[str, ...], trust_remote_code: bool) -> None:
    """Raises a WSDHubError if links lead out of a folder, or files are not as the Hub gave them."""
    if not trust_remote_code and Path(source.place).is_dir():
        check_links(Path(source.place), folder)
    check_whole(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _check_folder(
    shown: str, source: Source, folder: Path, patterns: tuple[str, ...], trust_remote_code: bool, only_data: bool
) -> None:
    """Raises a WSDHubError if transformers would read more than a model's own files."""
    if (folder / ADAPTER).exists():
        raise WSDHubError(f"{shown} has an adapter ({ADAPTER}): name the model that it goes over too, as MODEL+{shown}")
    check_files(source, folder, patterns, trust_remote_code)
    if only_data and (code := code_in(folder)):
        raise WSDHubError(
            f"{shown} has {code}: its Python code would run in a packed model, loaded with trust_remote_code=True; "
            "remove that, if transformers knows this type of model without it, or give another model"
        )


def _only(shown: str, files: list[str]) -> str | None:
    """The GGUF file that a folder consists of; a WSDHubError if there are several."""
    if len(files) > 1:
        raise WSDHubError(f"{shown} has {len(files)} GGUF files ({', '.join(files):.300}): give one, as {shown}/{files[0]}")
    return files[0] if files else None
