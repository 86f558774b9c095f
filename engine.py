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

from utils import InputError, ProgressBar, SizedLoader, all_reduce_sum, get_rank, get_world_size, seed_all


class NonFiniteError(InputError):
    """A loss or a gradient became infinite or NaN; `step` says where, for those that leave it out."""

    def __init__(self, message: str, step: dict[str, Any]) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What stays the same in all epochs of a training."""

    criterion: nn.Module  # from logits and targets, and the teacher's logits if there is one, to a mean loss
    device: torch.device
    amp_dtype: torch.dtype | None = None  # autocast's; None is float32
    clip_grad: float | None = None  # the largest gradient norm
    accum_steps: int = 1  # batches for each optimizer step; an epoch's last step takes those that are left
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # makes targets distributions
    memory_format: torch.memory_format = torch.preserve_format  # of the images
    train_mode: bool = True  # False keeps BatchNorm's statistics and turns dropout and drop path off
    teacher: nn.Module | None = None  # gives logits for the same images, mixed as the student sees them
    seed: int = 0
    max_skipped_steps: int = 20  # that the loss scaler may leave out in a row
    print_freq: int = 10  # batches between two printed lines


@dataclass
class EpochSums:
    """Sums over the batches of an epoch; a checkpoint in the middle of the epoch holds them."""

    loss_sum: float = 0.0
    losses: int = 0
    norm_sum: float = 0.0
    norms: int = 0
    skipped: int = 0  # optimizer steps that the loss scaler left out
    skipped_in_a_row: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0
    data_seconds: float = 0.0  # of these, spent waiting for the loader


@dataclass
class EpochLog:
    """An epoch's losses and gradient norms, which stay on the device until they are read."""

    sums: EpochSums
    progress: ProgressBar
    epoch: int
    scaler: torch.amp.GradScaler
    max_skipped: int

    def __post_init__(self) -> None:
        self._seconds_before, self._data_seconds_before = self.sums.seconds, self.sums.data_seconds
        self._unread: list[tuple[int, float, list[Tensor], Tensor]] = []

    def add(self, batch: int, lr: float, losses: list[Tensor], norm: Tensor) -> None:
        """Adds an optimizer step: the number of its first batch, its rate, its batches' losses, its gradient's norm."""
        self._unread.append((batch, lr, losses, norm))

    def read(self) -> None:
        """Brings the sums up to date, which waits for the device.

        Raises:
            NonFiniteError: see `train_one_epoch`.
        """
        sums = self.sums
        sums.seconds = self._seconds_before + self.progress.seconds
        sums.data_seconds = self._data_seconds_before + self.progress.data_time
        if not self._unread:
            return
        losses = torch.stack([loss for _, _, group, _ in self._unread for loss in group])
        values = iter((all_reduce_sum(losses) / get_world_size()).tolist())
        norms = torch.stack([norm for *_, norm in self._unread]).tolist()
        for (batch, sums.lr, group, _), norm in zip(self._unread, norms, strict=True):
            step_losses = [next(values) for _ in group]
            if math.isfinite(norm) and all(map(math.isfinite, step_losses)):
                for value in step_losses:
                    sums.loss_sum += value
                sums.losses += len(step_losses)
                sums.norm_sum += norm
                sums.norms += 1
                sums.skipped_in_a_row = 0
                continue
            sums.skipped += 1
            sums.skipped_in_a_row += 1
            if not self.scaler.is_enabled() or sums.skipped_in_a_row > self.max_skipped:
                raise self._non_finite(batch, step_losses, norm)
        self._unread.clear()

    def _non_finite(self, batch: int, losses: list[float], norm: float) -> NonFiniteError:
        step = {
            'epoch': self.epoch,
            'batch': batch,
            'batches': self.progress.steps,
            'batches_in_step': len(losses),
            'losses': losses,
            'gradient_norm': norm,
            'learning_rate': self.sums.lr,
            'loss_scale': self.scaler.get_scale(),
        }
        bad = [value for value in losses if not math.isfinite(value)]
        what = f'the loss is {bad[0]}' if bad else f'the norm of the gradient is {norm}'
        skipped = self.sums.skipped_in_a_row
        row = f', in {skipped} steps in a row,' if skipped > 1 else ','
        rates = f'learning rate {self.sums.lr:.3g} and loss scale {step["loss_scale"]:g}'
        where = f'at epoch {self.epoch}, step {batch} of {self.progress.steps}'
        return NonFiniteError(f'{what} {where}{row} with {rates}', step)

    def show(self) -> None:
        """Prints the means so far."""
        sums, progress = self.sums, self.progress
        if not sums.losses:  # before the first step of a run that accumulates
            return
        shown = {'loss': f'{sums.loss_sum / sums.losses:.4f}', 'lr': f'{sums.lr:.2e}'}
        shown['grad norm'] = f'{sums.norm_sum / max(sums.norms, 1):.3g}'
        if self.scaler.is_enabled():
            shown['skipped'] = f'{sums.skipped}'
        progress.show({**shown, 's/step': f'{progress.seconds / (progress.step + 1 - progress.first):.3f}'})

    def stats(self) -> dict[str, float]:
        """The epoch's `loss`, `lr`, `grad_norm`, and with an enabled scaler `skipped_steps`."""
        self.read()
        sums = self.sums
        if not sums.losses:
            raise InputError(
                f'the loss scaler left out all {sums.skipped} steps of epoch {self.epoch}: try --amp bf16 or off'
            )
        loss, norm = sums.loss_sum / sums.losses, sums.norm_sum / sums.norms
        stats = {'loss': loss, 'lr': sums.lr, 'grad_norm': norm}
        return {**stats, 'skipped_steps': sums.skipped} if self.scaler.is_enabled() else stats


def accumulation_group(batch: int, first: int, steps: int, accum_steps: int) -> tuple[int, int, bool]:
    """The optimizer step of a batch: its first batch, its number of batches, and whether this one is its last."""
    position = (batch - first) % accum_steps
    start = batch - position
    size = min(accum_steps, steps - start)
    return start, size, position == size - 1


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: list[Tensor], clip_grad: float | None
) -> Tensor:
    """Updates the parameters and clears their gradients; returns the gradient's norm before clipping."""
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def forward(
    model: nn.Module, images: Tensor, targets: Tensor, settings: TrainSettings, keep_rate: float | None
) -> Tensor:
    """The mean loss of a batch, in float32."""
    amp_dtype, teacher = settings.amp_dtype, settings.teacher
    with torch.autocast(settings.device.type, amp_dtype, enabled=amp_dtype is not None):
        outputs = model(images, **({} if keep_rate is None else {'keep_rate': keep_rate}))
        taught = () if teacher is None else (teacher(images).float(),)
    outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(part.float() for part in outputs)
    return settings.criterion(outputs, targets, *taught)


def train_one_epoch(
    model: nn.Module,
    loader: SizedLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainSettings,
    *,
    epoch: int,
    model_ema: ModelEmaV3 | None = None,
    keep_rate: Callable[[int], float] | None = None,
    first: int = 0,
    sums: EpochSums | None = None,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """Trains for one epoch, or from batch number `first` on, with the `sums` of those before.

    Losses are read only when they are printed, so nothing else waits for the device. The random draws of each batch
    (mixing, drop path, dropout) are seeded with (seed, process, epoch, batch).

    Args:
        model: the model, perhaps inside DistributedDataParallel.
        loader: batches of images (B, C, H, W) and class indices (B,).
        scaler: disabled unless the type is float16.
        keep_rate: EViT's, from the number of the batch.
        after_step: called after each optimizer step with the number of the next batch and a function that updates sums.

    Returns:
        `loss`, the mean over all batches and processes; `lr`, after scaling, of the last step; `grad_norm`, the mean
        before clipping; with an enabled scaler `skipped_steps`; with a `keep_rate` the last one.

    Raises:
        NonFiniteError: on all processes alike, for a loss or a gradient that is no finite number; with an enabled
            scaler for more than `max_skipped_steps` in a row.
    """
    model.train(settings.train_mode)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    progress = ProgressBar(loader, header=f'Epoch {epoch}', print_freq=settings.print_freq, first=first)
    log = EpochLog(sums or EpochSums(), progress, epoch, scaler, settings.max_skipped_steps)
    losses: list[Tensor] = []  # of this optimizer step
    optimizer.zero_grad()
    for images, targets in progress:
        step = progress.step
        images = images.to(settings.device, non_blocking=True, memory_format=settings.memory_format)
        targets = targets.to(settings.device, non_blocking=True)
        progress.images += len(images) * get_world_size()
        seed_all(settings.seed, get_rank(), epoch, step)
        if settings.mixup_fn is not None:
            images, targets = settings.mixup_fn(images, targets)
        start, size, is_last = accumulation_group(step, first, progress.steps, settings.accum_steps)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            loss = forward(model, images, targets, settings, None if keep_rate is None else keep_rate(step))
            scaler.scale(loss / size).backward()
        losses.append(loss.detach())
        if is_last:
            lr = max(group['lr'] for group in optimizer.param_groups)
            norm = optimizer_step(optimizer, scaler, parameters, settings.clip_grad)
            if model_ema is not None:
                model_ema.update(model.module if isinstance(model, DistributedDataParallel) else model)
            log.add(start, lr, losses, norm)
            losses = []
        if progress.due():
            log.read()
            log.show()
        if is_last and after_step is not None:
            after_step(step + 1, log.read)
    stats = log.stats()
    return stats if keep_rate is None else {**stats, 'keep_rate': keep_rate(progress.steps - 1)}


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
    progress = ProgressBar(loader, header=header, print_freq=print_freq)
    loss_sum = torch.zeros((), device=device)
    right = torch.zeros(2, dtype=torch.int64, device=device)  # at once, among five
    counted = torch.zeros((), dtype=torch.int64, device=device)
    for images, targets in progress:
        if stop is not None and stop():
            break
        progress.images += len(images)
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
            progress.show({'loss': f'{loss_sum.item() / max(counted.item(), 1):.4f}'})
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
