"""The two loops: one epoch of training, one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import InputError, Progress, all_reduce_sum, get_world_size


class NonFiniteLossError(InputError):
    """The loss became infinite or NaN."""


def train_one_epoch(
    *,
    model: nn.Module,
    criterion: nn.Module,
    loader: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    clip_grad: float | None = None,
    accum_steps: int = 1,
    model_ema: ModelEmaV3 | None = None,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    train_mode: bool = True,
    teacher: nn.Module | None = None,
    keep_rate: Callable[[int], float] | None = None,
    print_freq: int = 10,
) -> dict[str, float]:
    """Trains for one epoch.

    Losses stay on the device and are read only when they are printed, so nothing else waits for it.

    Args:
        model: the model, perhaps inside DistributedDataParallel.
        criterion: from logits and targets, and the teacher's logits if there is one, to a mean loss.
        loader: batches of images (B, C, H, W) and class indices (B,).
        epoch: for messages.
        scaler: disabled unless the type is float16.
        amp_dtype: autocast's type, None for float32.
        clip_grad: the largest gradient norm, None for no limit.
        accum_steps: batches for each optimizer step; the last step of an epoch takes those that are left.
        model_ema: updated after each optimizer step.
        mixup_fn: mixes images and turns targets into distributions.
        train_mode: False keeps BatchNorm's statistics and turns dropout and drop path off.
        teacher: gives logits for the same images, mixed as the student sees them.
        keep_rate: from the number of the batch to the model's argument of that name.
        print_freq: batches between two printed lines.

    Returns:
        `loss`, the mean over all batches and processes, `lr`, the learning rate used (after scaling), and `keep_rate`,
        the last one, if there is one.

    Raises:
        NonFiniteLossError: on all processes alike, with the epoch, the batch, the learning rate and the loss scale.
    """
    model.train(train_mode)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    progress = Progress(loader, header=f'Epoch {epoch}', print_freq=print_freq)
    learning_rate = max(group['lr'] for group in optimizer.param_groups)
    unread: list[Tensor] = []  # losses on the device since the last print
    loss_sum, images_seen = 0.0, 0
    optimizer.zero_grad()

    for images, targets in progress:
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        images_seen += len(images) * get_world_size()
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)

        group_start = progress.step - progress.step % accum_steps
        group_size = min(accum_steps, progress.steps - group_start)
        group_ends = progress.step == group_start + group_size - 1
        waits = isinstance(model, DistributedDataParallel) and not group_ends  # no all-reduce before the group's end
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = model(images, **({} if keep_rate is None else {'keep_rate': keep_rate(progress.step)}))
                taught = () if teacher is None else (teacher(images).float(),)
            outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(part.float() for part in outputs)
            loss = criterion(outputs, targets, *taught)
            scaler.scale(loss / group_size).backward()
        unread.append(loss.detach())

        if group_ends:
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if model_ema is not None:
                model_ema.update(model.module if isinstance(model, DistributedDataParallel) else model)

        if progress.due():
            values = (all_reduce_sum(torch.stack(unread)) / get_world_size()).tolist()
            for position, value in enumerate(values, start=progress.step + 1 - len(values)):
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f'the loss is {value} at epoch {epoch}, step {position} of {progress.steps}, with learning '
                        f'rate {learning_rate:.3g} and loss scale {scaler.get_scale():g}; '
                        'the last checkpoint is from before this epoch'
                    )
            loss_sum += sum(values)
            unread.clear()
            shown = {'loss': f'{loss_sum / (progress.step + 1):.4f}', 'lr': f'{learning_rate:.2e}'}
            progress.show(shown, images=images_seen)

    stats = {'loss': loss_sum / progress.steps, 'lr': learning_rate}
    return stats if keep_rate is None else {**stats, 'keep_rate': keep_rate(progress.steps - 1)}


@torch.inference_mode()
def evaluate(
    *,
    model: nn.Module,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    sharded: bool = False,
    keep_rate: float | None = None,
    header: str = 'Test',
    print_freq: int = 10,
) -> dict[str, float]:
    """Evaluates a model, not inside DistributedDataParallel, which would communicate at each batch.

    Args:
        loader: batches of images (B, C, H, W) and class indices (B,), -1 for images that are left out.
        amp_dtype: autocast's type, None for float32.
        sharded: each process's loader holds its own share of the images; the counts are then summed.
        keep_rate: the model's argument of that name, if it is to have one.

    Returns:
        `loss`, the mean cross-entropy; `acc1` and `acc5` in percent, the latter top-k for k classes if there are fewer
        than five; `images`, how many they are made from.
    """
    model.eval()
    progress = Progress(loader, header=header, print_freq=print_freq)
    loss_sum = torch.zeros((), device=device)
    right = torch.zeros(2, dtype=torch.int64, device=device)  # at once, among five
    images_seen = 0
    for images, targets in progress:
        images_seen += int((targets >= 0).sum())  # in host memory still: no wait
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images, **({} if keep_rate is None else {'keep_rate': keep_rate}))
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, targets, reduction='sum', ignore_index=-1)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
        if progress.due():
            progress.show({'loss': f'{loss_sum.item() / max(images_seen, 1):.4f}'}, images=images_seen)
    total = torch.tensor(images_seen, device=device)
    if sharded:
        for value in (loss_sum, right, total):
            all_reduce_sum(value)
    images_seen = int(total)
    right1, right5 = right.tolist()
    return {
        'loss': loss_sum.item() / images_seen,
        'acc1': 100 * right1 / images_seen,
        'acc5': 100 * right5 / images_seen,
        'images': images_seen,
    }
