"""`strategy="weak_to_strong_search"`: of the base's samples, those that tuning made a small model prefer go on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ... import _compat
from ...engine.call import Call
from ...engine.checks import check_models, check_room, vocabulary_size
from ...engine.stats import Stats, Work, peak_memory, work
from ...engine.strategy import StrategyConfig, keyword
from ...engine.supported import unsupported_inputs, unsupported_items, unsupported_options
from ...engine.text_scores import TextScore
from ...errors import WSDValueError
from ...text.settled_tokens import ContinuationTokenizer
from ...text.vocabulary import same_vocabulary
from .beam import Beam, BeamSettings, ChunkBeamSearch
from .output import SearchOutput
from .value import ImplicitValue, Prompt


@dataclass(frozen=True, kw_only=True)
class SearchConfig(StrategyConfig, BeamSettings):
    """Settings of weak-to-strong search, a chunk-level beam search (Zhou et al., arXiv 2405.19262).

    The base samples, and every few tokens the best hypotheses are kept, by an `ImplicitValue`: the log-probability that the
    tuned small model gives the response, less that of the reference. Base and small models meet through text, so their
    vocabularies may differ; the base's tokenizer must be passed. Sampling settings, processors and stopping criteria shape the
    base's samples, as in ordinary generation; `do_sample` need not be given. A streamer gets settled tokens: those that all
    responses begin with that may still be returned. `output_scores` and `output_logits` are refused.

    Args:
        beam_width: hypotheses that are kept of each prompt, W >= 1. The best `num_return_sequences` of them are returned.
        successors: samples that continue each, K >= 1; W·K is at most 16,384.
        chunk_length: tokens between two selections, L >= 1; None: one selection, at the end. With W=1 that is best-of-K.
        official_ties: follow the official code: a finished hypothesis that is kept becomes K copies, which may crowd out
            others; one that was cut by its length counts as ended; half a character is scored.
        value: takes the place of the small models: any function of (texts, ended, of) to one number for each.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    value: TextScore | None = field(default=None, metadata=keyword("value", travels=False))

    name: ClassVar[str] = "weak_to_strong_search"
    partners: ClassVar[tuple[str, ...]] = ("assistant", "reference")
    always_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is not None and not callable(self.value):
            raise WSDValueError(f"value={self.value!r}: must be a function of (texts, ended, of)")

    @property
    def needed(self) -> tuple[str, ...]:
        """The small models, unless there is another value."""
        return self.partners if self.value is None else ()

    def decode(self, call: Call) -> SearchOutput:
        """Samples, selects, and returns the best."""
        if call.tokenizer is None:
            raise WSDValueError("tokenizer=None: strategy='weak_to_strong_search' judges text; pass the base's tokenizer")
        value = self._value(call, call.tokenizer)
        _check(call, self)
        judges = [value.tuned, value.reference] if isinstance(value, ImplicitValue) else []
        before = [work(judge) for judge in judges]  # a value may serve many calls
        search = ChunkBeamSearch(call, value, ContinuationTokenizer(call.tokenizer).decode, self)
        streamed = 0
        while not search.ended:
            search.advance()
            streamed = _stream_settled(call, search.beams, streamed)
        found = [hypothesis for beam in search.beams for hypothesis in beam.best(call.copies)]
        tokens = [call.input_ids.new_tensor(hypothesis.tokens) for hypothesis in found]
        responses = pad_sequence(tokens, batch_first=True, padding_value=call.pad_token_id)
        spent = [Work(now.forwards - then.forwards, now.tokens - then.tokens) for now, then in zip(judges, before, strict=True)]
        pilot, reference = spent or (Work(), Work())
        memory = peak_memory(call.base, *(judge.model for judge in judges))
        return SearchOutput(
            sequences=torch.cat([call.input_ids, responses], dim=1),
            stats=Stats(work(search.stream), pilot, reference, peak_memory=memory),
            written_by_pilot=torch.zeros_like(responses, dtype=torch.bool),
            values=responses.new_tensor([hypothesis.value for hypothesis in found], dtype=torch.float32),
            tree=[beam.selections for beam in search.beams],
        )

    def _value(self, call: Call, tokenizer: PreTrainedTokenizerBase) -> TextScore:
        if self.value is None:
            return _implicit_value(call, tokenizer)
        if isinstance(self.value, ImplicitValue):
            tuned, reference = self.value.tuned.model, self.value.reference.model
            check_models({"the model": call.base, "value.tuned": tuned, "value.reference": reference})
        return self.value


def _check(call: Call, settings: SearchConfig) -> None:
    reason = unsupported_options(call.generation_config) or unsupported_inputs(call)
    if not reason and not _compat.can_select_rows(call.base, call.model_kwargs):
        reason = f"what {type(call.base).__name__} remembers of a row cannot be reordered"
    for name in ("output_scores", "output_logits"):
        if getattr(call.generation_config, name):
            reason = f"{name}=True was given"
    reason = reason or unsupported_items((*call.processors, *call.criteria))
    if reason:
        raise WSDValueError(f"strategy='weak_to_strong_search' cannot serve this call: {reason}")
    if call.copies > settings.beam_width:
        raise WSDValueError(
            f"num_return_sequences={call.copies}: must be at most beam_width={settings.beam_width}, which is what is kept"
        )


def _implicit_value(call: Call, tokenizer: PreTrainedTokenizerBase) -> ImplicitValue:
    scorer = call.pilot.tokenizer or tokenizer
    prompts: list[list[Prompt]] = []
    for model in (call.pilot, call.reference):
        one = same_vocabulary(vocabulary_size(call.base), vocabulary_size(model.model), tokenizer, scorer)
        ids, mask = replace(model, tokenizer=scorer).prompt(call.prompt, call.copies, tokenizer, one)
        check_room(f"{model.name}_model", model.model, mask)
        rows = [row[real.bool()].tolist() for row, real in zip(ids[:: call.copies], mask[:: call.copies], strict=True)]
        prompts.append([_as_text(row, scorer) for row in rows])
    return ImplicitValue(call.pilot.model, call.reference.model, scorer, *prompts)


def _as_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt as text, so that its last word may be read together with the response; as token ids where text loses them."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if tokenizer.encode(text, add_special_tokens=False) == ids else ids


def _stream_settled(call: Call, beams: list[Beam], streamed: int) -> int:
    """Streams the columns of tokens that no selection can change any more; returns how many have been streamed."""
    if call.streamer is None:
        return 0
    rows: list[list[int]] = []
    for beam in beams:
        rows += [beam.settled] * call.copies if beam.parents else [one.tokens for one in beam.best(call.copies)]
    by_pilot = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    end = min((len(beam.settled) for beam in beams if beam.parents), default=max(map(len, rows)))
    for column in range(streamed, end):
        tokens = [row[column] if column < len(row) else call.pad_token_id for row in rows]
        call.stream(torch.tensor(tokens, device="cpu"), by_pilot)
    return max(streamed, end)
