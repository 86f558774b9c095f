"""What of a checkpoint's state may be used: it must look as this program's own would."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils import InputError

MAX_COUNT = 2**53  # of counts, which floats hold exactly up to there
# How an optimizer computes is a matter of this machine, not of the run.
IMPLEMENTATION = ('fused', 'foreach', 'capturable', 'differentiable', 'maximize', 'params')


def check_like(given: Any, own: Any, what: str) -> Any:
    """A value of a checkpoint, compared with the one that this run itself would write.

    Tensors need the same shape and kind of number, lists the same length, words must be equal. Where the run has None,
    a number or a bool will do too. Of a mapping, names that the run does not have are left out.

    Raises:
        InputError: if it is of another kind; `what` names it.
    """
    if isinstance(own, Tensor) or isinstance(given, Tensor):
        same = isinstance(own, Tensor) and isinstance(given, Tensor)
        if same and given.shape != own.shape:
            raise InputError(f'{what} has shape {tuple(given.shape)}, where {tuple(own.shape)} is needed')
        same = same and given.layout == torch.strided and given.device.type != 'meta' and not given.is_quantized
        same = same and (given.is_floating_point(), given.is_complex()) == (own.is_floating_point(), own.is_complex())
    elif isinstance(own, Mapping):
        same = isinstance(given, Mapping)
        if same:
            return {name: check_like(given[name], own[name], f"{what}'s {name}") for name in own if name in given}
    elif isinstance(own, (list, tuple)):
        same = isinstance(given, (list, tuple)) and len(given) == len(own)
        if same:
            return type(own)(check_like(given[n], own[n], f'{what}[{n}]') for n in range(len(own)))
    elif isinstance(own, (str, bool)):
        same = type(given) is type(own) and (isinstance(own, bool) or given == own)
    elif isinstance(own, (int, float)):
        same = is_number(given, low=-math.inf)
    elif own is None:
        same = given is None or isinstance(given, bool) or is_number(given, low=-math.inf)
    else:  # a type of numbers
        same = type(given) is type(own) and given == own
    if not same:
        raise InputError(f'{what} is {_shown(given)}, where {_shown(own)} would do')
    return given


def _shown(value: Any) -> str:
    return f'{value!r:.40}' if isinstance(value, (str, bool, float)) or value is None else f'a {type(value).__name__}'


def is_number(value: Any, *, low: float = 0.0, high: float = math.inf) -> bool:
    """Whether a value is an int or float within limits, and not so long an int that no float is like it."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and (isinstance(value, float) or value.bit_length() <= 64) and low <= value <= high


def is_count(value: Any, *, high: int = MAX_COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= high


def is_line(value: Any) -> bool:
    """Whether a value is a line of log.txt: names, and numbers or words."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (isinstance(entry, str) or is_number(entry, low=-math.inf) or entry != entry)
        for name, entry in value.items()
    )


def base_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has the state: the one inside timm's Lookahead."""
    return getattr(optimizer, '_base_optimizer', optimizer)


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any, source: str) -> dict[str, Any]:
    """Compares an optimizer's state with what the optimizer itself makes in a step on gradients of zero.

    Returns:
        The state that may be loaded: each group has all options, and those of `IMPLEMENTATION` are this machine's.

    Raises:
        InputError: if it is of other parameters, or not of such an optimizer.
    """
    probe = copy.deepcopy(base_optimizer(optimizer))
    for group in probe.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)
    probe.step()
    own = probe.state_dict()
    what = f"{source}: the optimizer's"
    if not isinstance(state, Mapping) or not isinstance(state.get('state'), Mapping):
        raise InputError(f'{what} state is none')
    groups: Any = state.get('param_groups')
    own_groups = own['param_groups']
    right = isinstance(groups, Sequence) and all(
        isinstance(group, Mapping)
        and isinstance(group.get('params'), list)
        and all(type(number) is int for number in group['params'])
        for group in groups
    )
    if not right or [group['params'] for group in groups] != [group['params'] for group in own_groups]:
        raise InputError(f'{source} is of a run with other parameters in its optimizer')
    loaded = []
    for group, fresh in zip(groups, own_groups, strict=True):
        options = {name: fresh[name] for name in fresh if name not in IMPLEMENTATION}
        loaded.append({**fresh, **check_like(group, options, f'{what} group')})
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group['params']))
    for number, entries in state['state'].items():
        if number not in parameters or not isinstance(entries, Mapping):
            raise InputError(f'{what} state of parameter {number!r:.20} is of no such parameter')
        parameter, fresh = parameters[number], own['state'].get(number, {})
        for name in sorted({*map(str, fresh), *map(str, entries)}):
            if name not in entries:
                raise InputError(f'{what} {name} of parameter {number} is missing')
            similar = fresh.get(name, parameter if isinstance(entries[name], Tensor) else 0.0)
            check_like(entries[name], similar, f'{what} {name} of parameter {number}')
    return {**state, 'param_groups': loaded}
