"""`train-pilot` in two processes of a launcher, which share the gradients of each batch by gloo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from time_limit import output_of
from wsd_hf.tiny import FOLDER

pytest.importorskip("trl", reason='no TRL: pip install "wsd_hf[train]"')

UNTUNED = Path(__file__).parents[1] / "examples" / "tiny_world" / "pilot_untuned"
OPTIONS = ["--lora-rank", "0", "--learning-rate", "1e-3", "--batch-size", "8", "--epochs", "1", "--checkpoint-every", "4"]


@pytest.mark.sweep
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    for name, arguments in {"one": [], "two": launcher}.items():
        command = [sys.executable, *arguments, "-m", "wsd_hf", "train-pilot", "--pilot", str(UNTUNED), "--data", "tiny_world"]
        command += [*OPTIONS, "--part", "8", "--base", str(FOLDER / "base"), "--out", str(tmp_path / name)]
        out, _ = output_of(command)
        assert out.count("Mean log-probability") == 1
    losses, two = (json.loads((tmp_path / name / "losses.json").read_text("utf-8")) for name in ("one", "two"))
    assert len(losses) == 12
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in losses], abs=1e-5)
    one, other = (load_file(tmp_path / name / "pilot" / "model.safetensors") for name in ("one", "two"))
    for weight, values in one.items():
        torch.testing.assert_close(other[weight], values, atol=2e-3, rtol=0)
