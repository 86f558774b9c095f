"""Trains, fine-tunes and evaluates a model: `python main.py --help` lists the flags, run_code.sh holds the recipes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import nn

from config.arguments import _mixes, parse_args
from config.builders import build_model, build_optimizer, build_scheduler, build_teacher
from config.data import load_splits, open_loaders
from config.errors import explain, one_line_errors
from config.models import (
    check_output,
    distribute,
    keeps_tokens_by_rate,
    put_channels_last,
    recompute_blocks,
    synchronize_stem,
)
from datasets import DATA_SETS
from engine import evaluate
from losses import DistillationLoss, create_criterion
from models import evit
from models.folding import fold_batchnorm
from models.speed import count_macs, images_per_second
from pipeline.augment import BatchedMixup
from pipeline.workers import no_children_left
from training import checkpoint as ckpt
from training.devices import amp_name, default_device, find_amp_dtype, find_device, keep_freed_memory, set_backends
from training.distributed import Process, find_process, in_turn, init_distributed, leave_word
from training.ema import MovingAverage
from training.output import OutputFolder
from training.run import Run, report_accuracy
from training.signals import Interrupted, Interrupts
from training.state import Parts
from utils import (
    InputError,
    from_main_process,
    get_rank,
    is_main_process,
    log,
    one_line,
    share_batchnorm_statistics,
)


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
