"""A model directory that makes every caller of `generate` run Weak-to-Strong Decoding: writing one, and what its code calls."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer
from transformers.utils import logging

from . import _compat
from .engine.checks import check_prompt, check_token_ids, eos_token_ids, known_ids, vocabulary_size
from .engine.small_model import left_padded
from .errors import WSDValueError
from .generation import generate_with, streamer_ended_on_error
from .hub.loading import Fetched, check_whole, fetch_model, load_pilot
from .hub.model_folder import data_files, json_object
from .strategies.wsd.config import WSDConfig
from .text.chat import BASE_CHAT_TEMPLATE, encode_turns
from .text.chat_parser import ChatLayout
from .text.next_turn import answer_length, next_turn_criteria
from .text.streaming import AnswerStreamer
from .text.token_texts import plain_text
from .text.visible import visible
from .text.vocabulary import same_vocabulary

logger = logging.get_logger(__name__)

PILOT = "pilot"
"""The folder of a bundle that holds the pilot."""

ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
"""What transformers' `generate` may be given by position."""

TRANSCRIPT = "{{ bos_token }}" + BASE_CHAT_TEMPLATE
"""The chat template of a base that has none; with the BOS that `build_inputs` puts in front."""


class Packed(NamedTuple):
    """What `pack` did."""

    folder: Path
    weights: dict[str, Path]
    """The files of weights in the folder, and what each is a link to, or a copy of."""
    reads_chats: bool
    """Whether the pilot gets chats in its own template; else what the base's template writes cannot be read back."""


def pack(
    base: str | os.PathLike[str],
    pilot: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    wsd_config: WSDConfig | None = None,
    copy: bool = False,
) -> Packed:
    """Writes a model directory whose `generate` runs Weak-to-Strong Decoding, whoever calls it.

    That is `from_pretrained(folder, trust_remote_code=True).generate(...)`, `transformers serve --trust-remote-code`, and
    `model.generate(..., custom_generate=folder, trust_remote_code=True)`. The directory holds the base with its tokenizer, the
    pilot in `pilot/`, and a few lines of code that call `wsd_hf.bundle.generate`. A base without a chat template gets
    `BASE_CHAT_TEMPLATE`; `wsd_config` goes into `generation_config.json`. Models are not loaded. Of their files, weights and
    data are taken, and no code.

    Args:
        base: folder or Hub id of the base.
        pilot: folder or Hub id of the pilot, with the chat template that it was tuned with.
        folder: what is written; missing or empty.
        wsd_config: the settings; default: the paper's.
        copy: whether weights are copied. By default they are symbolic links: they must stay where they are.

    Raises:
        WSDValueError: there is something in `folder`, or links cannot be made there.
        WSDHubError: base or pilot cannot be had (see `load_pilot`), or names Python code of its own, which
            trust_remote_code=True would run. Nothing is written then.
    """
    out = Path(folder).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WSDValueError(f"folder={os.fspath(folder)!r}: must be missing or an empty folder; give another, or empty it")
    fetched_pilot = _fetch(os.fspath(pilot), "pilot")  # the smaller one first: faults show sooner
    fetched_base = _fetch(os.fspath(base), "base")
    tokenizer = fetched_base.tokenizer
    own_template = tokenizer.chat_template
    tokenizer.chat_template = own_template or TRANSCRIPT
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        new = Path(place, out.name)
        _write_model(new, fetched_base, copy)
        _write_model(new / PILOT, fetched_pilot, copy)
        if not own_template:
            (new / "chat_template.jinja").write_text(TRANSCRIPT, encoding="utf-8")
        _write_generation_config(new, wsd_config or WSDConfig())
        _write_code(new / "custom_generate")
        _card([name for name in map(str, (base, pilot)) if not Path(name).expanduser().is_dir()]).save(new / "README.md")
        new.replace(out)
    weights = {file.name: file.resolve() for file in fetched_base.weights}
    weights |= {f"{PILOT}/{file.name}": file.resolve() for file in fetched_pilot.weights}
    return Packed(out, weights, _reads_chats(tokenizer))


def generate(*args: Any, model: PreTrainedModel, **kwargs: Any) -> Any:
    """`generate` of a packed model; its pilot is loaded at the first call, and kept as long as the model.

    Callers hand over tokens. If they are a chat in the layout of the bundle's chat template, the pilot gets that chat in its
    own template (`ChatLayout` says what is lost on the way); else it gets the same text. An answer to a chat by transcript
    (and a text in the same batch) ends before the header of the next turn, with the base's EOS; only
    `return_dict_in_generate=True` shows the response as it was decoded.

    Args:
        *args: as transformers' `generate` takes them.
        model: the base.
        **kwargs: as `WSDGenerationMixin.generate` takes them, but for the pilot; None counts as not given.

    Raises:
        WSDValueError: a pilot is given, or what `generate(strategy=...)` refuses.
        WSDHubError: there is no pilot where the model was loaded from.
    """
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    given = {name: value for name, value in given.items() if value is not None}
    streamer = given.get("streamer")
    if streamer is None:
        return _generate(model, given)
    given["streamer"] = _Unended(streamer)
    with streamer_ended_on_error(streamer if isinstance(streamer, Iterator | AsyncIterator) else None):
        output = _generate(model, given)
    streamer.end()
    return output


def _generate(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    for name in ("assistant_model", "assistant_tokenizer"):
        if name in given:
            raise WSDValueError(
                f"{name} is given, and this model brings its own pilot: leave it out, or load the model without "
                "trust_remote_code, with wsd_hf.AutoModelForCausalLM"
            )
    strategy = given.pop("strategy", "wsd")
    partner = _partner(model, given.pop("revision", None))
    if strategy == "wsd" and partner.wsd_config is not None:
        given.setdefault("wsd_config", partner.wsd_config)
    prompt = given.get("input_ids", given.get("inputs"))
    chats = prompt is not None and partner.add_pilot_prompt(given, prompt, model)
    transcript = chats and BASE_CHAT_TEMPLATE in partner.tokenizer.chat_template
    if transcript:
        given["stopping_criteria"] = [*given.get("stopping_criteria", []), *next_turn_criteria(partner.tokenizer)]
        if "streamer" in given:
            given["streamer"] = AnswerStreamer(given["streamer"], partner.tokenizer)
    given |= {"tokenizer": partner.tokenizer, "assistant_tokenizer": partner.pilot_tokenizer}
    plain_generate = functools.partial(type(model).generate, model)  # model.generate is this module's
    output = generate_with(strategy, plain_generate, model, assistant_model=partner.pilot, **given)
    if prompt is None or not transcript or not isinstance(output, torch.Tensor):
        return output
    return _before_next_turn(output, prompt.shape[1], partner.tokenizer, model.generation_config)


class _Unended(BaseStreamer):
    """A streamer that no error ends: a server would take that for the end of its answer, and never tell of the error."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.put = streamer.put

    def end(self) -> None:
        """Nothing: who made this ends the streamer."""


class _Partner(NamedTuple):
    """What a bundle adds to its base. Holds no reference to it."""

    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pilot_tokenizer: PreTrainedTokenizerBase
    layout: ChatLayout
    wsd_config: WSDConfig | None
    """The settings of the bundle; None where the base carries them."""

    def add_pilot_prompt(self, given: dict[str, Any], ids: torch.Tensor, base: PreTrainedModel) -> bool:
        """Adds the pilot's prompts to the arguments where there are chats among the base's; returns whether there are."""
        check_token_ids("input_ids", ids)
        mask = given.get("attention_mask")
        if mask is None:
            mask = _unpadded(ids, self.tokenizer)
        check_prompt("input_ids", ids, mask, rows=len(ids))
        known_ids("input_ids", ids, mask, "the base", base)
        rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        prompts = [self._chat_prompt(row) for row in rows]
        if not any(prompts):
            return False
        if "assistant_input_ids" not in given:
            same = same_vocabulary(vocabulary_size(base), vocabulary_size(self.pilot), self.tokenizer, self.pilot_tokenizer)
            texts = (row if same else self.pilot_tokenizer.encode(plain_text(self.tokenizer, row)) for row in rows)
            padded = left_padded([prompt or text for prompt, text in zip(prompts, texts, strict=True)], ids.device)
            given["assistant_input_ids"], given["assistant_attention_mask"] = padded
        return True

    def _chat_prompt(self, row: list[int]) -> list[int] | None:
        chat = self.layout.read(row)
        if chat is None:
            return None
        try:
            return encode_turns("the pilot", chat.turns, chat.prefill, self.pilot_tokenizer)
        except WSDValueError as error:
            logger.warning_once(visible(f"{error}; the pilot gets the text of the base"))
            return None


_LOADING = threading.Lock()
_PARTNERS: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, str | None], _Partner]] = weakref.WeakKeyDictionary()


def _partner(model: PreTrainedModel, revision: str | None) -> _Partner:
    """The partner of a model, from the bundle that `generate` was called with or that the model was loaded from."""
    source = _compat.custom_generate_source(model)
    own = source is None
    if source is None:
        source, revision = model.name_or_path, _compat.commit(model)
    with _LOADING:
        partners = _PARTNERS.setdefault(model, {})
        if (source, revision) not in partners:
            # The caller trusts the code of the bundle, so its links may lead elsewhere too.
            pilot, pilot_tokenizer = load_pilot(source, revision, model.dtype, subfolder=PILOT, trust_remote_code=True)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            config = None if own else WSDConfig.resolve({}, None, GenerationConfig.from_pretrained(source, revision=revision))
            partners[source, revision] = _Partner(pilot, tokenizer, pilot_tokenizer, ChatLayout(tokenizer), config)
        partner = partners[source, revision]
        partner.pilot.to(_compat.input_device(model))
    return partner


def _unpadded(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The mask of prompts that came without one: as in transformers, pad tokens are padding unless they may be an EOS."""
    pad = tokenizer.pad_token_id
    if pad is None or pad in eos_token_ids(tokenizer):
        return torch.ones_like(ids)
    return ids.ne(pad).cumsum(dim=1).clamp(max=1)


def _before_next_turn(
    sequences: torch.Tensor, prompt: int, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> torch.Tensor:
    """Responses that end with an EOS where the base wrote the header of the next turn."""
    eos = min(eos_token_ids(config) or eos_token_ids(tokenizer), default=None)
    if eos is None:
        return sequences
    pad = eos if config.pad_token_id is None else config.pad_token_id
    end = prompt
    for row in sequences:
        length = answer_length(row[prompt:].tolist(), tokenizer)
        if length is not None:
            row[prompt + length :] = pad
            row[prompt + length] = eos
        end = max(end, sequences.shape[1] if length is None else prompt + length + 1)
    return sequences[:, :end]


def _fetch(name: str, kind: Literal["base", "pilot"]) -> Fetched:
    fetched = fetch_model(name, kind, only_data=True)
    check_whole(fetched.weights)
    return fetched


def _write_model(folder: Path, model: Fetched, copy: bool) -> None:
    folder.mkdir()
    for file in data_files(model.folder):
        shutil.copyfile(file, folder / file.name)
    for file in model.weights:
        if copy:
            shutil.copyfile(file, folder / file.name)
            continue
        try:
            (folder / file.name).symlink_to(file.resolve())
        except OSError as error:
            raise WSDValueError(
                f"copy=False: no link to weights can be made in {folder.parent} ({error}): copy them"
            ) from error


def _write_generation_config(folder: Path, config: WSDConfig) -> None:
    """Adds the settings to the file; transformers would refuse to write again some that the authors of bases wrote."""
    file = folder / "generation_config.json"
    if file.is_file():
        settings = json_object(file)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
        settings.pop("_from_model_config", None)
    file.write_text(json.dumps(settings | config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _write_code(folder: Path) -> None:
    folder.mkdir()
    requirement = f"wsd_hf>={importlib.metadata.version('wsd_hf')}"
    (folder / "requirements.txt").write_text(requirement + "\n", encoding="utf-8")
    (folder / "generate.py").write_text(CODE.format(requirement=requirement), encoding="utf-8")


def _reads_chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    turns = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "This."}]
    turns += [{"role": "user", "content": "Why?"}]
    try:
        return ChatLayout(tokenizer).read(encode_turns("tokenizer", turns, "", tokenizer)) == (turns, "")
    except WSDValueError:
        return False


def _card(names: list[str]) -> ModelCard:
    data = ModelCardData(
        base_model=names or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["custom_generate", "wsd", "weak-to-strong-decoding"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{CARD}")


CODE = '''\
"""Weak-to-Strong Decoding, whenever this model generates; the pilot is in pilot/."""

try:
    from wsd_hf import bundle
except ImportError as error:
    raise ImportError("this model generates with {requirement}: install it (in a clone of it, `pip install .`)") from error


def generate(*args, model, **kwargs):
    return bundle.generate(*args, model=model, **kwargs)
'''

CARD = """\
# Weak-to-Strong Decoding in a directory

A large base model, and in `pilot/` a small aligned one that writes the beginning of every answer; the base writes the rest as
soon as it finds the pilot's words as likely as its own ([Song et al., 2025](https://arxiv.org/abs/2506.07434)). With
`trust_remote_code=True` and wsd_hf installed, every `generate` of this model does that; without `trust_remote_code`, this is
the base alone.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
chat = [{"role": "user", "content": "How do I tell a neighbour that the music is too loud?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=512)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`transformers serve THIS_DIRECTORY --trust-remote-code` answers over HTTP. The settings are the `wsd_*` keys of
`generation_config.json`.
"""
