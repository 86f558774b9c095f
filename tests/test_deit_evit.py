"""models/deit.py, models/evit.py, the distilled DHVT, losses.py and their flags in main.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models  # noqa: F401
from config.pretrained import load_trained
from losses import DistillationLoss, Teacher
from main import main
from models.distilled import DistilledDHVT
from models.evit import EViT, KeepRateSchedule
from models.speed import count_macs
from tests.conftest import PLAIN
from tests.golden import DEIT_EVIT, images, set_weights
from training import checkpoint as ckpt
from training.weights import load_fitting, stored_args

TIMM_DEITS = [
    *(f'deit_{size}{kind}_patch16_224' for size in ('tiny', 'small', 'base') for kind in ('', '_distilled')),
    *('deit_base_patch16_384', 'deit_base_distilled_patch16_384'),
]
DIGITS = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '64', '--lr', '8e-3', '--input-size', '16']
SMALL = ['--model-kwargs', 'embed_dim=48', 'depth=4', 'num_heads=3']
EVIT = ['--model', 'deit_tiny_patch16_shrink_base', *SMALL, 'patch_size=4', '--drop_loc', '1', '2', '--fuse_token']
STUDENT = ['--model', 'dhvt_tiny_cifar_patch4_distilled', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2']


def evit(**kwargs: Any) -> EViT:
    """A small model of 6x6 patches."""
    defaults: dict[str, Any] = {'img_size': 24, 'patch_size': 4, 'embed_dim': 48, 'depth': 4, 'num_heads': 3}
    torch.manual_seed(0)
    return timm.create_model(
        'deit_tiny_patch16_shrink_base', **{**defaults, 'num_classes': 5, 'drop_loc': (1, 2), **kwargs}
    ).eval()


@pytest.mark.parametrize('name', TIMM_DEITS)
def test_deits_are_those_of_timm(name: str) -> None:
    assert timm.models.model_entrypoint(name).__module__ == 'timm.models.deit'
    size = int(name[-3:])
    model = timm.create_model(name, depth=1)
    tokens = 1 + ('distilled' in name) + (size // 16) ** 2
    width = {'tiny': 192, 'small': 384, 'base': 768}[name.split('_')[1]]
    keys = dict.fromkeys(['cls_token', *['dist_token'] * ('distilled' in name)], (1, 1, width))
    block = {'norm1': 1, 'attn.qkv': 3 * width, 'attn.proj': width, 'norm2': 1, 'mlp.fc1': 4 * width, 'mlp.fc2': width}
    modules = ['patch_embed.proj', *(f'blocks.0.{part}' for part in block), 'norm', 'head']
    modules += ['head_dist'] * ('distilled' in name)
    published = {*keys, 'pos_embed', *(f'{module}.{kind}' for module in modules for kind in ('weight', 'bias'))}
    state = model.state_dict()
    assert set(state) == published and state['pos_embed'].shape == (1, tokens, width)
    assert all(state[key].shape == shape for key, shape in keys.items())


@pytest.mark.parametrize(
    ('name', 'parameters', 'macs', 'heads'),
    [
        ('deit_tiny_cifar_patch4', 5.4, 0.4, 4),
        ('deit_small_cifar_patch4', 21.4, 1.4, 6),
        ('deit_tiny_cifar_patch2', 5.4, 1.7, 4),
        ('deit_small_cifar_patch2', 21.4, 6.1, 6),
    ],
)
def test_baselines_at_32_px(name: str, parameters: float, macs: float, heads: int) -> None:
    model = timm.create_model(name)
    assert type(model) is VisionTransformer
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters
    assert round(count_macs(model, (3, 32, 32)) / 1e9, 1) == macs
    assert model.blocks[0].attn.num_heads == heads and len(model.blocks) == 12
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('key', [key for key in DEIT_EVIT if key.startswith('deit_')])
def test_golden_evit(key: str, fused: bool) -> None:
    golden = DEIT_EVIT[key]
    keep, fuse = re.fullmatch(r'deit_small_patch16_shrink_base keep=(\S+) fuse=(\w+)', key).groups()
    model = timm.create_model(
        'deit_small_patch16_shrink_base', base_keep_rate=float(keep), fuse_token=fuse == 'True'
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == golden['n_params']
    set_weights(model)
    counts = []
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.register_forward_hook(lambda _, __, out: counts.append(out.shape[1] - 1))
    x = images(0, 2, (224, 224))
    with torch.no_grad():
        logits = model(x)
        assert counts == golden['tokens_after_block']
        np.testing.assert_allclose(logits[:, :8], golden['logits_first8'], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(logits.sum(), golden['logits_sum'], rtol=1e-8)
        np.testing.assert_allclose(model(x, keep_rate=0.9).sum(), golden['with_keep_rate_0.9_logits_sum'], rtol=1e-8)


def plain_evit(model: EViT, x: torch.Tensor, rate: float, fuse: bool) -> torch.Tensor:
    """The same in plain words: one image after the other, attention written out, tokens in lists."""
    out = []
    for image in x:
        tokens = model._pos_embed(model.patch_embed(image[None]))
        for number, block in enumerate(model.blocks):
            attn = block.attn
            qkv = attn.qkv(block.norm1(tokens)).reshape(-1, 3, attn.num_heads, attn.head_dim)
            q, k, v = (part.transpose(0, 1) for part in qkv.unbind(1))  # (h, T, d)
            weights = (q @ k.transpose(1, 2) * attn.head_dim**-0.5).softmax(-1)
            tokens = tokens + attn.proj((weights @ v).transpose(0, 1).flatten(1))[None]
            scores = weights[:, 0, 1:].mean(0)
            keep = -(-len(scores) * round(rate * 100) // 100)
            if number in (1, 2) and keep < len(scores):
                order = scores.argsort(descending=True).tolist()
                patches = tokens[0, 1:]
                parts = [tokens[0, 0], *(patches[i] for i in order[:keep])]
                if fuse:
                    parts.append(sum(scores[i] * patches[i] for i in order[keep:]))
                tokens = torch.stack(parts)[None]
            tokens = tokens + block.mlp(block.norm2(tokens))
        out.append(model.head(model.norm(tokens)[0, 0]))
    return torch.stack(out)


@pytest.mark.parametrize('fuse', [True, False])
@pytest.mark.parametrize('rate', [0.05, 0.3, 0.7, 0.99])
def test_evit_in_plain_words(rate: float, fuse: bool) -> None:
    model = evit(base_keep_rate=rate, fuse_token=fuse).double()
    x = torch.randn(3, 3, 24, 24, dtype=torch.double)
    expected = plain_evit(model, x, rate, fuse)
    torch.testing.assert_close(model(x), expected)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), expected)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train()(x), expected)
    loss = model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_evit_keeps_what_a_deit_computes_at_rate_one() -> None:
    deit = timm.create_model('deit_tiny_patch16_224', img_size=24, patch_size=4, embed_dim=48, depth=4, num_classes=5)
    x = torch.randn(2, 3, 24, 24)
    for model, rate in ((evit(base_keep_rate=1.0), None), (evit(base_keep_rate=0.5), 1.0), (evit(drop_loc=()), 0.5)):
        model.load_state_dict(deit.state_dict())  # the keys are DeiT's
        torch.testing.assert_close(model(x, keep_rate=rate), deit.eval()(x))
    model = evit(base_keep_rate=0.5)
    model.load_state_dict(deit.state_dict())
    assert not torch.allclose(model(x), deit(x))
    torch.testing.assert_close(model(x, keep_rate=[0.1, 0.6, 0.6, 0.1]), model(x, keep_rate=0.6))  # two blocks shrink


def test_evit_takes_norms_in_attention() -> None:
    model = evit(qk_norm=True, scale_attn_norm=True)
    tokens = torch.randn(2, 37, 48)
    torch.testing.assert_close(model.blocks[1]._attend(tokens)[0], model.blocks[1].attn(tokens))
    for kwargs in ({'reg_tokens': 4}, {'class_token': False, 'global_pool': 'avg'}):
        with pytest.raises(ValueError, match='needs a class token and no other'):
            evit(**kwargs)
    with pytest.raises(RuntimeError, match='no feature maps'):
        timm.create_model('deit_tiny_patch16_shrink_base', features_only=True)


def test_kept_tokens() -> None:
    model = evit(base_keep_rate=0.5, fuse_token=True)
    x = torch.randn(2, 3, 24, 24)
    logits, kept = model.forward_kept(x)
    torch.testing.assert_close(logits, model(x))
    assert list(kept) == [1, 2] and kept[1].attention.shape == (2, 36) and kept[1].indices.shape == (2, 18)
    assert kept[2].attention.shape == (2, 19) and kept[2].indices.shape == (2, 10)
    assert torch.all(kept[1].attention.gather(1, kept[1].indices).diff(dim=1) <= 0)


def test_evit_refuses() -> None:
    for kwargs in ({'base_keep_rate': 0.0}, {'base_keep_rate': 1.1}, {'drop_loc': (4,)}, {'drop_loc': (-1,)}):
        with pytest.raises(ValueError, match=r'base_keep_rate|drop_loc'):
            evit(**kwargs)
    with pytest.raises(ValueError, match='3 keep rates for 4 blocks'):
        evit()(torch.zeros(1, 3, 24, 24), keep_rate=[1, 1, 1])
    with pytest.raises(NotImplementedError, match='no feature maps'):
        evit().forward_intermediates(torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize(('keep', 'macs'), [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)])
def test_multiply_adds_of_the_paper(keep: float, macs: float) -> None:
    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=keep, fuse_token=True)
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 1) == macs


def test_golden_keep_rate_schedule() -> None:
    rows = next(rows for key, rows in DEIT_EVIT.items() if key.startswith('adjust_keep_rate'))
    schedule = KeepRateSchedule(base_keep_rate=0.7, start_epoch=2, epochs=4)
    for step, epoch, rate in rows:
        assert schedule(epoch, step % 10, 10) == pytest.approx(rate, abs=1e-9)
    at_once = KeepRateSchedule(base_keep_rate=0.7, start_epoch=2, epochs=0)
    assert [at_once(epoch, 0, 10) for epoch in range(4)] == [1, 1, 0.7, 0.7]


@pytest.mark.parametrize('key', [key for key in DEIT_EVIT if key.startswith('DistillationLoss')])
def test_golden_distillation_loss(key: str) -> None:
    kind, alpha, tau = re.match(r'DistillationLoss type=(\w+) alpha=(\S+) tau=(\S+)', key).groups()
    random = np.random.RandomState(3)
    outputs, outputs_dist, teacher = (torch.as_tensor(random.standard_normal((4, 10))) for _ in range(3))
    loss = DistillationLoss(nn.CrossEntropyLoss(), distillation_type=kind, alpha=float(alpha), tau=float(tau))
    value = loss((outputs, outputs_dist), torch.tensor([1, 2, 3, 4]), teacher)
    assert float(value) == pytest.approx(DEIT_EVIT[key], rel=1e-9)
    if kind != 'none':
        for arguments in ((outputs, torch.arange(4), teacher), ((outputs, outputs_dist), torch.arange(4))):
            with pytest.raises(ValueError, match='two heads'):
                loss(*arguments)


def test_teacher_sees_its_own_size_and_normalisation() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            seen.append(x)
            return self.norm(x).mean(dim=(2, 3)) * self.scale

    teacher = Teacher(
        Net(), input_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, student_mean=(0.4, 0.5, 0.6), student_std=(0.2, 0.3, 0.4)
    )
    teacher.train()
    pixels = torch.rand(2, 3, 1, 1).expand(-1, -1, 8, 8)
    student = (pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    assert not teacher(student).requires_grad
    assert seen[0].shape == (2, 3, 16, 16)
    torch.testing.assert_close(seen[0], ((pixels - 0.5) / 0.5)[..., :1, :1].expand(2, 3, 16, 16))
    same = Teacher(Net(), input_size=8, mean=(0, 0, 0), std=(1, 1, 1), student_mean=(0, 0, 0), student_std=(1, 1, 1))
    assert same(pixels) is not None and seen[1] is pixels


def test_distilled_dhvt() -> None:
    torch.manual_seed(0)
    plain = timm.create_model('dhvt_tiny_cifar_patch4', num_classes=7).eval()
    model = timm.create_model('dhvt_tiny_cifar_patch4_distilled', num_classes=7).eval()
    assert isinstance(model, DistilledDHVT) and model.num_prefix_tokens == 2
    assert set(model.state_dict()) - set(plain.state_dict()) == {'dist_token', 'head_dist.weight', 'head_dist.bias'}
    x = torch.randn(2, 3, 32, 24)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2 + 48, 192)
    both = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(x), both)
    model.set_distilled_training()
    torch.testing.assert_close(model(x), both)
    pair = model.train()(x)
    assert isinstance(pair, tuple) and [part.shape for part in pair] == [(2, 7), (2, 7)]
    sum(part.square().sum() for part in pair).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.get_classifier() == (model.head, model.head_dist)
    pruned = timm.create_model('dhvt_tiny_cifar_patch4_distilled').eval()
    pruned.prune_intermediate_layers(2)
    assert pruned(x).shape == (2, 192)
    model.eval().reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 192) and model.forward_head(tokens, pre_logits=True).shape == (2, 192)
    with pytest.raises(ValueError, match='must be'):
        timm.create_model('dhvt_tiny_cifar_patch4_distilled', global_pool='avg')
    maps = timm.create_model('dhvt_tiny_cifar_patch4_distilled', features_only=True, out_indices=(1,))(x)
    assert maps[0].shape == (2, 192, 8, 6)


def test_both_tokens_are_recalibrated_alike() -> None:
    """With the distillation token equal to the class token, both stay equal through all blocks."""
    torch.manual_seed(0)
    model = timm.create_model('dhvt_tiny_cifar_patch4_distilled').eval()
    model.dist_token.data.copy_(model.cls_token.data)
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1])
    assert not torch.allclose(tokens[:, 0], tokens[:, 2], atol=0.1)


def test_position_embeddings_are_resampled(capsys: pytest.CaptureFixture[str]) -> None:
    small = timm.create_model('deit_tiny_cifar_patch4', depth=1)
    large = timm.create_model('deit_tiny_cifar_patch4', depth=1, img_size=(48, 40), num_classes=3)
    load_fitting(large, small.state_dict(), 'file')
    notes = capsys.readouterr().out.splitlines()
    assert notes[0] == 'file: pos_embed resampled from 8x8 to 12x10' and len(notes) == 2 and 'head.weight' in notes[1]
    expected = timm.layers.resample_abs_pos_embed(small.pos_embed, new_size=[12, 10], num_prefix_tokens=1)
    torch.testing.assert_close(large.pos_embed, expected)
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])
    same = timm.create_model('deit_tiny_cifar_patch4', depth=1)
    load_fitting(same, small.state_dict(), 'file')
    assert capsys.readouterr().out == 'file: loaded 20 of 20 tensors (100.0% of the weights)\n'
    assert torch.equal(same.pos_embed, small.pos_embed)


def test_position_embeddings_between_plain_and_distilled() -> None:
    settings: dict[str, Any] = {'depth': 1, 'patch_size': 4}
    plain = timm.create_model('deit_tiny_patch16_224', img_size=32, **settings)
    distilled = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, **settings)
    small = timm.create_model('deit_tiny_patch16_shrink_base', img_size=32, drop_loc=(), **settings)
    load_fitting(small, distilled.state_dict(), 'file')
    assert torch.equal(small.pos_embed[:, :1], distilled.pos_embed[:, :1])
    assert torch.equal(small.pos_embed[:, 1:], distilled.pos_embed[:, 2:])
    before = distilled.pos_embed[:, 1].clone()
    load_fitting(distilled, plain.state_dict(), 'file')
    assert torch.equal(distilled.pos_embed[:, 2:], plain.pos_embed[:, 1:])
    assert torch.equal(distilled.pos_embed[:, 1], before)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp('teacher')
    main([*DIGITS, '--model', 'deit_tiny_cifar_patch4', *SMALL, '--epochs', '1', '--output_dir', str(out)])
    return str(out / 'checkpoint.pth')


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_end_to_end(teacher: str, tmp_path: Path, kind: str) -> None:
    flags = ['--distillation-type', kind, '--teacher-model', 'deit_tiny_cifar_patch4', '--teacher-path', teacher]
    line = main([*DIGITS, *STUDENT, *flags, '--epochs', '2', '--output_dir', str(tmp_path), '--amp', 'bf16'])
    assert np.isfinite(line['train_loss'])
    stats = main(['--eval', '--resume', str(tmp_path / 'checkpoint.pth'), '--device', 'cpu'])
    assert stats['test_acc1'] == line['test_acc1']


def expect_error(capsys: pytest.CaptureFixture, argv: list[str], message: str, code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.count('\n') == 1 and message in err, err


def test_distillation_errors(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hard = ['--distillation-type', 'hard']
    deit = ['--teacher-model', 'deit_tiny_cifar_patch4', '--teacher-path']
    one_head = ['--model', 'dhvt_tiny_cifar_patch4', *STUDENT[2:]]
    expect_error(capsys, [*DIGITS, *one_head, *hard, *deit, teacher], 'needs a model with a second head', 2)
    expect_error(capsys, [*DIGITS, *STUDENT, *deit, teacher], '--teacher-model needs --distillation-type', 2)
    expect_error(capsys, [*DIGITS, *STUDENT, *hard, *deit, str(tmp_path / 'absent.pth')], 'no such checkpoint', 1)
    expect_error(capsys, [*DIGITS, *STUDENT, *hard, '--teacher-path', teacher], 'not of regnety_160: give that name', 1)
    grey = [*DIGITS, *STUDENT, '--in-chans', '1']
    expect_error(capsys, [*grey, *hard, *deit, teacher], 'takes images of 3 channels, not of 1', 2)
    expect_error(capsys, [*DIGITS, *STUDENT, *hard, '--teacher-model', 'nothing'], 'no such model', 2)
    expect_error(capsys, [*DIGITS, *STUDENT, *hard, '--distillation-tau', '2'], 'is for --distillation-type soft', 2)
    expect_error(capsys, [*DIGITS, *STUDENT, *hard, *deit, teacher, '--no-train-mode'], 'add --train-mode', 2)
    state = ckpt.load(teacher)
    torch.save({**state, 'classes': state['classes'][::-1]}, tmp_path / 'reversed.pth')
    expect_error(
        capsys, [*DIGITS, *STUDENT, *hard, *deit, str(tmp_path / 'reversed.pth')], 'other classes than the data set', 1
    )
    state['classes'] = state['classes'][:7]
    state['model'] = {k: v[:7] if k.startswith('head.') else v for k, v in state['model'].items()}
    torch.save(state, tmp_path / 'seven.pth')
    expect_error(
        capsys, [*DIGITS, *STUDENT, *hard, *deit, str(tmp_path / 'seven.pth')], 'has 7 classes, the data set has 10', 1
    )


def test_timm_weights_for_other_classes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, 'create_model', lambda name, pretrained=False, **kwargs: create(name, **kwargs)
    )  # as if they had been downloaded
    flags = [*DIGITS, *STUDENT, '--distillation-type', 'soft', '--teacher-model', 'resnet10t']
    expect_error(capsys, flags, "timm's weights of resnet10t have 1000 classes, the data set has 10", 1)


def test_evit_trains_through_its_schedule_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [*DIGITS, *EVIT, '--base_keep_rate', '0.5', '--shrink_start_epoch', '1', '--shrink_epochs', '2']
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    main([*flags, '--epochs', '4', '--output_dir', str(whole)])
    rates = [json.loads(line)['keep_rate'] for line in (whole / 'log.txt').read_text().splitlines()]
    assert rates[0] == 1.0 and 1 > rates[1] > rates[2] > 0.5 == rates[3]
    steps = 1437 // 64
    schedule = KeepRateSchedule(base_keep_rate=0.5, start_epoch=1, epochs=2)
    assert rates == [schedule(epoch, steps - 1, steps) for epoch in range(4)]
    events = b''.join(path.read_bytes() for path in (whole / 'runs').iterdir())
    assert b'keep_rate' in events

    # Stopped in the middle of the descent, then resumed.
    main([*flags, '--epochs', '2', '--output_dir', str(half)])
    state = ckpt.load(str(half / 'checkpoint.pth'))
    assert state['keep_rate'] == rates[1]
    evaluation = ['--eval', '--resume', str(half / 'checkpoint.pth'), '--device', 'cpu']
    logged = json.loads((half / 'log.txt').read_text().splitlines()[-1])['test_loss']
    assert main(evaluation)['test_loss'] == logged  # at that epoch's keep rate
    assert main([*evaluation, '--base_keep_rate', '0.4'])['test_loss'] != logged
    model = load_trained(str(half / 'checkpoint.pth'))[0]  # what predicts, draws and exports
    assert [block.keep_rate for block in model.blocks] == [1.0, rates[1], rates[1], 1.0]  # type: ignore[union-attr]
    more = ['--epochs', '4', '--output_dir', str(half), '--auto-resume', '--force-resume']
    main([*flags, *more])
    stored = stored_args(ckpt.load(str(half / 'checkpoint.pth')))
    assert (stored['base_keep_rate'], stored['fuse_token'], stored['drop_loc']) == (0.5, True, [[1], [2]])
    again = [json.loads(line)['keep_rate'] for line in (half / 'log.txt').read_text().splitlines()]
    assert again == rates

    # --eval takes the model's own rates from the checkpoint; the last evaluation used the same ones.
    capsys.readouterr()
    stats = main(['--eval', '--resume', str(whole / 'checkpoint.pth'), '--device', 'cpu'])
    assert stats['test_acc1'] == json.loads((whole / 'log.txt').read_text().splitlines()[3])['test_acc1']
    main(['--eval', '--resume', str(whole / 'checkpoint.pth'), '--device', 'cpu', '--model', 'deit_tiny_patch16_224'])

    # It can teach, with its own blocks.
    flags = ['--distillation-type', 'soft', '--teacher-model', EVIT[1], '--teacher-path', str(whole / 'checkpoint.pth')]
    assert np.isfinite(main([*DIGITS, *STUDENT, *flags, '--epochs', '1'])['train_loss'])


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model', 'dhvt_tiny_cifar_patch4', '--base_keep_rate', '0.5'], 'its convolutions need the whole grid'),
        (['--model', 'deit_tiny_cifar_patch4', '--shrink-epochs', '5'], '--shrink_epochs is for EViT'),
        (['--model', 'resnet18', '--fuse_token'], '--fuse_token is for EViT'),
        ([*EVIT, '--drop_loc', '3', 'x'], "'x' is not a list of block numbers"),
        ([*EVIT, '--drop_loc', '__import__("os")'], 'is not a list of block numbers'),
        ([*EVIT, '--drop_loc', '9'], 'drop_loc names block 9'),
        ([*EVIT, '--model-kwargs', 'base_keep_rate=0.3'], 'this is set by --base_keep_rate'),
        ([*EVIT, '--base_keep_rate', '0'], 'must be above 0'),
    ],
)
def test_flags_for_other_models_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    expect_error(capsys, [*DIGITS, *flags], message, 2)


@pytest.mark.parametrize('spelling', [['3', '6'], ['(3, 6)'], ['3,6'], ['[3, 6]'], ['(3,', '6)']])
def test_spellings_of_drop_loc(spelling: list[str]) -> None:
    from config.arguments import parse_args
    from config.builders import build_model

    model = build_model(parse_args(['--model', 'deit_tiny_patch16_shrink_base', '--drop_loc', *spelling]), 10)
    assert [i for i, block in enumerate(model.blocks) if block.keep_rate < 1] == [3, 6]
