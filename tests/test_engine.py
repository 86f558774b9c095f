"""engine.py: accumulation, exact counts, and a loss that is no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import TrainSettings, evaluate, train_one_epoch
from utils import NonFiniteError

CPU = torch.device('cpu')


def loader(images: torch.Tensor, targets: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 4, 4, generator=generator)
    return images, torch.randint(0, 7, (n,), generator=generator)


def train(model: nn.Module, batches: DataLoader, **kwargs: Any) -> dict[str, float]:
    own = {name: kwargs.pop(name) for name in ('sums', 'first', 'after_step') if name in kwargs}
    optimizer = kwargs.pop('optimizer', None) or torch.optim.SGD(model.parameters(), lr=0.1)
    settings = TrainSettings(**{'criterion': nn.CrossEntropyLoss(), 'device': CPU, **kwargs})
    return train_one_epoch(
        model, batches, optimizer, torch.amp.GradScaler('cpu', enabled=False), settings, epoch=3, **own
    )


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 7)).double()


def test_accumulation_equals_the_large_batch_also_for_the_rest() -> None:
    """Seven batches of 4 in groups of three (3, 3 and the rest of 1) against batches of 12, 12 and 4."""
    images, targets = data(28)
    images = images.double()
    small, large = linear(), linear()
    train(small, loader(images, targets, 4), accum_steps=3)
    train(large, loader(images, targets, 12))
    torch.testing.assert_close(small[1].weight, large[1].weight)
    assert not torch.equal(small[1].weight, linear()[1].weight)


def test_clipping() -> None:
    images, targets = data(4)
    model, before = linear(), linear()
    train(model, loader(images.double() * 1000, targets, 4), clip_grad=0.5)
    change = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert change.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize('train_mode', [True, False])
def test_train_mode_decides_about_batchnorm(train_mode: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 7))
    train(model, loader(*data(8), 4), train_mode=train_mode)
    assert model[0].num_batches_tracked == (2 if train_mode else 0)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_loss_stops_at_its_step(value: float) -> None:
    images, targets = data(40)
    images[25] = value  # in the seventh batch of four
    with pytest.raises(NonFiniteError) as caught:
        train(linear().float(), loader(images, targets, 4))
    text = str(caught.value)
    assert 'the loss is nan' in text or 'the loss is inf' in text
    assert 'epoch 3, step 6 of 10' in text and 'learning rate 0.1' in text and 'loss scale 1' in text


class Counted(torch.Tensor):
    """A tensor that counts how often Python asks for its values."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__):
            cls.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_values_are_read_only_to_print() -> None:
    class Loss(nn.CrossEntropyLoss):
        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return super().forward(logits, targets).as_subclass(Counted)

    model = linear().float()
    Counted.reads = 0
    train(model, loader(*data(40), 2), criterion=Loss(), print_freq=5)
    assert Counted.reads == 5  # losses, after steps 0, 5, 10, 15 and the last, 19


def test_evaluation_is_exact() -> None:
    images, targets = data(37)
    model = linear().float()
    stats = evaluate(model=model, loader=loader(images, targets, 8), device=CPU)
    logits = model(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(dim=1)
    assert stats['images'] == 37
    assert stats['acc1'] == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert stats['acc5'] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert stats['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_evaluation_with_three_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    images, targets = data(10)
    stats = evaluate(model=copy.deepcopy(model), loader=loader(images, targets % 3, 4), device=CPU)
    assert stats['acc5'] == 100
