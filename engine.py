"""The two loops: one epoch of training, one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils


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
    keep_rate: Callable[[int, int, int], float] | None = None  # EViT's, from epoch, batch, and batches in the epoch
    teacher: nn.Module | None = None  # gives logits for the same images, mixed as the student sees them
    seed: int = 0
    max_skipped_steps: int = 20  # that the loss scaler may leave out in a row
    print_freq: int = 10  # batches between two printed lines


@dataclass
class MetricLogger:
    """An epoch's losses and gradient norms, which stay on the device until they are read.

    `unread` has an entry for each optimizer step: its first batch, learning rate, batches' losses, gradient norm.
    """

    sums: utils.EpochSums
    progress: utils.ProgressBar
    epoch: int
    scaler: torch.amp.GradScaler
    max_skipped: int
    unread: list[tuple[int, float, list[Tensor], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seconds_before, self._data_seconds_before = self.sums.seconds, self.sums.data_seconds

    def read(self) -> None:
        """Brings the sums up to date, which waits for the device; raises NonFiniteError as `train_one_epoch` does."""
        sums = self.sums
        sums.seconds = self._seconds_before + self.progress.seconds
        sums.data_seconds = self._data_seconds_before + self.progress.data_time
        if not self.unread:
            return
        losses = torch.stack([loss for _, _, group, _ in self.unread for loss in group])
        values = iter((utils.all_reduce(losses) / utils.get_world_size()).tolist())
        norms = torch.stack([norm for *_, norm in self.unread]).tolist()
        for (batch, sums.lr, group, _), norm in zip(self.unread, norms, strict=True):
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
                raise utils.NonFiniteError(
                    skipped_in_a_row=sums.skipped_in_a_row,
                    epoch=self.epoch,
                    batch=batch,
                    batches=self.progress.steps,
                    batches_in_step=len(step_losses),
                    losses=step_losses,
                    gradient_norm=norm,
                    learning_rate=sums.lr,
                    loss_scale=self.scaler.get_scale(),
                )
        self.unread.clear()

    def show(self) -> None:
        """Prints the means so far, if there are any: the first step of a run that accumulates comes later."""
        self.read()
        if not self.sums.losses:
            return
        means, progress = self.means(), self.progress
        shown = {'loss': f'{means["loss"]:.4f}', 'lr': f'{means["lr"]:.2e}', 'grad norm': f'{means["grad_norm"]:.3g}'}
        if 'skipped_steps' in means:
            shown['skipped'] = f'{means["skipped_steps"]}'
        progress.show({**shown, 's/step': f'{progress.seconds / (progress.step + 1 - progress.first):.3f}'})

    def means(self) -> dict[str, float]:
        """What `train_one_epoch` returns."""
        sums = self.sums
        if not sums.losses:
            raise utils.InputError(f'epoch {self.epoch} gave no finite numbers: try --amp bf16 or off, or a lower --lr')
        means = {'loss': sums.loss_sum / sums.losses, 'lr': sums.lr, 'grad_norm': sums.norm_sum / sums.norms}
        return {**means, 'skipped_steps': sums.skipped} if self.scaler.is_enabled() else means


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], scaler: torch.amp.GradScaler, clip_grad: float | None
) -> Tensor:
    """Updates an optimizer's parameters and clears their gradients; returns the gradient's norm before clipping."""
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def forward(model: nn.Module, images: Tensor, amp_dtype: torch.dtype | None, keep_rate: float | None = None) -> Any:
    """A batch's logits in float32; of a distilled model in training both of its heads'."""
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        outputs = model(images) if keep_rate is None else model(images, keep_rate=keep_rate)
    return outputs.float() if isinstance(outputs, Tensor) else tuple(part.float() for part in outputs)


def train_one_epoch(
    model: nn.Module,
    loader: utils.SizedLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainSettings,
    *,
    epoch: int,
    model_ema: ModelEmaV3 | None = None,
    first: int = 0,
    sums: utils.EpochSums | None = None,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """Trains for one epoch, or from batch number `first` on, with the `sums` of those before.

    Losses are read only when they are printed, so nothing else waits for the device. The random draws of each batch
    (mixing, drop path, dropout) are seeded with (seed, process, epoch, batch).

    Args:
        model: perhaps inside DistributedDataParallel.
        loader: batches of images (B, C, H, W) and class indices (B,).
        scaler: disabled unless the type is float16.
        after_step: called after each optimizer step with the number of the next batch and a function that updates sums.

    Returns:
        `loss`, the mean over all batches and processes; `lr`, after scaling, of the last step; `grad_norm`, the mean
        before clipping; with an enabled scaler `skipped_steps`.

    Raises:
        NonFiniteError: on all processes alike, for a loss or a gradient that is no finite number; with an enabled
            scaler for more than `max_skipped_steps` in a row.
    """
    model.train(settings.train_mode)
    progress = utils.ProgressBar(loader, header=f'Epoch {epoch}', print_freq=settings.print_freq, first=first)
    log = MetricLogger(sums or utils.EpochSums(), progress, epoch, scaler, settings.max_skipped_steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    losses: list[Tensor] = []  # of this optimizer step
    optimizer.zero_grad()
    for step, (images, targets) in enumerate(progress, start=first):
        images = images.to(settings.device, non_blocking=True, memory_format=settings.memory_format)
        targets = targets.to(settings.device, non_blocking=True)
        progress.images += len(images) * utils.get_world_size()
        utils.seed_all(settings.seed, utils.get_rank(), epoch, step)
        if settings.mixup_fn is not None:
            images, targets = settings.mixup_fn(images, targets)
        start = step - len(losses)  # the first batch of this optimizer step
        size = min(settings.accum_steps, progress.steps - start)
        is_last = step == start + size - 1
        rate = settings.keep_rate and settings.keep_rate(epoch, step, progress.steps)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            outputs = forward(model, images, settings.amp_dtype, rate)
            taught = () if settings.teacher is None else (forward(settings.teacher, images, settings.amp_dtype),)
            loss = settings.criterion(outputs, targets, *taught)
            scaler.scale(loss / size).backward()
        losses.append(loss.detach())
        if is_last:
            lr = max(group['lr'] for group in optimizer.param_groups)
            norm = optimizer_step(optimizer, parameters, scaler, settings.clip_grad)
            if model_ema is not None:
                model_ema.update(model.module if isinstance(model, DistributedDataParallel) else model)
            log.unread.append((start, lr, losses, norm))
            losses = []
        if progress.due():
            log.show()
        if is_last and after_step is not None:
            after_step(step + 1, log.read)
    log.read()
    return log.means()


@torch.inference_mode()
def evaluate(
    *,
    model: nn.Module,
    loader: utils.SizedLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    sharded: bool = False,
    keep_rate: float | None = None,
    stop: Callable[[], bool] | None = None,
    header: str = 'Test',
) -> dict[str, float]:
    """Evaluates a model, not inside DistributedDataParallel, which would communicate at each batch.

    Args:
        loader: batches of images (B, C, H, W) and class indices (B,), -1 for images that are left out.
        sharded: each process's loader holds its own share of the images; the counts are then summed.
        stop: asked before each batch; where it says so the result is of the batches before that one, or empty.

    Returns:
        `loss`, the mean cross-entropy; `acc1` and `acc5` in percent, the latter top-k for k classes if there are fewer
        than five; `images`, how many they are made from.
    """
    model.eval()
    progress = utils.ProgressBar(loader, header=header)
    loss_sum = torch.zeros((), device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, right at once, right among five
    for images, targets in progress:
        if stop is not None and stop():
            break
        progress.images += len(images) * (utils.get_world_size() if sharded else 1)
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        logits = forward(model, images, amp_dtype, keep_rate)
        loss_sum += F.cross_entropy(logits, targets, reduction='sum', ignore_index=-1)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        counts += torch.stack([(targets >= 0).sum(), hits[:, 0].sum(), hits.sum()])
        if progress.due():
            progress.show({'loss': f'{loss_sum.item() / max(counts[0].item(), 1):.4f}'})
    if sharded:
        utils.all_reduce(loss_sum)
        utils.all_reduce(counts)
    total, *right = counts.tolist()
    if total == 0:
        return {}
    acc1, acc5 = (100 * number / total for number in right)
    return {'loss': loss_sum.item() / total, 'acc1': acc1, 'acc5': acc5, 'images': total}
