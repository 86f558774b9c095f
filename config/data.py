"""From flags to data: the splits, their augmentation, the loaders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.data import Mixup

from config.arguments import mixes_images
from config.flags import usable_workers
from config.pretrained import find_reading
from datasets import DataSource, HoldOut, Splits, build_datasets
from pipeline.loaders import LoaderOptions, TrainLoader, build_loaders
from pipeline.transforms import Augmentation
from samplers import TrainBatches
from training.distributed import Process, main_process_first
from utils import InputError, SizedLoader, UsageError


def find_augmentation(args: argparse.Namespace) -> Augmentation:
    return Augmentation(
        input_size=args.input_size,
        channels=args.in_chans,
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


def load_splits(
    args: argparse.Namespace, process: Process, known_classes: Sequence[str] | None, *, download: bool = True
) -> Splits:
    """Builds the data set, one process first where files may have to be downloaded.

    Args:
        known_classes: those of the checkpoint whose head is used, in its order.
        download: whether absent files may be fetched.
    """
    source = DataSource(
        args.data_set,
        args.data_path,
        layout=args.data_layout,
        inat_category=args.inat_category,
        use_lmdb=args.use_lmdb,
        verify=args.verify_records,
        download=download,
    )
    hold_out = None
    if args.val_fraction or args.folds:
        hold_out = HoldOut(args.val_fraction, args.folds or 1, args.fold or 0, args.val_seed)
    with main_process_first(process) if source.downloads else nullcontext():
        splits = build_datasets(
            source,
            train=not args.eval,
            num_classes=args.nb_classes,
            skip_bad_images=args.on_bad_image == 'skip',
            hold_out=hold_out,
            train_fraction=args.train_fraction,
            train_fraction_seed=args.train_fraction_seed,
            known_classes=known_classes,
        )
    if args.data_set == 'DIGITS' and Path(args.data_path).resolve() != Path('data').resolve():
        splits.notes.append(f'{args.data_path} is not read: DIGITS comes with scikit-learn; --data-set FOLDER reads it')
    reading = find_reading(vars(args))
    for split in (splits.train, splits.val, splits.test):
        if split is not None:
            split.reading = reading
    if splits.test is not None and not args.output_dir:
        raise UsageError(
            f'{args.data_path} has test images beside those that validate: the best checkpoint is evaluated on them at '
            'the end, which needs a folder for checkpoints: --output_dir'
        )
    if splits.train is not None and len(set(splits.train.targets.tolist())) == 1:
        only = splits.train.classes[splits.train.target(0)]
        part = f' with --train-fraction {args.train_fraction:g}' if args.train_fraction < 1 else ''
        raise InputError(
            f'all training images in {args.data_path}{part} are of one class, {only}: nothing is to be told apart. '
            'They are read from <split>/<class>/<image>'
        )
    return splits


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
        even=mixes_images(args),
        balanced=splits.train.targets if args.sampler == 'balanced' else None,
        seed=args.seed,
    )
    if not len(batches):
        raise InputError(
            f'{len(splits.train)} training images do not fill one batch of {args.batch_size} on each of '
            f'{process.world_size} process{"es" if process.world_size > 1 else ""}: '
            f'--batch-size {len(splits.train) // process.world_size} or less'
        )
    return batches


def open_loaders(
    args: argparse.Namespace, splits: Splits, process: Process, device: torch.device
) -> tuple[TrainLoader | None, SizedLoader, str]:
    """The loaders of training, None for evaluation only, and of evaluation; and how training images are augmented."""
    first, step = (process.rank, process.world_size) if args.dist_eval else (0, 1)
    return build_loaders(
        splits.train,
        splits.val,
        batches=plan_batches(args, splits, process),
        shard=range(first, len(splits.val), step),  # each image once over all processes, with no padding
        eval_batch_size=int(1.5 * args.batch_size),
        augmentation=find_augmentation(args),
        seed=args.seed,
        options=LoaderOptions(
            device=device,
            workers=usable_workers(args.num_workers, processes=process.local_world_size),
            augment=args.augment,
            exact=args.augment_exact,
            cache_gib=args.cache_gib,
            pin_memory=args.pin_mem,
            timeout=args.timeout,
        ),
    )


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, None if neither is wanted."""
    if not mixes_images(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
