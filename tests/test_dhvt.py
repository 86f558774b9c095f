"""models/dhvt.py: the published model, and timm's contract."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

import models  # noqa: F401
from models.dhvt import DHVT, DHVTBlock, DynamicAggregationFeedForward, HeadInteractedAttention
from models.speed import count_macs
from tests import golden
from tests.conftest import ROOT

VARIANTS = {  # parameters, multiply-adds in G
    'dhvt_tiny_cifar_patch4': (6_008_650, 0.390),
    'dhvt_small_cifar_patch4': (23_425_450, 1.533),
    'dhvt_tiny_cifar_patch2': (5_845_162, 1.715),
    'dhvt_small_cifar_patch2': (22_766_698, 6.215),
    'dhvt_tiny_domain_patch16': (6_105_975, 1.366),
    'dhvt_small_domain_patch16': (23_788_431, 5.047),
    'dhvt_tiny_imagenet_patch16': (6_267_334, 1.362),
    'dhvt_small_imagenet_patch16': (24_040_606, 5.047),
}


def small(**kwargs: Any) -> DHVT:
    defaults = {'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'img_size': 16, 'num_classes': 7}
    return timm.create_model('dhvt_tiny_cifar_patch4', **{**defaults, **kwargs})


def test_variants_are_registered() -> None:
    assert set(timm.list_models('dhvt_*', module='dhvt')) == set(VARIANTS)
    assert set(timm.list_models('dhvt_*', module='distilled')) == {f'{name}_distilled' for name in VARIANTS}


@pytest.mark.parametrize('name', VARIANTS)
def test_parameters_and_multiply_adds(name: str) -> None:
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[name][0]
    assert round(count_macs(model, (3, *model.patch_embed.img_size)) / 1e9, 3) == VARIANTS[name][1]


def test_the_table_of_models_says_so() -> None:
    page = (ROOT / 'docs' / 'models.md').read_text()
    rows = re.findall(r'^\| `(dhvt_\w+)` .*\| ([\d.]+)M \| ([\d.]+) G \|$', page, re.MULTILINE)
    assert {name: (parameters, macs) for name, parameters, macs in rows} == {
        name: (f'{parameters / 1e6:.2f}', f'{macs:.3f}') for name, (parameters, macs) in VARIANTS.items()
    }


@pytest.mark.parametrize('name', golden.DHVT)
def test_golden_numbers(name: str) -> None:
    expected = golden.DHVT[name]
    model = golden.set_weights(timm.create_model(name)).eval()
    size = model.patch_embed.img_size

    def close(value: float, reference: float, scale: float = 0.0) -> bool:
        return abs(value - reference) <= 1e-8 * max(abs(reference), scale)

    with torch.no_grad():
        logits = model(golden.images(0, 2, size))
    for row, reference in zip(logits, expected['eval_logits_first8'], strict=True):
        assert all(close(a, b, scale=1.0) for a, b in zip(row[:8].tolist(), reference, strict=True))
    assert close(logits.sum().item(), expected['eval_logits_sum'], scale=1.0)
    assert close(logits.square().sum().item(), expected['eval_logits_sqsum'])

    model.train()
    loss = F.cross_entropy(model(golden.images(1, 4, size)), torch.arange(4) % model.num_classes)
    loss.backward()
    assert close(loss.item(), expected['train_loss'])
    grads = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    for key, reference in expected['grad_norms'].items():
        assert close(grads[key], reference)
    assert close(math.hypot(*grads.values()), expected['grad_norm_total'])
    assert all(value > 0 for value in grads.values()), 'a parameter without a gradient'
    for key, reference in expected['bn_after_one_step'].items():
        values = model.state_dict()[key][:4].tolist()
        assert all(close(a, b, scale=1.0) for a, b in zip(values, reference, strict=True))


@pytest.mark.parametrize('fused', [False, True])
def test_fused_and_plain_attention_agree(fused: bool) -> None:
    model = golden.set_weights(timm.create_model('dhvt_tiny_cifar_patch4')).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        logits = model(golden.images(0, 2, (32, 32)))
    expected = torch.tensor(golden.DHVT['dhvt_tiny_cifar_patch4']['eval_logits_first8'], dtype=torch.float64)
    torch.testing.assert_close(logits[:, :8], expected, rtol=1e-8, atol=1e-8)


def test_state_dict_is_the_published_one() -> None:
    lines = (golden.HERE / 'keys_dhvt_tiny_cifar_patch4.txt').read_text().splitlines()
    published = dict(line.split(' ', 1) for line in lines)  # block 0 stands for all
    own = {
        key: str(tuple(value.shape)) for key, value in timm.create_model('dhvt_tiny_cifar_patch4').state_dict().items()
    }
    assert {key: shape for key, shape in own.items() if not key.startswith('blocks.') or '.0.' in key[:9]} == published
    for i in range(1, 12):
        assert all(f'blocks.{i}.{key[9:]}' in own for key in published if key.startswith('blocks.0.'))
    assert len(own) == len(published) + 11 * sum(key.startswith('blocks.0.') for key in published)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = timm.create_model('dhvt_small_cifar_patch4')
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any()
            assert module.eps == (1e-6 if isinstance(module, nn.LayerNorm) and 'ht_norm' not in name else 1e-5)
        elif isinstance(module, nn.Conv2d):  # PyTorch's default: uniform up to 1/sqrt(fan in)
            bound = (module.weight[0].numel()) ** -0.5
            assert 0.97 * bound < module.weight.abs().max().item() <= bound
            assert (module.bias is None) == name.startswith('patch_embed')
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.blocks[0].attn.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.patch_embed.pre_affine.alpha == 1).all() and not model.patch_embed.post_affine.beta.any()
    assert not hasattr(model, 'pos_embed')


def test_weight_decay_groups() -> None:
    model = small()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    exempt, decayed = ({names[id(p)] for p in group['params']} for group in groups)
    assert groups[0]['weight_decay'] == 0 and groups[1]['weight_decay'] == 0.05
    assert 'cls_token' in exempt
    assert {f'blocks.{i}.attn.pos_embed' for i in range(3)} <= decayed
    assert {f'patch_embed.{part}_affine.{p}' for part in ('pre', 'post') for p in ('alpha', 'beta')} <= decayed
    assert all(name == 'cls_token' or name.endswith('bias') or model.get_parameter(name).ndim == 1 for name in exempt)
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)


def test_drop_path_grows_linearly() -> None:
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in small(drop_path_rate=0.1).blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_projection_dropout_acts_after_the_head_tokens_are_dropped() -> None:
    torch.manual_seed(0)
    attn = HeadInteractedAttention(dim=32, num_heads=2, proj_drop=0.5)
    zeros = (attn(torch.randn(64, 17, 32))[:, 0] == 0).float().mean().item()  # 0.5**3 where it acted before
    assert zeros == pytest.approx(0.5, abs=0.06)


# timm's contract


@pytest.mark.parametrize('patch_size', [2, 4, 8, 16, 32])
@pytest.mark.parametrize('size', [64, (64, 32)])
def test_any_patch_size_and_rectangles(patch_size: int, size: int | tuple[int, int]) -> None:
    model = small(patch_size=patch_size, img_size=size, in_chans=5).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert model(torch.randn(2, 5, height, width)).shape == (2, 7)
    tokens = model.forward_features(torch.randn(2, 5, width, height))  # another size than it was built for
    assert tokens.shape == (2, 1 + height * width // patch_size**2, 32)


def test_example_of_the_issue_tracker() -> None:
    model = timm.create_model('dhvt_tiny_cifar_patch4', num_classes=7, img_size=48)
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 7)


def test_rows_and_columns_of_the_grid_are_not_exchanged() -> None:
    """Equal for an image and its transpose only if the weights are transposed too."""
    torch.manual_seed(0)
    model = small(img_size=(16, 32)).double().eval()
    turned = small(img_size=(32, 16)).double().eval()
    weights = {key: v.transpose(-1, -2) if v.ndim == 4 else v for key, v in model.state_dict().items()}
    turned.load_state_dict(weights)
    images = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(turned(images.transpose(-1, -2)), model(images))
    assert not torch.allclose(model(images.transpose(-1, -2)), model(images))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'img_size': 30}, 'image size 30x30 is not divisible by patch size 4'),
        ({'img_size': (32, 30)}, 'image size 32x30 is not divisible by patch size 4'),
        ({'embed_dim': 30, 'num_heads': 4}, 'width 30 is not divisible by 4 heads'),
        ({'patch_size': 6}, 'power of two'),
        ({'patch_size': 1}, 'power of two'),
        ({'patch_size': 0}, 'power of two'),
        ({'patch_size': 16, 'embed_dim': 20, 'num_heads': 2}, 'needs embed_dim 20 halved 3 times'),
        ({'global_pool': 'max'}, 'global_pool'),
        ({'num_heads': 0}, '0 heads'),
        ({'embed_dim': 0}, 'embed_dim 0'),
        ({'depth': 0}, 'depth must be at least 1'),
    ],
)
def test_impossible_shapes_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_impossible_image_is_refused() -> None:
    with pytest.raises(ValueError, match='18x16'):
        small()(torch.randn(1, 3, 18, 16))


def test_constructors_are_keyword_only() -> None:
    for cls in (DHVT, DHVTBlock, HeadInteractedAttention, DynamicAggregationFeedForward):
        with pytest.raises(TypeError, match='positional'):
            cls(32)


def test_modules_are_arguments() -> None:
    class Nothing(nn.Module):
        def __init__(self, *, dim: int, hidden_dim: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            return x * 0

    model = small(mlp_layer=Nothing)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert not any('mlp' in name for name, _ in model.named_parameters())


def test_classifier() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 16, 16)
    assert model.get_classifier() is model.head
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 17, 32)
    features = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(model.head(features), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features)
    assert small(num_classes=0)(images).shape == (2, 32)
    model.reset_classifier(0, global_pool='avg')
    torch.testing.assert_close(model(images), tokens[:, 1:].mean(dim=1))
    assert small(global_pool='', num_classes=0)(images).shape == (2, 17, 32)


def test_features_only() -> None:
    model = small(features_only=True, out_indices=(0, 2), img_size=(16, 32))
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [4, 4]
    assert [tuple(y.shape) for y in model(torch.randn(2, 3, 16, 32))] == [(2, 32, 4, 8)] * 2


def test_forward_intermediates() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 16, 16)
    final, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    pairs = model.forward_intermediates(
        images, indices=[1], return_prefix_tokens=True, output_fmt='NLC', intermediates_only=True, stop_early=True
    )
    assert [tuple(y.shape) for y in pairs[0]] == [(2, 16, 32), (2, 1, 32)]
    torch.testing.assert_close(pairs[0][0], maps_without_norm(model, images)[1])
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(images, output_fmt='NHWC')  # type: ignore[arg-type]
    assert model.prune_intermediate_layers([0]) == [0] and len(model.blocks) == 1


def maps_without_norm(model: DHVT, images: torch.Tensor) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out[:, 1:])) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def test_group_matcher_covers_every_parameter() -> None:
    from timm.models import group_parameters

    model = small()
    layers = group_parameters(model, model.group_matcher())
    grouped = [name for names in layers.values() for name in names]
    assert set(grouped) == {name for name, _ in model.named_parameters()}
    assert 'head.weight' in layers[max(layers)] and 'cls_token' in layers[0]


def test_default_cfg() -> None:
    model = timm.create_model('dhvt_tiny_imagenet_patch16')
    assert model.default_cfg['input_size'] == (3, 224, 224)
    assert isinstance(model.get_submodule(model.default_cfg['first_conv']), nn.Conv2d)
    assert model.get_submodule(model.default_cfg['classifier']) is model.head
    with pytest.raises(RuntimeError):
        timm.create_model('dhvt_tiny_imagenet_patch16', pretrained=True)


def test_gradient_checkpointing_changes_nothing() -> None:
    """Neither the gradients nor, though each block runs twice, BatchNorm's running statistics."""
    images, states, grads = torch.randn(4, 3, 16, 16), [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small(drop_path_rate=0.3, drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        for _ in range(2):
            torch.manual_seed(1)
            model(images).square().mean().backward()
        states.append(model.state_dict())
        grads.append([p.grad for p in model.parameters()])
    assert states[1]['blocks.0.mlp.bn1.num_batches_tracked'] == 2
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], grads[1])


def test_compile() -> None:
    model = small(depth=1).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    model.train()
    torch.compile(model, fullgraph=True, backend='aot_eager')(images).sum().backward()
    assert model.cls_token.grad is not None


def test_export_with_dynamic_batch() -> None:
    model = small().eval()
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={'x': {0: batch}})
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), model(images))


def test_trace() -> None:
    model, images = small().eval(), torch.randn(2, 3, 16, 16)  # with gradients, as users trace
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))  # type: ignore[no-untyped-call]
