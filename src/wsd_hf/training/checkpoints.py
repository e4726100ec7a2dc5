"""Checkpoints of a training: whole ones are known by the digests of their files, which are written last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj
from transformers.utils import logging

from ..files import write_whole

logger = logging.get_logger(__name__)

DIGESTS = "sha256.json"


def mark_whole(checkpoint: Path) -> None:
    """Writes the digests of a checkpoint's files beside them."""
    write_whole(checkpoint / DIGESTS, json.dumps(_digests(checkpoint), indent=1) + "\n")


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; newer ones, unfinished or damaged, are removed. None if there is none."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is unfinished or damaged: it is removed, and the one before is taken", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        known = json.loads((checkpoint / DIGESTS).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known == _digests(checkpoint))


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return sha_fileobj(content).hex()
