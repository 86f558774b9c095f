"""Folding BatchNorms into convolutions changes no output."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import models  # noqa: F401
from models.folding import fold_batchnorm

SMALL = {'depth': 3, 'embed_dim': 32, 'num_heads': 2, 'num_classes': 5}


@torch.no_grad()
def as_trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affines in place of the initial ones, with which folding would change nothing."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(uniform(module.running_var, 0.3, 2.0))
            if module.affine:
                module.weight.copy_(uniform(module.weight, -1.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())


def difference(model: nn.Module, folded: nn.Module, images: Tensor) -> float:
    with torch.inference_mode():
        expected = model.eval()(images)
        return float((folded(images) - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize(('dtype', 'limit'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('name', timm.list_models('dhvt_*'))
def test_every_dhvt(name: str, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    model = as_trained(timm.create_model(name, **SMALL).to(dtype))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batchnorm(model)
    side = 64 if 'patch16' in name else 16
    images = torch.randn(2, 3, side, side + 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    assert difference(model, folded, images) < limit
    stages = len(model.patch_embed.proj) // 2 + len(model.patch_embed.proj) % 2
    assert norms(model) == 3 * SMALL['depth'] + stages and norms(folded) == 0 and not folded.training
    assert all(isinstance(block.mlp.conv1, nn.Conv2d) and block.mlp.conv1.bias is not None for block in folded.blocks)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # the model is untouched


def test_whole_size_in_float32() -> None:
    torch.manual_seed(0)
    model = as_trained(timm.create_model('dhvt_tiny_cifar_patch4'))
    assert difference(model, fold_batchnorm(model), torch.randn(4, 3, 32, 32)) < 1e-5


def test_training_mode_and_synchronised_norms() -> None:
    torch.manual_seed(0)
    model = timm.create_model('dhvt_tiny_cifar_patch4', **SMALL)
    model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)
    as_trained(model).train()
    folded = fold_batchnorm(model)
    assert model.training and not folded.training and norms(folded) == 0
    assert difference(model, folded, torch.randn(2, 3, 16, 16)) < 1e-5


@pytest.mark.parametrize(
    ('name', 'left'),
    [
        ('resnet10t', 1),  # whose bn1 follows a Sequential
        ('resnet26', 0),
        ('regnetx_002', 0),  # BatchNorm and activation in one
        ('mobilenetv3_small_050', None),  # not all by these names
        ('densenet121', None),  # norms before convolutions
    ],
)
def test_timms_convolutional_networks(name: str, left: int | None) -> None:
    torch.manual_seed(0)
    model = as_trained(timm.create_model(name, num_classes=4).double())
    folded = fold_batchnorm(model, by_name=True)
    assert difference(model, folded, torch.randn(1, 3, 64, 64, dtype=torch.float64)) < 1e-10
    assert left is None or norms(folded) == left < norms(model)


def test_nothing_to_fold() -> None:
    small = {'img_size': 32, 'patch_size': 4, 'depth': 2, 'embed_dim': 32, 'num_heads': 2}
    for name, further in (('deit_tiny_cifar_patch4', {}), ('deit_tiny_patch16_shrink_base', {'drop_loc': [1]})):
        model = timm.create_model(name, **small, **further)
        folded, own = fold_batchnorm(model).state_dict(), model.state_dict()
        assert folded.keys() == own.keys() and all(torch.equal(folded[key], own[key]) for key in own)


class NormFirst(nn.Module):
    """A norm before its convolution, by names that look like a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(x).relu())


class ActivationBetween(nn.Module):
    """Named as a pair, but for who sees `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x).relu())


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3)))


@pytest.mark.parametrize(
    'model',
    [
        NormFirst(),
        ActivationBetween(),
        shared(),
        nn.Sequential(Standardised(3, 3, 3), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)),
    ],
    ids=['norm first', 'activation between names', 'shared', 'standardised', 'no statistics', 'activation between'],
)
def test_what_cannot_be_folded_stays(model: nn.Module) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    by_name = not isinstance(model, ActivationBetween)
    folded = fold_batchnorm(model, by_name=by_name)
    assert norms(folded) == norms(model)
    assert difference(model, folded, torch.randn(2, 3, 8, 8)) == 0


def test_without_affine_and_with_hooks() -> None:
    torch.manual_seed(0)
    model = as_trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)))
    folded = fold_batchnorm(model)
    assert norms(folded) == 0 and difference(model, folded, torch.randn(2, 3, 8, 8)) < 1e-6
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert norms(fold_batchnorm(model)) == 1
