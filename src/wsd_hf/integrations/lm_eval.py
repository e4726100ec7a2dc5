"""Base and pilot as a model of the lm-evaluation-harness, under the name `wsd-hf`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, configure_pad_token, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import BatchEncoding

from .._compat import input_device
from ..errors import WSDValueError
from ..generation import enable_wsd
from ..hub.loading import load_pilot
from ..pair import Pair
from ..ranks import ALONE, Rank
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch_rules import SwitchRuleName
from ..text.chat import check_text
from ..text.next_turn import before_next_turn

WITHOUT_EFFECT = ("chat_template_args", "enable_thinking", "think_end_token", "truncation", "mixed_precision_dtype")
"""Arguments of `HFLM` that would have no effect."""

PATIENCE = timedelta(weeks=52)
"""Longest wait for the other processes, which may have longer prompts; that of the harness."""


def _group() -> Any:
    """All processes of the launcher, which exchange texts: by gloo, since those need no GPU."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


class Chat(str):
    """Messages as JSON: text for the harness, which hands it back as a prompt."""


@register_model("wsd-hf")
class WSDHFLM(HFLM):
    """`HFLM` whose answers are a base's and a pilot's, by Weak-to-Strong Decoding.

    With `apply_chat_template=True` both models get the messages, each in its own layout, as `wsd_hf.build_inputs` makes them;
    else both get the harness's text. Generation settings of a task or of `gen_kwargs` hold as for `HFLM`, and may be `wsd_*`
    settings too. A prompt that fills a context is refused, never cut.

    The processes of a launcher share the batches, and each gets all answers: for the harness each is the only one, and all have
    the same results. With `tp_plan` every process answers every batch.

    Args:
        pretrained: the base, a path, a Hub id, or a loaded model (which `wsd_hf.enable_wsd` is then applied to).
        pilot: path or Hub id of the pilot; or a loaded model, whose tokenizer is `pilot_tokenizer`.
        threshold, window_size, switch_criteria, ignore_repeats: as in `WSDConfig`.
        **kwargs: as `HFLM` takes them.

    Raises:
        WSDValueError: an illegal setting, an argument that would have no effect, or a task that scores given answers instead
            of having one written.
        WSDHubError: the pilot cannot be had; see `load_pilot`.
    """

    def __init__(
        self,
        pretrained: Any,
        pilot: Any,
        threshold: float | None = None,
        window_size: int | None = None,
        switch_criteria: SwitchRuleName = "confidence",
        ignore_repeats: bool = False,
        pilot_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in WITHOUT_EFFECT:
            if kwargs.get(name):
                raise WSDValueError(f"{name}={kwargs[name]!r}: would have no effect on wsd-hf; leave it out")
        rule = {"switch_criteria": switch_criteria, "wsd_ignore_repeats": ignore_repeats}
        self._settings = WSDConfig.resolve({"wsd_threshold": threshold, "wsd_window_size": window_size, **rule}, None)
        self._process = ALONE if kwargs.get("tp_plan") else Rank.from_environment()
        if named := isinstance(pilot, str):  # before the base, which is larger: faults show sooner
            pilot, pilot_tokenizer = load_pilot(pilot, dtype=kwargs.get("dtype", "auto"))
        super().__init__(pretrained, **kwargs)
        self._group = None if self._process.alone else _group()
        self._rank, self._world_size = 0, 1  # the harness's own split repeats requests until all shares are equal
        enable_wsd(self.model)
        pilot_tokenizer = configure_pad_token(pilot_tokenizer, model_config=pilot.config)
        if named:
            pilot = pilot.to(input_device(self.model))
        self.pair = Pair(self.model, pilot, self.tokenizer, pilot_tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cached prompts; not the base's own, since chats are cached in another form."""
        return f"{super().tokenizer_name}__messages"

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as JSON; both prompts are made of them later. A last one of the assistant begins the answer."""
        return Chat(json.dumps(chat_history, ensure_ascii=False))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request; the longest prompts come first, so a prompt that does not fit fails at once."""
        size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        order = Collator([request.args for request in requests], lambda args: (-len(args[0]), args[0]), group_by="gen_kwargs")
        batches = list(order.get_batched(n=min(self._of_all(size))))
        if len(set(self._of_all(hashlib.sha256(repr(batches).encode()).digest()))) > 1:
            raise WSDValueError("the processes of this launch have different requests; remove the harness's caches of answers")
        seed = int(torch.randint(2**62, (), generator=torch.Generator().set_state(torch.get_rng_state())))
        progress = tqdm(total=len(requests), disable=disable_tqdm or not self._process.first, desc="wsd-hf")
        written = []
        for number, batch in self._process.share([*enumerate(batches)]):
            # Else what is drawn would depend on the batches before, and so on the number of processes.
            answers = self._answers([prompt for prompt, _ in batch], batch[0][1], seed + number if number else None)
            if self._process.alone:
                for (prompt, settings), answer in zip(batch, answers, strict=True):
                    self.cache_hook.add_partial("generate_until", (prompt, settings), answer)
            written.append(answers)
            progress.update(len(batch))
        progress.close()
        shares = self._of_all(written)
        turns = [shares[number % len(shares)][number // len(shares)] for number in range(len(batches))]
        in_order: list[str] = order.get_original([answer for answers in turns for answer in answers])
        return in_order

    def _of_all(self, value: Any) -> list[Any]:
        """A value of each process."""
        values = [value] * self._process.of
        if self._group is not None:
            try:
                torch.distributed.all_gather_object(values, value, group=self._group)
            except RuntimeError as error:
                raise WSDValueError(
                    "another process of this launch has ended, so the answers of its share are missing: see its own last line"
                ) from error
        return values

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Always raises: such tasks generate nothing that a pilot could begin."""
        raise WSDValueError(
            "a task asks for the likelihood of given answers: it generates nothing, so Weak-to-Strong Decoding equals the base "
            "there; run it with --model hf on the base"
        )

    loglikelihood_rolling = loglikelihood

    def _answers(self, prompts: list[str], settings: dict[str, Any], seed: int | None) -> list[str]:
        settings = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = [stop for stop in settings.pop("until") if stop]
        max_new_tokens = settings.pop("max_gen_toks")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        elif seed is not None:
            torch.manual_seed(seed)
        inputs = self._inputs(prompts)
        output = self.pair.generate(
            inputs,
            self._settings,
            max_new_tokens=max_new_tokens,
            stop_strings=until or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **settings,
        )
        texts = self.tokenizer.batch_decode(output.sequences[:, output.prompt_length :], skip_special_tokens=True)
        if "stopping_criteria" in inputs:
            texts = [before_next_turn(text) for text in texts]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _inputs(self, prompts: list[str]) -> BatchEncoding:
        if isinstance(prompts[0], Chat):
            return self.pair.inputs([json.loads(prompt) for prompt in prompts])
        for prompt in prompts:
            check_text("a prompt", prompt)
        ids, mask = self.tok_batch_encode(prompts)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(input_device(self.model))
