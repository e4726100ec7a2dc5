"""Writing of a model folder that holds a base, a pilot, and code that makes every `generate` use both."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ..errors import WSDValueError
from ..hub.card import model_card
from ..hub.files import check_whole
from ..hub.loading import Fetched, fetch_model
from ..hub.model_folder import data_files, json_object
from ..hub.names import parse_name
from ..strategies.wsd.config import WSDConfig
from ..text.chat import BASE_CHAT_TEMPLATE, encode_turns
from ..text.chat_parser import ChatLayout
from .decoding import PILOT

TRANSCRIPT = "{{ bos_token }}" + BASE_CHAT_TEMPLATE
"""Chat template for a base that has none; begins with BOS, as `build_inputs` does."""


class Packed(NamedTuple):
    """Result of `pack`."""

    folder: Path
    weights: dict[str, Path]
    """Source of each file of weights in the folder, by the file's name."""
    reads_chats: bool
    """True if chats can be read back from prompts, so that the pilot gets them in its own template."""


def pack(
    base: str | os.PathLike[str],
    pilot: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    wsd_config: WSDConfig | None = None,
    copy: bool = False,
) -> Packed:
    """Writes a model folder whose `generate` runs Weak-to-Strong Decoding for every caller.

    Such callers are `from_pretrained(folder, trust_remote_code=True).generate(...)`, `transformers serve --trust-remote-code`,
    and `model.generate(..., custom_generate=folder, trust_remote_code=True)`. The folder holds the base with its tokenizer, the
    pilot in `pilot/`, and a few lines of code that call `wsd_hf.bundle.generate`. A base without a chat template gets
    `BASE_CHAT_TEMPLATE`; `wsd_config` goes into `generation_config.json`. Models are not loaded. Their weights and data are
    packed, and no code of theirs.

    Args:
        base: folder or Hub id of the base, or `NAME@REVISION`.
        pilot: the pilot likewise, with the chat template that it was tuned with.
        folder: the folder to write; missing or empty.
        wsd_config: the settings; default: the paper's.
        copy: if True, weights are copied; by default they are symbolic links to files that must stay in their place.

    Raises:
        WSDValueError: `folder` is not empty, links cannot be made there, or a setting is an object.
        WSDHubError: base or pilot cannot be fetched (see `load_pilot`), or names Python code of its own, which
            trust_remote_code=True would run. Nothing is written then.
    """
    config = wsd_config or WSDConfig()
    config.check_travels()
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
        _write_generation_config(new, config)
        _write_code(new / "custom_generate")
        places = [parse_name(os.fspath(name)).model.place for name in (base, pilot)]
        on_hub = [place for place in places if not Path(place).is_dir()]
        model_card(CARD, on_hub or None, ["custom_generate", "wsd", "weak-to-strong-decoding"]).save(new / "README.md")
        new.replace(out)
    weights = {file.name: file.resolve() for file in fetched_base.weights}
    weights |= {f"{PILOT}/{file.name}": file.resolve() for file in fetched_pilot.weights}
    return Packed(out, weights, _reads_chats(tokenizer))


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
    """Adds the settings to the file; transformers would refuse to save some that authors of bases wrote."""
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
    said = ("user", "Which one?"), ("assistant", "This."), ("user", "Why?")
    turns = [{"role": role, "content": content} for role, content in said]
    try:
        return ChatLayout(tokenizer).read(encode_turns("tokenizer", turns, "", tokenizer)) == (turns, "")
    except WSDValueError:
        return False


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
