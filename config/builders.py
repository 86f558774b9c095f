"""From flags to a run's parts: model, loss, teacher, optimizer, schedule."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config.arguments import mixes_images
from config.models import (
    EVIT_ARGUMENTS,
    check_output,
    convert_stem_sync_batchnorm,
    enable_grad_checkpointing,
    evit_kwargs,
    is_evit,
    new_model,
)
from config.recall import EVIT_FLAGS
from config.teachers import DEFAULT_TEACHER, pretrained_teacher, trained_teacher
from datasets import Splits
from losses import DistillationLoss, Teacher, balanced_class_weights, create_criterion
from models import evit
from pipeline.transforms import normalization
from training.distributed import Process, main_process_first
from training.ema import MovingAverage
from utils import UsageError, log, one_line


def build_model(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """The student, or the only model; rates of 0 are not mentioned to it.

    Args:
        num_classes: the head's size, None for the model's own.

    Raises:
        UsageError: if timm does not know it, it refuses its arguments, or flags of EViT are given for another one.
    """
    given = [name for name in EVIT_FLAGS if getattr(args, name) is not None]
    if given and not is_evit(args.model):
        why = ': its convolutions need the whole grid of tokens' if args.model.startswith('dhvt') else ''
        raise UsageError(f'--{given[0]} is for EViT (deit_…_shrink_base); {args.model} cannot drop tokens{why}')
    set_by = {argument: f'--{argument}' for argument in EVIT_ARGUMENTS}
    set_by |= {
        'num_classes': '--nb-classes',
        'img_size': '--input-size',
        'in_chans': "--in-chans, the images' three channels or one",
    }
    for key, _ in args.model_kwargs:
        if key in set_by:
            raise UsageError(f'--model-kwargs {key}=…: this is set by {set_by[key]}')
    rates = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path}
    kwargs = {
        **{key: rate for key, rate in rates.items() if rate},
        **dict(args.model_kwargs),
        **evit_kwargs(vars(args)),
    }
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    if args.in_chans != 3:
        kwargs['in_chans'] = args.in_chans
    return new_model('--model', args.model, args.input_size, kwargs)


def build_criterion(
    args: argparse.Namespace, process: Process, model: nn.Module, splits: Splits
) -> tuple[nn.Module, Teacher | None]:
    """The loss, and the teacher of distillation, for which the student is made ready.

    Raises:
        UsageError: if the student has one head only, or the teacher cannot be built.
        InputError: if the teacher's weights cannot be had.
    """
    weights = None
    if args.class_weights == 'balanced' and splits.train is not None:
        weights = balanced_class_weights(splits.train.targets, splits.num_classes)
    criterion = create_criterion(mixed=mixes_images(args), smoothing=args.smoothing, class_weights=weights)
    if args.distillation_type == 'none':
        return criterion, None
    if not hasattr(model, 'set_distilled_training'):
        raise UsageError(f'--distillation-type {args.distillation_type} needs a model with a second head, such as '
                         f'dhvt_tiny_cifar_patch4_distilled; {args.model} has one')  # fmt: skip
    model.set_distilled_training(True)  # type: ignore[operator]
    sizes = {'input_size': args.input_size, 'num_classes': splits.num_classes}
    name = args.teacher_model or DEFAULT_TEACHER
    with main_process_first(process):
        if args.teacher_path:
            trained, size, own = trained_teacher(name, args.teacher_path, splits.num_classes, splits.val.classes)
        else:
            trained, size, own = pretrained_teacher(name, args.input_size, splits.num_classes)
    if len(own['mean']) != args.in_chans:
        raise UsageError(f'--teacher-model {name} takes images of {len(own["mean"])} channels, not of {args.in_chans}')
    mean, std = normalization(args.in_chans)
    teacher = Teacher(trained, input_size=size, mean=own['mean'], std=own['std'], student_mean=mean, student_std=std)
    check_output(teacher, flag='--teacher-model', name=name, in_chans=args.in_chans, **sizes)
    alpha = 0.5 if args.distillation_alpha is None else args.distillation_alpha
    tau = args.distillation_tau or 1.0
    return DistillationLoss(criterion, distillation_type=args.distillation_type, alpha=alpha, tau=tau), teacher


def build_keep_rates(args: argparse.Namespace) -> evit.KeepRateSchedule | None:
    """EViT's schedule, None for other models."""
    if not is_evit(args.model):
        return None
    return evit.KeepRateSchedule(
        base_keep_rate=evit.BASE_KEEP_RATE if args.base_keep_rate is None else args.base_keep_rate,
        start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
        epochs=args.shrink_epochs or 0,
    )


def prepare_training(args: argparse.Namespace, model: nn.Module, process: Process, device: torch.device) -> nn.Module:
    """The model as training calls it: recomputed, compiled and distributed as the flags say."""
    if args.grad_checkpointing:
        enable_grad_checkpointing(model, args.model)
    if args.compile != 'off':
        model.compile(mode=args.compile)  # in place: names of weights stay, and copies of the model are not compiled
    if process.world_size == 1:
        return model
    convert_stem_sync_batchnorm(model, device)
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == 'cuda' else None,
        broadcast_buffers=False,  # the main process's are the ones that are evaluated and saved
        gradient_as_bucket_view=True,
        static_graph=args.accum_steps == 1,  # the same graph at each step, which PyTorch makes use of
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float, device: torch.device) -> Any:
    """timm's optimizer, with the scaled learning rate.

    Raises:
        UsageError: if timm does not know it, or it refuses its arguments.
    """
    kwargs = {**optimizer_kwargs(args), 'lr': lr}  # timm drops what an optimizer does not take
    if args.opt in ('adam', 'adamw') and device.type in ('cuda', 'cpu'):
        kwargs['fused'] = True  # one kernel; on GPUs it skips steps that float16 spoils without a wait for the host
    try:
        if args.opt_betas is not None:
            kwargs['betas'] = tuple(args.opt_betas)
            known = get_optimizer_info(args.opt.lower().rpartition('_')[2])
            if not known.has_betas:
                raise ValueError('it takes no --opt-betas')
            if len(args.opt_betas) != known.num_betas:
                raise ValueError(f'--opt-betas takes {known.num_betas} numbers')
        optimizer = create_optimizer_v2(model, **kwargs)
    except (ValueError, TypeError, RuntimeError, AssertionError) as err:
        raise UsageError(f'--opt {args.opt}: {one_line(err)}') from None
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {args.opt} needs second derivatives, which training here does not compute')
    return optimizer


def build_model_ema(args: argparse.Namespace, model: nn.Module) -> MovingAverage | None:
    """The moving average of the model's weights, None if it is not wanted."""
    if not args.model_ema:
        return None
    device = torch.device('cpu') if args.model_ema_force_cpu else None
    return MovingAverage(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int = 1) -> Any:
    """timm's schedule, by epochs or by optimizer steps."""
    # Its plateau says that a resumed run starts over, which one of ours does not (training/state.py).
    warnings.filterwarnings('ignore', 'PlateauLRScheduler is deprecated', FutureWarning)
    if args.epochs <= args.warmup_epochs:
        log(f'Note: --epochs {args.epochs} is not above --warmup-epochs {args.warmup_epochs}: the schedule never '
            'reaches its rate; lower --warmup-epochs')  # fmt: skip
    kwargs = scheduler_kwargs(args, decreasing_metric=True)  # plateau looks at the test loss
    scheduler: Any = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)[0]
    if isinstance(scheduler, PlateauLRScheduler) and not scheduler.warmup_t:
        scheduler.warmup_t = -1  # its step takes epoch 0 for warm-up, where there is none too
    return scheduler
