"""`pipeline("text-generation", ..., assistant_model=pilot)(text_or_chat, strategy="wsd")`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from .. import _compat
from .._compat import Chat
from ..engine.checks import check_causal
from ..engine.keywords import check_without_strategy
from ..errors import WSDValueError
from ..generation import generate_with
from ..strategies import STRATEGIES
from ..text.chat import chat_prompts, check_text
from ..text.next_turn import before_next_turn, next_turn_criteria
from ..text.streaming import AnswerStreamer

logger = logging.get_logger(__name__)

BASE_PROMPT_ONLY = ("documents", "handle_long_generation", "tokenizer_encode_kwargs", "tools", "truncation")
"""Arguments of the stock pipeline that change the base's prompt of a chat, and cannot change the pilot's likewise."""


class WSDTextGenerationPipeline(TextGenerationPipeline):
    """transformers' text generation pipeline that takes `strategy="wsd"`; without it, it is the stock one.

    Importing `wsd_hf` makes it the class of `pipeline("text-generation")`: transformers' own would render a chat in the base's
    layout for both models. `pipeline("text-generation", ..., pipeline_class=WSDTextGenerationPipeline)` chooses it by name, and
    `pipeline_class=transformers.TextGenerationPipeline` the stock one. The base need not be enabled with `enable_wsd`, and is
    left as it is. `strategy` and all keywords of `WSDGenerationMixin.generate` are given when the pipeline is made, or for one
    call. As always with this pipeline, answers are sampled unless `do_sample=False` or the model's generation config differ.

    A chat becomes two prompts as in `build_inputs`: the pilot's follows its own chat template, the base's its own template
    or a plain transcript, and then the answer ends before the header of the next turn, for a streamer too (`AnswerStreamer`).
    A text is continued as it is by both models, each with its own tokenizer: no chat template is applied to it.

    Args:
        assistant_model: the pilot; a loaded model stays on its device, a path or Hub id is loaded to the base's device and
            dtype.
        assistant_tokenizer: the pilot's; needed for chats, and where transformers asks for it. Comes with a path or Hub id.

    Raises:
        WSDValueError: a strategy without a pilot, chats of another form than `build_inputs` takes, a prompt that is no text, a
            pilot without a chat template, and whatever `generate(strategy=...)` refuses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pilot = kwargs.get("assistant_model")
        # transformers drops the tokenizer of a pilot that has the base's special tokens, and its chat template with it.
        self.pilot_tokenizer = kwargs.get("assistant_tokenizer")
        if self.pilot_tokenizer is None and isinstance(pilot, str):
            self.pilot_tokenizer = AutoTokenizer.from_pretrained(pilot)

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if forward.get("strategy") is not None:
            _check_pilot(forward["strategy"], forward.get("assistant_model"), self.model)
        return preprocess, forward, postprocess

    def preprocess(self, prompt_text: Any, **kwargs: Any) -> Any:
        """The base's prompt and, under a strategy, the pilot's: `assistant_input_ids`, `assistant_attention_mask`."""
        if kwargs.get("strategy") is None:
            return super().preprocess(prompt_text, **kwargs)
        if isinstance(prompt_text, Chat):
            return self._preprocess_chat(prompt_text.messages, **kwargs)
        text, special = kwargs.get("prefix", "") + prompt_text, kwargs.get("add_special_tokens", True)
        check_text("the prompt", text)
        inputs = super().preprocess(prompt_text, **kwargs)
        if self.pilot_tokenizer is not None:
            encoded = self.pilot_tokenizer(text, add_special_tokens=special, return_tensors="pt")
            inputs["assistant_input_ids"] = encoded["input_ids"]
            inputs["assistant_attention_mask"] = encoded["attention_mask"]
        return inputs

    def _preprocess_chat(
        self, messages: list[Mapping[str, Any]], continue_final_message: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        for name in BASE_PROMPT_ONLY:
            if kwargs.get(name) is not None:
                raise WSDValueError(
                    f"{name}={kwargs[name]!r}: not for chats under a strategy, whose prompts are their messages"
                )
        if continue_final_message not in (None, messages[-1]["role"] == "assistant"):
            raise WSDValueError(
                f"continue_final_message={continue_final_message}: under a strategy a last assistant message is continued, "
                "and no other is"
            )
        if self.pilot_tokenizer is None:
            raise WSDValueError("assistant_tokenizer is missing: chats need the pilot's, which holds its chat template")
        prompts = chat_prompts([messages], self.tokenizer, self.pilot_tokenizer)
        return {**prompts, "prompt_text": Chat(messages) if self.tokenizer.chat_template else _Transcript(messages)}

    def _forward(self, model_inputs: Any, strategy: str | None = None, **kwargs: Any) -> Any:
        if strategy is None:
            check_without_strategy(STRATEGIES, self.model.generate, self.model, kwargs)
            return super()._forward(model_inputs, **kwargs)
        for name in ("assistant_input_ids", "assistant_attention_mask"):
            if name in model_inputs:
                kwargs[name] = model_inputs.pop(name)
        prompt = model_inputs["prompt_text"]
        if isinstance(prompt[0] if isinstance(prompt, list) else prompt, _Transcript):
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), *next_turn_criteria(self.tokenizer)]
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = AnswerStreamer(kwargs["streamer"], self.tokenizer)
        kwargs |= {"tokenizer": self.tokenizer, "assistant_tokenizer": self.pilot_tokenizer}
        base = self.model

        def generate(**arguments: Any) -> Any:
            output = generate_with(strategy, base.generate, base, **arguments)
            return getattr(output, "sequences", output)  # 5.17 cannot batch what else a ModelOutput holds

        # The stock method on a pipeline whose model decodes with the strategy: neither this pipeline nor the model changes.
        twin = copy.copy(self)
        twin.model = SimpleNamespace(generate=generate, generation_config=base.generation_config)
        return super(WSDTextGenerationPipeline, twin)._forward(model_inputs, **kwargs)

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """The stock records; an answer to a chat by transcript ends before the header of the next turn."""
        records = super().postprocess(model_outputs, **kwargs)
        chat = model_outputs["prompt_text"]
        if isinstance(chat, _Transcript):
            for record in records:
                answer = record.get("generated_text")
                if isinstance(answer, str):
                    record["generated_text"] = before_next_turn(answer)
                elif answer:
                    text, last = answer[-1]["content"], chat.messages[-1]
                    given = len(last["content"]) if last["role"] == "assistant" else 0
                    answer[-1]["content"] = text[:given] + before_next_turn(text[given:])
        return records


class _Transcript(Chat):
    """A chat whose prompt for the base is a plain transcript."""


def _check_pilot(strategy: str, pilot: PreTrainedModel | None, base: PreTrainedModel) -> None:
    if pilot is None:
        raise WSDValueError(f"strategy={strategy!r} needs a pilot: pass assistant_model= when the pipeline is made")
    check_causal("assistant_model", pilot)
    there, here = _compat.input_device(pilot), _compat.input_device(base)
    if (there.type == "cpu") != (here.type == "cpu"):
        logger.warning_once(
            f"the pilot is on {there} and the base on {here}: move one of them, or every step waits for the CPU"
        )


# `register_pipeline` would warn, and have `save_pretrained` copy this package's code next to the weights of any user.
PIPELINE_REGISTRY.supported_tasks["text-generation"]["impl"] = WSDTextGenerationPipeline
