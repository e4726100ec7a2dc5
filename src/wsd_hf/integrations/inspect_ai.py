"""Base and pilot as one model of Inspect: `inspect eval task.py --model wsd/BASE -M pilot=PILOT`.

Inspect imports this module by itself, through the entry point group `inspect_ai`.
"""

from __future__ import annotations

from typing import Any

import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from ..engine.checks import eos_token_ids
from ..errors import WSDValueError
from ..pair import Pair
from ..serving.batching import Batcher, Waiting
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.output import WSDOutput
from ..strategies.wsd.switch_rules import SwitchRuleName
from ..text.bridge import before_end
from ..text.next_turn import before_next_turn

MAX_TOKENS = 2048
"""Most tokens in an answer, unless the task or the command line sets a number."""

MAX_CONNECTIONS = 16
"""Most chats in a batch, likewise (`--max-connections`)."""

GATHERING = 0.1
"""Seconds for which a batch waits for more chats: samples that were answered together come back together."""

REFUSED = (
    "best_of",
    "extra_body",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "presence_penalty",
    "prompt_logprobs",
    "response_schema",
    "top_logprobs",
)
"""Settings of `GenerateConfig` that would change answers or their data, and that this model doesn't have."""


@modelapi("wsd")
class WSDModelAPI(ModelAPI):
    """A base and a pilot that answer together.

    Of Inspect's `GenerateConfig` it takes max_tokens, temperature (none, or 0, is greedy), top_p, top_k, stop_seqs,
    num_choices and seed. Concurrent samples are answered in batches of up to max_connections; with a seed, one at a time.
    Each answer's metadata hold `draft_length`, the tokens that the pilot wrote, and `switch_reason`, the end of its draft.

    Args:
        model_name: the base, a path or Hub id; the model argument is "wsd/" and that.
        pilot: the pilot, a path or Hub id. This and the following are given as `-M name=value`, or as `model_args`.
        threshold, window_size, switch_criteria, ignore_repeats: as in `WSDConfig`.
        device: where both models go, as transformers' `device_map`, which needs accelerate; default: the CPU.
        dtype: of both models' weights; default: as they are stored.

    Raises:
        WSDValueError: no pilot, an illegal setting; and, for a sample, tools, contents that are no text, or settings that
            this model doesn't have.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None,
        api_key: str | None,
        config: GenerateConfig,
        pilot: str | None = None,
        threshold: float | None = None,
        window_size: int | None = None,
        switch_criteria: SwitchRuleName = "confidence",
        ignore_repeats: bool = False,
        device: str | int | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__(model_name, base_url, api_key, config=config)
        if pilot is None:
            raise WSDValueError(f"the model wsd/{model_name} lacks its pilot: add -M pilot=PATH_OR_ID, or model_args")
        rule = {"switch_criteria": switch_criteria, "wsd_ignore_repeats": ignore_repeats}
        self._config = WSDConfig.resolve({"wsd_threshold": threshold, "wsd_window_size": window_size, **rule}, None)
        self._pair = Pair.from_pretrained(model_name, pilot, dtype=dtype, device_map=device)
        for tokenizer in (self._pair.tokenizer, self._pair.pilot_tokenizer):
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._batcher = Batcher(self._answers, GATHERING)

    def max_tokens(self) -> int:
        """Most tokens in an answer, by default."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Most chats in a batch, by default."""
        return MAX_CONNECTIONS

    def collapse_user_messages(self) -> bool:
        """True: many chat templates refuse roles that do not alternate."""
        return True

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The answer to one chat; written in a thread, in a batch with other chats that are waiting then."""
        if tools:
            raise WSDValueError(f"tools={[tool.name for tool in tools]}: the model wsd calls no tools; choose a task without")
        settings = _settings(config)
        chat = [_text_message(message) for message in input]
        request = Waiting(chat, settings, config.seed if settings["do_sample"] else None)
        output: ModelOutput = await self._batcher.outcome(request, config.max_connections or MAX_CONNECTIONS)
        return output

    def _answers(self, batch: list[Waiting]) -> list[ModelOutput]:
        chats, settings, seed = [request.messages for request in batch], batch[0].settings, batch[0].seed
        inputs = self._pair.inputs(chats)
        if seed is not None:
            torch.manual_seed(seed)
        output = self._pair.generate(inputs, self._config, pad_token_id=self._pair.tokenizer.pad_token_id, **settings)
        copies = settings["num_return_sequences"]
        return [
            self._output(output, range(first * copies, (first + 1) * copies), int(mask.sum()), settings)
            for first, mask in enumerate(inputs["attention_mask"])
        ]

    def _output(self, output: WSDOutput, rows: range, read: int, settings: dict[str, Any]) -> ModelOutput:
        responses = [self._response(output, row) for row in rows]
        written = sum(map(len, responses))
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(output, row, ids, settings) for row, ids in zip(rows, responses, strict=True)],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
        )

    def _response(self, output: WSDOutput, row: int) -> list[int]:
        """A row's tokens up to and with its EOS, without padding."""
        ids: list[int] = output.sequences[row, output.prompt_length :].tolist()
        eos = eos_token_ids(self._pair.base.generation_config)
        end = len(before_end(ids, eos | {self._pair.tokenizer.pad_token_id}))
        return ids[: end + 1] if end < len(ids) and ids[end] in eos else ids[:end]

    def _choice(self, output: WSDOutput, row: int, ids: list[int], settings: dict[str, Any]) -> ChatCompletionChoice:
        text = self._pair.tokenizer.decode(ids, skip_special_tokens=True)
        answer = text if self._pair.tokenizer.chat_template else before_next_turn(text)
        for stop in settings.get("stop_strings", ()):
            answer = answer.split(stop)[0]
        ended = bool(eos_token_ids(self._pair.base.generation_config) & set(ids)) or answer.rstrip() != text.rstrip()
        return ChatCompletionChoice(
            message=ChatMessageAssistant(
                content=answer.strip(),
                model=self.model_name,
                source="generate",
                metadata={"draft_length": int(output.draft_length[row]), "switch_reason": output.switch_reason[row]},
            ),
            stop_reason="max_tokens" if len(ids) == settings["max_new_tokens"] and not ended else "stop",
        )


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """Settings of a `GenerateConfig` as keywords of `generate`."""
    for name in REFUSED:
        if getattr(config, name):
            raise WSDValueError(f"{name}={getattr(config, name)!r}: the model wsd doesn't have this setting; leave it out")
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_tokens or MAX_TOKENS,
        "num_return_sequences": config.num_choices or 1,
        "do_sample": bool(config.temperature),
    }
    if config.temperature:
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        settings |= {name: value for name, value in sampling.items() if value is not None}
    if config.stop_seqs:
        settings["stop_strings"] = config.stop_seqs
    return settings


def _text_message(message: ChatMessage) -> dict[str, str]:
    for content in [] if isinstance(message.content, str) else message.content:
        if content.type not in ("text", "reasoning"):
            raise WSDValueError(f"a {message.role} message holds {content.type}: the model wsd reads text alone")
    return {"role": message.role, "content": message.text}
