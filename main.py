"""Trains, fine-tunes and evaluates a model: `python main.py --help` lists the flags, run_code.sh holds the recipes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn, random_seed
from torch import nn

from config.arguments import parse_args
from config.builders import (
    build_criterion,
    build_keep_rates,
    build_model,
    build_model_ema,
    build_optimizer,
    build_scheduler,
    prepare_training,
)
from config.data import build_mixup, load_splits, open_loaders
from config.errors import explain, one_line_errors
from config.models import check_output, set_memory_format, stored_keep_rate
from datasets import find_info
from engine import TrainSettings, evaluate
from models.folding import fold_batchnorm
from models.speed import count_macs, images_per_second
from pipeline.images import ImageDataset
from pipeline.workers import no_children_left
from training import checkpoint as ckpt
from training.devices import amp_name, find_amp_dtype, find_device, set_backends
from training.distributed import Process, find_process, init_distributed, report_failure
from training.output import OutputFolder
from training.run import Run, RunSettings, Test, report_accuracy
from training.signals import Interrupted, Interrupts
from training.state import MODEL_ARGUMENTS, TrainState, different_arguments, refuse_other_run
from training.tracking import WandbRun
from training.weights import class_names, load_fitting, load_whole, model_weights, stored_args
from utils import InputError, SizedLoader, broadcast_object, is_main_process, log, one_line


def start_process(args: argparse.Namespace) -> tuple[Process, torch.device, torch.dtype | None]:
    """Joins the process group; returns this process's place in it, its device, and autocast's type."""
    process = find_process(os.environ, world_size=args.world_size, local_rank=args.local_rank)
    device = find_device(args.device, process=process)
    set_backends(device, deterministic=args.deterministic, tf32=args.tf32)
    init_distributed(process, device=device, dist_url=args.dist_url, timeout=args.timeout)
    return process, device, find_amp_dtype(args.amp, device)


def report_speed(args: argparse.Namespace, model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
    """Prints parameters, multiply-adds and images per second of evaluation, measured on the main process."""
    if not is_main_process():
        return
    size = (args.in_chans, args.input_size, args.input_size)
    parameters = sum(p.numel() for p in model.parameters())
    log(f'{args.model}: {parameters:,} parameters, {count_macs(model, size) / 1e9:.4g} G multiply-adds an image')
    rate = images_per_second(model, size, batch_size=args.batch_size, amp_dtype=amp)
    log(f'{rate:.1f} images/s in evaluation, batch {args.batch_size}, {args.input_size} px, {amp_name(amp)}, {device}')


def find_start(args: argparse.Namespace, output: OutputFolder) -> tuple[str, dict[str, Any], bool]:
    """The checkpoint to start from, if any: its name and content, and whether a run goes on from it.

    The output folder's is read by the main process for all, which need not have the same disk.
    """
    if args.auto_resume and not args.eval:
        found = broadcast_object(output.newest())
        if found is not None:
            checkpoint = ckpt.from_bytes(found[1], found[0])
            differences = different_arguments(stored_args(checkpoint), vars(args))
            if differences.keys() & MODEL_ARGUMENTS and 'fingerprint' in checkpoint and not args.force_resume:
                refuse_other_run(found[0], differences.values())
            return found[0], checkpoint, True
    source = args.resume or args.finetune
    if not source:
        return '', {}, False
    return source, ckpt.load(source, newest=bool(args.resume) and not args.eval), bool(args.resume)


def evaluate_only(
    args: argparse.Namespace, model: nn.Module, test: Test, classes: list[str], checkpoint: dict[str, Any]
) -> dict[str, Any]:
    """Prints a model's accuracy, and writes its weights to `--export-safetensors`."""
    if args.val_fraction or args.folds or args.train_fraction < 1:
        log('Note: --val-fraction, --folds and --train-fraction are for training: this is on all test images')
    recalled = args.base_keep_rate == stored_args(checkpoint).get('base_keep_rate')
    stats = test(model, 'Test', stored_keep_rate(args.model, checkpoint) if recalled else None)
    report_accuracy(stats)
    if args.export_safetensors and is_main_process():
        metadata = ckpt.export_metadata({**checkpoint, 'args': vars(args), 'classes': classes})
        ckpt.write_bytes(Path(args.export_safetensors), ckpt.to_safetensors(model.state_dict(), metadata))
    return {f'test_{name}': value for name, value in stats.items()}


def make_test(
    args: argparse.Namespace, dataset: ImageDataset, loader: SizedLoader, device: torch.device, amp: torch.dtype | None
) -> Test:
    """What evaluates a model on a split."""

    def test(
        module: nn.Module, header: str, keep_rate: float | None = None, stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        if dist.is_initialized():  # so that all processes evaluate the model that is saved
            distribute_bn(module, dist.get_world_size(), reduce=False)
        stats = evaluate(model=fold_batchnorm(module), loader=loader, device=device, amp_dtype=amp,
                         sharded=args.dist_eval, keep_rate=keep_rate, stop=stop, header=header)  # fmt: skip
        dataset.log_bad_images()
        return stats

    return test


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds everything from the arguments and runs the epochs; returns the last line of the log."""
    process, device, amp_dtype = start_process(args)
    if args.only_test_speed:
        model = build_model(args, args.nb_classes or find_info(args.data_set).num_classes).to(device)
        check_output(model, name=args.model, input_size=args.input_size, in_chans=args.in_chans,
                     num_classes=model.num_classes)  # type: ignore[arg-type]  # fmt: skip
        report_speed(args, model, device, amp_dtype)
        return {}

    output = OutputFolder('' if args.eval else args.output_dir, export=args.export_safetensors)
    source, checkpoint, resumes = find_start(args, output)
    head_stays = resumes or args.eval
    splits = load_splits(args, process, class_names(checkpoint, source) if head_stays else None)
    train_loader, val_loader, augmented = open_loaders(args, splits, process, device)
    for note in splits.notes:
        log(f'Note: {note}')

    random_seed(args.seed, process.rank)  # here, so that the weights do not depend on what was drawn for the data
    model = build_model(args, splits.num_classes).to(device)
    memory_format = set_memory_format(args, model)
    check_output(model, name=args.model, input_size=args.input_size, num_classes=splits.num_classes,
                 in_chans=args.in_chans)  # fmt: skip
    if source:
        load = load_whole if head_stays else partial(load_fitting, partial=args.allow_partial)
        load(model, model_weights(checkpoint, source), source)
    if args.test_speed:
        report_speed(args, model, device, amp_dtype)

    test, final_test = make_test(args, splits.val, val_loader, device, amp_dtype), None
    if splits.test is not None:
        test_loader = open_loaders(args, splits.only_test(), process, device)[1]
        final_test = make_test(args, splits.test, test_loader, device, amp_dtype)
    if train_loader is None or splits.train is None:
        return evaluate_only(args, model, test, splits.val.classes, checkpoint)

    criterion, teacher = build_criterion(args, process, model, splits)
    settings = TrainSettings(
        criterion=criterion.to(device),
        device=device,
        amp_dtype=amp_dtype,
        clip_grad=args.clip_grad,
        accum_steps=args.accum_steps,
        mixup_fn=build_mixup(args, splits.num_classes),
        memory_format=memory_format,
        keep_rate=build_keep_rates(args),
        train_mode=not args.finetune if args.train_mode is None else args.train_mode,
        teacher=None if teacher is None else teacher.to(device),
        seed=args.seed,
        max_skipped_steps=args.most_skips,
    )
    total_batch = args.batch_size * args.accum_steps * process.world_size
    lr = args.lr * total_batch / 512  # learning rates are given for a total batch of 512
    train_model = prepare_training(args, model, process, device)
    optimizer = build_optimizer(args, model, lr, device)
    updates_per_epoch = math.ceil(len(train_loader) / args.accum_steps)
    scheduler = build_scheduler(args, optimizer, updates_per_epoch)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    fingerprint = {
        'data': splits.fingerprint(),
        'total_batch': total_batch,
        'processes': process.world_size,
        'precision': amp_name(amp_dtype),
        'train_mode': settings.train_mode,
        'augment': augmented,
        'threads': torch.get_num_threads(),
        'device': device.type,
        'torch': str(torch.__version__),
    }
    training = Run(
        state=TrainState(model, build_model_ema(args, model), optimizer, scheduler, scaler),
        train_model=train_model,
        loader=train_loader,
        dataset=splits.train,
        test=test,
        final_test=final_test,
        settings=settings,
        run_settings=RunSettings(
            last_epoch=args.epochs + args.cooldown_epochs,
            updates_per_epoch=updates_per_epoch,
            lr_delay_epochs=args.lr_delay_epochs,
            ema_can_be_best=args.model_ema_warmup,
            checkpoint_every=args.checkpoint_every,
            rewinds=args.on_nan == 'rewind',
        ),
        metadata={'classes': splits.val.classes, 'args': vars(args), 'fingerprint': fingerprint},
        output=output,
    )
    if resumes:
        training.resume(checkpoint, source, force=args.force_resume)
    elif args.start_epoch:
        training.start_at(args.start_epoch)

    num_classes, num_parameters = splits.num_classes, training.num_parameters
    chosen_on = f'{training.val_name} images'
    derived = {'lr_scaled': lr, 'nb_classes': num_classes, 'n_parameters': num_parameters, 'best_chosen_on': chosen_on,
               **fingerprint}  # fmt: skip
    progress = training.progress
    output.begin({**vars(args), 'derived': derived}, lines=progress.history, timings=progress.timings,
                 best=progress.best)  # fmt: skip
    if args.log_wandb and is_main_process():
        output.writers.append(WandbRun(output.path, {**vars(args), **derived}, project=args.wandb_project,
                                       name=args.experiment, tags=args.wandb_tags))  # fmt: skip
    log(f'{args.model}, {num_parameters:,} parameters, on {args.data_set}: {len(splits.train)} training and '
        f'{len(splits.val)} {chosen_on}, {num_classes} classes')  # fmt: skip
    processes = f'{process.world_size} process{"es" if process.world_size > 1 else ""}'
    log(f'{processes} on {device.type} in {amp_name(amp_dtype)}, augmentation {augmented}, total batch {total_batch}, '
        f'learning rate {lr:.3g}')  # fmt: skip
    return training.train()


def report_run(args: argparse.Namespace) -> None:
    """Makes the report of a run that is over. Whatever goes wrong there is a note, as the run itself is whole."""
    interrupts = Interrupts()
    try:
        with interrupts.installed(), no_children_left():
            from reports.page import make  # drawing takes a second to import, and is for the main process only

            made = make([Path(args.output_dir)], device=args.device, stop=lambda: bool(interrupts.signal))
        log(f'Report: {made}')
    except (Exception, SystemExit) as err:
        log(f'Note: there is no report ({one_line(err)}); python tools/report.py {args.output_dir} makes one')


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
        except (InputError, OSError, ValueError, RuntimeError) as err:
            reason = err if isinstance(err, (InputError, OSError)) else explain(err, args) or err
            report_failure(one_line(reason))
            if reason is err:
                raise
            raise reason from None
    reports = args.report and args.output_dir and not (args.eval or args.only_test_speed) and is_main_process()
    if dist.is_initialized():  # not after an error: the other processes may never come to the same point
        dist.destroy_process_group()
    if reports:  # once the others are free to leave
        report_run(args)
    return line


if __name__ == '__main__':
    main()
