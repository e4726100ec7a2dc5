"""The model card that goes to the Hub with a pilot."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData


def pilot_card(
    repo_id: str,
    *,
    base: str,
    finetuned_from: str | None = None,
    results: Mapping[str, Mapping[str, object]] | None = None,
) -> ModelCard:
    """The model card of a pilot: metadata for the Hub, how to use it, and what was measured.

    Its library is transformers: the weights need nothing else, and the Hub counts downloads for libraries that it knows. On the
    Hub, `base_model` is the origin of a model: so that is `finetuned_from`, and not the base that the pilot leads.

    >>> results = {"base": {"aligned": "0 %", "right": "99 %"}, "WSD": {"aligned": "100 %", "right": "100 %"}}
    >>> card = pilot_card("me/my-pilot", base="meta-llama/Llama-3.1-70B", results=results)
    >>> card.data.tags
    ['wsd', 'weak-to-strong-decoding', 'pilot']
    >>> print(card.text[card.text.index("|") :])
    |  | aligned | right |
    | --- | ---: | ---: |
    | base | 0 % | 99 % |
    | WSD | 100 % | 100 % |
    <BLANKLINE>

    Args:
        repo_id: Hub id of the pilot.
        base: Hub id of the base that the pilot is meant for, which the example uses.
        finetuned_from: Hub id of the model that the pilot was tuned from.
        results: measured values by method and measure, `{"WSD": {"aligned": "100.0 %"}}`: the rows and columns of a table.
    """
    measured = f"\n## Measured\n\n{_table(results)}\n" if results else ""
    text = CARD.format(name=repo_id.split("/")[-1], repo_id=repo_id, base=base)
    return model_card(text + measured, finetuned_from, ["wsd", "weak-to-strong-decoding", "pilot"])


def model_card(text: str, base_model: str | list[str] | None, tags: list[str]) -> ModelCard:
    """A text with metadata for the Hub."""
    data = ModelCardData(base_model=base_model, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


CARD = """\
# {name}

A pilot for Weak-to-Strong Decoding ([Song et al., 2025](https://arxiv.org/abs/2506.07434)): it writes the beginning of an
answer, and [{base}](https://huggingface.co/{base}) writes the rest as soon as it finds the pilot's words as likely as its own.

```python
from wsd_hf import Pair

pair = Pair.from_pretrained("{base}", "{repo_id}", device_map="auto")
output = pair.generate("How do I tell a neighbour that the music is too loud?", max_new_tokens=512)
print(pair.answers(output)[0])
```
"""


def _table(results: Mapping[str, Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    rows = [[method, *(str(row.get(column, "-")) for column in columns)] for method, row in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (["", *columns], ["---", *["---:"] * len(columns)], *rows))
