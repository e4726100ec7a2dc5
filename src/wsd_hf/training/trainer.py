"""Training by TRL: `SFTTrainer` and `DPOTrainer` over rows that are token ids already."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .._compat import dpo_trainer_of_token_ids
from ..errors import WSDValueError
from .checkpoints import last_whole, mark_whole
from .masking import Row
from .recipe import Recipe

KEPT = 2
"""Checkpoints that are kept: the last one, and one to go back to if it is damaged."""

Report = Callable[[int, int, float], None]
"""Called after each step with its number, the number of all steps, and its loss."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    folder: Path,
    device: str,
    report: Report | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains a model, from the last whole checkpoint of a folder if there is one.

    Args:
        model: in float32; it is changed.
        tokenizer: the pilot's; TRL gets a copy, in which it may set a pad token.
        rows: the trained parts.
        recipe: settings.
        folder: of the checkpoints.
        device: "cpu" or "cuda".
        report: see `Report`.

    Returns:
        The trained model, or a `PeftModel` around it, and the loss of each step: `{"step": ..., "loss": ...}`.

    Raises:
        WSDValueError: a batch that cannot be split between the processes, or weights that are spread over them.
    """
    trainer = _trainer(model, copy.deepcopy(tokenizer), rows, recipe, _arguments(len(rows), recipe, folder, device))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise WSDValueError("FSDP and DeepSpeed spread the weights over processes; train a pilot with plain data parallelism")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Marks())
    if report is not None:
        trainer.add_callback(_Reports(report))
    with PartialState().main_process_first():
        checkpoint = last_whole(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    return trainer.accelerator.unwrap_model(trainer.model), losses


def _arguments(rows: int, recipe: Recipe, folder: Path, device: str) -> dict[str, Any]:
    """Arguments that TRL's two trainers share. bf16 and gradient checkpointing, which TRL turns on, are for GPUs."""
    processes = PartialState().num_processes
    forwards = recipe.forwards_per_step(processes)
    steps = -(-rows // recipe.batch_size) * recipe.epochs
    gpu = device != "cpu"
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.batch_size // processes // forwards,
        "gradient_accumulation_steps": forwards,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.peak_learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // 10,
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
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
    }


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    arguments: dict[str, Any],
) -> Any:
    shared = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if recipe.lora_rank
        else None,
    }
    if recipe.objective == "sft":
        pad = tokenizer.pad_token_id
        return SFTTrainer(
            **shared,
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_list([row.sft() for row in rows]),
            # Without a collator, TRL writes a pad token into the configs; masked positions may hold any token.
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0 if pad is None else pad),
        )
    return dpo_trainer_of_token_ids(
        **shared,
        ref_model=None if recipe.lora_rank else copy.deepcopy(model),
        args=DPOConfig(**arguments, beta=recipe.beta, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0]),
        train_dataset=Dataset.from_list([row.preference() for row in rows]),
    )


class _Marks(TrainerCallback):
    """Marks each checkpoint as whole, once all processes have written their files."""

    def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Reports(TrainerCallback):
    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self._report(state.global_step, state.max_steps, logs["loss"])
