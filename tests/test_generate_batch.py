"""transformers' continuous batching, in which no strategy takes part: refused by name, else untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList

import wsd_hf
from oracle import plain_tokens

PROMPT = [5, 6, 7]


@pytest.mark.parametrize(
    "keywords",
    [
        {"strategy": "wsd"},
        {"strategy": wsd_hf.WSDConfig()},
        {"assistant_model": "a pilot"},
        {"wsd_threshold": 0.5},
        {"beta": 1.0},
    ],
    ids=str,
)
def test_keywords_of_strategies_are_refused(base: Any, keywords: dict[str, Any]) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=rf"{next(iter(keywords))} has no effect in generate_batch.*call generate\("):
        base.generate_batch([PROMPT], **keywords)


@pytest.mark.parametrize("kind", [list, LogitsProcessorList])
def test_a_logits_processor_is_refused(base: Any, pilot: Any, kind: Any) -> None:
    processors = kind([wsd_hf.WSDLogitsProcessor(pilot)])
    with pytest.raises(wsd_hf.WSDValueError, match=r"WSDLogitsProcessor, which has no effect with generate_batch"):
        base.generate_batch([PROMPT], logits_processor=processors)
    paged = {"cache_implementation": "paged"}
    for arguments, keywords in [
        ((), {"logits_processor": processors, **paged}),
        ((GenerationConfig(**paged), processors), {}),
    ]:
        with pytest.raises(wsd_hf.WSDValueError, match=r"has no effect with cache_implementation='paged'"):
            base.generate(torch.tensor([PROMPT]), *arguments, **keywords)


def test_other_calls_are_as_before(own_base: Any) -> None:
    settings = GenerationConfig(max_new_tokens=4, do_sample=False)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    [answer] = own_base.generate_batch([PROMPT], generation_config=settings, continuous_batching_config=small).values()
    assert answer.generated_tokens == plain_tokens(own_base, torch.tensor([PROMPT]), 4)
