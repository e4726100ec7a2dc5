"""Answers to a data set by Ray Data: actors on one machine or many, each of which holds a base and a pilot.

python examples/ray_data.py PROMPTS.jsonl OUT    needs the extra ray: pip install "wsd_hf[ray]"

A line of prompts is `{"id": ..., "prompt": ...}`. The answers are JSON files in the folder OUT; several machines must share it,
and PROMPTS. The same command goes on with a run that was stopped: OUT.ids holds the ids that have an answer.
"""

import sys
from pathlib import Path

import ray

from wsd_hf import Pair


class Answers:
    def __init__(self) -> None:
        self.pair = Pair.tiny()  # models of your own: Pair.from_pretrained(BASE, PILOT, dtype="auto", device_map="cuda")

    def __call__(self, batch: dict) -> dict:
        chats = [[{"role": "user", "content": prompt}] for prompt in batch["prompt"]]
        output = self.pair.generate(chats, "wsd", max_new_tokens=64, do_sample=False)
        return {"id": batch["id"], "response": self.pair.answers(output)}


prompts, out = (Path(argument).resolve() for argument in sys.argv[1:])
checkpoint = {"id_column": "id", "checkpoint_path": f"{out}.ids", "delete_checkpoint_on_success": False}
ray.data.DataContext.get_current().checkpoint_config = ray.data.checkpoint.CheckpointConfig(**checkpoint)
data = ray.data.read_json(str(prompts), file_extensions=None, override_num_blocks=16)  # a block is kept once it is whole
# On GPUs, num_gpus=1. Actors take no CPU here, since Ray's own tasks take up to three, and wait forever where there are fewer.
data.map_batches(Answers, batch_size=4, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0).write_json(str(out))
