"""What makes a step fast, and must not change what it computes: loaders, the moving average, --compile and the rest."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import models  # noqa: F401
from config.arguments import get_args_parser, parse_args
from config.models import enable_grad_checkpointing
from datasets import load_digits
from main import main
from pipeline.loaders import CachedLoader, LoaderOptions, PrefetchLoader, build_loaders
from pipeline.transforms import Augmentation
from samplers import TrainBatches
from tests.conftest import PLAIN, SMALL_MODEL
from training import checkpoint as ckpt
from training.devices import num_compiled_graphs
from training.ema import MovingAverage
from utils import UsageError

CPU = torch.device('cpu')
MakeFolder = Callable[..., Path]
DIGITS = [*SMALL_MODEL, '--data-set', 'DIGITS', '--device', 'cpu', '--no-report']


def settings(**changes: Any) -> Augmentation:
    return Augmentation(**{'input_size': 16, **changes})


def loaders(augmentation: Augmentation, **kwargs: Any) -> tuple[Any, Any, str]:
    train, val = load_digits(train=True), load_digits(train=False)
    batches = TrainBatches(len(train), batch_size=64)
    options = LoaderOptions(**{'device': CPU, 'workers': 0, **kwargs})
    return build_loaders(
        train, val, batches=batches, shard=range(len(val)), eval_batch_size=96, augmentation=augmentation, seed=0,
        options=options,
    )  # fmt: skip


def batches_of(loader: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), targets.clone()) for images, targets in loader]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_without_augmentation_all_loaders_give_the_same_batches() -> None:
    plain = settings(no_aug=True)
    expected, expected_val, kind = loaders(plain, augment='pil', cache_gib=0)
    assert kind == 'pil' and isinstance(expected, torch.utils.data.DataLoader)
    for options in ({}, {'cache_gib': 0}, {'cache_gib': 0, 'workers': 2}):
        found, found_val, kind = loaders(plain, **options)
        assert kind == 'batched' and isinstance(found, CachedLoader) == (not options)
        assert isinstance(found_val, CachedLoader) == (not options)
        assert same(batches_of(found), batches_of(expected)) and same(batches_of(found_val), batches_of(expected_val))


def test_augmented_batches_are_the_same_from_the_cache_and_from_loader_processes() -> None:
    cached, *_ = loaders(settings())
    for workers in (0, 2):
        found, *_ = loaders(settings(), cache_gib=0, workers=workers)
        assert not isinstance(found, CachedLoader)
        assert same(batches_of(found), batches_of(cached))
    before = batches_of(cached)
    cached.batch_sampler.set_epoch(1)
    assert not torch.equal(batches_of(cached)[0][0], before[0][0])


def test_a_cache_takes_what_fits() -> None:
    """1,437 training and 360 test images of 3 x 16 x 16 bytes: 1.05 and 0.26 MiB."""
    for mib, kinds in ((1.4, (True, True)), (1.2, (True, False)), (0.3, (False, True)), (0.2, (False, False))):
        train, val, _ = loaders(settings(), cache_gib=mib / 1024)
        assert (isinstance(train, CachedLoader), isinstance(val, CachedLoader)) == kinds


def test_policies_that_are_not_covered(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaders(settings(auto_augment='augmix-m3'))[2] == 'pil'
    assert 'augmentation runs in PIL' in capsys.readouterr().out
    with pytest.raises(UsageError, match='augmix'):
        loaders(settings(auto_augment='augmix-m3'), augment='batched')


def test_large_images_are_cropped_in_the_loader(make_folder: MakeFolder) -> None:
    """Above 32 px each draw has its own crop: equal for equal draws, whatever the number of loader processes."""
    from datasets import DataSource, build_datasets

    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, size=60)
    found = []
    for workers in (0, 1):
        augmentation = settings(input_size=48)
        splits = build_datasets(DataSource('FOLDER', str(root)))
        assert splits.train is not None
        loader, _, kind = build_loaders(
            splits.train, splits.val, batches=TrainBatches(16, batch_size=8, repeated=True),
            shard=range(len(splits.val)), eval_batch_size=8, augmentation=augmentation, seed=1,
            options=LoaderOptions(device=CPU, workers=workers, augment='batched')
        )  # fmt: skip
        assert kind == 'batched' and not isinstance(loader, CachedLoader)
        found.append(batches_of(loader))
    assert found[0][0][0].shape == (8, 3, 48, 48) and same(*found)


def test_moving_average_is_timms() -> None:
    model: nn.Module = timm.create_model('dhvt_tiny_cifar_patch4', embed_dim=32, depth=1, num_heads=2)
    one, other = ModelEmaV3(model, decay=0.9), MovingAverage(model, decay=0.9)
    for step in range(3):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(step + 1)
        one.update(model)
        other.update(model)
        if step == 1:  # as a resume does
            other.module.load_state_dict(copy.deepcopy(other.module.state_dict()))
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name


def final(folder: Path) -> dict[str, Any]:
    return ckpt.load(str(folder / 'checkpoint.pth'))


def weights_differ(one: dict[str, Any], other: dict[str, Any], part: str = 'model') -> float:
    return max((one[part][key].double() - other[part][key].double()).abs().max().item() for key in one[part])


def test_grad_checkpointing_and_memory_formats_change_nothing_but_rounding(tmp_path: Path) -> None:
    flags = [*DIGITS, *PLAIN, '--epochs', '1', '--batch-size', '256', '--opt', 'sgd', '--lr', '0.1']
    ends = {}
    for name, more in (('usual', []), ('again', ['--grad-checkpointing']), ('first', ['--no-channels-last'])):
        main([*flags, *more, '--output_dir', str(tmp_path / name)])
        ends[name] = final(tmp_path / name)
    assert weights_differ(ends['usual'], ends['again']) < 1e-5 and weights_differ(ends['usual'], ends['first']) < 1e-4
    start = timm.create_model('dhvt_tiny_cifar_patch4', embed_dim=32, depth=2, num_heads=2, num_classes=10, img_size=16)
    assert ends['again']['model'].keys() == start.state_dict().keys()


def test_compiled_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an average: plain keys, nothing compiled after the first epoch, and to the same end as without."""
    flags = ['--epochs', '2', '--batch-size', '256', '--opt', 'sgd', '--lr', '0.1', '--drop-path', '0', '--amp', 'off']
    flags = [*DIGITS, '--input-size', '16', '--model-ema-decay', '0.9', '--warmup-epochs', '0', *flags]
    flags += ['--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2']
    before = num_compiled_graphs()
    main([*flags, '--compile', 'default', '--output_dir', str(tmp_path / 'compiled')])
    assert num_compiled_graphs() > before and 'further graphs' not in capsys.readouterr().out
    main([*flags, '--output_dir', str(tmp_path / 'eager')])
    one, other = final(tmp_path / 'compiled'), final(tmp_path / 'eager')
    assert one['model'].keys() == other['model'].keys()
    assert weights_differ(one, other) < 1e-3 and weights_differ(one, other, 'model_ema') < 1e-3
    torch._dynamo.reset()


def test_drop_path_breaks_no_graph() -> None:
    model = timm.create_model('dhvt_tiny_cifar_patch4', embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.5)
    compiled = torch.compile(model.train(), backend='eager', fullgraph=True)
    assert compiled(torch.randn(4, 3, 32, 32)).shape == (4, 100)
    torch._dynamo.reset()


class Recorded:
    """Stands in for a CUDA stream or event, and notes what is asked of it."""

    calls: list[str]

    def __init__(self, *_: Any) -> None:
        pass

    def record_event(self) -> Recorded:
        Recorded.calls.append('copied')
        return self

    def wait_event(self, event: Recorded) -> None:
        Recorded.calls.append('waited')

    def wait_stream(self, stream: Recorded) -> None:
        assert not Recorded.calls, 'before the first copy'


class Batches(list):  # type: ignore[type-arg]
    batch_sampler = None


@pytest.mark.parametrize('count', [0, 1, 3])
def test_the_next_batch_is_copied_before_one_is_given(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorded.calls = []
    monkeypatch.setattr(torch.cuda, 'Stream', Recorded)
    monkeypatch.setattr(torch.cuda, 'current_stream', Recorded)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda self, stream: Recorded.calls.append('kept'))
    batches = Batches((torch.full((2,), i), torch.full((2,), -i)) for i in range(count))
    found = []
    for images, targets in PrefetchLoader(batches, CPU):
        Recorded.calls.append('used')
        found.append((int(images[0]), int(targets[0])))
    assert found == [(i, -i) for i in range(count)]
    use = ['waited', 'kept', 'kept', 'used']
    assert Recorded.calls == (['copied', *(['copied', *use] * (count - 1)), *use] if count else [])


def test_recomputed_blocks_can_be_compiled() -> None:
    """Running statistics are updated once, and gradients are those of the plain model."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('dhvt_tiny_cifar_patch4', embed_dim=32, depth=2, num_heads=2).train()
        if compiled:
            model.set_grad_checkpointing()
            model.compile(backend='aot_eager')
        model(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)).square().sum().backward()
        ends.append((model.state_dict(), [p.grad for p in model.parameters()]))
    (plain, gradients), (other, other_gradients) = ends
    assert int(other['blocks.0.mlp.bn1.num_batches_tracked']) == 1
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_resume_across_memory_formats(tmp_path: Path) -> None:
    """AdamW's fused kernel reads its state as it lies: a state of another layout must be laid out anew."""
    flags = [*DIGITS, *PLAIN, '--batch-size', '256', '--lr', '1e-2', '--opt-eps', '1e-4', '--auto-resume']
    ends = []
    for name, first in (('one', '--channels-last'), ('other', '--no-channels-last')):
        out = ['--output_dir', str(tmp_path / name)]
        main([*flags, first, '--epochs', '1', '--sched', 'step', *out])
        main([*flags, '--channels-last', '--epochs', '2', '--sched', 'step', '--force-resume', *out])
        ends.append(final(tmp_path / name))
    assert weights_differ(*ends) < 1e-3


def test_the_first_weights_do_not_depend_on_the_cache(tmp_path: Path) -> None:
    flags = [*DIGITS, *PLAIN, '--epochs', '1', '--batch-size', '256', '--lr', '1e-3']
    for name, more in (('kept', []), ('read', ['--cache-gib', '0']), ('pil', ['--augment', 'pil'])):
        main([*flags, *more, '--output_dir', str(tmp_path / name)])
    for name in ('read', 'pil'):
        assert weights_differ(final(tmp_path / 'kept'), final(tmp_path / name)) == 0


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch._dynamo.exc

    def fails(*_: Any, **__: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException('no C++ compiler\nand a long story')

    monkeypatch.setattr('main.build_optimizer', fails)
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *PLAIN, '--compile', 'default'])
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        'main.py: error: --compile default failed: no C++ compiler; go on with --compile off\n'
    )


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--augment', 'pil', '--augment-exact'], '--augment-exact is for batched'),
        (['--compile', 'max-autotune', '--accum-steps', '2'], 'no --accum-steps above 1'),
        (['--compile', 'default', '--model', 'deit_small_patch16_shrink_base'], 'EViT has another number of tokens'),
        ([*DIGITS, '--grad-checkpointing', '--compile', 'fast'], 'invalid choice'),
    ],
)
def test_impossible_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_not_every_model_can_compute_its_blocks_again() -> None:
    with pytest.raises(UsageError, match='linear cannot compute its blocks again'):
        enable_grad_checkpointing(nn.Linear(1, 1), 'linear')


def test_step_flags_have_the_published_defaults() -> None:
    args = parse_args([])
    assert (args.compile, args.augment, args.grad_checkpointing, args.channels_last) == ('off', 'auto', False, None)
    assert set(vars(get_args_parser().parse_args(['--augment_exact']))) >= {'cache_gib', 'tf32'}


def test_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from training import devices

    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: Library)
    for name in [
        name for name in devices.os.environ if name.startswith('MALLOC_') or name in ('GLIBC_TUNABLES', 'LD_PRELOAD')
    ]:
        monkeypatch.delenv(name)
    devices.keep_freed_memory()
    assert (-4, 0) in calls and len(calls) == 2
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
    devices.keep_freed_memory()
    assert len(calls) == 2


def test_digits_pixels_on_the_device() -> None:
    """What the cache gives is what the transform of evaluation gives, to the bit."""
    augmentation = settings()
    _, val, _ = loaders(augmentation)
    images = torch.cat([images for images, _ in val])
    expected = load_digits(train=False, transform=augmentation.transform(train=False))
    assert np.array_equal(images.numpy(), torch.stack([expected[i][0] for i in range(len(expected))]).numpy())
