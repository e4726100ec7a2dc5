"""`wsd-hf eval`: the questions of a benchmark, asked one after the other."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import track

from ..config import WSDConfig
from ..evaluation.export import AnswerFile
from ..text.chat import Messages
from .models import Pair, answer, response_text


def write_answers(answers: AnswerFile, load: Callable[[], Pair], config: WSDConfig, max_new_tokens: int) -> None:
    """Asks what an answer file still lacks; greedily, where FastChat itself samples some categories of MT-Bench.

    Args:
        answers: the file.
        load: gives the models; called if there is anything to ask.
        config: settings of the decoding.
        max_new_tokens: of each answer.
    """
    console = Console(stderr=True)
    if not answers.missing:
        console.print("every question has its answer already")
        return
    with console.status("loading both models"):
        pair = load()

    def ask(chat: Messages) -> str:
        output = answer(pair, chat, config, max_new_tokens, do_sample=False)
        return response_text(output.sequences, output.prompt_length, pair[2])

    for question in track(answers.missing, "asking", console=console):
        answers.add(question, ask)
