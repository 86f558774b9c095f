"""How fast training, evaluation and the loader are, beside a baseline.

    python tools/benchmark.py step --baseline "--amp off" --candidate "--amp bf16" --candidate "--compile default"

| step   | training steps by `engine.train_one_epoch`, on made-up images that lie on the device   |
| eval   | `engine.evaluate` likewise; its batches are 1.5 times --batch-size, as in every run     |
| loader | the training loader alone, on the data set that the flags name                           |

A variant is a text of main.py's flags, such as `--model` with a name of timm's registry. Flags that stand outside
such a text count for all variants; without any the model is DHVT-T/4 at 32 px with batch 128. The variants are
measured in turn, round after round, in one process: A B A B. Rates are medians over the rounds, ratios medians of the
rounds' own, with the lowest and the highest. tools/benchmark_augment.py and tools/benchmark_data.py measure what lies
before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.arguments import parse_args
from config.builders import build_model, build_model_ema, build_optimizer, prepare_training
from config.data import build_mixup, load_splits, open_loaders
from config.errors import one_line_errors
from config.flags import FROM_ONE, POSITIVE, FlagParser
from config.models import set_memory_format
from engine import TrainSettings, evaluate, train_one_epoch
from losses import create_criterion
from models.folding import fold_batchnorm
from pipeline.workers import no_children_left
from training.devices import find_amp_dtype, find_device, set_backends
from training.distributed import Process
from utils import InputError, UsageError, num_usable_cores, one_line

DEFAULTS = ['--model', 'dhvt_tiny_cifar_patch4', '--input-size', '32', '--batch-size', '128']
NUM_CLASSES = 100  # where --nb-classes does not say
RunBatches = Callable[[int], int]  # so many, or all there are; returns the number of images


@dataclass
class Variant:
    """What is measured: its flags, and its images per second in each round."""

    label: str
    flags: list[str]
    rates: list[float] = field(default_factory=list)


def parse_variant(text: str) -> Variant:
    """Raises UsageError for a text that a shell could not split."""
    try:
        return Variant(text.strip() or 'as it is', shlex.split(text))
    except ValueError as err:
        raise UsageError(f'{text!r}: {err}') from None


def prepare_loader(args: argparse.Namespace, device: torch.device) -> RunBatches:
    """What reads batches of training images."""
    loader = open_loaders(args, load_splits(args, Process(), None), Process(), device)[0]
    assert loader is not None
    epochs = itertools.count()

    def read(number: int) -> int:
        loader.batch_sampler.set_epoch(next(epochs))
        images = sum(len(images) for images, _ in itertools.islice(loader, number))
        if device.type == 'cuda':
            torch.cuda.synchronize(device)  # which augments
        return images

    return read


def prepare_model(what: str, args: argparse.Namespace, device: torch.device) -> RunBatches:
    """What trains or evaluates a model on the same made-up batch, so many times."""
    if args.distillation_type != 'none':
        raise UsageError(f'--distillation-type {args.distillation_type}: a step with a teacher is not measured')
    amp_dtype, num_classes = find_amp_dtype(args.amp, device), args.nb_classes or NUM_CLASSES
    model = build_model(args, num_classes).to(device)
    memory_format = set_memory_format(args, model)
    size = args.batch_size if what == 'step' else int(1.5 * args.batch_size)
    images = torch.randn(size, args.in_chans, args.input_size, args.input_size, device=device)
    batch = images, torch.randint(num_classes, (size,), device=device)
    if what == 'eval':
        folded = fold_batchnorm(model)

        def test(number: int) -> int:
            evaluate(model=folded, loader=[batch] * number, device=device, amp_dtype=amp_dtype)
            return number * size

        return test

    mixup = build_mixup(args, num_classes)
    settings = TrainSettings(
        criterion=create_criterion(mixed=mixup is not None, smoothing=args.smoothing), device=device,
        amp_dtype=amp_dtype, clip_grad=args.clip_grad, accum_steps=args.accum_steps, mixup_fn=mixup,
        memory_format=memory_format, train_mode=args.train_mode is not False,
    )  # fmt: skip
    trained = prepare_training(args, model, Process(), device)
    optimizer = build_optimizer(args, model, args.lr * size / 512, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    average = build_model_ema(args, model)

    def train(number: int) -> int:
        batches = [batch] * (number * args.accum_steps)
        train_one_epoch(trained, batches, optimizer, scaler, settings, epoch=0, model_ema=average)
        return len(batches) * size

    return train


def prepare(what: str, flags: Sequence[str]) -> RunBatches:
    """Builds everything that main.py builds from the flags; returns what is timed."""
    args = parse_args([*DEFAULTS, *flags])
    if args.eval or args.only_test_speed:
        raise UsageError('--eval and --only_test_speed are not for this: benchmark.py eval measures the evaluation')
    device = find_device(args.device)
    set_backends(device, deterministic=args.deterministic, tf32=args.tf32)
    return prepare_loader(args, device) if what == 'loader' else prepare_model(what, args, device)


def measure(what: str, variants: Sequence[Variant], common: Sequence[str], *, rounds: int, seconds: float) -> None:
    """Fills in the variants' rates."""
    runs = []
    for variant in variants:
        run = prepare(what, [*common, *variant.flags])
        number = 2**62
        if what != 'loader':
            number = 1
            run(number)  # which compiles
        while True:  # warms up, until a measurement is long enough
            began = time.perf_counter()
            run(number)
            taken = time.perf_counter() - began
            if taken >= seconds or what == 'loader':  # an epoch is as long as it is
                break
            number = max(number + 1, min(4 * number, round(number * seconds / max(taken, 1e-9)) + 1))
        runs.append((run, number))
    for _ in range(rounds):
        for variant, (run, number) in zip(variants, runs, strict=True):
            began = time.perf_counter()
            images = run(number)
            variant.rates.append(images / (time.perf_counter() - began))


def make_table(variants: Sequence[Variant]) -> str:
    """Rates and ratios to the first variant, as Markdown."""
    rows = ['| variant | images/s | slowest to fastest | ratio | lowest to highest |', '|---|---|---|---|---|']
    for variant in variants:
        ratios = [rate / base for rate, base in zip(variant.rates, variants[0].rates, strict=True)]
        rows.append(
            f'| {variant.label} | {statistics.median(variant.rates):,.1f} | {min(variant.rates):,.1f} to '
            f'{max(variant.rates):,.1f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |'
        )
    return '\n'.join(rows)


def describe_machine() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    threads = torch.get_num_threads()
    return f'{processor}, {num_usable_cores()} cores, {threads} threads{gpu}, torch {torch.__version__}'


def get_args_parser() -> FlagParser:
    parser = FlagParser('benchmark.py', description=f"{(__doc__ or '').splitlines()[0]} Further flags are main.py's.")
    parser.add_argument('what', choices=('step', 'eval', 'loader'), help='the part of a run that is timed')
    parser.add_argument('--baseline', default='', metavar='FLAGS', help='the variant that others are compared with')
    parser.add_argument('--candidate', action='append', default=[], metavar='FLAGS',
                        help='another; may be repeated; one word as --candidate=--grad-checkpointing')  # fmt: skip
    parser.add_argument('--rounds', default=5, type=FROM_ONE, help='measurements of each variant')
    parser.add_argument('--seconds', default=5.0, type=POSITIVE, help='length of a measurement, at least')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args, common = get_args_parser().parse_known_args(argv)
    with one_line_errors('benchmark.py'), no_children_left():
        variants = [parse_variant(text) for text in (args.baseline, *args.candidate)]
        try:
            with redirect_stdout(open(os.devnull, 'w')):
                measure(args.what, variants, common, rounds=args.rounds, seconds=args.seconds)
        except RuntimeError as err:
            raise InputError(one_line(err)) from None
        print(f'{args.what}, {args.rounds} rounds in turn; {describe_machine()}')
        print(f'Flags of all: {shlex.join(common) or "none"}\n\n{make_table(variants)}')


if __name__ == '__main__':
    main()
