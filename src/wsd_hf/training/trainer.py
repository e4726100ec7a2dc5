"""Training by TRL: `SFTTrainer` and `DPOTrainer` over rows that are token ids already. Imports the extra `train`."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .._compat import dpo_trainer_of_token_ids
from ..errors import WSDValueError
from ..files import write_whole
from ..hub.loading import Fetched, read_model
from ..hub.names import parse_name
from .checkpoints import last_whole, mark_whole
from .folder import ADAPTER, CHECKPOINTS, LOSSES, PILOT
from .masking import Row
from .recipe import Recipe, Report

KEPT = 2
"""Checkpoints that are kept: the last one, and one to go back to if it is damaged."""

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""Name of the argument, of which transformers 5.17 has the second only."""


def train(pilot: Fetched, rows: Sequence[Row], recipe: Recipe, folder: Path, device: str, report: Report | None) -> None:
    """Trains a pilot, from the last whole checkpoint if there is one, and saves it.

    The folder gets the losses, the adapter and, at last, the tuned pilot.

    Args:
        pilot: the pilot to train.
        rows: the trained parts.
        recipe: settings.
        folder: of the run.
        device: "cpu" or "cuda".
        report: called after each step, if given.

    Raises:
        WSDValueError: a batch that cannot be split between the processes, or weights that are spread over them.
    """
    model = read_model(pilot, torch.float32)
    # TRL and transformers write pad token, end of text and use_cache into them.
    config, generation_config = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    trainer = _trainer(model, copy.deepcopy(pilot.tokenizer), rows, recipe, _arguments(len(rows), recipe, folder, device))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise WSDValueError("FSDP and DeepSpeed spread weights over processes: train a pilot with plain data parallelism")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Marks())
    if report is not None:
        trainer.add_callback(_Reports(report))
    with PartialState().main_process_first():
        checkpoint = last_whole(folder / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not PartialState().is_main_process:
        return
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    write_whole(folder / LOSSES, json.dumps(losses, indent=1) + "\n")
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel):
        _save_adapter(trained, pilot, folder / ADAPTER)
        trained = trained.merge_and_unload()
    trained.config, trained.generation_config = config, generation_config
    _save(trained, pilot, folder / PILOT)


def _arguments(rows: int, recipe: Recipe, folder: Path, device: str) -> dict[str, Any]:
    """Arguments that TRL's two trainers share. bf16 and checkpointing of activations, which TRL turns on, are for GPUs."""
    processes = PartialState().num_processes
    forwards = recipe.forwards_per_step(processes)
    gpu = device != "cpu"
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "per_device_train_batch_size": recipe.batch_size // processes // forwards,
        "gradient_accumulation_steps": forwards,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.peak_learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": -(-rows // recipe.batch_size) * recipe.epochs // 10,
        "max_length": None,
        "seed": recipe.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint_every,
        "save_total_limit": KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        CHECKPOINTING: gpu,
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,
    }


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    arguments: dict[str, Any],
) -> Any:
    rank = recipe.lora_rank
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    shared = {"model": model, "processing_class": tokenizer, "peft_config": adapter}
    if recipe.objective == "sft":
        pad = tokenizer.pad_token_id
        return SFTTrainer(
            **shared,
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_list([row.sft() for row in rows]),
            # TRL's default collator writes a pad token into the configs; positions without attention may hold any token.
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0 if pad is None else pad),
        )
    return dpo_trainer_of_token_ids(
        **shared,
        ref_model=None if rank else copy.deepcopy(model),
        args=DPOConfig(**arguments, beta=recipe.beta, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0]),
        train_dataset=Dataset.from_list([row.preference() for row in rows]),
    )


def _save_adapter(model: PeftModel, pilot: Fetched, folder: Path) -> None:
    """Saves an adapter without the card that PEFT writes, and without the path of a pilot that is on this machine only."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    place = parse_name(pilot.name).model.place
    config["base_model_name_or_path"] = None if Path(place).exists() else place
    write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save(model: PreTrainedModel, pilot: Fetched, folder: Path) -> None:
    """Saves a tuned pilot, whole or not at all, in the data type of the untuned one."""
    dtype = (
        None if pilot.in_gguf else AutoConfig.from_pretrained(pilot.folder).dtype
    )  # checks have changed that of pilot.config
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to("cpu", dtype or torch.float32).save_pretrained(unfinished)
    pilot.tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)


class _Marks(TrainerCallback):
    """Marks each checkpoint as whole, once all processes have written their files."""

    def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Reports(TrainerCallback):
    """Passes losses on."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self._report(state.global_step, state.max_steps, logs["loss"])
