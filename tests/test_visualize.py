"""tools/visualize.py attention. Its evit-mask is tested in test_tools.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import models  # noqa: F401
from config.pretrained import load_trained, read_image
from models.ablations import create_model
from tools import visualize
from tools.visualize import choose_blocks, get_activations

SMALL = {'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'img_size': 16, 'num_classes': 7}
PLAIN_ATTENTION = {'attention': 'plain'}


def build(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **kwargs}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def attended(attn: nn.Module, weights: Tensor, tokens: Tensor, num_prefix: int) -> Tensor:
    """What attention puts out for its input (B, P+N, D), by the weights (B, h, T, T) that were drawn."""
    num_tokens = tokens.shape[1]
    if hasattr(attn, 'head_tokens'):
        tokens = torch.cat([tokens, attn.head_tokens(tokens)], dim=1)
    value = rearrange(attn.qkv(tokens)[..., 2 * tokens.shape[2] :], 'b t (h d) -> b h t d', h=attn.num_heads)
    x = attn.proj(rearrange(weights @ value, 'b h t d -> b t (h d)'))
    if hasattr(attn, 'head_tokens'):
        shared = x[:, num_tokens:].mean(dim=1, keepdim=True)
        x = torch.cat([x[:, :num_prefix] + shared, x[:, num_prefix:num_tokens]], dim=1)
    return x


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('dhvt_tiny_cifar_patch4', {}),
        ('dhvt_tiny_cifar_patch2', {'patch_size': 2}),
        ('dhvt_tiny_cifar_patch4_distilled', {}),
        ('dhvt_tiny_cifar_patch4', PLAIN_ATTENTION),
        ('deit_tiny_cifar_patch4', {'img_size': (16, 24)}),
    ],
)
def test_the_attention_drawn_is_the_attention_used(name: str, kwargs: dict[str, Any], fused: bool) -> None:
    """The forward pass's own output, block by block, follows from the weights that are drawn."""
    model = build(name, **kwargs)
    passed: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.attn.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0], output)))
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    seen = get_activations(model, images)
    assert len(passed) == len(seen.attention) == 4 and seen.num_prefix == model.num_prefix_tokens
    heads = 2 if hasattr(model.blocks[0].attn, 'head_tokens') else 0
    size = seen.num_prefix + seen.grid[0] * seen.grid[1] + heads
    patch = kwargs.get('patch_size', 4)
    assert seen.grid == (16 // patch, 24 // patch)
    for block, weights, (tokens, output) in zip(model.blocks, seen.attention, passed, strict=True):
        assert weights.shape == (2, 2, size, size) and weights.min() >= 0
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, size, dtype=torch.float64))
        with torch.no_grad():
            torch.testing.assert_close(attended(block.attn, weights, tokens, seen.num_prefix), output)
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks)


def test_the_channel_weights_are_those_of_the_forward_pass() -> None:
    model = build('dhvt_tiny_cifar_patch4')
    passed: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0], output)))
    seen = get_activations(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    for weight, (tokens, output) in zip(seen.channels, passed, strict=True):
        assert weight is not None
        torch.testing.assert_close(tokens[:, 0] * weight, output[:, 0])
    assert get_activations(build('deit_tiny_cifar_patch4'), torch.randn(2, 3, 16, 16).double()).channels == [None] * 4


def test_titles_scales_and_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The predicted class and its probability above each image, a colour bar a row, patches with sharp edges."""
    drawn: list[Any] = []
    draw = visualize.draw_attention

    def keep(*given: Any) -> Any:
        drawn[:] = [*given, draw(*given)]
        return drawn[-1]

    monkeypatch.setattr(visualize, 'draw_attention', keep)
    classes = ['a', '$b^', '\U000f1234', *'cdef']  # of private use, which no font has
    path = save(tmp_path / 'dhvt.pth', 'dhvt_tiny_cifar_patch4', classes=classes)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    visualize.main(['attention', path, str(tmp_path / 'image.png'), '--layers', '0', '3', '--out', f'{tmp_path}/a.png'])
    _, names, seen, _, figure = drawn
    model, _, _ = load_trained(path)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(value)[:, None, None] for value in
                     (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))  # fmt: skip
        probabilities = model(((pixels - mean) / std)[None]).softmax(dim=1)[0]
    torch.testing.assert_close(seen[0].probabilities[0], probabilities)
    shown = ['a', '$b^', '#2', *'cdef'][int(probabilities.argmax())]
    assert names == [f'{shown}, {float(probabilities.max()):.1%}'] == [figure.subfigs[0].axes[0].get_title()]
    panels = figure.subfigs[0].axes[1:]
    assert len(panels) == 2 * (3 + 1 + 1 + 1)  # class and two head tokens, map, its colour bar, channel weights
    heats = [axes.images[1] for axes in panels if len(axes.images) == 2]
    assert len(heats) == 6 and all(heat.get_interpolation() == 'nearest' for heat in heats)
    assert len({heat.get_clim() for heat in heats}) == 2  # one a row
    weights = seen[0].attention[3][0].mean(dim=0)
    np.testing.assert_allclose(heats[5].get_array().reshape(-1), weights[-1, 1:17])


def test_layers() -> None:
    assert choose_blocks(None, 12) == [2, 5, 8, 11] and choose_blocks(None, 2) == [0, 1]
    assert choose_blocks([3, 1, 3], 4) == [1, 3] and choose_blocks(None, 1) == [0]


@pytest.mark.parametrize('size', [16, 48])
def test_what_is_seen_is_what_evaluation_sees(size: int, tmp_path: Path) -> None:
    """Its pixels are those that are drawn; another size takes the largest part of that shape."""
    path = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    settings = load_trained(save(tmp_path / 'a.pth', 'dhvt_tiny_cifar_patch4', size))[1]
    seen, pixels = visualize.show(str(path), settings)
    image = read_image(str(path), settings.reading)
    assert torch.equal(seen, settings.transform(image)) and pixels.shape == (size, size, 3)
    whole = visualize.show(str(path), settings, (60, 90))[1]
    np.testing.assert_array_equal(whole, np.asarray(image))


def save(path: Path, name: str, size: int = 16, classes: list[str] | None = None, **kwargs: Any) -> str:
    model = create_model(name, **{**SMALL, 'img_size': size, **kwargs})
    settings = [(key, value) for key, value in {**SMALL, **kwargs}.items() if key not in ('img_size', 'num_classes')]
    args = {'model': name, 'input_size': size, 'model_kwargs': settings}
    torch.save({'model': model.state_dict(), 'args': args, 'classes': classes}, path)
    return str(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = []
    for number, size in enumerate([(40, 30), (9, 31)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        names.append(str(tmp_path / f'{number}.png'))
        Image.fromarray(pixels).save(names[-1])
    dhvt = save(tmp_path / 'dhvt.pth', 'dhvt_tiny_cifar_patch4')
    out = tmp_path / 'new' / 'attention.png'
    sizes = []
    for path, *flags in (
        (dhvt, '--size', '16', '24', '--layers', '1', '0'),
        (save(tmp_path / 'two.pth', 'dhvt_tiny_cifar_patch4_distilled', depth=1),),
        (save(tmp_path / 'deit.pth', 'deit_tiny_cifar_patch4', depth=1), '--size', '24', '16'),
    ):
        visualize.main(['attention', path, *names, '--out', str(out), *flags])
        with Image.open(out) as sheet:
            sizes.append(sheet.size)
            assert np.asarray(sheet.convert('L')).std() > 20
    said = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit, match='2'):
        visualize.main(['attention', dhvt, *names, '--out', names[1]])
    assert 'which is read: give another name' in capsys.readouterr().err
    assert all('; predicted: ' in line for line in said)
    assert '2 images of 16x24 px, layers 0, 1' in said[0] and '24x16 px, layers 0' in said[2]
    assert sizes[0][1] > 1.5 * sizes[1][1] and sizes[1][0] > sizes[2][0]  # a row a layer; no columns for head tokens

    positions = save(tmp_path / 'positions.pth', 'dhvt_tiny_cifar_patch4', pos_embed='learn')
    resnet = tmp_path / 'resnet.pth'
    torch.save({'model': timm.create_model('resnet10t', num_classes=7).state_dict(),
                'args': {'model': 'resnet10t', 'input_size': 32}}, resnet)  # fmt: skip
    pooled = save(tmp_path / 'pooled.pth', 'vit_tiny_patch16_224', class_token=False, global_pool='avg')
    nameless = tmp_path / 'nameless.pth'
    torch.save({'model': {'x': torch.zeros(1)}}, nameless)
    evit = tmp_path / 'evit.pth'
    name = 'deit_tiny_patch16_shrink_base'
    weights = timm.create_model(name, img_size=32).state_dict()
    torch.save({'model': weights, 'args': {'model': name, 'input_size': 32}}, evit)
    for argv, message, code in (
        ([dhvt, names[0], '--layers', '4'], '--layers 4: the model has layers 0 to 3', 2),
        ([dhvt, names[0], '--size', '18', '16'], 'needs multiples of its patch size, 4', 2),
        ([dhvt, names[0], '--fuse_token'], '--fuse_token is not for attention', 2),
        ([positions, names[0], '--size', '16', '24'], 'position embedding is for 4x4 patches, not 4x6', 2),
        ([dhvt, dhvt], 'cannot be read as an image', 1),
        ([dhvt, str(tmp_path / 'absent.png')], 'absent.png: No such file', 1),
        ([str(resnet), names[0]], 'a DHVT or a DeiT is needed', 1),
        ([pooled, names[0]], 'a DHVT or a DeiT is needed', 1),
        ([str(nameless), names[0]], 'does not say which model', 2),
        ([str(evit), names[0]], 'draw evit-mask', 1),
    ):
        with pytest.raises(SystemExit) as stop:
            visualize.main(['attention', *argv, '--out', str(out)])
        err = capsys.readouterr().err
        assert stop.value.code == code and err.count('\n') == 1 and message in err, err
    with pytest.raises(SystemExit) as stop:
        visualize.main(['evit-mask', dhvt, names[0], '--layers', '1'])
    assert stop.value.code == 2 and '--layers is not for evit-mask' in capsys.readouterr().err
