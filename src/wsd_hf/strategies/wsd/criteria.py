"""The switch criteria of one call: rules of the package work on lists, all other criteria are called with tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...engine.rows import GrowingTensor
from ...speculation.rule import Drafted
from .switch_rules import DISTRIBUTIONS, RowSwitch, SwitchRule


class Criteria:
    """Criteria that end the drafts of one call, and the drafts as these see them.

    Args:
        criteria: one, or a list; the first that fires ends a draft.
        prompts: token ids of the base's prompts, without padding.

    Attributes:
        needs: arguments that some criterion takes, beside drafted tokens and their log-probabilities.
    """

    def __init__(self, criteria: StoppingCriteria | StoppingCriteriaList, prompts: Sequence[Sequence[int]]) -> None:
        self._rules, self._called = list[SwitchRule](), list[tuple[StoppingCriteria, set[str]]]()
        for one in _single(criteria):
            if isinstance(one, SwitchRule) and type(one).__call__ is SwitchRule.__call__:
                self._rules.append(one)
            else:
                self._called.append((one, _arguments(one)))
        self._switches = [[RowSwitch(rule, prompt) for prompt in prompts] for rule in self._rules]
        self.needs = set[str]().union(*(rule.needs for rule in self._rules), *(arguments for _, arguments in self._called))
        self._prompts = list(prompts)
        self._values: list[list[list[float]]] = [[[] for _ in prompts] for _ in Drafted._fields]
        self._tensors = self._gathered()

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Begins another draft in a row, after a prompt that has grown."""
        self._prompts[row] = prompt
        for rule, switches in zip(self._rules, self._switches, strict=True):
            switches[row] = RowSwitch(rule, prompt)
        for values in self._values:
            values[row].clear()
        self._tensors = self._gathered()

    def _gathered(self) -> list[GrowingTensor]:
        """The values of all drafts as tensors that grow with them."""
        nothing = torch.empty(len(self._prompts), 0, dtype=torch.float32, device="cpu")
        tokens, *others = self._values
        return [GrowingTensor(nothing.long(), tokens, 0), *(GrowingTensor(nothing, one, torch.nan) for one in others)]

    def fired(self, offered: Mapping[int, Drafted]) -> set[int]:
        """Takes the next drafted token of some rows; returns those rows where it is the last."""
        fired = {row for switches in self._switches for row, drafted in offered.items() if switches[row].ends(drafted)}
        return fired | self._call(offered) if self._called else fired

    def _call(self, offered: Mapping[int, Drafted]) -> set[int]:
        """Calls criteria with the drafts of one length at a time, since a call is exact for those alone."""
        for row, drafted in offered.items():
            for values, value in zip(self._values, drafted, strict=True):
                values[row].append(value)
        lengths = {row: len(self._values[0][row]) for row in offered}
        fired = set[int]()
        for length in sorted(set(lengths.values())):
            token_ids, log_probs, *distributions = (tensor.first(length) for tensor in self._tensors)
            more = {**dict(zip(DISTRIBUTIONS, distributions, strict=True)), "prompts": self._prompts}
            for criterion, arguments in self._called:
                found = criterion(token_ids, log_probs, **{name: more[name] for name in arguments})
                in_all = torch.as_tensor(found, device="cpu").expand(len(self._prompts)).tolist()
                fired |= {row for row in offered if lengths[row] == length and in_all[row]}
        return fired


def _single(criteria: StoppingCriteria | StoppingCriteriaList) -> Iterator[StoppingCriteria]:
    """A criterion, or those of a list, of which each gets the arguments that it takes itself."""
    if type(criteria) is StoppingCriteriaList:
        for one in criteria:
            yield from _single(one)
    else:
        yield criteria


def _arguments(criterion: StoppingCriteria) -> set[str]:
    """Arguments of `SwitchRule.__call__` that a criterion takes by name; if it takes any, those that its base classes name."""
    taken = set[str]()
    for kind in type(criterion).__mro__:
        if "__call__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__call__"]).parameters
            taken |= parameters.keys()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return taken & {*DISTRIBUTIONS, "prompts"}
