"""The model card of a tuned pilot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..comparison.table import Row, markdown
from ..hub.card import model_card

CARD = """\
# {name}

A pilot for Weak-to-Strong Decoding ([Song et al., 2025](https://arxiv.org/abs/2506.07434)), tuned from `{source}` with
`wsd-hf train-pilot`: it writes the beginning of an answer, and a base writes the rest.

```python
from wsd_hf import Pair

pair = Pair.from_pretrained(BASE, "{name}")
output = pair.generate("How do I tell a neighbour that the music is too loud?", max_new_tokens=512)
print(pair.answers(output)[0])
```

## Training

| setting | |
|---|---|
{settings}

Mean log-probability of a token in the trained parts of the chosen answers: {before:.2f} before, {after:.2f} after.
"""

MEASURED = """
## Measured

{records}, with the base `{base}`:

{table}"""


def tuned_card(
    name: str,
    settings: Mapping[str, Any],
    log_probs: tuple[float, float],
    table: Sequence[Row],
    warnings: Sequence[str],
) -> ModelCard:
    """The card, which names models of this machine by their folders' names alone.

    Args:
        name: of the pilot.
        settings: of the training, as `settings.json` has them.
        log_probs: see `mean_log_prob`, before and after.
        table: see `before_and_after`; may be empty.
        warnings: see `warnings_of`.
    """
    shown = {key: _name(value) if key in ("pilot", "base") else value for key, value in settings.items()}
    before, after = log_probs
    text = CARD.format(
        name=name,
        source=shown["pilot"],
        settings="\n".join(f"| {key} | {value} |" for key, value in shown.items() if value is not None),
        before=before,
        after=after,
    )
    text += "".join(f"\n**Warning:** {warning}.\n" for warning in warnings)
    if table:
        text += MEASURED.format(records=shown["prompts"], base=shown["base"], table=markdown(table))
    hub_id = settings["pilot"] if shown["pilot"] == settings["pilot"] else None
    return model_card(text, hub_id, ["wsd", "weak-to-strong-decoding", "pilot"])


def _name(model: str | None) -> str | None:
    """A Hub id, or the name of a folder without its path."""
    return Path(model).name if model and Path(model).is_absolute() else model
