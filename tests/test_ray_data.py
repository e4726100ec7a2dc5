"""examples/ray_data.py: two actors answer as one process does, and a run goes on with the ids that have no answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from time_limit import output_of
from wsd_hf import Pair
from wsd_hf.tiny import demo_questions

pytest.importorskip("ray.data", reason='no Ray Data: pip install "wsd_hf[ray]"', exc_type=ImportError)

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_data.py"


def answers(prompts: Path, out: Path) -> dict[str, str]:
    """The answers in the folder of a run of the example."""
    output_of([sys.executable, str(EXAMPLE), str(prompts), str(out)], env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    lines = [json.loads(line) for file in out.iterdir() for line in file.read_text("utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["response"] for line in lines}


@pytest.mark.sweep
def test_actors_answer_as_one_process_and_go_on(tmp_path: Path) -> None:
    chats = [question["messages"] for question in demo_questions()]
    rows = [{"id": f"question {number}", "prompt": chat[-1]["content"]} for number, chat in enumerate(chats)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    pair = Pair.tiny()
    expected = [pair.answers(pair.generate(chat, "wsd", max_new_tokens=64, do_sample=False))[0] for chat in chats]
    whole = {row["id"]: answer for row, answer in zip(rows, expected, strict=True)}
    begun = rows[::2]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in begun))
    assert answers(prompts, out) == {row["id"]: whole[row["id"]] for row in begun}
    before = {file: file.read_bytes() for file in out.iterdir()}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answers(prompts, out) == whole  # each once
    assert {file: file.read_bytes() for file in before} == before
