"""Trains, fine-tunes and evaluates a model: `python main.py --help` lists the flags, run_code.sh holds the recipes."""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import checkpoint as ckpt
from datasets import DATA_SETS, EraseSecondHalf, Splits, build_datasets, build_transform
from engine import NonFiniteLossError, evaluate, train_one_epoch
from flags import (
    AMOUNT,
    COUNT,
    FROM_ONE,
    PART,
    POSITIVE,
    PROBABILITY,
    SEED,
    FlagParser,
    add_data_flags,
    one_line_errors,
    usable_workers,
)
from losses import DistillationLoss, Teacher, create_criterion
from models import evit  # and all models are registered with timm
from output import OutputFolder
from samplers import EvalSampler, RASampler
from speed import count_macs, images_per_second
from utils import (
    InputError,
    Process,
    UsageError,
    amp_name,
    default_device,
    find_amp_dtype,
    find_device,
    find_process,
    format_seconds,
    in_turn,
    init_distributed,
    is_main_process,
    log,
    one_line,
    share_batchnorm_statistics,
)

# A resumed run keeps these from its checkpoint and says so where they differ.
SCHEDULE_FLAGS = (
    *('epochs', 'sched', 'lr', 'min_lr', 'warmup_lr', 'warmup_epochs', 'decay_epochs', 'decay_rate', 'batch_size'),
    *('accum_steps', 'weight_decay', 'lr_noise', 'patience_epochs'),
)  # fmt: skip
# With --eval, flags that are not given are taken from the run that wrote the checkpoint.
RECALLED_FLAGS = (
    *('model', 'model_kwargs', 'input_size', 'nb_classes', 'batch_size', 'amp'),
    *('data_set', 'data_path', 'data_layout', 'inat_category', 'use_lmdb'),
    *('base_keep_rate', 'fuse_token', 'drop_loc', 'shrink_start_epoch', 'shrink_epochs'),
)
LAYOUT_FLAGS = ('data_layout', 'inat_category', 'use_lmdb')
EVIT_FLAGS = ('base_keep_rate', 'fuse_token', 'drop_loc', 'shrink_start_epoch', 'shrink_epochs')
TEACHER_FLAGS = ('distillation_alpha', 'distillation_tau', 'teacher_model', 'teacher_path')


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _blocks(text: str) -> list[int]:
    """Block numbers, as '3', '3,6,9' or '(3, 6, 9)'."""
    if not re.fullmatch(r'[\s(\[]*\d+([\s,]+\d+)*[\s,)\]]*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of block numbers such as 3 6 9')
    return [int(number) for number in re.findall(r'\d+', text)]


def get_args_parser() -> FlagParser:
    """The flags. Names, meanings and defaults are the published code's; DIFFERENCES.md lists the exceptions."""
    parser = FlagParser('main.py', description='Train, fine-tune and evaluate DHVT, DeiT and EViT.')
    switch = argparse.BooleanOptionalAction
    parser.add_argument('--batch-size', default=64, type=FROM_ONE, help='images for each process and step')
    parser.add_argument('--epochs', default=300, type=FROM_ONE, help='length of training and of the schedule')
    parser.add_argument('--accum-steps', default=1, type=FROM_ONE, help='batches for each optimizer step')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='dhvt_small_imagenet_patch16', help="a name of timm's registry")
    group.add_argument('--model-kwargs', default=[], nargs='*', type=_key_value, metavar='KEY=VALUE',
                       help="further arguments of the model's constructor")  # fmt: skip
    group.add_argument('--input-size', default=224, type=FROM_ONE, help='image size in pixels')
    group.add_argument('--nb-classes', type=FROM_ONE, help="size of the head; the data set's by default")
    group.add_argument('--drop', default=0.0, type=PROBABILITY, help="dropout after attention's projection")
    group.add_argument('--drop-path', default=0.1, type=PROBABILITY, help='drop path rate of the last block')
    group.add_argument('--train-mode', action=switch, help='train with the model in training mode; --no-train-mode '
                       'keeps BatchNorm frozen and drop path off, and is the default with --finetune')  # fmt: skip
    group.add_argument('--model-ema', action=switch, default=True, help='keep a moving average of the weights')
    group.add_argument('--model-ema-decay', default=0.99996, type=PROBABILITY, help='its decay for each step')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it in host memory')

    group = parser.add_argument_group('token reorganisation', 'of EViT, the models named deit_…_shrink_base')
    group.add_argument(
        '--base_keep_rate', type=PART, help='part of the patch tokens that a shrinking block keeps (0.7)'
    )
    group.add_argument('--fuse_token', action=switch, help='fuse the others into one (they are dropped by default)')
    group.add_argument('--drop_loc', nargs='+', type=_blocks, metavar='BLOCK', help='the shrinking blocks (3 6 9)')
    group.add_argument('--shrink_start_epoch', type=COUNT, help='epoch from which the keep rate falls from 1 (10)')
    group.add_argument('--shrink_epochs', type=COUNT, help='epochs in which it falls to the base, by a cosine (0)')

    group = parser.add_argument_group('distillation', 'into a model with two heads')
    group.add_argument('--distillation-type', default='none', choices=('none', 'soft', 'hard'))
    group.add_argument('--distillation-alpha', type=PROBABILITY, help="weight of the teacher's part (0.5)")
    group.add_argument('--distillation-tau', type=POSITIVE, help='temperature of soft distillation (1)')
    group.add_argument('--teacher-model', help="a name of timm's registry (regnety_160)")
    group.add_argument(
        '--teacher-path', metavar='FILE', help="path or URL of its checkpoint; timm's weights if not given"
    )

    group = parser.add_argument_group('optimizer')
    group.add_argument('--opt', default='adamw', help="a name of timm's optimizers")
    group.add_argument('--opt-eps', default=1e-8, type=POSITIVE, help='epsilon')
    group.add_argument('--opt-betas', nargs=2, type=PROBABILITY, help="betas; the optimizer's own by default")
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='largest gradient norm')
    group.add_argument('--momentum', default=0.9, type=PROBABILITY, help='of optimizers that have one')
    group.add_argument('--weight-decay', default=0.05, type=AMOUNT, help='of all but biases, norms and class token')

    group = parser.add_argument_group('learning rate schedule')
    group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'poly', 'plateau'))
    group.add_argument('--lr', default=5e-4, type=AMOUNT, help='before scaling by total batch / 512')
    group.add_argument('--lr-noise', nargs='+', type=PROBABILITY, metavar='PART', help='noise from (to) this part on')
    group.add_argument('--lr-noise-pct', default=0.67, type=AMOUNT, help='limit of the noise')
    group.add_argument('--lr-noise-std', default=1.0, type=AMOUNT, help='standard deviation of the noise')
    group.add_argument('--warmup-lr', default=1e-6, type=AMOUNT, help='at the start of warm-up, not scaled')
    group.add_argument('--min-lr', default=1e-5, type=AMOUNT, help='at the end, not scaled')
    group.add_argument('--decay-epochs', default=30, type=POSITIVE, help='epochs between two decays (step)')
    group.add_argument('--warmup-epochs', default=5, type=COUNT, help='epochs of warm-up')
    group.add_argument('--cooldown-epochs', default=0, type=COUNT, help='epochs after the schedule, at its last rate')
    group.add_argument('--patience-epochs', default=10, type=COUNT, help='epochs without improvement (plateau)')
    group.add_argument('--decay-rate', '--dr', default=0.1, type=POSITIVE, help='factor of a decay (step, plateau)')
    group.add_argument('--lr-delay-epochs', default=1, type=COUNT, help='epochs by which training trails the '
                       "schedule: 1 as published, so that the first rate is used twice; 0 is timm's")  # fmt: skip

    group = parser.add_argument_group('augmentation')
    group.add_argument('--no-aug', action='store_true', help='train on the images as evaluation sees them')
    group.add_argument('--color-jitter', default=0.4, type=AMOUNT, help='strength, where --aa is none')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help="timm's policy string, or none")
    group.add_argument('--hflip', default=0.5, type=PROBABILITY, help='probability of a horizontal flip')
    group.add_argument('--smoothing', default=0.1, type=PROBABILITY, help='label smoothing')
    group.add_argument('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'))
    group.add_argument('--repeated-aug', action=switch, default=True, help='each image three times, a third of them')
    group.add_argument('--reprob', default=0.25, type=PROBABILITY, help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='its fill')
    group.add_argument('--recount', default=1, type=FROM_ONE, help='its count')
    group.add_argument('--resplit', action='store_true', help='erase in the second half of each batch only')
    group.add_argument('--mixup', default=0.8, type=AMOUNT, help='alpha, 0 for none')
    group.add_argument('--cutmix', default=1.0, type=AMOUNT, help='alpha, 0 for none')
    group.add_argument('--cutmix-minmax', nargs=2, type=PROBABILITY, help='ratios, in place of alpha')
    group.add_argument('--mixup-prob', default=1.0, type=PROBABILITY, help='of either')
    group.add_argument('--mixup-switch-prob', default=0.5, type=PROBABILITY, help='of cutmix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))

    group = parser.add_argument_group('data')
    group.add_argument(
        '--data-path', default='data', type=os.path.abspath, help='folder of train/ and val/, or where CIFAR is put'
    )
    add_data_flags(group, default='IMNET')
    group.add_argument('--use-lmdb', action=switch, default=False, help="read --data-path's train.lmdb and val.lmdb, "
                       'which folder2lmdb.py writes')  # fmt: skip
    group.add_argument('--verify-records', action='store_true', help='compare each LMDB record with its checksum')
    group.add_argument('--on-bad-image', default='stop', choices=('stop', 'skip'), help='an image that cannot be '
                       'decoded: stop, or train with the next good one and leave it out of evaluation')  # fmt: skip
    group.add_argument('--train-fraction', default=1.0, type=PART, help='use this part of the training images, the '
                       'same share of each class; a smaller part lies inside a larger one')  # fmt: skip
    group.add_argument('--train-fraction-seed', default=0, type=SEED, help='chooses another part')
    group.add_argument('--pin-mem', action=switch, default=True, help='pin batches in host memory for GPUs')

    group = parser.add_argument_group('run')
    group.add_argument('--output_dir', default='', help='folder for checkpoints and logs; none by default')
    group.add_argument('--finetune', default='', metavar='FILE', help='path or URL of the weights to start from')
    group.add_argument('--resume', default='', metavar='FILE', help='path or URL of the checkpoint to go on from')
    group.add_argument('--start_epoch', default=0, type=COUNT, help='first epoch; --resume sets it')
    group.add_argument('--eval', action='store_true', help='evaluate only; the flags of the run that wrote the '
                       'checkpoint are the defaults')  # fmt: skip
    group.add_argument('--dist-eval', action='store_true', help='share evaluation out over the processes')
    group.add_argument('--test_speed', action='store_true', help='print images per second and multiply-adds first')
    group.add_argument('--only_test_speed', action='store_true', help='print them and leave')
    group.add_argument('--seed', default=0, type=SEED, help='of every random draw')
    group.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    group.add_argument('--amp', default='auto', choices=('auto', 'off', 'fp16', 'bf16'),
                       help='mixed precision: auto is bf16 where the hardware has it, else fp16 on GPUs')  # fmt: skip

    group = parser.add_argument_group('processes', 'torchrun and SLURM set these themselves')
    group.add_argument('--world_size', default=1, type=FROM_ONE, help='number of processes, if started by hand')
    group.add_argument('--local_rank', default=0, type=COUNT, help="this process's number")
    group.add_argument('--dist_url', default='env://', help='env:// or tcp://HOST:PORT')
    return parser


def stored_flags(stored: dict[str, Any]) -> list[str]:
    """The recalled flags of a run as they would be typed, so that the parser checks them like any others."""
    flags: list[str] = []
    for name in RECALLED_FLAGS:
        value = stored.get(name)
        if name == 'model_kwargs' and value is not None:
            try:
                flags += [f'--{name}', *(f'{key}={setting!r}' for key, setting in value)]
            except (TypeError, ValueError):
                raise InputError(
                    f'the checkpoint has {value!r:.40} as model_kwargs: it is not of this program'
                ) from None
        elif isinstance(value, (list, tuple)):
            flags += [f'--{name}', *map(str, value)]
        elif isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no-{name}')
        elif value is not None:
            flags.append(f'--{name}={value}')
    return flags


def _mixes(args: argparse.Namespace) -> bool:
    """Whether training mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags.

    Raises:
        UsageError: for flags that contradict each other.
        InputError: if `--eval --resume FILE` cannot read its file.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.start_epoch and args.resume:
        raise UsageError('--start_epoch and --resume exclude each other: the checkpoint says where it stopped')
    if args.resume:
        typed = sys.argv[1:] if argv is None else argv
        typed_names = {arg.partition('=')[0].replace('_', '-') for arg in typed}
        stored = ckpt.stored_args(ckpt.load(args.resume))
        if '--data-set' in typed_names:  # how the other one lies says nothing about this one
            stored = {name: value for name, value in stored.items() if name not in LAYOUT_FLAGS}
        elif typed_names & {'--use-lmdb', '--no-use-lmdb'}:
            stored = {**stored, 'data_layout': None}
        if '--model' in typed_names and not keeps_tokens_by_rate(args.model):
            stored = {name: value for name, value in stored.items() if name not in EVIT_FLAGS}
        if not args.eval:  # a resumed run goes on with its schedule of tokens; the other flags must be given again
            stored = {name: value for name, value in stored.items() if name in EVIT_FLAGS}
        args = parser.parse_args([*stored_flags(stored), *typed])

    trains = not args.eval and not args.only_test_speed
    if _mixes(args) and args.batch_size % 2 and trains:
        raise UsageError(f'--batch-size {args.batch_size} is odd: mixup and cutmix need an even one, or both at 0')
    if args.cutmix_minmax and not int(args.input_size * args.cutmix_minmax[0]) < int(
        args.input_size * args.cutmix_minmax[1]
    ):
        raise UsageError('--cutmix-minmax needs two ratios, the smaller one first, at least a pixel apart')
    given = [f'--{name.replace("_", "-")}' for name in TEACHER_FLAGS if getattr(args, name) not in (None, '')]
    if args.distillation_type == 'none' and given:
        raise UsageError(f'{given[0]} needs --distillation-type soft or hard')
    if args.distillation_type == 'hard' and args.distillation_tau is not None:
        raise UsageError('--distillation-tau is for --distillation-type soft')
    if args.distillation_type != 'none' and args.train_mode is not True and (args.finetune or args.train_mode is False):
        raise UsageError('distillation needs the model in training mode: add --train-mode')
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UsageError('--lr-noise takes one part of the training, or two')
    if args.eval and not (args.resume or args.finetune):
        raise UsageError('--eval needs the weights: --resume FILE or --finetune FILE')
    if args.resplit and (args.reprob == 0 or args.no_aug):
        raise UsageError('--resplit needs random erasing: --reprob above 0, and no --no-aug')
    if args.eval and args.only_test_speed:
        raise UsageError('--eval and --only_test_speed exclude each other')
    if args.start_epoch >= args.epochs:
        raise UsageError(f'--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}')
    if trains and args.output_dir:
        output = Path(args.output_dir)
        holds_run = any((output / name).exists() for name in ('checkpoint.pth', 'best_checkpoint.pth', 'log.txt'))
        goes_on = bool(args.resume) and Path(args.resume).resolve().parent == output.resolve()
        if holds_run and not goes_on:
            raise UsageError(
                f'{output} holds a run already: go on with --resume {output / "checkpoint.pth"}, '
                'or choose another --output_dir'
            )
    return args


def new_model(flag: str, name: str, img_size: int, kwargs: dict[str, Any]) -> nn.Module:
    """A model by its name in timm's registry, told the image size in pixels if it takes one.

    Raises:
        UsageError: if timm does not know the name, or the model refuses its arguments.
    """
    if not timm.is_model(name):
        near = ', '.join(timm.list_models(['dhvt_*', 'deit_*cifar*', 'deit_*shrink_base']))
        raise UsageError(f"{flag} {name}: timm's registry has no such model; this project adds {near}")
    try:
        try:
            return timm.create_model(name, **{'img_size': img_size, **kwargs})
        except TypeError as err:
            if 'img_size' not in str(err):
                raise
            return timm.create_model(name, **kwargs)  # convolutional networks are not told the size
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as err:
        hint = '; --drop-path 0 leaves it out' if 'drop_path_rate' in str(err) else ''
        raise UsageError(f'{flag} {name} refuses its arguments: {one_line(err)}{hint}') from None


def keeps_tokens_by_rate(name: str) -> bool:
    """Whether a model of timm's registry is an EViT."""
    return timm.is_model(name) and timm.models.model_entrypoint(name).__module__ == evit.__name__


def create_model(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """Builds the student, or the only model.

    Raises:
        UsageError: if timm does not know the name, or the model refuses its arguments.
    """
    given = [name for name in EVIT_FLAGS if getattr(args, name) is not None]
    if given and not keeps_tokens_by_rate(args.model):
        why = ': its convolutions need the whole grid of tokens' if args.model.startswith('dhvt') else ''
        raise UsageError(f'--{given[0]} is for EViT (deit_…_shrink_base); {args.model} cannot drop tokens{why}')
    elsewhere = {name: f'--{name}' for name in ('base_keep_rate', 'fuse_token', 'drop_loc')}
    elsewhere |= {'num_classes': '--nb-classes', 'img_size': '--input-size', 'in_chans': "the images' three channels"}
    for name, _ in args.model_kwargs:
        if name in elsewhere:
            raise UsageError(f'--model-kwargs {name}=…: this is set by {elsewhere[name]}')
    drops = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path}  # a rate of 0 is not mentioned to the model
    kwargs: dict[str, Any] = {**{name: rate for name, rate in drops.items() if rate > 0}, **dict(args.model_kwargs)}
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    if args.base_keep_rate is not None:
        kwargs['base_keep_rate'] = args.base_keep_rate
    if args.fuse_token is not None:
        kwargs['fuse_token'] = args.fuse_token
    if args.drop_loc is not None:
        kwargs['drop_loc'] = [number for numbers in args.drop_loc for number in numbers]
    return new_model('--model', args.model, args.input_size, kwargs)


def create_teacher(args: argparse.Namespace, num_classes: int, classes: Sequence[str]) -> Teacher:
    """The teacher of distillation, at the image size and the normalisation that it was trained with.

    A checkpoint of this program or of the published codes says its model's arguments, and has ImageNet's normalisation
    as they do; for other weights timm's settings of the model count.

    Raises:
        UsageError: if timm does not know the model.
        InputError: if the weights cannot be had, or are for another number of classes.
    """
    name = args.teacher_model or 'regnety_160'
    stored: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    weights = None
    if args.teacher_path:
        loaded = ckpt.load(args.teacher_path)
        weights = ckpt.model_weights(loaded, args.teacher_path)
        stored = ckpt.stored_args(loaded)
        if not (isinstance(stored.get('data_set'), str) and isinstance(stored.get('input_size'), int)):
            stored = {}  # of another program, whose arguments have other meanings
        if stored.get('model', name) != name:
            raise InputError(f'{args.teacher_path} is of {stored["model"]}: give that as --teacher-model, not {name}')
        taught = loaded.get('classes')
        if taught is not None and len(taught) == len(classes) and list(taught) != list(classes):
            raise InputError(
                f'the teacher {args.teacher_path} has other classes than the data set, or in another order'
            )
        kwargs |= dict(stored.get('model_kwargs') or [])
        kwargs |= {key: stored[key] for key in ('base_keep_rate', 'fuse_token') if stored.get(key) is not None}
        if stored.get('drop_loc') is not None:
            kwargs['drop_loc'] = [number for numbers in stored['drop_loc'] for number in numbers]
    if weights is not None:
        cfg = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
        classifier = cfg.classifier if cfg is not None else None
        head = weights.get(f'{classifier[0] if isinstance(classifier, (list, tuple)) else classifier}.weight')
        if head is not None and len(head) != num_classes:
            raise InputError(f'the teacher {args.teacher_path} has {len(head)} classes, the data set has {num_classes}')
        settings = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {})
        size = int(stored.get('input_size', settings['input_size'][-1]))
        model = new_model('--teacher-model', name, size, {**kwargs, 'num_classes': num_classes})
        ckpt.load_whole(model, weights, args.teacher_path)
    else:
        if not timm.is_model(name):
            new_model('--teacher-model', name, args.input_size, {})
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as err:  # whatever timm and the hub raise where there are no weights or no network
            raise InputError(
                f"cannot get timm's weights of {name} ({one_line(err)}): give --teacher-path FILE"
            ) from None
        if model.num_classes != num_classes:
            raise InputError(
                f"timm's weights of {name} have {model.num_classes} classes, the data set has {num_classes}: "
                'give --teacher-path FILE'
            )
        settings = timm.data.resolve_data_config(model=model)
        size = settings['input_size'][-1]
    imagenet = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    own = imagenet if stored else settings
    return Teacher(
        model,
        input_size=size,
        mean=own['mean'],
        std=own['std'],
        student_mean=imagenet['mean'],
        student_std=imagenet['std'],
    )


def check_output(model: nn.Module, *, name: str, input_size: int, num_classes: int, flag: str = '--model') -> None:
    """Puts one black image through the model.

    Raises:
        UsageError: if that fails, or does not end in logits (1, num_classes).
    """
    image = torch.zeros(1, 3, input_size, input_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            logits = model.eval()(image)
    except (TypeError, ValueError, RuntimeError, AssertionError) as err:
        raise UsageError(f'{flag} {name} cannot take images of {input_size} px: {one_line(err)}') from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f'{flag} {name} gives {shape} for an image, where a row of {num_classes} logits is needed')


def load_splits(args: argparse.Namespace, process: Process, known_classes: Sequence[str] | None) -> Splits:
    """Builds the data set, one process first where files may have to be downloaded.

    Args:
        known_classes: those of the checkpoint whose head is used, in its order.
    """
    augmentation = {
        'no_aug': args.no_aug,
        'hflip': args.hflip,
        'color_jitter': args.color_jitter,
        'auto_augment': None if args.aa.lower() in ('', 'none') else args.aa,
        'interpolation': args.train_interpolation,
        're_prob': 0.0 if args.resplit else args.reprob,  # with --resplit the collate function erases
        're_mode': args.remode,
        're_count': args.recount,
    }
    downloads = DATA_SETS[args.data_set].kind == 'cifar' and not args.use_lmdb
    with in_turn(process) if downloads else nullcontext():
        return build_datasets(
            args.data_set,
            args.data_path,
            train=not args.eval,
            train_transform=build_transform(train=True, input_size=args.input_size, **augmentation),
            val_transform=build_transform(train=False, input_size=args.input_size),
            num_classes=args.nb_classes,
            data_layout=args.data_layout,
            inat_category=args.inat_category,
            use_lmdb=args.use_lmdb,
            verify_records=args.verify_records,
            skip_bad_images=args.on_bad_image == 'skip',
            train_fraction=args.train_fraction,
            train_fraction_seed=args.train_fraction_seed,
            known_classes=known_classes,
        )


def build_loaders(
    args: argparse.Namespace, splits: Splits, process: Process, device: torch.device
) -> tuple[DataLoader | None, DataLoader]:
    """The training loader, None for evaluation only, and the evaluation loader.

    Raises:
        InputError: if the training images do not fill one batch.
    """
    workers = usable_workers(args.num_workers, processes=process.local_world_size)
    common: dict[str, Any] = {'num_workers': workers, 'pin_memory': args.pin_mem and device.type == 'cuda'}
    replicas, rank = process.world_size, process.rank
    shard = EvalSampler(splits.val, num_replicas=replicas, rank=rank) if args.dist_eval else EvalSampler(splits.val)
    val_loader = DataLoader(splits.val, sampler=shard, batch_size=int(1.5 * args.batch_size), **common)
    if splits.train is None:
        return None, val_loader
    # The seeds of the published samplers: the epoch, not --seed, decides the order.
    sampler_class = RASampler if args.repeated_aug else DistributedSampler
    sampler: Any = sampler_class(splits.train, num_replicas=replicas, rank=rank)
    if len(sampler) < args.batch_size:
        raise InputError(
            f'{len(sampler)} training images for each process do not fill one batch: '
            f'lower --batch-size {args.batch_size}'
        )
    erase = EraseSecondHalf(re_prob=args.reprob, re_mode=args.remode, re_count=args.recount)
    train_loader = DataLoader(
        splits.train,
        sampler=sampler,
        batch_size=args.batch_size,
        drop_last=True,
        collate_fn=erase if args.resplit else None,
        persistent_workers=workers > 0,
        **common,
    )
    return train_loader, val_loader


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float, device: torch.device) -> Any:
    """timm's optimizer, with the scaled learning rate.

    Raises:
        UsageError: if timm does not know it, or it refuses its arguments.
    """
    kwargs: dict[str, Any] = {'eps': args.opt_eps}  # timm drops what an optimizer does not take
    if args.opt_betas is not None:
        kwargs['betas'] = tuple(args.opt_betas)
    if args.opt in ('adam', 'adamw') and device.type == 'cuda':
        kwargs['fused'] = True  # skips steps that float16 spoils without a wait for the host
    try:
        return create_optimizer_v2(
            model, opt=args.opt, lr=lr, weight_decay=args.weight_decay, momentum=args.momentum, **kwargs
        )
    except (ValueError, TypeError, RuntimeError, AssertionError) as err:
        raise UsageError(f'--opt {args.opt}: {one_line(err)}') from None


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Any:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        patience_epochs=args.patience_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        noise_seed=args.seed,
    )
    return scheduler


def report_speed(args: argparse.Namespace, model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
    """Prints parameters, multiply-adds and images per second of evaluation, measured on the main process."""
    if not is_main_process():
        return
    size = (3, args.input_size, args.input_size)
    parameters = sum(p.numel() for p in model.parameters())
    log(f'{args.model}: {parameters:,} parameters, {count_macs(model, size) / 1e9:.3f} G multiply-adds an image')
    rate = images_per_second(model, size, batch_size=args.batch_size, amp_dtype=amp)
    log(f'{rate:.1f} images/s in evaluation, batch {args.batch_size}, {args.input_size} px, {amp_name(amp)}, {device}')


def report_accuracy(stats: dict[str, float]) -> None:
    log(f'Accuracy of the network on the {stats["images"]} test images: {stats["acc1"]:.1f}%')
    log(f'  acc@1 {stats["acc1"]:.4f}  acc@5 {stats["acc5"]:.4f}  loss {stats["loss"]:.6f}')


def restore(
    args: argparse.Namespace, state: dict[str, Any], ema: ModelEmaV3 | None, optimizer: Any, scheduler: Any, scaler: Any
) -> tuple[int, float]:
    """Continues a run from its checkpoint, whose model is loaded already.

    Returns:
        The next epoch, and the best accuracy so far in percent, -1 if the checkpoint does not say.

    Raises:
        InputError: if the checkpoint is of another kind of run.
    """
    source = args.resume
    lacking = [name for name in ('optimizer', 'lr_scheduler', 'epoch') if state.get(name) is None]
    if lacking:
        raise InputError(f'{source} has no {", ".join(lacking)}: it cannot be resumed; start from it with --finetune')
    stored = ckpt.stored_args(state)
    if stored.get('opt', args.opt) != args.opt:
        raise InputError(f'{source} is of a run with --opt {stored["opt"]}, not {args.opt}')
    for name in SCHEDULE_FLAGS:
        if name in stored and stored[name] != getattr(args, name):
            log(f'Note: --{name} was {stored[name]} and stays so: the schedule goes on as {source} has it')
    try:
        if ema is not None:
            weights = state.get('model_ema')
            if weights is None:
                log(f'{source} holds no moving average: it starts from the weights')
            ckpt.load_whole(ema.module, weights or ckpt.model_weights(state, source), source)
        optimizer.load_state_dict(state['optimizer'])
        scheduler.load_state_dict(state['lr_scheduler'])
        if state.get('scaler') and scaler.is_enabled():
            scaler.load_state_dict(state['scaler'])
        best = float(state.get('max_accuracy', -1.0))
        epoch = int(state['epoch'])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as err:
        raise InputError(f'{source} is of a run with another optimizer or schedule: {one_line(err)}') from None
    log(f'Resumed from {source}: epoch {epoch} is done, best accuracy {max(best, 0):.2f}%')
    return epoch + 1, best


def synchronize_stem(model: nn.Module, device: torch.device) -> None:
    """Lets the stem's BatchNorms, and no others, see the batches of all processes, as in the published code.

    PyTorch's SyncBatchNorm exists on GPUs only; on CPUs each process normalises its own batch (DIFFERENCES.md).
    """
    if device.type == 'cuda' and isinstance(getattr(model, 'patch_embed', None), nn.Module):
        model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds everything from the arguments and runs the epochs; returns the last line of the log."""
    process = find_process(os.environ, world_size=args.world_size, local_rank=args.local_rank)
    device = find_device(args.device or default_device(process), process=process)
    init_distributed(process, device=device, dist_url=args.dist_url)
    amp_dtype = find_amp_dtype(args.amp, device)
    random_seed(args.seed, process.rank)
    torch.backends.cudnn.benchmark = True

    if args.only_test_speed:
        model = create_model(args, args.nb_classes or DATA_SETS[args.data_set].num_classes).to(device)
        report_speed(args, model, device, amp_dtype)
        return {}

    source = args.resume or args.finetune
    loaded: dict[str, Any] = {}
    if source:
        with in_turn(process):  # a URL is downloaded once
            loaded = ckpt.load(source)
    head_stays = bool(args.resume or args.eval)
    splits = load_splits(args, process, loaded.get('classes') if head_stays else None)
    train_loader, val_loader = build_loaders(args, splits, process, device)
    for note in splits.notes:
        log(f'Note: {note}')
    model = create_model(args, splits.num_classes).to(device)
    check_output(model, name=args.model, input_size=args.input_size, num_classes=splits.num_classes)
    if source:
        weights = ckpt.model_weights(loaded, source)
        if head_stays:
            ckpt.load_whole(model, weights, source)
        else:
            for misfit in ckpt.load_fitting(model, weights, source):
                log(f'{source}: {misfit}')
    if args.test_speed:
        report_speed(args, model, device, amp_dtype)

    def test(module: nn.Module, header: str, keep_rate: float | None = None) -> dict[str, float]:
        share_batchnorm_statistics(module)
        stats = evaluate(model=module, loader=val_loader, device=device, amp_dtype=amp_dtype,
                         sharded=args.dist_eval, keep_rate=keep_rate, header=header)  # fmt: skip
        splits.val.log_bad_images()
        return stats

    train_split = splits.train
    if train_loader is None or train_split is None:
        stats = test(model, 'Test')
        report_accuracy(stats)
        return {f'test_{name}': value for name, value in stats.items()}

    # Learning rates are given for a total batch of 512.
    total_batch = args.batch_size * args.accum_steps * process.world_size
    lr = args.lr * total_batch / 512
    mixed = _mixes(args)
    mixup_fn = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=splits.num_classes,
    ) if mixed else None  # fmt: skip
    criterion = create_criterion(mixed=mixed, smoothing=args.smoothing)
    teacher = None
    if args.distillation_type != 'none':
        if not hasattr(model, 'set_distilled_training'):
            raise UsageError(f'--distillation-type {args.distillation_type} needs a model with a second head, such as '
                             f'dhvt_tiny_cifar_patch4_distilled; {args.model} has one')  # fmt: skip
        model.set_distilled_training(True)  # type: ignore[operator]
        with in_turn(process):
            teacher = create_teacher(args, splits.num_classes, splits.val.classes).to(device)
        check_output(
            teacher,
            flag='--teacher-model',
            name=args.teacher_model or 'regnety_160',
            input_size=args.input_size,
            num_classes=splits.num_classes,
        )
        criterion = DistillationLoss(
            criterion,
            kind=args.distillation_type,
            alpha=0.5 if args.distillation_alpha is None else args.distillation_alpha,
            tau=args.distillation_tau or 1.0,
        )
    keep_rates = None
    if keeps_tokens_by_rate(args.model):
        keep_rates = evit.KeepRateSchedule(
            base_keep_rate=0.7 if args.base_keep_rate is None else args.base_keep_rate,
            start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
            epochs=args.shrink_epochs or 0,
        )
    train_mode = not args.finetune if args.train_mode is None else args.train_mode

    synchronized: nn.Module = model
    if process.world_size > 1:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # the layout of their gradients, as tokens are channels-last maps
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        synchronize_stem(model, device)
        synchronized = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    optimizer = build_optimizer(args, model, lr, device)
    scheduler = build_scheduler(args, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    model_ema = None
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        model_ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device)
    start_epoch, best = args.start_epoch, -1.0
    if args.resume:
        start_epoch, best = restore(args, loaded, model_ema, optimizer, scheduler, scaler)
    elif start_epoch:
        scheduler.step(max(start_epoch - args.lr_delay_epochs, 0), 0.0)

    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    derived = {
        'lr_scaled': lr,
        'total_batch': total_batch,
        'nb_classes': splits.num_classes,
        'device': str(device),
        'amp_dtype': amp_name(amp_dtype),
        'world_size': process.world_size,
        'train_mode': train_mode,
        'n_parameters': num_parameters,
    }
    output = OutputFolder(args.output_dir, {**vars(args), 'derived': derived})
    log(
        f'{args.model}, {num_parameters:,} parameters, on {args.data_set}: {len(train_split)} training and '
        f'{len(splits.val)} test images, {splits.num_classes} classes'
    )
    log(
        f'{process.world_size} process{"es" if process.world_size > 1 else ""} on {device.type} in '
        f'{derived["amp_dtype"]}, total batch {total_batch}, learning rate {lr:.3g}'
    )

    line: dict[str, Any] = {}
    started = time.perf_counter()
    last_epoch = args.epochs + args.cooldown_epochs
    for epoch in range(start_epoch, last_epoch):
        train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        train_stats = train_one_epoch(
            model=synchronized,
            criterion=criterion,
            loader=train_loader,
            optimizer=optimizer,
            device=device,
            epoch=epoch,
            scaler=scaler,
            amp_dtype=amp_dtype,
            clip_grad=args.clip_grad,
            accum_steps=args.accum_steps,
            model_ema=model_ema,
            mixup_fn=mixup_fn,
            train_mode=train_mode,
            teacher=teacher,
            keep_rate=partial(keep_rates, epoch, steps=len(train_loader)) if keep_rates is not None else None,
        )
        keep_rate = train_stats.pop('keep_rate', None)
        train_split.log_bad_images()
        test_stats = test(model, 'Test', keep_rate)
        if not math.isfinite(test_stats['loss']):
            raise NonFiniteLossError(
                f'the test loss is {test_stats["loss"]} after epoch {epoch}, with learning rate '
                f'{train_stats["lr"]:.3g}; the last checkpoint is from before this epoch'
            )
        report_accuracy(test_stats)
        line = {f'train_{name}': value for name, value in train_stats.items()}
        line |= {f'test_{name}': value for name, value in test_stats.items() if name != 'images'}
        if model_ema is not None:
            ema_stats = test(copy.deepcopy(model_ema.module).to(device), 'Test of the moving average', keep_rate)
            line |= {f'ema_test_{name}': value for name, value in ema_stats.items() if name != 'images'}
            log(f'  moving average: acc@1 {ema_stats["acc1"]:.4f}')
        is_best = test_stats['acc1'] > best
        best = max(best, test_stats['acc1'])
        line |= {'max_accuracy': best, 'epoch': epoch, 'n_parameters': num_parameters}
        if keep_rate is not None:
            line['keep_rate'] = keep_rate
        if epoch + 1 > args.lr_delay_epochs:
            scheduler.step(epoch + 1 - args.lr_delay_epochs, test_stats['loss'])
        output.save(
            {
                'model': model.state_dict(),
                'model_ema': model_ema.module.state_dict() if model_ema is not None else None,
                'optimizer': optimizer.state_dict(),
                'lr_scheduler': scheduler.state_dict(),
                'scaler': scaler.state_dict(),
                'epoch': epoch,
                'max_accuracy': best,
                'keep_rate': keep_rate,
                'classes': splits.val.classes,
                'args': vars(args),
            },
            best=is_best,
        )
        output.write_log(line)

    if start_epoch >= last_epoch:
        log(f'Nothing is left to train: the checkpoint has all {last_epoch} epochs')
        report_accuracy(test(model, 'Test'))
    log(f'Training time {format_seconds(time.perf_counter() - started)}, best accuracy {max(best, 0):.2f}%')
    output.close()
    return line


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program; returns the last line of its log.

    Args:
        argv: the flags, the command line's by default.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    with one_line_errors('main.py'):
        try:
            line = run(parse_args(argv))
        except torch.OutOfMemoryError:
            raise InputError(
                'out of GPU memory: lower --batch-size, and raise --accum-steps to keep the total'
            ) from None
        except ValueError as err:
            if 'more than 1 value per channel' not in str(err):
                raise
            raise UsageError('BatchNorm needs more than one value for each channel: raise --batch-size') from None
        except (dist.DistError, RuntimeError) as err:
            # gloo and NCCL report a process that is gone from inside whatever collective the others were in.
            if 'DataLoader worker' in str(err):
                raise InputError(f'{one_line(err)}: was it short of memory? Fewer --num_workers need less') from None
            if not isinstance(err, dist.DistError) and 'gloo' not in str(err):
                raise
            raise InputError(f'another process of the group has stopped: {one_line(err)}') from None
    if dist.is_initialized():  # not after an error: the other processes may never come to the same point
        dist.destroy_process_group()
    return line


if __name__ == '__main__':
    main()
