"""The two loops: one epoch of training, one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import InputError, Progress, SizedLoader, all_reduce_sum, get_rank, get_world_size, seed_all


class NonFiniteError(InputError):
    """A loss or a gradient became infinite or NaN; `step` says where, for those that leave it out."""

    def __init__(self, message: str, step: dict[str, Any]) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Tally:
    """Sums over the batches of an epoch; a checkpoint in the middle of the epoch holds them."""

    loss_sum: float = 0.0
    losses: int = 0
    norm_sum: float = 0.0
    norms: int = 0
    skipped: int = 0  # optimizer steps that the loss scaler left out
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0  # of these, spent waiting for the loader


def train_one_epoch(
    *,
    model: nn.Module,
    criterion: nn.Module,
    loader: SizedLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    clip_grad: float | None = None,
    accum_steps: int = 1,
    model_ema: ModelEmaV3 | None = None,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    train_mode: bool = True,
    teacher: nn.Module | None = None,
    keep_rate: Callable[[int], float] | None = None,
    print_freq: int = 10,
    seed: int = 0,
    first: int = 0,
    tally: Tally | None = None,
    most_skips: int = 20,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """Trains for one epoch, or for the rest of one.

    Losses stay on the device and are read only when they are printed, so nothing else waits for it. The random draws
    of each batch (mixing, drop path, dropout) are seeded with (seed, process, epoch, batch).

    Args:
        model: the model, perhaps inside DistributedDataParallel.
        criterion: from logits and targets, and the teacher's logits if there is one, to a mean loss.
        loader: batches of images (B, C, H, W) and class indices (B,).
        epoch: the epoch's number.
        scaler: disabled unless the type is float16.
        amp_dtype: autocast's type, None for float32.
        clip_grad: the largest gradient norm, None for no limit.
        accum_steps: batches for each optimizer step; the last step of an epoch takes those that are left.
        model_ema: updated after each optimizer step.
        mixup_fn: mixes images and turns targets into distributions.
        memory_format: of the images.
        train_mode: False keeps BatchNorm's statistics and turns dropout and drop path off.
        teacher: gives logits for the same images, mixed as the student sees them.
        keep_rate: from the number of the batch to the model's argument of that name.
        print_freq: batches between two printed lines.
        seed: the run's.
        first: the number of the loader's first batch, where the epoch goes on.
        tally: sums over the batches before it, which are gone on with.
        most_skips: optimizer steps that the scaler may leave out in a row.
        after_step: called after each optimizer step with the number of the next batch, and a function that reads all
            losses and brings the tally up to date.

    Returns:
        `loss`, the mean over all batches and processes, `lr`, the learning rate used (after scaling), `grad_norm`, the
        mean norm of the gradient before clipping; with an enabled scaler `skipped_steps`; and `keep_rate`, the last
        one, if there is one.

    Raises:
        NonFiniteError: on all processes alike, for a loss or a gradient that is no finite number; with float16 for more
            than `most_skips` in a row.
    """
    model.train(train_mode)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    progress = Progress(loader, header=f'Epoch {epoch}', print_freq=print_freq, first=first)
    learning_rate = max(group['lr'] for group in optimizer.param_groups)
    tally = Tally() if tally is None else tally
    seconds_before, data_seconds_before = tally.seconds, tally.data_seconds
    unread: list[tuple[int, list[Tensor], Tensor]] = []  # of steps since the last print: first batch, losses, norm
    group_losses: list[Tensor] = []
    images_seen = 0
    optimizer.zero_grad()

    def read() -> None:
        tally.seconds = seconds_before + progress.seconds
        tally.data_seconds = data_seconds_before + progress.data_time
        if not unread:
            return
        losses = torch.stack([loss for _, group, _ in unread for loss in group])
        values = iter((all_reduce_sum(losses) / get_world_size()).tolist())
        norms = torch.stack([norm for _, _, norm in unread]).tolist()
        for (start, group, _), norm in zip(unread, norms, strict=True):
            step_losses = [next(values) for _ in group]
            if math.isfinite(norm) and all(map(math.isfinite, step_losses)):
                for value in step_losses:
                    tally.loss_sum += value
                tally.losses += len(step_losses)
                tally.norm_sum += norm
                tally.norms += 1
                tally.skipped_in_a_row = 0
                continue
            tally.skipped += 1
            tally.skipped_in_a_row += 1
            if not scaler.is_enabled() or tally.skipped_in_a_row > most_skips:
                raise _non_finite(
                    step={
                        'epoch': epoch,
                        'batch': start,
                        'batches': progress.steps,
                        'batches_in_step': len(group),
                        'losses': step_losses,
                        'gradient_norm': norm,
                        'learning_rate': learning_rate,
                        'loss_scale': scaler.get_scale(),
                    },
                    skipped=tally.skipped_in_a_row,
                )
        unread.clear()

    for images, targets in progress:
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        images_seen += len(images) * get_world_size()
        seed_all(seed, get_rank(), epoch, progress.step)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)

        position = (progress.step - first) % accum_steps
        group_start = progress.step - position
        group_size = min(accum_steps, progress.steps - group_start)
        group_ends = position == group_size - 1
        waits = isinstance(model, DistributedDataParallel) and not group_ends  # no all-reduce before the group's end
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = model(images, **({} if keep_rate is None else {'keep_rate': keep_rate(progress.step)}))
                taught = () if teacher is None else (teacher(images).float(),)
            outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(part.float() for part in outputs)
            loss = criterion(outputs, targets, *taught)
            scaler.scale(loss / group_size).backward()
        group_losses.append(loss.detach())

        if group_ends:
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if model_ema is not None:
                model_ema.update(model.module if isinstance(model, DistributedDataParallel) else model)
            unread.append((group_start, group_losses, norm))
            group_losses = []

        if progress.due():
            read()
            shown = {
                'loss': f'{tally.loss_sum / max(tally.losses, 1):.4f}',
                'lr': f'{learning_rate:.2e}',
                'grad norm': f'{tally.norm_sum / max(tally.norms, 1):.3g}',
                **({'skipped': f'{tally.skipped}'} if scaler.is_enabled() else {}),
                's/step': f'{progress.seconds / (progress.step + 1 - first):.3f}',
            }
            if tally.losses:  # none before the first step of a run that accumulates
                progress.show(shown, images=images_seen)
        if group_ends and after_step is not None:
            after_step(progress.step + 1, read)

    read()
    if not tally.losses:
        raise InputError(f'the loss scaler left out all {tally.skipped} steps of epoch {epoch}: try --amp bf16 or off')
    stats = {'loss': tally.loss_sum / tally.losses, 'lr': learning_rate, 'grad_norm': tally.norm_sum / tally.norms}
    if scaler.is_enabled():
        stats['skipped_steps'] = tally.skipped
    return stats if keep_rate is None else {**stats, 'keep_rate': keep_rate(progress.steps - 1)}


def _non_finite(*, step: dict[str, Any], skipped: int) -> NonFiniteError:
    """The error for a step: its losses or its gradient norm are no finite numbers."""
    where = f'at epoch {step["epoch"]}, step {step["batch"]} of {step["batches"]}'
    bad = [value for value in step['losses'] if not math.isfinite(value)]
    what = f'the loss is {bad[0]}' if bad else f'the norm of the gradient is {step["gradient_norm"]}'
    row = f', in {skipped} steps in a row,' if skipped > 1 else ','
    rates = f'learning rate {step["learning_rate"]:.3g} and loss scale {step["loss_scale"]:g}'
    return NonFiniteError(f'{what} {where}{row} with {rates}', step)


@torch.inference_mode()
def evaluate(
    *,
    model: nn.Module,
    loader: SizedLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    sharded: bool = False,
    keep_rate: float | None = None,
    stop: Callable[[], bool] | None = None,
    header: str = 'Test',
    print_freq: int = 10,
) -> dict[str, float]:
    """Evaluates a model, not inside DistributedDataParallel, which would communicate at each batch.

    Args:
        loader: batches of images (B, C, H, W) and class indices (B,), -1 for images that are left out; where they are
            on the device already, nothing is copied.
        amp_dtype: autocast's type, None for float32.
        sharded: each process's loader holds its own share of the images; the counts are then summed.
        keep_rate: the model's argument of that name, if it is to have one.
        stop: asked before each batch; where it says so the result is of the batches before that one, or empty.

    Returns:
        `loss`, the mean cross-entropy; `acc1` and `acc5` in percent, the latter top-k for k classes if there are fewer
        than five; `images`, how many they are made from.
    """
    model.eval()
    progress = Progress(loader, header=header, print_freq=print_freq)
    loss_sum = torch.zeros((), device=device)
    right = torch.zeros(2, dtype=torch.int64, device=device)  # at once, among five
    counted = torch.zeros((), dtype=torch.int64, device=device)
    images_seen = 0
    for images, targets in progress:
        if stop is not None and stop():
            break
        images_seen += len(images)
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        counted += (targets >= 0).sum()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images, **({} if keep_rate is None else {'keep_rate': keep_rate}))
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, targets, reduction='sum', ignore_index=-1)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
        if progress.due():
            progress.show({'loss': f'{loss_sum.item() / max(counted.item(), 1):.4f}'}, images=images_seen)
    if sharded:
        for value in (loss_sum, right, counted):
            all_reduce_sum(value)
    total = int(counted)
    right1, right5 = right.tolist()
    if total == 0:
        return {}
    return {
        'loss': loss_sum.item() / total,
        'acc1': 100 * right1 / total,
        'acc5': 100 * right5 / total,
        'images': total,
    }
