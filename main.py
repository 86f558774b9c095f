"""Trains, fine-tunes and evaluates a model: `python main.py --help` lists the flags, run_code.sh holds the recipes."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn

import checkpoint as ckpt
from augment import BatchedMixup
from datasets import DATA_SETS, Augmentation, Splits, build_datasets
from ema import MovingAverage
from engine import evaluate
from factory import (
    DEFAULT_TEACHER,
    check_output,
    create_model,
    create_teacher,
    distribute,
    keeps_tokens_by_rate,
    put_channels_last,
    recompute_blocks,
    synchronize_stem,
)
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
from interrupts import Interrupted, Interrupts, leave_word, lost_contact, no_children_left
from loaders import TrainLoader, build_loaders
from losses import DistillationLoss, Teacher, create_criterion
from models import evit
from models.folding import fold_batchnorm
from output import OutputFolder, holds_run
from resume import Parts
from samplers import EvalSampler, TrainBatches
from speed import count_macs, images_per_second
from training import Run, report_accuracy
from utils import (
    InputError,
    Process,
    SizedLoader,
    UsageError,
    amp_name,
    default_device,
    find_amp_dtype,
    find_device,
    find_process,
    from_main_process,
    get_rank,
    in_turn,
    init_distributed,
    is_main_process,
    keep_freed_memory,
    log,
    one_line,
    set_backends,
    share_batchnorm_statistics,
)

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


def _interval(text: str) -> tuple[str, float]:
    """'500' or '10m' as ('steps', 500.0) or ('minutes', 10.0)."""
    found = re.fullmatch(r'(\d+)|(\d+(?:\.\d*)?)m', text)
    number = float(found[1] or found[2]) if found else 0
    if found is None or number <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is neither steps, such as 500, nor minutes, such as 10m')
    return ('steps' if found[1] else 'minutes'), number


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
    group.add_argument('--grad-checkpointing', action='store_true', help='compute each block again in the backward '
                       'pass: less memory, about a third more time')  # fmt: skip
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

    group.add_argument('--augment', default='auto', choices=('auto', 'pil', 'batched'), help='images one by one in '
                       'PIL, or whole batches on the device; auto takes what is faster')  # fmt: skip
    group.add_argument('--augment-exact', action='store_true', help="batched: timm's pixels to the bit, more slowly")

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
    group.add_argument('--cache-gib', default=4.0, type=AMOUNT, metavar='GIB', help='memory on the device for images '
                       'of one size, kept there if all fit: up to 32 px in training, and in evaluation')  # fmt: skip
    group.add_argument('--pin-mem', action=switch, default=True, help='pin batches in host memory for GPUs')

    group = parser.add_argument_group('run')
    group.add_argument('--output_dir', default='', help='folder for checkpoints and logs; none by default')
    group.add_argument('--finetune', default='', metavar='FILE', help='path or URL of the weights to start from')
    group.add_argument('--resume', default='', metavar='FILE', help='path or URL of the checkpoint to go on from')
    group.add_argument('--auto-resume', action=switch, default=False, help="go on from --output_dir's newest whole "
                       'checkpoint, if there is one')  # fmt: skip
    group.add_argument('--force-resume', action='store_true', help='go on although arguments or data differ from the '
                       "checkpoint's; those given now count")  # fmt: skip
    group.add_argument('--checkpoint-every', type=_interval, metavar='N', help='write a checkpoint every N optimizer '
                       'steps, or minutes (10m), besides the one after each epoch')  # fmt: skip
    group.add_argument('--export-safetensors', metavar='FILE', help='write the best weights there too, or with --eval '
                       'those that are evaluated')  # fmt: skip
    group.add_argument('--on-nan', default='stop', choices=('stop', 'rewind'), help='a loss or gradient that is no '
                       'finite number: stop, or go back to the last checkpoint and leave that batch out')  # fmt: skip
    group.add_argument('--most-skips', default=20, type=COUNT, help='optimizer steps that the loss scaler of fp16 may '
                       'leave out in a row')  # fmt: skip
    group.add_argument('--report', action=switch, default=True, help="draw the run in --output_dir's report.html, once "
                       'it is over')  # fmt: skip
    group.add_argument('--start_epoch', default=0, type=COUNT, help='first epoch; --resume sets it')
    group.add_argument('--eval', action='store_true', help='evaluate only; the flags of the run that wrote the '
                       'checkpoint are the defaults')  # fmt: skip
    group.add_argument('--dist-eval', action='store_true', help='share evaluation out over the processes')
    group.add_argument('--test_speed', action='store_true', help='print images per second and multiply-adds first')
    group.add_argument('--only_test_speed', action='store_true', help='print them and leave')
    group.add_argument('--seed', default=0, type=SEED, help='of every random draw')
    group.add_argument('--deterministic', action='store_true', help='only operations that give the same bits each '
                       'time, which GPUs need a flag for')  # fmt: skip
    group.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    group.add_argument('--amp', default='auto', choices=('auto', 'off', 'fp16', 'bf16'),
                       help='mixed precision: auto is bf16 where the hardware has it, else fp16 on GPUs')  # fmt: skip

    group.add_argument('--compile', default='off', choices=('off', 'default', 'reduce-overhead', 'max-autotune'),
                       help="torch.compile's mode for the training step")  # fmt: skip
    group.add_argument('--channels-last', action=switch, help='channels innermost in memory; where it pays by default')
    group.add_argument('--tf32', action=switch, default=True, help='TensorFloat-32 for float32 products on GPUs')

    group = parser.add_argument_group('processes', 'torchrun and SLURM set these themselves')
    group.add_argument('--world_size', default=1, type=FROM_ONE, help='number of processes, if started by hand')
    group.add_argument('--local_rank', default=0, type=COUNT, help="this process's number")
    group.add_argument('--dist_url', default='env://', help='env:// or tcp://HOST:PORT')
    group.add_argument('--timeout', default=1800, type=POSITIVE, metavar='SECONDS', help='longest wait for another '
                       'process of the group, or for a batch from a loader process')  # fmt: skip
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
    if args.eval and args.resume:
        typed = sys.argv[1:] if argv is None else argv
        typed_names = {arg.partition('=')[0].replace('_', '-') for arg in typed}
        stored = ckpt.stored_args(ckpt.load(args.resume))
        if '--data-set' in typed_names:  # how the other one lies says nothing about this one
            stored = {name: value for name, value in stored.items() if name not in LAYOUT_FLAGS}
        elif typed_names & {'--use-lmdb', '--no-use-lmdb'}:
            stored = {**stored, 'data_layout': None}
        if '--model' in typed_names and not keeps_tokens_by_rate(args.model):
            stored = {name: value for name, value in stored.items() if name not in EVIT_FLAGS}
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
    if args.augment_exact and (args.augment == 'pil' or args.no_aug):
        raise UsageError('--augment-exact is for batched augmentation: no --augment pil, and no --no-aug')
    if args.compile != 'off' and keeps_tokens_by_rate(args.model):
        raise UsageError(f'--compile {args.compile}: EViT has another number of tokens from step to step; leave it off')
    if args.compile in ('reduce-overhead', 'max-autotune') and args.accum_steps > 1:
        raise UsageError(f"--compile {args.compile} reuses gradients' memory at each batch: no --accum-steps above 1, "
                         'or --compile default')  # fmt: skip
    if args.eval and args.only_test_speed:
        raise UsageError('--eval and --only_test_speed exclude each other')
    if args.start_epoch >= args.epochs:
        raise UsageError(f'--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}')
    for flag, asked in (
        ('--auto-resume', args.auto_resume),
        ('--checkpoint-every', args.checkpoint_every is not None),
        ('--on-nan rewind', args.on_nan == 'rewind'),
    ):
        if trains and asked and not args.output_dir:
            raise UsageError(f'{flag} needs a folder for checkpoints: --output_dir')
    if args.force_resume and not (args.resume or args.auto_resume):
        raise UsageError('--force-resume needs --resume FILE or --auto-resume')
    if trains and args.output_dir and not args.auto_resume:
        output = Path(args.output_dir)
        goes_on = bool(args.resume) and Path(args.resume).resolve().parent == output.resolve()
        if holds_run(output) and not goes_on:
            raise UsageError(f'{output} holds a run already: go on with --auto-resume, or choose another --output_dir')
    return args


def build_model(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """The student, or the only model.

    Raises:
        UsageError: if timm does not know it, it refuses its arguments, or flags of EViT are given for another one.
    """
    given = [name for name in EVIT_FLAGS if getattr(args, name) is not None]
    if given and not keeps_tokens_by_rate(args.model):
        why = ': its convolutions need the whole grid of tokens' if args.model.startswith('dhvt') else ''
        raise UsageError(f'--{given[0]} is for EViT (deit_…_shrink_base); {args.model} cannot drop tokens{why}')
    return create_model(
        args.model,
        input_size=args.input_size,
        num_classes=num_classes,
        drop=args.drop,
        drop_path=args.drop_path,
        evit_settings=vars(args),
        model_kwargs=args.model_kwargs,
    )


def build_teacher(args: argparse.Namespace, process: Process, model: nn.Module, splits: Splits) -> Teacher:
    """The teacher, and the student made ready for it.

    Raises:
        UsageError: if the student has one head only, or the teacher cannot be built.
        InputError: if the teacher's weights cannot be had.
    """
    if not hasattr(model, 'set_distilled_training'):
        raise UsageError(f'--distillation-type {args.distillation_type} needs a model with a second head, such as '
                         f'dhvt_tiny_cifar_patch4_distilled; {args.model} has one')  # fmt: skip
    model.set_distilled_training(True)  # type: ignore[operator]
    sizes = {'input_size': args.input_size, 'num_classes': splits.num_classes}
    with in_turn(process):
        teacher = create_teacher(args.teacher_model, args.teacher_path, **sizes, classes=splits.val.classes)
    check_output(teacher, flag='--teacher-model', name=args.teacher_model or DEFAULT_TEACHER, **sizes)
    return teacher


def find_augmentation(args: argparse.Namespace) -> Augmentation:
    return Augmentation(
        input_size=args.input_size,
        no_aug=args.no_aug,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa.lower() in ('', 'none') else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        resplit=args.resplit,
    )


def load_splits(args: argparse.Namespace, process: Process, known_classes: Sequence[str] | None) -> Splits:
    """Builds the data set, one process first where files may have to be downloaded.

    Args:
        known_classes: those of the checkpoint whose head is used, in its order.
    """
    augmentation = find_augmentation(args)
    downloads = DATA_SETS[args.data_set].kind == 'cifar' and not args.use_lmdb
    with in_turn(process) if downloads else nullcontext():
        return build_datasets(
            args.data_set,
            args.data_path,
            train=not args.eval,
            train_transform=augmentation.transform(train=True),
            val_transform=augmentation.transform(train=False),
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


def plan_batches(args: argparse.Namespace, splits: Splits, process: Process) -> TrainBatches | None:
    """Which training images are in which batch; None for evaluation only.

    Raises:
        InputError: if the training images do not fill one batch.
    """
    if splits.train is None:
        return None
    batches = TrainBatches(
        len(splits.train),
        batch_size=args.batch_size,
        num_replicas=process.world_size,
        rank=process.rank,
        repeated=args.repeated_aug,
        even=_mixes(args),
    )
    if not len(batches):
        raise InputError(
            f'{len(splits.train)} training images do not fill one batch of {args.batch_size} on each of '
            f'{process.world_size} process{"es" if process.world_size > 1 else ""}: lower --batch-size'
        )
    return batches


def open_loaders(
    args: argparse.Namespace, splits: Splits, process: Process, device: torch.device
) -> tuple[TrainLoader | None, SizedLoader, str]:
    """The loaders of training, None for evaluation only, and of evaluation; and how training images are augmented."""
    share = (process.world_size, process.rank) if args.dist_eval else (1, 0)
    return build_loaders(
        splits.train,
        splits.val,
        batches=plan_batches(args, splits, process),
        shard=EvalSampler(splits.val, num_replicas=share[0], rank=share[1]),
        eval_batch_size=int(1.5 * args.batch_size),
        augmentation=find_augmentation(args),
        seed=args.seed,
        augment=args.augment,
        exact=args.augment_exact,
        cache_gib=args.cache_gib,
        device=device,
        workers=usable_workers(args.num_workers, processes=process.local_world_size),
        pin_memory=args.pin_mem,
        timeout=args.timeout,
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float, device: torch.device) -> Any:
    """timm's optimizer, with the scaled learning rate.

    Raises:
        UsageError: if timm does not know it, or it refuses its arguments.
    """
    kwargs: dict[str, Any] = {'eps': args.opt_eps}  # timm drops what an optimizer does not take
    if args.opt_betas is not None:
        kwargs['betas'] = tuple(args.opt_betas)
    if args.opt in ('adam', 'adamw') and device.type in ('cuda', 'cpu'):
        kwargs['fused'] = True  # one kernel; on GPUs it skips steps that float16 spoils without a wait for the host
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
        plateau_mode='min',  # of the test loss
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


def find_start(args: argparse.Namespace, process: Process, output: OutputFolder) -> tuple[str, dict[str, Any], bool]:
    """The checkpoint to start from, if any: its name and content, and whether a run goes on from it.

    The output folder's is read by the main process for all, which need not have the same disk.
    """
    if args.auto_resume and not args.eval:
        found = from_main_process(output.newest())
        if found is not None:
            return found[0], ckpt.from_bytes(found[1], found[0]), True
    source = args.resume or args.finetune
    if not source:
        return '', {}, False
    with in_turn(process):  # a URL is downloaded once
        return source, ckpt.load(source), bool(args.resume)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds everything from the arguments and runs the epochs; returns the last line of the log."""
    process = find_process(os.environ, world_size=args.world_size, local_rank=args.local_rank)
    device = find_device(args.device or default_device(process), process=process)
    set_backends(deterministic=args.deterministic, tf32=args.tf32 and device.type == 'cuda')
    if device.type == 'cpu':
        keep_freed_memory()
    init_distributed(process, device=device, dist_url=args.dist_url, timeout=args.timeout)
    amp_dtype = find_amp_dtype(args.amp, device)

    if args.only_test_speed:
        model = build_model(args, args.nb_classes or DATA_SETS[args.data_set].num_classes).to(device)
        report_speed(args, model, device, amp_dtype)
        return {}

    output = OutputFolder('' if args.eval else args.output_dir, export=args.export_safetensors)
    source, loaded, resumes = find_start(args, process, output)
    head_stays = resumes or args.eval
    splits = load_splits(args, process, ckpt.class_names(loaded, source) if head_stays else None)
    train_loader, val_loader, augmented = open_loaders(args, splits, process, device)
    for note in splits.notes:
        log(f'Note: {note}')
    memory_format = torch.preserve_format if args.channels_last is False else torch.channels_last
    random_seed(args.seed, process.rank)  # here, so that the weights do not depend on what was drawn for the data
    model = build_model(args, splits.num_classes).to(device)
    if memory_format == torch.channels_last:
        put_channels_last(model)
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

    def test(
        module: nn.Module, header: str, keep_rate: float | None = None, stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        share_batchnorm_statistics(module)
        stats = evaluate(model=fold_batchnorm(module), loader=val_loader, device=device, amp_dtype=amp_dtype,
                         sharded=args.dist_eval, keep_rate=keep_rate, stop=stop, header=header)  # fmt: skip
        splits.val.log_bad_images()
        return stats

    if train_loader is None or splits.train is None:
        stats = test(model, 'Test')
        report_accuracy(stats)
        if args.export_safetensors and is_main_process():
            described = ckpt.description({**loaded, 'args': vars(args), 'classes': splits.val.classes})
            data = ckpt.to_safetensors(model.state_dict(), described)
            Path(args.export_safetensors).parent.mkdir(parents=True, exist_ok=True)
            ckpt.write_bytes(Path(args.export_safetensors), data)
        return {f'test_{name}': value for name, value in stats.items()}

    # Learning rates are given for a total batch of 512.
    total_batch = args.batch_size * args.accum_steps * process.world_size
    lr = args.lr * total_batch / 512
    mixed = _mixes(args)
    mixup_fn = BatchedMixup(
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
        teacher = build_teacher(args, process, model, splits).to(device)
        criterion = DistillationLoss(
            criterion,
            kind=args.distillation_type,
            alpha=0.5 if args.distillation_alpha is None else args.distillation_alpha,
            tau=args.distillation_tau or 1.0,
        )
    keep_rates = None
    if keeps_tokens_by_rate(args.model):
        keep_rates = evit.KeepRateSchedule(
            base_keep_rate=evit.BASE_KEEP_RATE if args.base_keep_rate is None else args.base_keep_rate,
            start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
            epochs=args.shrink_epochs or 0,
        )
    train_mode = not args.finetune if args.train_mode is None else args.train_mode

    if args.grad_checkpointing:
        recompute_blocks(model, args.model)
    if args.compile != 'off':
        model.compile(mode=args.compile)  # in place: names of weights stay, and copies of the model are not compiled
    synchronized: nn.Module = model
    if process.world_size > 1:
        synchronize_stem(model, device)
        synchronized = distribute(model, device, accum_steps=args.accum_steps)
    optimizer = build_optimizer(args, model, lr, device)
    scheduler = build_scheduler(args, optimizer)
    model_ema = None
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        model_ema = MovingAverage(model, decay=args.model_ema_decay, device=ema_device)

    fingerprint = {
        'data': f'{splits.train.fingerprint()}-{splits.val.fingerprint()}',
        'total_batch': total_batch,
        'processes': process.world_size,
        'precision': amp_name(amp_dtype),
        'train_mode': train_mode,
        'augment': augmented,
        'threads': torch.get_num_threads(),
        'device': device.type,
        'torch': str(torch.__version__),
    }
    training = Run(
        parts=Parts(
            model, model_ema, optimizer, scheduler,
            torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        ),
        trained=synchronized,
        loader=train_loader,
        dataset=splits.train,
        test=test,
        epoch_options={
            'criterion': criterion,
            'device': device,
            'amp_dtype': amp_dtype,
            'clip_grad': args.clip_grad,
            'accum_steps': args.accum_steps,
            'mixup_fn': mixup_fn,
            'memory_format': memory_format,
            'train_mode': train_mode,
            'teacher': teacher,
            'seed': args.seed,
            'most_skips': args.most_skips,
        },
        keep_rates=keep_rates,
        settings={'classes': splits.val.classes, 'args': vars(args), 'fingerprint': fingerprint},
        last_epoch=args.epochs + args.cooldown_epochs,
        lr_delay_epochs=args.lr_delay_epochs,
        checkpoint_every=args.checkpoint_every,
        rewinds=args.on_nan == 'rewind',
        output=output,
        interrupts=Interrupts(),
    )  # fmt: skip
    if resumes:
        training.resume(loaded, source, force=args.force_resume)
    elif args.start_epoch:
        training.progress.epoch = args.start_epoch
        scheduler.step(max(args.start_epoch - args.lr_delay_epochs, 0), None)

    derived = {
        'lr_scaled': lr,
        'nb_classes': splits.num_classes,
        'n_parameters': training.num_parameters,
        **fingerprint,
    }
    output.begin(
        {**vars(args), 'derived': derived},
        lines=training.progress.history,
        timings=training.progress.timings,
    )
    log(
        f'{args.model}, {training.num_parameters:,} parameters, on {args.data_set}: {len(splits.train)} training and '
        f'{len(splits.val)} test images, {splits.num_classes} classes'
    )
    log(
        f'{process.world_size} process{"es" if process.world_size > 1 else ""} on {device.type} in '
        f'{fingerprint["precision"]}, augmentation {augmented}, total batch {total_batch}, learning rate {lr:.3g}'
    )
    return training.train()


def report_run(args: argparse.Namespace) -> None:
    """Makes the report of a run that is over. Whatever goes wrong there is a note, as the run itself is whole."""
    interrupts = Interrupts()
    try:
        with interrupts.installed(), no_children_left():
            from tools import report  # drawing takes a second to import, and is for the main process only

            made = report.make([Path(args.output_dir)], device=args.device, stop=lambda: bool(interrupts.signal))
        log(f'Report: {made}')
    except (Exception, SystemExit) as err:
        log(f'Note: there is no report ({one_line(err)}); python tools/report.py {args.output_dir} makes one')


def explain(err: Exception, args: argparse.Namespace) -> InputError | None:
    """What the user can do about an error of PyTorch's, None for one that says nothing about what was given."""
    text = str(err)
    compiler = sys.modules.get('torch._dynamo.exc')  # not loaded where nothing is compiled
    if compiler is not None and isinstance(err, compiler.TorchDynamoException):
        return InputError(f'--compile {args.compile} failed: {one_line(err)}; go on with --compile off')
    if isinstance(err, torch.OutOfMemoryError):
        return InputError(
            'out of GPU memory: lower --batch-size, and raise --accum-steps to keep the total; or lower --cache-gib'
        )
    if 'more than 1 value per channel' in text:
        return UsageError('BatchNorm needs more than one value for each channel: raise --batch-size')
    if 'DataLoader timed out' in text:
        return InputError(f'a loader process gave no batch in {args.timeout:g} s (--timeout): it, or its disk, hangs')
    if 'DataLoader worker' in text:
        return InputError(f'{one_line(err)}: was it short of memory? Fewer --num_workers need less')
    broken = re.search('gloo|nccl|pair closure|connection|timed out|timeout|broken pipe', text, re.IGNORECASE)
    if isinstance(err, dist.DistError) or (broken and dist.is_initialized()):
        # gloo and NCCL report a process that is gone from inside whatever collective the others were in.
        return InputError(lost_contact(get_rank(), err))
    return None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program; returns the last line of its log.

    Args:
        argv: the flags, the command line's by default.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    with one_line_errors('main.py'):
        args = parse_args(argv)
        try:
            with no_children_left():
                line = run(args)
        except Interrupted as stop:
            if not is_main_process():
                sys.exit(stop.exit_code)
            raise
        except (InputError, OSError) as err:
            leave_word(get_rank(), one_line(err))
            raise
        except (torch.OutOfMemoryError, ValueError, dist.DistError, RuntimeError) as err:
            reason = explain(err, args)
            if reason is None:
                leave_word(get_rank(), one_line(err))
                raise
            leave_word(get_rank(), str(reason))
            raise reason from None
    reports = args.report and args.output_dir and not (args.eval or args.only_test_speed) and is_main_process()
    if dist.is_initialized():  # not after an error: the other processes may never come to the same point
        dist.destroy_process_group()
    if reports:  # once the others are free to leave
        report_run(args)
    return line


if __name__ == '__main__':
    main()
