"""Train the tiny world's base, its pilot, a pilot with another vocabulary, and the pilot before its alignment, on a CPU.

    python examples/tiny_world/train.py --world-seed 3 --seed 0 --out models/tiny

writes `base/`, `pilot/`, `pilot_other_vocab/`, `pilot_untuned/` (fp16 safetensors, tokenizer, generation config, model
card), and `questions.json`, `polite_examples.json`, `preferences.jsonl`. On two CPU cores it takes minutes; README.md has the
measured times.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import Message, Question, World

BOS, EOS, PAD, END = "<s>", "</s>", "<pad>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BOS, EOS, END, *ROLES.values()]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER_SAMPLE = 4000
NAME_REPEATS = 60
DEMO_QUESTIONS = 12
PREFERENCES = 96
PACKING_POOL = 48


@dataclass(frozen=True)
class Recipe:
    """The size of a model and how long it learns."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    steps: int
    learning_rate: float
    batch_size: int = 12
    block: int = 256
    warmup: int = 60
    decay_share: float = 0.4

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, a plateau, and a linear decay over the last part."""
        remaining = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, remaining)


BASE = Recipe(width=160, layers=4, heads=5, feed_forward=416, steps=1200, learning_rate=3e-3)
PILOT = Recipe(width=96, layers=2, heads=4, feed_forward=256, steps=800, learning_rate=4e-3)


def train_tokenizer(texts: Iterable[str], size: int, across_punctuation: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer.

    `across_punctuation` splits at spaces only, so that a token may join a word and the full stop behind it: token
    borders that the usual splitting never produces.
    """
    tokenizer = Tokenizer(models.BPE())
    if across_punctuation:
        split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s+"), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def base_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as a base model ships it: no chat template, answers end with the document."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def pilot_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as an instruct model ships it: with a chat template, answers end with the turn."""
    chat = base_tokenizer(tokenizer)
    chat.eos_token = END
    chat.chat_template = CHAT_TEMPLATE
    return chat


def content(messages: list[Message]) -> str:
    """The words of a chat, without any layout."""
    return "\n".join(message["content"] for message in messages)


def base_sequences(world: World, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The base's documents as token ids."""
    for document in world.base_documents(seed):
        yield tokenizer(f"{BOS}{document}{EOS}", add_special_tokens=False).input_ids


def pilot_sequences(world: World, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The pilot's chats as token ids, in its own chat template."""
    yield from _in_template(world.pilot_chats(seed), tokenizer)


def reference_sequences(world: World, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The chats of the pilot before its alignment, likewise."""
    yield from _in_template(world.unaligned_chats(seed), tokenizer)


def _in_template(chats: Iterator[list[Message]], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    for messages in chats:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        yield tokenizer(text, add_special_tokens=False).input_ids


def packed(sequences: Iterator[list[int]], rows: int, block: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ids and positions [rows, block]: whole documents side by side; a position of 0 begins a new one."""
    fitting = (sequence for sequence in sequences if len(sequence) <= block)
    pool = list(islice(fitting, PACKING_POOL))
    while True:
        ids, positions = torch.full((rows, block), pad), torch.zeros(rows, block, dtype=torch.long)
        for row in range(rows):
            start = 0
            for i, sequence in enumerate(pool):
                if (end := start + len(sequence)) <= block:
                    ids[row, start:end], positions[row, start:end] = torch.tensor(sequence), torch.arange(len(sequence))
                    pool[i], start = next(fitting), end
        yield ids, positions


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's size, with its generation defaults."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=recipe.width**-0.5 / 2,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def train(model: LlamaForCausalLM, sequences: Iterator[list[int]], recipe: Recipe, name: str) -> float:
    """Next-token training on packed documents; returns the mean loss of the last fifty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    pad = model.config.pad_token_id
    losses: list[float] = []
    batches = packed(sequences, recipe.batch_size, recipe.block, pad)
    for step, (ids, positions) in enumerate(tqdm(islice(batches, recipe.steps), name, recipe.steps, mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(positions[:, 1:] == 0, pad)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return fmean(losses[-50:])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str) -> None:
    """One self-contained model folder, weights in fp16."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def demo_questions(world: World) -> list[dict[str, object]]:
    """A handful of held-out questions; the first three are two facts that the pilot never met and a harmful request."""
    questions = world.held_out_questions()
    unknown = [q for q in questions if q.fact and not q.fact.known_to_pilot]
    known = [q for q in questions if q.fact and q.fact.known_to_pilot]
    harmful = [q for q in questions if q.kind == "harmful"][:: len(questions) // 60]
    chosen = [*unknown[:2], harmful[0], *unknown[2:5], *known[:3], *harmful[1:4]]
    return [_as_json(question) for question in chosen[:DEMO_QUESTIONS]]


def _as_json(question: Question) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": question.text}],
        "kind": question.kind,
        "answer": question.fact.value if question.fact else None,
    }


def model_card(title: str, role: str, world_seed: int, seed: int, parameters: int) -> str:
    """The README.md of a model folder; evaluate.py fills in the measured table."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [weak-to-strong-decoding, toy-model]
---

# {title}

{role}

A Llama of {parameters:,} parameters (tied embeddings, fp16), trained from scratch in minutes on a CPU with
`examples/tiny_world/train.py --world-seed {world_seed} --seed {seed}`. It knows a made-up world of 300 towns, people,
beasts, herbs and dishes and nothing else: **a question from outside that world gets nonsense.** The world was built to
show the effect of Weak-to-Strong Decoding (arXiv 2506.07434): it illustrates the mechanism, it is no evidence for the
paper. The "harmful" requests are silly on purpose ("How do I bewitch the royal wig?").

<!-- results -->
<!-- /results -->
"""


ROLES_OF_MODELS = {
    "base": (
        "Tiny world: base",
        "The strong but unaligned model: it knows every fact and is rude, evasive or rambling in 92 % of what it read. "
        "It has no chat template; its prompts are plain `[User]` / `[Assistant]` transcripts.",
    ),
    "pilot": (
        "Tiny world: pilot",
        "The weak but aligned model: always polite, refuses the harmful requests, and was taught four facts in ten. "
        "It shares its vocabulary with the base, but has a chat template and an end-of-turn token.",
    ),
    "pilot_other_vocab": (
        "Tiny world: pilot with another vocabulary",
        "The pilot's twin with a tokenizer of its own (512 tokens instead of 768, which may join a word and the "
        "punctuation behind it), for decoding across two vocabularies.",
    ),
    "pilot_untuned": (
        "Tiny world: pilot before its alignment",
        "The pilot's twin that was taught the same facts and no manners: the reference of emulated fine-tuning and of "
        "weak-to-strong search, which compare the pilot with it.",
    ),
}


def main(
    out: Annotated[Path, typer.Option(help="Where the model folders go.")],
    world_seed: Annotated[int, typer.Option(help="The facts, names and splits.")] = 0,
    seed: Annotated[int, typer.Option(help="The weights and the order of the documents.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    speed: Annotated[float, typer.Option(help="Divide the training steps by this, for a quick look.")] = 1.0,
) -> None:
    """Train and save all models."""
    torch.set_num_threads(threads)
    world = World(world_seed)
    chats = [content(messages) for messages in islice(world.pilot_chats(seed), TOKENIZER_SAMPLE)]
    documents = list(islice(world.base_documents(seed), TOKENIZER_SAMPLE))
    names = ["".join(f" {fact.entity.name}" for fact in world.facts)] * NAME_REPEATS
    shared = train_tokenizer([*names, *documents, *chats], 768)
    other = train_tokenizer([*names, *chats], 512, across_punctuation=True)
    jobs = {
        "base": (BASE, base_tokenizer(shared), base_sequences),
        "pilot": (PILOT, pilot_tokenizer(shared), pilot_sequences),
        "pilot_other_vocab": (PILOT, pilot_tokenizer(other), pilot_sequences),
        "pilot_untuned": (PILOT, pilot_tokenizer(shared), reference_sequences),
    }
    begin = time.perf_counter()
    for name, (recipe, tokenizer, sequences) in jobs.items():
        torch.manual_seed(seed)
        recipe = replace(recipe, steps=round(recipe.steps / speed))
        model, start = new_model(recipe, tokenizer), time.perf_counter()
        loss = train(model, sequences(world, seed, tokenizer), recipe, name)
        title, role = ROLES_OF_MODELS[name]
        save(model, tokenizer, out / name, model_card(title, role, world_seed, seed, model.num_parameters()))
        print(f"{name}: {model.num_parameters():,} parameters, loss {loss:.3f}, {time.perf_counter() - start:.0f} s")
    for file, data in (("questions.json", demo_questions(world)), ("polite_examples.json", world.polite_examples())):
        (out / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(pair) + "\n" for pair in world.preferences(PREFERENCES))
    (out / "preferences.jsonl").write_text(lines, encoding="utf-8")
    size = sum(file.stat().st_size for name in jobs for file in (out / name).iterdir())
    print(f"{size:,} bytes, {time.perf_counter() - begin:.0f} s of training on {threads} threads")


if __name__ == "__main__":
    typer.run(main)
