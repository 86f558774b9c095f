"""Every optimizer that timm offers: its own state is taken up again, another's is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from training.schema import check_optimizer
from utils import InputError

NAMES = [name for name in list_optimizers() if name != 'adahessian']  # which the flags refuse
NAMES += ['lookahead_adamw', 'lookahead_sgd', 'lookahead_muon']


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    try:
        return model, create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05, momentum=0.9, eps=1e-8)
    except (AssertionError, ImportError) as err:
        pytest.skip(str(err))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    torch.manual_seed(seed)  # some optimizers draw too
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('name', NAMES)
def test_resumes(name: str) -> None:
    with torch.compiler.set_stance('force_eager'):
        check_resumes(name)


def check_resumes(name: str) -> None:
    model, optimizer = make(name)
    train(model, optimizer, 8, 1)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again, resumed = make(name)
    before, untouched = copy.deepcopy(again.state_dict()), copy.deepcopy(resumed.state_dict())
    good = check_optimizer(resumed, state, 'a.pth')
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())
    assert len(untouched['state']) == len(resumed.state_dict()['state'])
    again.load_state_dict(weights)
    resumed.load_state_dict(good)
    for one in ((model, optimizer), (again, resumed)):
        train(*one, 3, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


WRONG: list[Any] = [
    *(torch.zeros(shape) for shape in ((), (1,), (2, 2), (64, 10))),
    *(torch.zeros(10, 64, dtype=torch.int64), torch.zeros(10, 64, device='meta'), torch.zeros(10, 64).to_sparse()),
    *(None, 'exp_avg', [], {}, 10**400, float('nan')),
]  # fmt: skip


@pytest.mark.parametrize('wrong', WRONG, ids=str)
@pytest.mark.parametrize('entry', ['exp_avg', 'exp_avg_sq'])
def test_no_other_state_reaches_the_step(entry: str, wrong: Any) -> None:
    model, optimizer = make('adamw')
    train(model, optimizer, 1, 1)
    state = optimizer.state_dict()
    number = next(number for number, own in state['state'].items() if own[entry].shape == (10, 64))
    state['state'][number][entry] = wrong
    with pytest.raises(InputError, match=f"the optimizer's {entry} of parameter {number} "):
        check_optimizer(make('adamw')[1], state, 'a.pth')
    del state['state'][number][entry]
    with pytest.raises(InputError, match='is missing'):
        check_optimizer(make('adamw')[1], state, 'a.pth')
