"""`strategy="weak_to_strong_search"`: of what the base writes, go on with what tuning made a small model prefer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ... import _compat
from ...engine.call import Call, decode_within, setting
from ...engine.checks import check_kind, check_models, check_room, eos_token_ids, vocabulary_size
from ...engine.keywords import needed
from ...engine.lockstep_stream import StepStream
from ...engine.small_model import SmallModel, tuned_and_untuned
from ...engine.stats import GuidedStats, peak_memory
from ...engine.supported import why_not_inputs, why_not_items, why_not_options
from ...errors import WSDValueError
from ...text.settled_tokens import ContinuationTokenizer
from ...text.vocabulary import same_vocabulary
from .beam import Beam, BeamSettings, ChunkBeamSearch, Hypothesis, Value
from .output import SearchGenerateOutput
from .value import ImplicitValue, Prompt


def weak_to_strong_search(
    generate: Callable[..., Any],
    base: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel | None = None,
    assistant_input_ids: torch.Tensor | None = None,
    assistant_attention_mask: torch.Tensor | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    reference_model: PreTrainedModel | None = None,
    reference_input_ids: torch.Tensor | None = None,
    reference_attention_mask: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    beam_width: int = BeamSettings.beam_width,
    successors: int = BeamSettings.successors,
    chunk_length: int | None = BeamSettings.chunk_length,
    official_ties: bool = BeamSettings.official_ties,
    value: Value | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Chunk-level beam search (Zhou et al., arXiv 2405.19262): the base samples, and every few tokens the best are kept.

    What is best is told by an `ImplicitValue`: the log-probability that the tuned small model gives the response, less that
    of the untuned one. Base and small models meet through text, so their vocabularies may differ. Sampling settings, processors
    and stopping criteria shape what the base writes, as in ordinary generation. A streamer gets what is settled: the tokens
    that all responses begin with that may still be returned.

    Args:
        generate: transformers' own `generate` of the base.
        base: the model that generates.
        assistant_model: the tuned small model.
        assistant_input_ids: its prompt, LongTensor[batch, prompt]; default: the base's, or its text.
        assistant_attention_mask: of that prompt, padded on the left; default: nothing is padded.
        assistant_tokenizer: of both small models; default: the base's.
        reference_model: the small model before tuning.
        reference_input_ids: its prompt; default: the tuned model's, if that was given, else the base's.
        reference_attention_mask: of that prompt.
        tokenizer: the base's; needed.
        beam_width: hypotheses that are kept of each prompt. `num_return_sequences` of them, the best, are returned.
        successors: samples that each is gone on with; `beam_width` times `successors` is at most 16,384.
        chunk_length: tokens between two selections; None: one at the end; then `beam_width=1` is best-of-`successors`.
        official_ties: follow the official code where a finished hypothesis is concerned; see `BeamSettings`.
        value: takes the place of the small models: any function of (texts, ended, of) to one number for each.
        generation_config: as transformers' `generate` takes it.
        **kwargs: likewise. `do_sample` need not be given: candidates are always sampled.

    Returns:
        LongTensor[batch, prompt + response], or a `SearchGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        WSDValueError: a missing model or tokenizer, an illegal setting, options tied to transformers' own loop.
        WSDLogitsError: logits that are no numbers.
    """
    settings = BeamSettings(beam_width, successors, chunk_length, official_ties)
    if setting("do_sample", kwargs, generation_config) is False:
        raise WSDValueError("do_sample=False: strategy='weak_to_strong_search' chooses among samples; leave it out")
    kwargs["do_sample"] = True
    if value is not None and not callable(value):
        raise WSDValueError(f"value={value!r}: must be a function of (texts, ended, of)")
    if isinstance(value, ImplicitValue):
        judges = {"value.tuned": value.tuned.model, "value.untuned": value.untuned.model}
        check_models({"the model": base, **judges})
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase)
    if tokenizer is None:
        raise WSDValueError("tokenizer=None: strategy='weak_to_strong_search' judges text; pass the base's tokenizer")
    for name, model in (("assistant_model", assistant_model), ("reference_model", reference_model)):
        if value is None and model is None:
            raise needed("weak_to_strong_search", name)
    scorer = tokenizer if assistant_tokenizer is None else assistant_tokenizer
    models = (
        (assistant_model, assistant_input_ids, assistant_attention_mask),
        (reference_model, reference_input_ids, reference_attention_mask),
    )
    small = tuned_and_untuned(*models, scorer) if value is None else ()

    def decode(call: Call) -> Any:
        judge = _implicit_value(call, small, tokenizer, scorer) if value is None else value
        return _search(call, settings, judge, tokenizer)

    name = "weak_to_strong_search"
    return decode_within(name, generate, base, decode, tokenizer=tokenizer, generation_config=generation_config, **kwargs)


def _search(call: Call, settings: BeamSettings, value: Value, tokenizer: PreTrainedTokenizerBase) -> Any:
    _check(call, settings)
    before = _work(value)
    prompts, mask = (tensor[:: call.copies] for tensor in call.prompt)
    stream = StepStream(call.base, prompts, mask, call.budget)
    search = ChunkBeamSearch(
        stream,
        call.processors,
        call.copies,
        call.criteria,
        ContinuationTokenizer(tokenizer).decode,
        value,
        settings,
        eos_token_ids(call.generation_config),
        call.pad_token_id,
    )
    streamed = 0
    while not search.ended:
        search.advance()
        streamed = _stream_settled(call, search.beams, streamed)
    if call.streamer is not None:
        call.streamer.end()
    found = [hypothesis for beam in search.beams for hypothesis in beam.best(call.copies)]
    sequences = _sequences(call, found)
    if not call.generation_config.return_dict_in_generate:
        return sequences
    return SearchGenerateOutput(
        sequences=sequences,
        values=sequences.new_tensor([hypothesis.value for hypothesis in found], dtype=torch.float32),
        tree=[beam.selections for beam in search.beams],
        stats=_stats(call, stream, value, before),
        prompt_length=call.input_ids.shape[1],
    )


def _check(call: Call, settings: BeamSettings) -> None:
    reason = why_not_options(call.generation_config) or why_not_inputs(call)
    if not _compat.can_select_rows(call.base, call.model_kwargs):
        reason = f"what {type(call.base).__name__} remembers of a row cannot be reordered"
    for name in ("output_scores", "output_logits"):
        if getattr(call.generation_config, name):
            reason = f"{name}=True was given"
    reason = reason or why_not_items((*call.processors, *call.criteria))
    if reason:
        raise WSDValueError(f"strategy='weak_to_strong_search' cannot serve this call: {reason}")
    if call.copies > settings.beam_width:
        raise WSDValueError(
            f"num_return_sequences={call.copies}: must be at most beam_width={settings.beam_width}, which is what is kept"
        )


def _implicit_value(
    call: Call, small: Sequence[SmallModel], tokenizer: PreTrainedTokenizerBase, scorer: PreTrainedTokenizerBase
) -> ImplicitValue:
    prompts: list[list[Prompt]] = []
    for model in small:
        one = same_vocabulary(vocabulary_size(call.base), vocabulary_size(model.model), tokenizer, scorer)
        ids, mask = model.prompt(call.prompt, call.copies, tokenizer, one)
        check_room(f"{model.name}_model", model.model, mask)
        rows = [row[real.bool()].tolist() for row, real in zip(ids[:: call.copies], mask[:: call.copies], strict=True)]
        prompts.append([_as_text(row, scorer) for row in rows])
    return ImplicitValue(small[0].model, small[1].model, scorer, *prompts)


def _as_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt as text, so that its last word may be read together with the response; as it is where text doesn't keep it."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if tokenizer.encode(text, add_special_tokens=False) == ids else ids


def _stream_settled(call: Call, beams: list[Beam], streamed: int) -> int:
    """Feeds the streamer what no selection can change any more, column by column; returns how many columns it has got."""
    if call.streamer is None:
        return 0
    rows: list[list[int]] = []
    for beam in beams:
        rows += [beam.settled] * call.copies if beam.parents else [one.tokens for one in beam.best(call.copies)]
    end = min((len(beam.settled) for beam in beams if beam.parents), default=max(map(len, rows)))
    for column in range(streamed, end):
        tokens = [row[column] if column < len(row) else call.pad_token_id for row in rows]
        call.streamer.put(torch.tensor(tokens, device="cpu"))
    return max(streamed, end)


def _sequences(call: Call, found: list[Hypothesis]) -> torch.Tensor:
    width = max(len(hypothesis.tokens) for hypothesis in found)
    rows = [hypothesis.tokens + [call.pad_token_id] * (width - len(hypothesis.tokens)) for hypothesis in found]
    return torch.cat([call.input_ids, call.input_ids.new_tensor(rows)], dim=1)


def _work(value: Value) -> list[int]:
    """Forwards and token positions of each small model so far; a value may serve many calls."""
    judges = [value.tuned, value.untuned] if isinstance(value, ImplicitValue) else []
    return [count for judge in judges for count in (judge.forwards, judge.tokens)] or [0] * 4


def _stats(call: Call, stream: StepStream, value: Value, before: list[int]) -> GuidedStats:
    work = [now - then for now, then in zip(_work(value), before, strict=True)]
    small = [value.tuned.model, value.untuned.model] if isinstance(value, ImplicitValue) else []
    return GuidedStats(
        base_forwards=stream.forwards,
        base_tokens=stream.tokens,
        pilot_forwards=work[0],
        pilot_tokens=work[1],
        reference_forwards=work[2],
        reference_tokens=work[3],
        cache_memory=None,
        peak_memory=peak_memory(call.base, *small),
    )
