"""main.py's flags, and what excludes what."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.flags import (
    AMOUNT,
    COUNT,
    FROM_ONE,
    PART,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SECONDS,
    SEED,
    FlagParser,
    add_data_flags,
    refuse_inputs,
)
from config.models import is_evit
from config.recall import config_flags, recalled_flags
from training.output import holds_run
from utils import UsageError

TEACHER_FLAGS = ('distillation_alpha', 'distillation_tau', 'teacher_model', 'teacher_path')

EXAMPLES = r"""examples:
  train on digits, a minute on two CPU cores (run_code.sh has the published recipes):
    bash run_code.sh digits
  the same run with another seed:
    python main.py -c output/digits/args.yaml --seed 1 --output_dir output/digits-1
  go on from its newest checkpoint:
    python main.py -c output/digits/args.yaml --auto-resume
  evaluate its best weights:
    python main.py --eval --resume output/digits/best_checkpoint.pth
  fine-tune them on your own images, in my-images/train/CLASS/ and my-images/val/CLASS/:
    python main.py --finetune output/digits --data-set FOLDER --data-path my-images --input-size 16 --train-mode \
        --output_dir output/mine
"""


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
    """The flags. Names, meanings and defaults are the published code's; docs/differences.md lists the exceptions."""
    parser = FlagParser('main.py', description='Train, fine-tune and evaluate DHVT, DeiT and EViT.', epilog=EXAMPLES)
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group('length and batches')
    group.add_argument('--batch-size', default=64, type=FROM_ONE, help='images for each process and step')
    group.add_argument('--epochs', default=300, type=FROM_ONE, help='length of training and of the schedule')
    group.add_argument('--accum-steps', default=1, type=FROM_ONE, help='batches for each optimizer step')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='dhvt_small_imagenet_patch16', help="a name of timm's registry")
    group.add_argument('--model-kwargs', default=[], nargs='*', type=_key_value, metavar='KEY=VALUE',
                       help="further arguments of the model's constructor")  # fmt: skip
    group.add_argument('--input-size', default=224, type=PIXELS, help='image size in pixels')
    group.add_argument('--in-chans', default=3, type=int, choices=(1, 3), help='3 for RGB images, 1 for grey ones, to '
                       'which those in colour are converted')  # fmt: skip
    group.add_argument('--nb-classes', type=FROM_ONE, help="size of the head; the data set's by default")
    group.add_argument('--drop', default=0.0, type=PROBABILITY, help="dropout after attention's projection; of timm's "
                       'ViTs, before the head')  # fmt: skip
    group.add_argument('--drop-path', default=0.1, type=PROBABILITY, help='drop path rate of the last block')
    group.add_argument('--train-mode', action=switch, help='train with the model in training mode; --no-train-mode '
                       'keeps BatchNorm frozen and drop path off, and is the default with --finetune')  # fmt: skip
    group.add_argument('--grad-checkpointing', action='store_true', help='compute each block again in the backward '
                       'pass: less memory, about a third more time')  # fmt: skip
    group.add_argument('--model-ema', action=switch, default=True, help='keep a moving average of the weights')
    group.add_argument('--model-ema-decay', default=0.99996, type=PROBABILITY, help='its decay for each step')
    group.add_argument('--model-ema-warmup', action=switch, default=False, help="timm's: the decay grows with the "
                       'steps up to that; the average then counts for the best checkpoint if it is better')  # fmt: skip
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it in host memory')

    group = parser.add_argument_group('token reorganisation', 'of EViT, the models named deit_…_shrink_base')
    group.add_argument('--base_keep_rate', type=PART, help='part of the patch tokens that a shrinking block keeps '
                       '(0.7)')  # fmt: skip
    group.add_argument('--fuse_token', action=switch, help='fuse the others into one (they are dropped by default)')
    group.add_argument('--drop_loc', nargs='+', type=_blocks, metavar='BLOCK', help='the shrinking blocks (3 6 9)')
    group.add_argument('--shrink_start_epoch', type=COUNT, help='epoch from which the keep rate falls from 1 (10)')
    group.add_argument('--shrink_epochs', type=COUNT, help='epochs in which it falls to the base, by a cosine (0)')

    group = parser.add_argument_group('distillation', 'into a model with two heads')
    group.add_argument('--distillation-type', default='none', choices=('none', 'soft', 'hard'), help="the second head "
                       "learns the teacher's distribution (soft) or its first choice (hard)")  # fmt: skip
    group.add_argument('--distillation-alpha', type=PROBABILITY, help="weight of the teacher's part (0.5)")
    group.add_argument('--distillation-tau', type=POSITIVE, help='temperature of soft distillation (1)')
    group.add_argument('--teacher-model', help="a name of timm's registry (regnety_160)")
    group.add_argument('--teacher-path', metavar='FILE', help="path or URL of its checkpoint; timm's weights if not "
                       'given')  # fmt: skip

    group = parser.add_argument_group('optimizer')
    group.add_argument('--opt', default='adamw', help="a name of timm's optimizers")
    group.add_argument('--opt-eps', default=1e-8, type=POSITIVE, help='epsilon')
    group.add_argument('--opt-betas', nargs='+', type=PROBABILITY, help="betas; the optimizer's own by default")
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='largest gradient norm')
    group.add_argument('--momentum', default=0.9, type=PROBABILITY, help='of optimizers that have one')
    group.add_argument('--layer-decay', type=PART, help="factor of the learning rate from each layer to the one before "
                       "it, timm's: for fine-tuning")  # fmt: skip
    group.add_argument('--weight-decay', default=0.05, type=AMOUNT, help='of all but biases, norms and class token')

    group = parser.add_argument_group('learning rate schedule')
    group.add_argument(
        '--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'poly', 'plateau'), help="timm's"
    )
    group.add_argument('--lr', default=5e-4, type=AMOUNT, help='before scaling by total batch / 512')
    group.add_argument('--sched-on-updates', action=switch, default=False, help='the schedule goes by optimizer steps, '
                       'not by epochs, and without --lr-delay-epochs')  # fmt: skip
    group.add_argument('--lr-noise', nargs='+', type=PROBABILITY, metavar='PART', help='noise from (to) this part on')
    group.add_argument('--lr-noise-pct', default=0.67, type=AMOUNT, help='limit of the noise')
    group.add_argument('--lr-noise-std', default=1.0, type=AMOUNT, help='standard deviation of the noise')
    group.add_argument('--warmup-lr', default=1e-6, type=AMOUNT, help='at the start of warm-up, not scaled')
    group.add_argument('--min-lr', default=1e-5, type=AMOUNT, help='at the end, not scaled')
    group.add_argument('--decay-epochs', default=30, type=POSITIVE, help='epochs between two decays (step)')
    group.add_argument('--warmup-epochs', default=5, type=COUNT, help='epochs of warm-up')
    group.add_argument('--cooldown-epochs', default=0, type=COUNT, help='epochs after the schedule, at the last rate '
                       'of cosine, tanh and poly; step and plateau go on')  # fmt: skip
    group.add_argument('--patience-epochs', default=10, type=COUNT, help='epochs without improvement (plateau)')
    group.add_argument('--decay-rate', '--dr', default=0.1, type=POSITIVE, help='factor of a decay (step, plateau); '
                       'the power (poly)')  # fmt: skip
    group.add_argument('--lr-delay-epochs', default=1, type=COUNT, help='epochs by which training trails the '
                       "schedule: 1 as published, so that the first rate is used twice; 0 is timm's")  # fmt: skip

    group = parser.add_argument_group('augmentation')
    group.add_argument('--no-aug', action='store_true', help='train on the images as evaluation sees them')
    group.add_argument('--color-jitter', default=0.4, type=AMOUNT, help='strength, where --aa is none')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help="timm's policy string, or none")
    group.add_argument('--hflip', default=0.5, type=PROBABILITY, help='probability of a horizontal flip')
    group.add_argument('--smoothing', default=0.1, type=PROBABILITY, help='label smoothing')
    group.add_argument('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'),
                       help='of the crop, and of rotations and the like')  # fmt: skip
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
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='one ratio for the '
                       'batch, for each pair of images, or for each image')  # fmt: skip
    group.add_argument('--augment', default='auto', choices=('auto', 'pil', 'batched'), help='images one by one in '
                       'PIL, or whole batches on the device; auto takes what is faster')  # fmt: skip
    group.add_argument('--augment-exact', action='store_true', help="batched: timm's pixels to the bit, more slowly")

    group = parser.add_argument_group('data')
    group.add_argument('--data-path', default='data', type=os.path.abspath, help='folder of train/ and val/, or where '
                       'CIFAR, torch/NAME and hfds/NAME are put')  # fmt: skip
    add_data_flags(group, default='IMNET')
    group.add_argument('--use-lmdb', action=switch, default=False, help="read --data-path's train.lmdb and val.lmdb, "
                       'which folder2lmdb.py writes')  # fmt: skip
    group.add_argument('--verify-records', action='store_true', help='compare each LMDB record with its checksum')
    group.add_argument('--on-bad-image', default='stop', choices=('stop', 'skip'), help='an image that cannot be '
                       'decoded: stop, or train with the next good one and leave it out of evaluation')  # fmt: skip
    group.add_argument('--exif-orientation', action=switch, default=False, help='turn images as their EXIF data says')
    group.add_argument('--value-range', nargs=2, type=float, metavar=('LOW', 'HIGH'), help='the values that become '
                       'black and white, of grey images with 16 or 32 bits: 0 4095 for 12-bit data')  # fmt: skip
    group.add_argument('--val-fraction', default=0.0, type=PROBABILITY, help='hold out this part of the training '
                       'images, the same share of each class, to choose the best checkpoint; the test images are then '
                       'evaluated once, by that checkpoint at the end')  # fmt: skip
    group.add_argument('--val-seed', default=0, type=SEED, help='holds out others, also with --folds')
    group.add_argument('--folds', type=FROM_ONE, help='hold out one of so many parts instead, for cross-validation')
    group.add_argument('--fold', type=COUNT, help='its number, from 0 on')
    group.add_argument('--train-fraction', default=1.0, type=PART, help='use this part of the training images, the '
                       'same share of each class; a smaller part lies inside a larger one')  # fmt: skip
    group.add_argument('--train-fraction-seed', default=0, type=SEED, help='chooses another part')
    group.add_argument('--sampler', default='random', choices=('random', 'balanced'), help='balanced draws each class '
                       'equally often')  # fmt: skip
    group.add_argument('--class-weights', default='none', choices=('none', 'balanced'), help='balanced weighs each '
                       "class's part of the loss by its inverse frequency")  # fmt: skip
    group.add_argument('--cache-gib', default=4.0, type=AMOUNT, metavar='GIB', help='memory on the device for images '
                       'of one size, kept there if all fit: up to 32 px in training, and in evaluation')  # fmt: skip
    group.add_argument('--pin-mem', action=switch, default=True, help='pin batches in host memory for GPUs')

    group = parser.add_argument_group('run')
    group.add_argument('-c', '--config', default=argparse.SUPPRESS, metavar='FILE', help="flags from a YAML file, such "
                       "as a run's args.yaml; those of the command line win")  # fmt: skip
    group.add_argument('--output_dir', default='', help='folder for checkpoints and logs; none by default')
    group.add_argument('--finetune', default='', metavar='FILE', help='path or URL of the weights to start from, or a '
                       "run's folder; the model is theirs unless given")  # fmt: skip
    group.add_argument('--allow-partial', action='store_true', help='start although most of the model is not in '
                       '--finetune')  # fmt: skip
    group.add_argument('--resume', default='', metavar='FILE', help='path or URL of the checkpoint to go on from, or a '
                       "run's folder")  # fmt: skip
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
    group.add_argument('--log-wandb', action='store_true', help='log to Weights & Biases too (pip install wandb); '
                       'WANDB_MODE=offline needs no account')  # fmt: skip
    group.add_argument('--wandb-project', default='dhvt', help='its project there')
    group.add_argument('--wandb-tags', default=[], nargs='*', metavar='TAG', help='its tags')
    group.add_argument('--experiment', metavar='NAME', help="its name; --output_dir's last part by default")
    group.add_argument('--start_epoch', default=0, type=COUNT, help='first epoch; --resume sets it')
    group.add_argument('--eval', action='store_true', help='evaluate only; the flags of the run that wrote the '
                       'checkpoint are the defaults')  # fmt: skip
    group.add_argument('--dist-eval', action=switch, default=False, help='share evaluation out over the processes')
    group.add_argument('--test_speed', action='store_true', help='print images per second and multiply-adds first')
    group.add_argument('--only_test_speed', action='store_true', help='print them and leave')
    group.add_argument('--seed', default=0, type=SEED, help='of every random draw but the order of the images, which '
                       'follows from the epoch, as published')  # fmt: skip
    group.add_argument('--deterministic', action='store_true', help='only operations that give the same bits each '
                       'time, which GPUs need a flag for')  # fmt: skip
    group.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    group.add_argument('--amp', default='auto', choices=('auto', 'off', 'fp16', 'bf16'),
                       help='mixed precision: auto is bf16 where the hardware has it, else fp16 on GPUs')  # fmt: skip
    group.add_argument('--compile', default='off', choices=('off', 'default', 'reduce-overhead', 'max-autotune'),
                       help="torch.compile's mode for the training step")  # fmt: skip
    group.add_argument('--channels-last', action=switch, help='channels innermost in memory, which is the default')
    group.add_argument('--tf32', action=switch, default=True, help='TensorFloat-32 for float32 products on GPUs')

    group = parser.add_argument_group('processes', 'torchrun and SLURM set these themselves')
    group.add_argument('--world_size', default=1, type=FROM_ONE, help='number of processes, if started by hand')
    group.add_argument('--local_rank', default=0, type=COUNT, help="this process's number")
    group.add_argument('--dist_url', default='env://', help='env:// or tcp://HOST:PORT')
    group.add_argument('--timeout', default=1800, type=SECONDS, metavar='SECONDS', help='longest wait for another '
                       'process of the group, or for a batch from a loader process')  # fmt: skip
    return parser


def mixes_images(args: argparse.Namespace) -> bool:
    """Whether training mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags.

    Raises:
        UsageError: for flags that contradict each other.
        InputError: if `--eval --resume FILE` or `-c FILE` cannot read its file.
    """
    parser = get_args_parser()
    typed = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(typed)
    if 'config' in args:
        typed = [*config_flags(parser, args.config), *typed]
        args = parser.parse_args(typed)
    if args.start_epoch and args.resume:
        raise UsageError('--start_epoch and --resume exclude each other: the checkpoint says where it stopped')
    check_args(args)
    recalled = recalled_flags(args, {arg.partition('=')[0].replace('_', '-') for arg in typed})
    if recalled:
        args = parser.parse_args([*recalled, *typed])
        check_args(args)
    vars(args).pop('config', None)  # what it said is in the others
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises UsageError for the first of the flags that exclude each other, or lack one that they need."""
    trains = not args.eval and not args.only_test_speed
    shortest, longest = (int(args.input_size * ratio) for ratio in args.cutmix_minmax or (0, 1))
    of_teacher = [f'--{name.replace("_", "-")}' for name in TEACHER_FLAGS if getattr(args, name) not in (None, '')]
    distils = args.distillation_type != 'none'
    for wrong, message in (
        (mixes_images(args) and args.batch_size % 2 and trains,
         f'--batch-size {args.batch_size} is odd: mixup and cutmix need an even one, or both at 0'),
        (shortest >= longest, '--cutmix-minmax needs two ratios, the smaller one first, at least a pixel apart'),
        (of_teacher and not distils, f'{"".join(of_teacher[:1])} needs --distillation-type soft or hard'),
        (args.distillation_type == 'hard' and args.distillation_tau is not None,
         '--distillation-tau is for --distillation-type soft'),
        (distils and args.train_mode is not True and (args.finetune or args.train_mode is False),
         'distillation needs the model in training mode: add --train-mode'),
        (args.lr_noise and (len(args.lr_noise) > 2 or args.lr_noise != sorted(set(args.lr_noise))),
         '--lr-noise takes one part of the training, or two, the smaller one first'),
        (args.lr_noise and args.lr_noise_pct * 100 <= args.lr_noise_std,  # timm draws until one is below
         '--lr-noise-pct has to be above a hundredth of --lr-noise-std'),
        (args.sched == 'plateau' and args.decay_rate >= 1, '--decay-rate has to be below 1 for --sched plateau'),
        (args.smoothing == 1, '--smoothing 1 leaves nothing of the classes: below 1'),
        (args.eval and not (args.resume or args.finetune),
         '--eval needs the weights: --resume FILE or --finetune FILE'),
        (args.resplit and (args.reprob == 0 or args.no_aug),
         '--resplit needs random erasing: --reprob above 0, and no --no-aug'),
        (args.augment_exact and (args.augment == 'pil' or args.no_aug),
         '--augment-exact is for batched augmentation: no --augment pil, and no --no-aug'),
        (args.compile != 'off' and is_evit(args.model),
         f'--compile {args.compile}: EViT has another number of tokens from step to step; leave it off'),
        (args.compile in ('reduce-overhead', 'max-autotune') and args.accum_steps > 1,
         f"--compile {args.compile} reuses gradients' memory at each batch: no --accum-steps above 1, "
         'or --compile default'),
        (args.eval and args.only_test_speed, '--eval and --only_test_speed exclude each other'),
        (args.start_epoch >= args.epochs,
         f'--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}'),
        (args.value_range and not 0 < args.value_range[1] - args.value_range[0] < float('inf'),
         '--value-range needs two numbers, the smaller one first'),
        (args.val_fraction == 1, '--val-fraction 1 leaves nothing to train with'),
        (args.val_fraction and args.folds, '--val-fraction and --folds exclude each other'),
        ((args.folds is None) != (args.fold is None), '--folds and --fold need each other: --folds 5 --fold 0'),
        (args.folds == 1, '--folds 1 leaves nothing to train with'),
        (args.folds is not None and args.fold is not None and args.fold >= args.folds,
         f'--fold {args.fold} is none of the {args.folds} folds, which are numbered from 0 on'),
        *((trains and asked and not args.output_dir, f'{flag} needs a folder for checkpoints: --output_dir')
          for flag, asked in (('--auto-resume', args.auto_resume), ('--on-nan rewind', args.on_nan == 'rewind'),
                              ('--checkpoint-every', args.checkpoint_every is not None),
                              ('--val-fraction', args.val_fraction > 0), ('--folds', args.folds is not None))),
        (args.model_ema_warmup and not args.model_ema, '--model-ema-warmup needs the average: no --no-model-ema'),
        (args.sched_on_updates and args.sched == 'plateau',
         '--sched-on-updates is for schedules by time: plateau looks at the loss after each epoch'),
        (args.export_safetensors and not args.export_safetensors.endswith('.safetensors'),
         f'--export-safetensors {args.export_safetensors}: the name must end in .safetensors'),
        (args.allow_partial and not args.finetune, '--allow-partial needs --finetune FILE'),
        (args.force_resume and not (args.resume or args.auto_resume),
         '--force-resume needs --resume FILE or --auto-resume'),
    ):  # fmt: skip
        if wrong:
            raise UsageError(message)
    if args.export_safetensors:
        refuse_inputs('--export-safetensors', args.export_safetensors, (args.resume, args.finetune, args.teacher_path))
    if trains and args.output_dir and not args.auto_resume:
        output = Path(args.output_dir)
        source = Path(args.resume).resolve()
        goes_on = bool(args.resume) and output.resolve() == (source if source.is_dir() else source.parent)
        if holds_run(output) and not goes_on:
            raise UsageError(f'{output} holds a run already: go on with --auto-resume, or choose another --output_dir')
