"""The reward of a command, from its option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..comparison.judges import find_function
from ..errors import WSDValueError
from ..hub.loading import fetch_model, read_model
from .models import Loading

REWARDS = {"tiny_world": "wsd_hf.tiny.judge:manners"}
"""Functions by their names."""

Reward = Annotated[
    str | None,
    typer.Option(
        help="Reward for reward_guided: a path or Hub id of a sequence-classification model with one label, "
        f"{', '.join(REWARDS)}, or package.module:function, from texts, their ends and the numbers of their prompts to numbers."
    ),
]


def load_reward(name: str | None, loading: Loading) -> dict[str, Any]:
    """Keywords of `generate` for the reward that an option names; none without one.

    Raises:
        WSDValueError: neither a function nor a model that can be loaded.
    """
    if name is None:
        return {}
    if name in REWARDS or (":" in name and not Path(name).exists()):
        return {"reward": find_function("--reward", name, REWARDS)}
    keywords = loading.keywords()
    try:
        fetched = fetch_model(name, "reward model", use_safetensors=None)
        model = read_model(fetched, **keywords)
    except Exception as error:  # the readers of weights and tokenizers raise what they like over a damaged file
        raise WSDValueError(f"--reward {name}: {error}") from error
    return {"reward": loading.place(model), "reward_tokenizer": fetched.tokenizer}
