"""Calls that several processes (ranks) of torch.distributed run together.

Ranks share the work of a forward, or the weights, in collectives, which all of them must join in the same order; one that is
missing makes the others wait for ever. With tensor parallelism, all ranks do the same work. With weights sharded by FSDP or
DeepSpeed's ZeRO-3, each has prompts of its own, and unequal numbers of forwards.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from .. import _compat
from ..errors import WSDValueError
from .text_scores import ModelScore

REFUSED = (-1, -1)
"""In place of the digests of a call that failed its checks; those are at least 0."""

_out_of_step: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Sharded models of a call that failed in the middle of a forward, in which the other ranks may still wait."""


def process_count() -> int:
    """Number of ranks; 1 outside of torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def models_among(*arguments: Mapping[str, object]) -> list[PreTrainedModel]:
    """The models that arguments hold, and those of their rewards and scores, each once, in the same order on all ranks."""
    values = [value for named in arguments for _, value in sorted(named.items())]
    alone = [_compat.unwrapped(value) for value in values if isinstance(value, torch.nn.Module)]
    scoring = [model for value in values if isinstance(value, ModelScore) for model in value.models]
    return list(dict.fromkeys(model for model in (*alone, *scoring) if isinstance(model, PreTrainedModel)))


@contextmanager
def joint_forwards(models: Sequence[PreTrainedModel], synced_gpus: bool | None) -> Iterator[None]:
    """Lets calls of unequal length run on all ranks, which do the forwards of sharded models together meanwhile.

    Before each such forward, the ranks agree on the model that is next: of those that any rank is about to run, the last in
    `models`. Ranks that are about to run another one run a single token through it. A rank whose call has ended, failed, or
    was interrupted goes on so until the calls of all ranks have ended. An error in the middle of a forward is raised at once,
    since the ranks are then out of step.

    Args:
        models: of the call, in the same order on all ranks; expensive ones first, so that ranks wait for each other there.
        synced_gpus: whether all ranks run the forwards of all `models` together; None: of those that are sharded.

    Raises:
        WSDValueError: a sharded model that keeps a state outside of its cache, which the forwards of other ranks would change,
            or one that is out of step since an earlier call.
    """
    together = process_count() > 1 and synced_gpus is not False
    shared = [model for model in models if synced_gpus or _compat.sharded(model)] if together else []
    if not shared:
        yield
        return
    for model in shared:
        if _compat.keeps_state_in_layers(model):
            raise WSDValueError(
                f"{type(model).__name__} keeps a state in its layers, so its weights can't be sharded over ranks"
            )
        if model in _out_of_step:
            raise WSDValueError(
                "an earlier call failed in the middle of a forward of a model whose weights are sharded, so the ranks are out "
                "of step: end the processes, and start them again"
            )
    turns = _Turns(shared[::-1])
    with turns.hooked():
        try:
            try:
                yield
            finally:
                if turns.in_step:
                    turns.finish()
        finally:
            if not turns.in_step:
                _out_of_step.update(shared)


def check_whole(name: str, model: PreTrainedModel) -> None:
    """Raises if a model's weights are sharded over ranks, where they can't run its forwards together."""
    if process_count() > 1 and _compat.sharded(model):
        raise WSDValueError(
            f"{name} has weights that are sharded over processes, which would wait for each other's forwards: "
            "call generate(strategy='wsd'), or load that model whole"
        )


class _Turns:
    """The order of the forwards of some models, on which all ranks agree.

    Attributes:
        in_step: False from the beginning of a forward to its end, and while other ranks go on.
    """

    def __init__(self, models: list[PreTrainedModel]) -> None:
        self.in_step = True
        self._models = models
        self._joining = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Makes every forward of the models wait for its turn."""
        with ExitStack() as stack:
            for place, model in enumerate(self._models):
                before = model.register_forward_pre_hook(partial(self._before, place), prepend=True)
                after = model.register_forward_hook(self._after)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def finish(self) -> None:
        """Takes part in the forwards of other ranks until the calls of all have ended."""
        self.in_step, end = False, len(self._models)
        while (turn := self._agree(end)) != end:
            self._join(turn)
        self.in_step = True

    def _before(self, place: int, *_: Any) -> None:
        if not self._joining:
            self.in_step = False
            while (turn := self._agree(place)) != place:
                self._join(turn)

    def _after(self, *_: Any) -> None:
        self.in_step = not self._joining

    def _agree(self, place: int) -> int:
        """The first place in the order among those that the ranks have reached."""
        first = torch.tensor(place, device=_compat.collective_device())
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        return int(first)

    def _join(self, turn: int) -> None:
        """A forward of one token, in which only the collectives matter."""
        model = self._models[turn]
        self._joining = True
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=_compat.input_device(model)))
        self._joining = False


def check_same_call(models: Sequence[PreTrainedModel], arguments: Mapping[str, object], samples: bool) -> None:
    """Raises on every rank of a tensor-parallel model unless all were given the same call, and draw the same tokens.

    Args:
        models: of the call.
        arguments: of the call; None, and objects other than tensors, numbers, texts and generation configs, are passed over.
        samples: whether tokens are drawn.
    """
    if not _tensor_parallel_groups(models):
        return
    seeds = [_random_state(_compat.input_device(model)) for model in models] if samples else []
    configs = {f"generation config {place}": getattr(model, "generation_config", None) for place, model in enumerate(models)}
    digests = [_digest({**arguments, **configs}), _digest({str(place): state for place, state in enumerate(seeds)})]
    same_arguments, same_seeds = _same_on_all_ranks(models, digests)
    if not same_arguments:
        raise WSDValueError(
            "the ranks of a tensor-parallel model were given prompts or settings that differ, and run each forward together: "
            "pass the same ones on every rank"
        )
    if not same_seeds:
        raise WSDValueError(
            "the ranks of a tensor-parallel model have random states that differ, so they would draw different tokens: "
            "call torch.manual_seed with the same number on every rank before it samples"
        )


@contextmanager
def refused_together(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Lets an error of one rank of a tensor-parallel model fail `check_same_call` on the others, which would wait for it."""
    try:
        yield
    except BaseException:
        if _tensor_parallel_groups(models):
            _same_on_all_ranks(models, REFUSED)
        raise


def _tensor_parallel_groups(models: Iterable[PreTrainedModel]) -> list[Any]:
    return [group for group in map(_compat.tensor_parallel_group, models) if group is not None]


def _same_on_all_ranks(models: Sequence[PreTrainedModel], numbers: Sequence[int]) -> list[bool]:
    """Whether each number is the same on all ranks of the tensor-parallel ones among some models."""
    extremes = torch.tensor([*numbers, *(-number for number in numbers)], device=_compat.input_device(models[0]))
    same: list[bool] = []
    for group in _tensor_parallel_groups(models):
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MIN, group=group)
        same = (extremes[: len(numbers)] == -extremes[len(numbers) :]).tolist()
        if not all(same):  # a rank whose call was refused may lack the other models
            break
    return same


def with_late_errors(streamer: BaseStreamer | None, models: Iterable[PreTrainedModel]) -> BaseStreamer | None:
    """The streamer of a call; with tensor parallelism, one that raises once all ranks have run the call's forwards."""
    return streamer if streamer is None or not _tensor_parallel_groups(models) else _LateErrors(streamer)


class _LateErrors(BaseStreamer):
    """A streamer whose first error is raised when it is ended; it gets nothing more meanwhile."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)

    def put(self, *values: Any) -> None:
        """Hands tokens on, and what the streamer takes with them."""
        if self._error is None:
            try:
                self._streamer.put(*values)
            except Exception as error:
                self._error = error

    def end(self) -> None:
        """Ends the streamer, or raises its error."""
        if self._error is not None:
            raise self._error
        self._streamer.end()


def _digest(arguments: Mapping[str, object]) -> int:
    """A number of 56 bits for arguments, the same for equal ones."""
    digest = hashlib.blake2b(digest_size=7)
    for name, value in sorted(arguments.items()):
        if value is None:
            continue
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, GenerationConfig):
            digest.update(f"{name}{_digest(value.to_dict())}".encode())
        else:
            with suppress(TypeError):
                digest.update(json.dumps([name, value]).encode())
    return int.from_bytes(digest.digest(), "big")


def _random_state(device: torch.device) -> torch.Tensor:
    """State of the generator that draws on a device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state
