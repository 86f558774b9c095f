"""Batched augmentation beside timm's on PIL images: ops in every bit, distributions, independence of the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import Mixup
from timm.data import auto_augment as pil_ops
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode

from config.arguments import parse_args
from config.data import build_mixup
from pipeline.augment import OPS, BatchedAugment, apply_op, policy
from pipeline.augment.erasing import plan_erasing
from pipeline.augment.policy import plan_ops, read_policy
from pipeline.augment.random_numbers import Purpose, device_normals, hashes, sample_keys, uniforms
from pipeline.augment.steps import Step
from pipeline.transforms import Augmentation, build_transform
from tools import benchmark_augment
from utils import UsageError, seed_all

FILL = (124, 116, 104)
GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')
CASES = [(name, cubic) for name in OPS for cubic in ((True, False) if name in GEOMETRIC else (True,))]
DEFAULT = 'rand-m9-mstd0.5-inc1'


def make_augment(*, seed: int = 3, exact: bool = False, **changes: Any) -> BatchedAugment:
    return BatchedAugment(Augmentation(**{'input_size': 32, **changes}), seed=seed, exact=exact)


def make_draws(count: int, *, epoch: int = 0, repeat: int = 0) -> torch.Tensor:
    return torch.stack([torch.arange(count), torch.full((count,), epoch), torch.full((count,), repeat)], dim=1)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) as (n, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def cut_patches(count: int, height: int, width: int) -> np.ndarray:
    """Patches of scikit-learn's two photographs, uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    patches = []
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (rng.integers(photograph.shape[side] - length) for side, length in enumerate((height, width)))
        patches.append(photograph[top : top + height, left : left + width])
    return np.stack(patches)


@pytest.fixture(scope='module')
def patches() -> np.ndarray:
    return cut_patches(400, 32, 32)


@pytest.fixture(scope='module')
def odd_images() -> np.ndarray:
    """Images on which tables degenerate and interpolation meets whole numbers."""
    rng = np.random.default_rng(1)
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    grey = [np.full((32, 32), value, np.uint8) for value in (0, 1, 127, 128, 254, 255)]
    grey += [
        np.tile(ramp, (32, 1)),
        np.tile(ramp[:, None], (1, 32)),
        np.tile(np.arange(32, dtype=np.uint8) * 5, (32, 1)),
    ]
    grey += [np.where(np.indices((32, 32)).sum(0) % 2, 255, low).astype(np.uint8) for low in (0, 254)]
    spot = np.zeros((32, 32), np.uint8)
    spot[7, 9] = 200
    colour = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), rng.integers(100, 103, (32, 32, 3), dtype=np.uint8)]
    mixed = np.stack([ramp[None].repeat(32, 0), grey[3], spot], axis=2)
    return np.stack([np.stack([image] * 3, axis=2) for image in [*grey, spot]] + colour + [mixed])


# Random numbers


def test_the_generator_is_splitmix64() -> None:
    # The published sequence for the seed 1234567, e.g. of Rosetta Code.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert hashes(np.array([1234567], np.uint64), Purpose(0), 4)[0].tolist() == expected


def test_devices_draw_the_bits_that_the_host_does() -> None:
    keys = sample_keys(5, make_draws(1000).numpy())
    numbers = hashes(keys, Purpose(0), 2)
    first, second = ((numbers >> np.uint64(shift)) & np.uint64(2**24 - 1) for shift in (40, 8))
    radius = np.sqrt(-2 * np.log((first + 1) * 2.0**-24))
    angle = 2 * math.pi * second * 2.0**-24
    expected = np.stack([radius[:, 0] * np.cos(angle[:, 0]), radius[:, 0] * np.sin(angle[:, 0]),
                         radius[:, 1] * np.cos(angle[:, 1])], axis=1)  # fmt: skip
    found = device_normals(torch.from_numpy(keys.view(np.int64)), torch.zeros(1000, dtype=torch.int64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_uniform_numbers_are_even_and_uncorrelated() -> None:
    keys = sample_keys(0, make_draws(20000).numpy())
    numbers = np.concatenate([uniforms(keys, purpose, 4) for purpose in (Purpose.OPS, Purpose.ERASE)], axis=1)
    counts = np.stack([np.histogram(column, bins=50, range=(0, 1))[0] for column in numbers.T])
    chi2 = ((counts - 400) ** 2 / 400).sum(1)  # 49 degrees of freedom: 49 +- 10
    assert chi2.max() < 100
    correlations = np.corrcoef(numbers, rowvar=False) - np.eye(8)
    assert np.abs(correlations).max() < 5 / math.sqrt(20000)
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 5 / math.sqrt(20000)


def test_every_part_of_a_draw_counts() -> None:
    keys = {
        int(sample_keys(seed, np.array(draws))[0])
        for seed, draws in [(0, [[4, 5, 6]]), (1, [[4, 5, 6]]), (0, [[5, 4, 6]]), (0, [[4, 6, 5]]), (0, [[4, 5, 7]])]
    }
    assert len(keys) == 5
    many = sample_keys(0, np.stack(np.meshgrid(*[np.arange(30)] * 3), axis=-1).reshape(-1, 3))
    assert len(np.unique(many)) == 30**3


# Ops


def run_timm(name: str, images: np.ndarray, levels: np.ndarray, *, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """What timm's op makes of each image, and the arguments that it got."""
    outs, arguments = [], []
    for image, level in zip(images, levels.tolist(), strict=True):
        to_argument = pil_ops.LEVEL_TO_ARG[name]
        argument = to_argument(level, {'translate_const': 14}) if to_argument else ()
        resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
        out = pil_ops.NAME_TO_OP[name](Image.fromarray(image), *argument, fillcolor=FILL, resample=resample)
        outs.append(np.asarray(out))
        arguments.append(argument[0] if argument else 0)
    return np.stack(outs), np.array(arguments)


def make_levels(count: int, largest: float) -> np.ndarray:
    return np.concatenate([[0, largest], np.random.default_rng(2).uniform(0, largest, count - 2)])


@pytest.mark.parametrize(('name', 'cubic'), CASES)
def test_exact_ops_are_timms_in_every_bit(name: str, cubic: bool, patches: np.ndarray, odd_images: np.ndarray) -> None:
    images = np.concatenate([patches[:60], odd_images, odd_images, odd_images])
    random.seed(0)
    expected, argument = run_timm(name, images, make_levels(len(images), 10), cubic=cubic)
    found = apply_op(to_tensor(images), name, argument, cubic=cubic, fill=FILL, exact=True)
    assert torch.equal(found, to_tensor(expected))


@pytest.mark.parametrize(('name', 'cubic'), CASES)
def test_exact_ops_on_rectangles_and_beyond_the_usual_levels(name: str, cubic: bool) -> None:
    images = cut_patches(12, 45, 70)
    random.seed(1)
    # A rotation by 30 levels is one by 90 degrees, where Pillow takes another way.
    levels = np.array([30, 30, 20, 25, 11, 12, 14, 17, 18, 19, 22, 29])
    if name == 'GaussianBlur':  # levels end at 10
        levels = levels / 3
    expected, argument = run_timm(name, images, levels, cubic=cubic)
    found = apply_op(to_tensor(images), name, argument, cubic=cubic, fill=FILL, exact=True)
    assert torch.equal(found, to_tensor(expected))
    squares = np.ascontiguousarray(images[:, :, :45])
    expected, argument = run_timm(name, squares, levels, cubic=cubic)
    found = apply_op(to_tensor(squares), name, argument, cubic=cubic, fill=FILL, exact=True)
    assert torch.equal(found, to_tensor(expected))


@pytest.mark.parametrize(('name', 'cubic'), CASES)
def test_float32_ops_are_within_a_grey_level(
    name: str, cubic: bool, patches: np.ndarray, odd_images: np.ndarray
) -> None:
    random.seed(0)
    levels = np.clip(np.random.default_rng(4).normal(9, 0.5, 150), 0, 9.99)
    expected, argument = run_timm(name, patches[:150], levels, cubic=cubic)
    found = apply_op(to_tensor(patches[:150]), name, argument, cubic=cubic, fill=FILL)
    difference = (found.int() - to_tensor(expected).int()).abs()
    if name not in GEOMETRIC:
        assert difference.max() == 0
        return
    # Pillow truncates, so that a value just below a whole number and one at it are a grey level apart.
    assert difference.max() <= 1
    assert difference.float().mean() < 2e-3
    assert (difference.flatten(1).amax(1) == 0).float().mean() > 0.6
    expected, argument = run_timm(name, odd_images, make_levels(len(odd_images), 10), cubic=cubic)
    found = apply_op(to_tensor(odd_images), name, argument, cubic=cubic, fill=FILL)
    flat = (odd_images == odd_images[:, :1, :1]).all((1, 2, 3))
    assert flat.sum() >= 6
    difference = (found.int() - to_tensor(expected).int()).abs()
    assert difference[torch.from_numpy(flat)].max() == 0, 'interpolation changes a constant'


@pytest.mark.parametrize('name', OPS)
def test_levels_become_timms_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pil_ops.LEVEL_TO_ARG[name], OPS[name].argument
    assert (theirs is None) == (ours is None)
    if theirs is None or ours is None:
        return
    levels = np.concatenate([np.linspace(0, 10, 101), np.linspace(10, 30, 21), [1 / 3, 9.999999]])
    for negative in (False, True):
        monkeypatch.setattr(pil_ops.random, 'random', lambda answer=negative: 0.9 if answer else 0.1)
        expected = [theirs(level, {'translate_const': 14})[0] for level in levels.tolist()]
        assert ours(levels, np.full(len(levels), negative)).tolist() == expected


# RandAugment


@pytest.mark.parametrize(
    'text',
    [DEFAULT, 'rand', 'rand-m5', 'rand-m7-n3-p0.7', 'rand-m9-mstd101-inc1', 'rand-m15-mmax20-mstd1', 'rand-m9-tweights',
     'rand-m6-n3-t3aw-mstd0.3', 'rand-m9-t3a-inc1', 'rand-m9-inc0-tother', 'rand-p1', 'rand-n0', 'rand-foo'],
)  # fmt: skip
def test_policies_of_timm(text: str) -> None:
    for op in read_policy(text).ops:  # all share the settings, as plan_ops takes it
        first = read_policy(text).ops[0]
        assert (op.prob, op.magnitude, op.magnitude_std) == (first.prob, first.magnitude, first.magnitude_std)
        assert op.magnitude_max == first.magnitude_max
    images = to_tensor(cut_patches(8, 32, 32))
    assert make_augment(auto_augment=text)(images, make_draws(8)).isfinite().all()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'auto_augment': 'v0'}, 'v0.*--augment pil'),
        ({'auto_augment': 'original-mstd0.5'}, 'original.*--augment pil'),
        ({'auto_augment': '3a'}, '3a.*--augment pil'),
        ({'auto_augment': 'augmix-m5'}, 'augmix.*--augment pil'),
        ({'auto_augment': 'random'}, 'random.*--augment pil'),
        ({'auto_augment': 'rand-x5'}, 'rand-x5: timm refuses'),
        ({'auto_augment': 'rand-m1.5'}, 'rand-m1.5: timm refuses'),
        ({'auto_augment': 'rand-n16-tweights'}, '16 ops of 15 without replacement'),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make_augment(**changes)
    assert '\n' not in str(caught.value)


def test_an_op_that_is_not_covered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pil_ops, '_RAND_TRANSFORMS', ['Invert', 'TranslateX'])
    with pytest.raises(UsageError, match=r'rand-m9.*TranslateX; use --augment pil'):
        make_augment(auto_augment='rand-m9')


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match='24x32'):
        make_augment()(torch.zeros(2, 3, 24, 32, dtype=torch.uint8), make_draws(2))


Applied = tuple[str, float, bool]  # kind, argument, cubic


def record_ours(monkeypatch: pytest.MonkeyPatch, made: BatchedAugment, draws: torch.Tensor) -> list[list[Applied]]:
    """The ops that a plan applies to each sample, in order."""
    found: list[list[Applied]] = [[] for _ in range(len(draws))]
    make_step = policy.make_step

    def record(kind: str, index: np.ndarray, argument: np.ndarray, size: Any, *, cubic: bool = True) -> Step:
        for sample, value in zip(index.tolist(), argument.tolist(), strict=True):
            found[sample].append((kind, value, cubic))
        return make_step(kind, index, argument, size, cubic=cubic)

    with monkeypatch.context() as patch:
        patch.setattr(policy, 'make_step', record)
        made.plan(draws.numpy(), (32, 32))
    return found


def record_timm(text: str, samples: int, *, interpolation: Any = None) -> list[list[Applied]]:
    """The same of timm's RandAugment."""
    settings = {'translate_const': 14, 'img_mean': FILL}
    if interpolation is not None:
        settings['interpolation'] = interpolation
    transform = rand_augment_transform(text, settings)
    found: list[list[Applied]] = []

    def recorder(name: str) -> Callable[..., Any]:
        def record(image: Any, *argument: float, resample: Any, **_: Any) -> Any:
            filters = list(resample) if isinstance(resample, tuple) else [resample]
            chosen = random.choice(filters)
            found[-1].append((OPS[name].kind, argument[0] if argument else 0, chosen == Image.Resampling.BICUBIC))
            return image

        return record

    for op in transform.ops:
        op.aug_fn = recorder(op.name)
    for _ in range(samples):
        found.append([])
        transform(None)
    return found


def assert_same_shares(ours: Counter, theirs: Counter, total: int) -> None:
    """Two samples of counts: no share differs by more than 4.5 standard errors."""
    for key in set(ours) | set(theirs):
        share = (ours[key] + theirs[key]) / (2 * total)
        error = math.sqrt(2 * share * (1 - share) / total)
        assert abs(ours[key] - theirs[key]) / total <= 4.5 * error, (key, ours[key], theirs[key])


@pytest.mark.parametrize(
    ('text', 'interpolation'),
    [(DEFAULT, 'bicubic'), ('rand-m6-n3-mstd101-p0.7', 'random'), ('rand-m9-mstd1-tweights', 'random'),
     ('rand-m5-n2-mstd0.5-t3aw', 'bilinear')],
)  # fmt: skip
def test_ops_are_as_frequent_and_as_strong_as_timms(
    text: str, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = 12000
    random.seed(0)
    np.random.seed(0)
    resample = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR, 'random': None}
    made = make_augment(auto_augment=text, interpolation=interpolation, color_jitter=0)
    ours = record_ours(monkeypatch, made, make_draws(samples))
    theirs = record_timm(text, samples, interpolation=resample[interpolation])

    def count(key: Callable[[list[Applied]], Any]) -> None:
        assert_same_shares(Counter(map(key, ours)), Counter(map(key, theirs)), samples)

    count(len)
    count(lambda ops: ops[0][0] if ops else None)
    for kind in {op[0] for ops in theirs for op in ops}:
        count(lambda ops, kind=kind: sum(op[0] == kind for op in ops))
        if kind in ('rotate', 'shear_x', 'shear_y', 'translate_x_rel', 'translate_y_rel'):
            count(lambda ops, kind=kind: [op[2] for op in ops if op[0] == kind][:1] == [True])
            count(lambda ops, kind=kind: [op[1] > 0 for op in ops if op[0] == kind][:1] == [True])
        values = [np.array([op[1] for ops in each for op in ops if op[0] == kind]) for each in (ours, theirs)]
        if kind in ('autocontrast', 'equalize', 'invert'):  # take no argument
            continue
        for moment in (values, [np.abs(value) for value in values], [value**2 for value in values]):
            error = math.sqrt(sum(value.var() / len(value) for value in moment))
            assert abs(moment[0].mean() - moment[1].mean()) < 4.5 * error + 1e-12, kind


def test_levels_signs_and_interpolation_are_drawn_as_defined() -> None:
    samples = 100_000
    made = make_augment(auto_augment=DEFAULT, interpolation='random')
    keys = sample_keys(made.seed, make_draws(samples).numpy())
    all_ops, all_levels, all_steps = plan_ops(made.policy, keys, (32, 32), interpolation='random')
    assert all_ops.shape == all_levels.shape == (2, samples)
    error = 4.5 * math.sqrt(0.25 / samples)
    for ops, levels in zip(all_ops, all_levels, strict=True):
        for level, share in ((8.0, 0.0228), (8.5, 0.1587), (9.0, 0.5), (9.5, 0.8413), (9.999, 0.9772)):
            assert abs((levels < level).mean() - share) < error
        assert levels.max() == 10
        assert abs((ops == -1).mean() - 0.5) < error
        counts = np.bincount(ops[ops >= 0], minlength=15)
        assert ((counts - samples / 30) ** 2 / (samples / 30)).sum() < 50  # 14 degrees of freedom and the total's
    both = np.corrcoef(all_levels)[0, 1], np.corrcoef(all_ops == -1)[0, 1]
    assert np.abs(both).max() < 4.5 / math.sqrt(samples)
    shifts = [step for steps in all_steps for step in steps if step.kind.startswith('shift')]
    positive = np.concatenate([step.values.sum(1) > 0 for step in shifts])
    cubic = np.concatenate([np.full(len(step.index), step.cubic) for step in shifts])
    for found in (positive, cubic, positive == cubic):
        assert abs(found.mean() - 0.5) < 4.5 * math.sqrt(0.25 / len(found))


def test_colour_jitter_draws_factors_and_orders_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 6000
    made = make_augment(auto_augment=None, color_jitter=0.3)
    found = record_ours(monkeypatch, made, make_draws(samples))
    orders = Counter(tuple(op[0] for op in ops) for ops in found)
    assert len(orders) == 6
    assert all(abs(number - samples / 6) < 5 * math.sqrt(samples / 6) for number in orders.values())
    factors = np.array([op[1] for ops in found for op in ops])
    assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3
    assert abs(factors.mean() - 1) < 5 * factors.std() / math.sqrt(len(factors))
    assert abs(factors.std() - 0.6 / math.sqrt(12)) < 0.005
    assert not any(record_ours(monkeypatch, make_augment(auto_augment=None, color_jitter=0), make_draws(5)))
    # timm keeps it beside its 3-Augment sets, and beside them alone.
    with_jitter = record_ours(monkeypatch, make_augment(auto_augment='rand-m5-p0-t3a'), make_draws(5))
    assert [len(ops) for ops in with_jitter] == [3] * 5
    assert not any(record_ours(monkeypatch, make_augment(auto_augment='rand-m5-p0'), make_draws(5)))


# The pipeline


def replay(
    made: BatchedAugment, images: np.ndarray, draws: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """What PIL, timm's ops and torchvision make of a plan."""
    size = images.shape[1:3]
    plan = made.plan(draws.numpy(), size)
    normalize = build_transform(train=False, input_size=32).transforms[-2:]
    outs = []
    for number, ops in enumerate(record_ours(monkeypatch, made, draws)):
        image = Image.fromarray(images[number])
        if made.settings.is_small:
            padded = Image.new('RGB', (size[1] + 8, size[0] + 8))
            padded.paste(image, (4, 4))
            top, left = int(plan.top[number]), int(plan.left[number])
            image = padded.crop((left, top, left + size[1], top + size[0]))
        if plan.flip[number]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for kind, argument, cubic in ops:
            function = getattr(pil_ops, {'autocontrast': 'auto_contrast'}.get(kind, kind))
            resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
            arguments = () if kind in ('autocontrast', 'equalize', 'invert') else (argument,)
            image = function(image, *arguments, fillcolor=FILL, resample=resample)
        for step in normalize:
            image = step(image)
        outs.append(image)
    return torch.stack(outs)


@pytest.mark.parametrize(
    'changes',
    [{}, {'interpolation': 'random', 'auto_augment': 'rand-m7-n4-mstd3'}, {'auto_augment': None},
     {'auto_augment': 'rand-m5-n2-t3aw'}, {'input_size': 224, 'hflip': 0.2}],
)  # fmt: skip
def test_the_exact_pipeline_is_timms_in_every_bit(
    changes: dict[str, Any], patches: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_augment(re_prob=0, exact=True, **changes)
    draws = make_draws(200, epoch=2)
    expected = replay(made, patches[:200], draws, monkeypatch)
    assert torch.equal(made(to_tensor(patches[:200]), draws), expected)
    fast = make_augment(re_prob=0, **changes)(to_tensor(patches[:200]), draws)
    assert (fast - expected).abs().mean() < 2e-3
    assert torch.isclose(fast, expected, atol=1e-5).float().mean() > 0.99


def test_the_whole_pipeline_has_timms_statistics(patches: np.ndarray) -> None:
    images, epochs = patches[:250], 8
    transform = build_transform(train=True, input_size=32)
    seed_all(0)
    theirs = torch.stack([torch.stack([transform(Image.fromarray(i)) for i in images]) for _ in range(epochs)])
    for exact in (True, False):
        made = make_augment(exact=exact)
        ours = torch.stack([made(to_tensor(images), make_draws(len(images), epoch=e)) for e in range(epochs)])
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        statistics: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda x: x.mean((3, 4)),  # (epochs, n, 3)
            lambda x: x.std((3, 4)),
            lambda x: x[..., :4, :].mean((3, 4)),
            lambda x: x[..., 12:20, 12:20].mean((3, 4)),
            lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((3, 4)),
            lambda x: (x[..., 1:, :] - x[..., :-1, :]).abs().mean((3, 4)),
            lambda x: x.amax((3, 4)),
        ]
        for statistic in statistics:
            # Differences of the same image's values in the two, averaged over epochs, are independent of each other.
            gap = statistic(ours).mean(0) - statistic(theirs).mean(0)  # (n, 3)
            error = gap.std(0) / math.sqrt(len(images))
            assert (gap.mean(0).abs() < 4.5 * error).all(), (gap.mean(0), error)


def test_samples_do_not_depend_on_their_batch(patches: np.ndarray) -> None:
    made = make_augment()
    images, draws = to_tensor(patches[:96]), make_draws(96, epoch=3, repeat=1)
    whole = made(images, draws)
    before = images.clone()
    assert torch.equal(made(images, draws), whole)
    assert torch.equal(images, before)
    parts = [made(images[start : start + 7], draws[start : start + 7]) for start in range(0, 96, 7)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made(images[order], draws[order]), whole[order])
    assert torch.equal(make_augment()(images, draws), whole)
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(made(images, draws), whole)
    for other in (make_augment(seed=4)(images, draws), made(images, make_draws(96, epoch=4, repeat=1)),
                  made(images, make_draws(96, epoch=3, repeat=2))):  # fmt: skip
        assert ((other != whole).flatten(1).any(1)).float().mean() > 0.9


def test_crops_and_flips_are_even() -> None:
    plan = make_augment(hflip=0.3).plan(make_draws(9000).numpy(), (32, 32))
    for corner in (plan.top, plan.left):
        counts = np.bincount(corner)
        assert len(counts) == 9 and np.abs(counts - 1000).max() < 5 * math.sqrt(1000)
    assert abs(plan.flip.mean() - 0.3) < 5 * math.sqrt(0.21 / 9000)
    assert not make_augment(hflip=0).plan(make_draws(100).numpy(), (32, 32)).flip.any()


@pytest.mark.parametrize('exact', [True, False])
def test_large_images_rectangles_and_other_layouts(exact: bool) -> None:
    images = to_tensor(cut_patches(6, 224, 224))
    made = make_augment(input_size=224, exact=exact, re_prob=1.0)
    out = made(images, make_draws(6))
    assert out.shape == (6, 3, 224, 224) and out.isfinite().all()
    assert torch.equal(made(images.contiguous(memory_format=torch.channels_last), make_draws(6)), out)
    assert made(to_tensor(cut_patches(6, 48, 64)), make_draws(6)).shape == (6, 3, 48, 64)


class Watch(TorchDispatchMode):
    """Notes the ops that make the host wait for a device."""

    waits = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'bincount', 'equal', 'item')

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if name in ('index', 'index_put', 'index_put_'):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), 'a mask as index waits'
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(patches: np.ndarray) -> None:
    made = make_augment(re_count=2, interpolation='random')
    made(to_tensor(patches[:64]), make_draws(64))
    mixup = Mixup(cutmix_alpha=1.0, num_classes=10)
    with Watch() as watch:
        mixup(made(to_tensor(patches[:64]), make_draws(64)), torch.arange(64) % 10)
    assert watch.names['gather'] and watch.names['index_put_']
    assert not set(watch.names) & set(Watch.waits)


@pytest.mark.parametrize('input_size', [32, 224])
def test_all_tensors_lie_on_the_device_of_the_images(input_size: int, patches: np.ndarray) -> None:
    for changes in ({'re_count': 2, 'exact': True}, {'re_mode': 'rand'}, {'auto_augment': 'rand-m9-n4-t3aw'}):
        made = make_augment(input_size=input_size, re_prob=1.0, interpolation='random', **changes)
        # A meta tensor has no values: it refuses to be read, and most ops with tensors from elsewhere.
        out = made(to_tensor(patches[:200]).to('meta'), make_draws(200))
        assert out.device.type == 'meta' and out.shape == (200, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('exact', [True, False])
def test_a_gpu_makes_the_same_without_a_wait(exact: bool, patches: np.ndarray) -> None:
    made = make_augment(exact=exact, interpolation='random', re_count=2)
    images, draws = to_tensor(patches[:128]), make_draws(128)
    expected, on_gpu = made(images, draws), images.cuda()
    made(on_gpu, draws)  # sends constants
    torch.cuda.set_sync_debug_mode('error')
    try:
        found = made(on_gpu, draws)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    close = torch.isclose(found.cpu(), expected, rtol=1e-4, atol=1e-4)  # noise differs in the last place
    assert close.all() if exact else close.float().mean() > 0.999


# Random erasing


@pytest.mark.parametrize(('size', 'count'), [((32, 32), 1), ((32, 32), 3), ((20, 50), 1)])
def test_erased_boxes_are_as_many_and_as_large_as_timms(size: tuple[int, int], count: int) -> None:
    samples = 5000
    random.seed(0)
    theirs = RandomErasing(0.4, mode='const', max_count=count, device='cpu')
    blanks = theirs(torch.ones(samples, 1, *size))
    keys = sample_keys(1, make_draws(samples).numpy())
    erasing = plan_erasing(keys, size, prob=0.4, mode='const', count=count)
    ours = torch.ones(samples, 1, *size)
    for sample, top, left, height, width in erasing.boxes.tolist():
        assert 0 <= top <= top + height <= size[0] and 0 <= left <= left + width <= size[1]
        ours[sample, :, top : top + height, left : left + width] = 0
    assert sum(erasing.rounds) == len(erasing.boxes)

    for erased in ((1 - ours), (1 - blanks)):
        assert 0.35 < erased.flatten(1).any(1).float().mean() < 0.45
    shares = [(1 - image)[:, 0].flatten(1).mean(1) for image in (ours, blanks)]
    heights = [(image[:, 0] == 0).any(2).sum(1).float() for image in (ours, blanks)]
    tops = [(image[:, 0, :4] == 0).float().mean((1, 2)) for image in (ours, blanks)]
    lefts = [(image[:, 0, :, :4] == 0).float().mean((1, 2)) for image in (ours, blanks)]
    for pair in (shares, heights, tops, lefts, [share**2 for share in shares]):
        error = math.sqrt(sum(float(values.var()) / samples for values in pair))
        assert abs(float(pair[0].mean() - pair[1].mean())) < 4.5 * error


def test_boxes_are_drawn_as_defined() -> None:
    keys = sample_keys(1, make_draws(30_000).numpy())
    side = 1000  # large enough that rounding does not count
    boxes = plan_erasing(keys, (side, side), prob=1.0, mode='const', count=1).boxes.astype(float)
    assert len(boxes) == len(keys)
    _, top, left, height, width = boxes.T
    area, aspect = height * width / side**2, np.log(height / width)
    assert 0.0195 < area.min() < 0.021 and 0.332 < area.max() < 0.3345
    small = area < 0.2  # fit whatever their aspect, so that none is drawn again
    assert abs(area[small].mean() - 0.11) < 4.5 * 0.18 / math.sqrt(12 * small.sum())
    limit = math.log(1 / 0.3)
    assert abs(aspect[small].mean()) < 4.5 * limit / math.sqrt(3 * small.sum())
    assert abs(np.abs(aspect[small]).mean() - limit / 2) < 4.5 * limit / math.sqrt(12 * small.sum())
    for corner, length in ((top, height), (left, width)):
        place = (corner + 0.5) / (side - length + 1)
        assert abs(place.mean() - 0.5) < 4.5 / math.sqrt(12 * len(place))
        assert np.histogram(place, 10, (0, 1))[0].max() < 3000 + 5 * math.sqrt(3000)
    tight = plan_erasing(keys[:3000], (4, 4), prob=1.0, mode='const', count=1).boxes
    assert (tight[:, 1] + tight[:, 3]).max() == 4 and (tight[:, 2] + tight[:, 4]).max() == 4


def erased_pixels(made: BatchedAugment, count: int = 400) -> torch.Tensor:
    """The values in the erased boxes, (pixels, 3)."""
    draws = make_draws(count)
    out = made(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), draws)
    erasing = made.plan(draws.numpy(), (32, 32)).erasing
    assert erasing is not None
    return torch.cat([out[s, :, y : y + h, x : x + w].flatten(1).T for s, y, x, h, w in erasing.boxes.tolist()])


def test_erased_pixels_are_normal() -> None:
    noise = erased_pixels(make_augment(auto_augment=None, color_jitter=0, re_prob=1.0)).double()
    total = noise.numel()
    assert total > 150_000
    assert abs(noise.mean()) < 5 / math.sqrt(total)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / total)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / total)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / total)
    assert (torch.corrcoef(noise.T) - torch.eye(3)).abs().max() < 5 / math.sqrt(len(noise))
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / math.sqrt(total)
    edges = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    shares = torch.stack([(noise < edge).double().mean() for edge in edges])
    assert (shares - torch.special.ndtr(edges)).abs().max() < 2.5 / math.sqrt(total)


def test_modes_of_erasing() -> None:
    assert (erased_pixels(make_augment(auto_augment=None, color_jitter=0, re_prob=1.0, re_mode='const')) == 0).all()
    made = make_augment(auto_augment=None, color_jitter=0, re_prob=1.0, re_mode='rand')
    colours = torch.unique(erased_pixels(made, 2000), dim=0)
    assert len(colours) > 1900  # one for each box
    assert abs(colours.mean()) < 5 / math.sqrt(colours.numel()) and abs(colours.var() - 1) < 0.1


def test_later_boxes_lie_above_earlier_ones() -> None:
    made = make_augment(auto_augment=None, color_jitter=0, re_prob=1.0, re_mode='rand', re_count=3)
    draws = make_draws(200)
    out = made(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), draws)
    erasing = made.plan(draws.numpy(), (32, 32)).erasing
    assert erasing is not None and len(erasing.rounds) == 3 and min(erasing.rounds) > 0
    expected = out.clone()
    for (sample, top, left, height, width), colour in zip(erasing.boxes.tolist(), erasing.colours, strict=True):
        expected[sample, :, top : top + height, left : left + width] = torch.tensor(colour).float()[:, None, None]
    assert torch.equal(out, expected)


def test_resplit_erases_the_second_half(patches: np.ndarray) -> None:
    images, draws = to_tensor(patches[:41]), make_draws(41)
    plain, erased, half = (make_augment(**changes)(images, draws) for changes in
                           ({'re_prob': 0}, {'re_prob': 1.0}, {'re_prob': 1.0, 'resplit': True}))  # fmt: skip
    assert torch.equal(half[:20], plain[:20])
    assert torch.equal(half[20:], erased[20:])
    assert (erased != plain).flatten(1).any(1).all()


# The benchmark


def test_benchmark_compares_ops_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, patch in enumerate(cut_patches(6, 32, 32)):
        Image.fromarray(patch).save(tmp_path / f'{number}.png')
    benchmark_augment.main([str(tmp_path), '--images', '5', '--batch-size', '6', '--rounds', '1'])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(tuple(f'| {name}' for name in OPS))]
    assert len(rows) == len(CASES)
    assert all(row.split('|')[2:5] == [' 5 ', ' 0 ', ' 0.00000 '] for row in rows)
    assert [line.split(' |')[0] for line in lines[-3:]] == ['| timm, PIL', '| batched, exact', '| batched, float32']
    with pytest.raises(SystemExit) as caught:
        benchmark_augment.main([str(tmp_path)])
    assert caught.value.code == 1
    assert 'has 6 images, not 2000' in capsys.readouterr().err


def test_flags_of_mixing() -> None:
    flags = [
        '--mixup',
        '0.3',
        '--cutmix',
        '0.7',
        '--mixup-prob',
        '0.9',
        '--mixup-switch-prob',
        '0.4',
        '--smoothing',
        '0.2',
    ]
    mixup = build_mixup(parse_args([*flags, '--cutmix-minmax', '0.2', '0.8', '--mixup-mode', 'pair']), 5)
    assert mixup is not None
    found = (mixup.mixup_alpha, mixup.mix_prob, mixup.switch_prob, mixup.cutmix_minmax, mixup.label_smoothing)
    assert found == (0.3, 0.9, 0.4, [0.2, 0.8], 0.2) and (mixup.mode, mixup.num_classes) == ('pair', 5)
    mixup = build_mixup(parse_args(flags), 5)
    assert mixup is not None and (mixup.mode, mixup.cutmix_alpha) == ('batch', 0.7)
    assert build_mixup(parse_args(['--mixup', '0', '--cutmix', '0']), 5) is None
    _, targets = mixup(torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
