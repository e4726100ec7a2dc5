"""`strategy="nudging"`: a small aligned model says the next word wherever the base is unsure (arXiv 2410.09300).

Let p be the base's largest probability of a next token: a float32 softmax of its raw logits, before temperature and
processors. Where p >= γ the base writes its own token, chosen as in ordinary generation. Where p < γ the pilot reads the
response so far and writes the next word, which the base reads in the forward that gives its next p. A word is spaces, if
any, and what follows up to the next space (U+0020), in whole tokens of the pilot; 16 tokens without a space count as a word
too. It goes on from where the response stands, so it may be the rest of a word that the base has begun.

The response ends with the base's EOS where the pilot writes its own, if it is asked for a word or has just said one. Where
the caller's processors forbid an EOS (`min_new_tokens`), or there is none, the base writes on. So it does where the pilot
has nothing to say: its context is full, or a character is not yet complete that only the base's vocabulary cuts. An EOS of
the base ends the response as always.

γ = 0.4 is what the authors' repository (fywalter/nudging) runs in its README and in its version with caches; the signature
of its function for servers says 0.3. Where we leave that function on purpose:

- It asks the pilot for 16 tokens at a time, and if they reach its EOS, all of them end the response. Here the base is asked
  behind every word, and an EOS counts right behind one, so that no request's length decides. The 16 lives on for scripts
  without spaces.
- It also gives the turn to an unsure base whose likeliest token begins the pilot's next word. That is the same text up to
  the token's end; here the word stays whole, as in the version with caches, and the rule needs no second condition.
- It takes an EOS of the base for a question to the pilot. Here that ends the response, as it does everywhere in `generate`.
- It ends a response at the fourth equal nudge in a row, or when the base repeats itself, and cuts repetitions off the
  result. Here nothing of the kind: equal words may be meant, and `generate` has processors and criteria against repetition.
- It counts the budget in rounds and in another tokenizer's tokens, and encodes the text anew in each round. Here the budget
  is exact, and with one vocabulary token ids stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...engine.call import Call, decode_within
from ...engine.checks import eos_token_ids
from ...engine.numbers import check_probability
from ...engine.pilot_side import PilotArguments
from ...engine.small_model import SmallModel
from ...errors import WSDValueError
from ...text.settled_tokens import ContinuationTokenizer
from . import loop
from .output import NudgingGenerateOutput

THRESHOLD = 0.4
"""γ, unless the caller says another."""


def nudging(
    generate: Callable[..., Any],
    base: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel,
    assistant_input_ids: torch.Tensor | None = None,
    assistant_attention_mask: torch.Tensor | None = None,
    assistant_do_sample: bool | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    nudging_threshold: float = THRESHOLD,
    **kwargs: Any,
) -> Any:
    """Runs one call. Processors and criteria of the caller's own must depend on nothing but the prefix they are shown.

    Args:
        generate: transformers' own `generate` of the base.
        base: the model that generates.
        assistant_model: the pilot, a loaded causal model.
        assistant_input_ids: the pilot's prompt, LongTensor[batch, prompt]; default: the base's.
        assistant_attention_mask: its mask, [batch, prompt]; padding on the left. Default: nothing is padded.
        assistant_do_sample: whether the pilot samples; default: as the base does.
        assistant_tokenizer: the pilot's. Its EOS ends a response, beside those of the pilot's generation config.
        tokenizer: the base's. One of the two tells where words end; both are needed where the vocabularies differ.
        nudging_threshold: γ in (0, 1]. The pilot says the next word where the base's largest probability is below γ.
        **kwargs: as transformers' `generate` takes them.

    Returns:
        LongTensor[batch, prompt + response], or a `NudgingGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        WSDValueError: an illegal argument, or models, options or processors that it cannot serve; before any forward.
    """
    threshold = check_probability("nudging_threshold", nudging_threshold)
    pilot = SmallModel("assistant", assistant_model, assistant_input_ids, assistant_attention_mask, assistant_tokenizer)
    arguments = PilotArguments(pilot, assistant_do_sample=assistant_do_sample, tokenizer=tokenizer)
    spelling = tokenizer if assistant_tokenizer is None else assistant_tokenizer
    if spelling is None:
        raise WSDValueError("strategy='nudging' finds the ends of words in text: pass the base's tokenizer as tokenizer=")

    def decode(call: Call) -> Any:
        settings = call.generation_config
        side = arguments.side(call.base, *call.prompt, settings, call.processors)
        bridge = arguments.bridge(call.base, eos_token_ids(settings), side, side.room.tolist())
        if reason := loop.unsupported(call, pilot.model):
            raise WSDValueError(f"strategy='nudging' cannot serve this call: {reason}")
        sequences, by_pilot, stats = loop.decode(call, pilot.model, side, bridge, ContinuationTokenizer(spelling), threshold)
        if not settings.return_dict_in_generate:
            return sequences
        return NudgingGenerateOutput(
            sequences=sequences, written_by_pilot=by_pilot, stats=stats, prompt_length=call.input_ids.shape[1]
        )

    return decode_within("nudging", generate, base, decode, tokenizer=tokenizer, **kwargs)
