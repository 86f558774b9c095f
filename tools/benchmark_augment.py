"""Batched augmentation beside timm's on PIL images: how equal each op is, and how fast the whole pipeline.

    python tools/benchmark_augment.py FOLDER                   images of any kind below FOLDER
    python tools/benchmark_augment.py FOLDER --input-size 224 --batch-size 64

Ops are compared on the same images with the same arguments, which timm draws for the levels of rand-m9-mstd0.5. Rates
are those of one thread, from images in memory to a normalised batch; all ways are measured in turn, round after round.
Up to 32 pixels the pipeline starts with the crop with padding; above, after the random resized crop, which loader
processes do in both cases. On a CPU, processor seconds are counted, so that other programs do not.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import COUNT, FROM_ONE, SEED, FlagParser
from config.pretrained import read_image
from pipeline.augment import OPS, BatchedAugment, apply_op
from pipeline.files import walk
from pipeline.transforms import Augmentation
from training.devices import find_device
from utils import InputError, seed_all

GEOMETRIC = ('rotate', 'shear_x', 'shear_y', 'translate_x_rel', 'translate_y_rel')
FILL = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)


def get_args_parser() -> FlagParser:
    parser = FlagParser('benchmark_augment.py', description='Batched augmentation beside that of PIL images.')
    parser.add_argument('folder', help='of images, at any depth')
    parser.add_argument('--images', type=FROM_ONE, default=2000, help='for each op')
    parser.add_argument('--input-size', type=FROM_ONE, default=32, help='pixels')
    parser.add_argument('--batch-size', type=FROM_ONE, default=256, help='of the pipeline')
    parser.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help='policy of the pipeline')
    parser.add_argument('--rounds', type=COUNT, default=9, help='measurements of each rate; 0 compares ops only')
    parser.add_argument('--device', default='cpu', help='of the batched ways')
    parser.add_argument('--seed', type=SEED, default=0, help='of every draw')
    return parser


def read_images(folder: Path, *, images: int, input_size: int, seed: int) -> list[Image.Image]:
    """Images below a folder, drawn at random, as squares.

    Raises:
        InputError: if there are too few, or a folder cannot be read.
    """
    found = walk(folder).images
    paths = sorted(folder / below / name for below, names in found.items() for name in names)
    if len(paths) < images:
        raise InputError(f'{folder} has {len(paths)} images, not {images}: give another folder, or --images')
    chosen = map(read_image, random.Random(seed).sample(paths, images))
    return [image.resize((input_size, input_size), Image.Resampling.BICUBIC) for image in chosen]


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """uint8 (n, 3, H, W)."""
    return torch.stack([pil_to_tensor(image) for image in images])


def compare_op(name: str, images: Sequence[Image.Image], *, cubic: bool, device: torch.device) -> list[str]:
    """The cells of a row: for exact arithmetic and for float32, identical images, greatest and mean difference."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    to_argument: Any = LEVEL_TO_ARG[name]
    op: Any = NAME_TO_OP[name]
    arguments: list[float] = []
    outs = []
    for image in images:
        argument = to_argument(min(random.gauss(9, 0.5), 10), {'translate_const': 0}) if to_argument else ()
        arguments += argument or (0,)
        outs.append(op(image, *argument, fillcolor=FILL, resample=resample))
    expected = to_batch(outs).short()
    parts = [slice(start, start + 500) for start in range(0, len(images), 500)]  # for the device's memory
    cells = []
    for exact in (True, False):
        found = torch.cat([
            apply_op(to_batch(images[part]).to(device), name, np.array(arguments[part]), cubic=cubic, fill=FILL,
                     exact=exact).cpu()
            for part in parts
        ])  # fmt: skip
        difference = (found - expected).abs().flatten(1)
        mean = int(difference.sum()) / difference.numel()
        cells += [f'{int((difference.amax(1) == 0).sum()):,}', str(int(difference.max())), f'{mean:.5f}']
    return cells


def compare_ops(images: Sequence[Image.Image], *, device: torch.device) -> None:
    """Prints a row for each op."""
    print(f'{len(images):,} images of {images[0].width} pixels; differences in grey levels')
    print('| op | exact: identical | max | mean | float32: identical | max | mean |\n|---|---|---|---|---|---|---|')
    for name, info in OPS.items():
        for cubic in (True, False) if info.kind in GEOMETRIC else (True,):
            label = name if info.kind not in GEOMETRIC else f'{name}, {"bicubic" if cubic else "bilinear"}'
            print(f'| {label} | ' + ' | '.join(compare_op(name, images, cubic=cubic, device=device)) + ' |', flush=True)


def measure_rates(
    images: Sequence[Image.Image], settings: Augmentation, seed: int, rounds: int, device: torch.device
) -> None:
    """Prints images per second of timm's pipeline and of both batched ones, on one batch."""
    transform: Any = settings.transform(train=True)
    transform.transforms = transform.transforms[1:]  # without the resize, or the random resized crop
    batch = to_batch(images).to(device)
    numbers = torch.arange(len(images))

    def on_pil(epoch: int) -> Tensor:
        return torch.stack([transform(image) for image in images])

    def batched(exact: bool) -> Callable[[int], Tensor]:
        augment = BatchedAugment(settings, seed=seed, exact=exact)

        def run(epoch: int) -> Tensor:
            draws = torch.stack([numbers, torch.full_like(numbers, epoch), torch.zeros_like(numbers)], dim=1)
            return augment(batch, draws)

        return run

    ways = {'timm, PIL': on_pil, 'batched, exact': batched(True), 'batched, float32': batched(False)}
    on_host = device.type == 'cpu'
    clock = time.process_time if on_host else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            repeats = 1 if run is on_pil else 5
            began = clock()
            for repeat in range(repeats):
                run(number * 5 + repeat)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if number:  # the first round warms up
                rates[name].append(len(images) * repeats / (clock() - began))
    size, policy = images[0].width, settings.auto_augment or 'no policy'
    print(f'\nBatch {len(images)}, {size} pixels, {policy}, one thread, {rounds} rounds in turn, device {device}')
    print('| pipeline | images/s | slowest to fastest | ratio |\n|---|---|---|---|')
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates['timm, PIL'], strict=True))
        print(f'| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} | {ratio:.2f} |')


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with one_line_errors('benchmark_augment.py'):
        device = find_device(args.device)
        torch.set_num_threads(1)
        seed_all(args.seed)
        policy = args.aa if args.aa.lower() not in ('', 'none') else None
        settings = Augmentation(input_size=args.input_size, auto_augment=policy)
        BatchedAugment(settings, seed=args.seed)  # refuses what it does not cover, before anything is compared
        wanted = max(args.images, args.batch_size)
        images = read_images(Path(args.folder), images=wanted, input_size=args.input_size, seed=args.seed)
        compare_ops(images[: args.images], device=device)
        if args.rounds:
            measure_rates(images[: args.batch_size], settings, args.seed, args.rounds, device)


if __name__ == '__main__':
    main()
