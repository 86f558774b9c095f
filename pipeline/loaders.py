"""From data sets to batches: loader processes, images that stay on the device, augmentation of whole batches there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.augment import BatchedAugment
from pipeline.images import ImageDataset
from pipeline.transforms import SMALL_IMAGE, Augmentation, AugmentedImages
from pipeline.workers import deadline, ignore_signals
from samplers import Draw, EvalSampler, TrainBatches
from utils import SizedLoader, UsageError, log

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S), class indices (B,)
GIB = 2**30
FEW_IMAGES = 4096  # are read faster than loader processes start


class TrainLoader(SizedLoader, Protocol):
    """The batches of an epoch, as `batch_sampler` says."""

    batch_sampler: TrainBatches


class TimedLoader(DataLoader):
    """A DataLoader whose `timeout` also holds while it fetches a batch that a loader process has announced.

    That process hands over the memory itself, and PyTorch waits for it without end if it stops just then.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        patience = self.timeout + 2 if self.timeout else 0  # PyTorch's own limit goes first, where it works
        while True:
            with deadline(patience, lambda: RuntimeError(f'DataLoader timed out after {patience:g} seconds')):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


class Normalize:
    """Images uint8 (B, 3, H, W) to float32 with ImageNet's mean and standard deviation, as the transforms do."""

    def __init__(self, device: torch.device) -> None:
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def __call__(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class ImageCache:
    """Images of a data set on the device, uint8 (n, 3, S, S), with their class indices.

    Args:
        dataset: its transform is replaced by `crop`.
        indices: the images, in this order.
        crop: from an image to a uint8 tensor (3, S, S), the same each time.
        size: S.
        device: where the images stay.
        options: of the DataLoader that reads them, once.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: Sequence[int],
        crop: Callable[..., Any],
        *,
        size: int,
        device: torch.device,
        options: dict[str, Any],
    ) -> None:
        dataset.transform = crop
        if len(indices) < FEW_IMAGES:
            options = {**options, 'num_workers': 0, 'timeout': 0}
        self.images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8, device=device)
        self.targets = torch.empty(len(indices), dtype=torch.int64, device=device)
        self.device = device
        first = 0
        for images, targets in TimedLoader(dataset, batch_size=256, sampler=indices, **options):
            self.images[first : first + len(images)].copy_(images, non_blocking=True)
            self.targets[first : first + len(images)].copy_(targets, non_blocking=True)
            first += len(images)

    def take(self, indices: Sequence[int]) -> Batch:
        index = to_device(torch.tensor(indices), self.device)
        return self.images[index], self.targets[index]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host's on the device, without a wait for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else values.to(device)


def _numbers(draws: Sequence[Draw]) -> Tensor:
    return torch.from_numpy(np.array(draws, dtype=np.int64).reshape(-1, 3))


class CachedTraining:
    """Training batches out of a cache, augmented on the device: no loader processes.

    Args:
        cache: the training images.
        batches: says which are in a batch.
        augment: from images uint8 (B, 3, S, S) and draws (B, 3) to what the model is trained with.
    """

    def __init__(self, cache: ImageCache, batches: TrainBatches, augment: Callable[..., Tensor]) -> None:
        self.cache = cache
        self.batch_sampler = batches
        self.augment = augment

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for draws in self.batch_sampler:
            images, targets = self.cache.take([draw.image for draw in draws])
            yield self.augment(images, _numbers(draws)), targets


class AugmentedBatches:
    """Training batches that loader processes decode and crop, augmented on the device.

    Args:
        loader: gives uint8 images (B, 3, S, S), by a `TrainBatches`.
        augment: as for `CachedTraining`.
        device: where the batches go.
    """

    def __init__(self, loader: DataLoader, augment: Callable[..., Tensor], device: torch.device) -> None:
        self.loader = loader
        self.batch_sampler: TrainBatches = loader.batch_sampler  # type: ignore[assignment]
        self.augment = augment
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for draws, (images, targets) in zip(self.batch_sampler, self.loader, strict=True):
            moved = images.to(self.device, non_blocking=True)
            yield self.augment(moved, _numbers(draws)), targets.to(self.device, non_blocking=True)


class CachedEvaluation:
    """Batches of a cache in its order, normalised."""

    def __init__(self, cache: ImageCache, *, batch_size: int) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self.normalize = Normalize(cache.device)

    def __len__(self) -> int:
        return math.ceil(len(self.cache.images) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in zip(
            self.cache.images.split(self.batch_size), self.cache.targets.split(self.batch_size), strict=True
        ):
            yield self.normalize(images), targets


class Prefetched:
    """Batches that are on a GPU when they are asked for: the next is copied, and augmented, on a stream of its own.

    Args:
        loader: whatever gives batches.
        device: a GPU.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler
        self.device = device
        self.stream = torch.cuda.Stream(device)  # one for all epochs: memory is reused within a stream only

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still be filling the cache
        iterator = iter(self.loader)

        def fetch() -> tuple[Batch, torch.cuda.Event] | None:
            with torch.cuda.stream(stream):
                batch = next(iterator, None)
                if batch is None:
                    return None
                images, targets = (part.to(self.device, non_blocking=True) for part in batch)
                return (images, targets), stream.record_event()

        ahead = fetch()
        while ahead is not None:
            batch, copied = ahead
            ahead = fetch()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for part in batch:
                part.record_stream(current)  # so that its memory is not reused while this stream reads it
            yield batch


def _pipeline(augmentation: Augmentation, *, seed: int, exact: bool, device: torch.device) -> Callable[..., Tensor]:
    """What the device does with a batch.

    Raises:
        UsageError: if `augment` does not cover it.
    """
    if augmentation.no_aug:
        return Normalize(device)
    return BatchedAugment(
        input_size=augmentation.input_size,
        seed=seed,
        crop='pad' if augmentation.input_size <= SMALL_IMAGE else 'none',
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        re_prob=augmentation.re_prob,
        re_mode=augmentation.re_mode,
        re_count=augmentation.re_count,
        resplit=augmentation.resplit,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        exact=exact,
    )


def build_loaders(
    train: ImageDataset | None,
    val: ImageDataset,
    *,
    batches: TrainBatches | None,
    shard: EvalSampler,
    eval_batch_size: int,
    augmentation: Augmentation,
    seed: int,
    augment: str = 'auto',
    exact: bool = False,
    cache_gib: float = 4.0,
    device: torch.device,
    workers: int,
    pin_memory: bool = True,
    timeout: float = 0.0,
) -> tuple[TrainLoader | None, SizedLoader, str]:
    """The loaders of a run, and how training images are augmented: 'none', 'pil', 'batched' or 'batched, exact'.

    Batched augmentation runs on the device. 'auto' chooses it where it knows the policy, but not for large images on a
    CPU, which Pillow handles faster. Images whose crop is the same
    each time, which all are at evaluation and up to 32 px, are kept on the device where they fit.

    Args:
        train, val: the splits, with the transforms of `build_transform`; train is None for evaluation alone.
        batches: of training.
        shard: this process's share of evaluation.
        eval_batch_size: images.
        augmentation: the pipeline's settings.
        seed: the run's.
        augment: 'auto', 'pil' or 'batched'.
        exact: timm's pixels to the bit, more slowly.
        cache_gib: memory for images on the device, in GiB; at most half of what a GPU has free.
        device: where the model is.
        workers: loader processes.
        pin_memory: pin batches in host memory, for GPUs.
        timeout: seconds to wait for a loader process.

    Raises:
        UsageError: if the policy is not covered by what is asked for.
    """
    pin_memory = pin_memory and device.type == 'cuda'
    options: dict[str, Any] = {
        'num_workers': workers,
        'pin_memory': pin_memory,
        'timeout': timeout if workers else 0,
        'worker_init_fn': ignore_signals,
    }
    room = cache_gib * GIB
    if device.type == 'cuda':
        room = min(room, torch.cuda.mem_get_info(device)[0] / 2)
    size = augmentation.input_size

    def fits(images: int) -> bool:
        nonlocal room
        needed = images * 3 * size**2
        if needed > room:
            return False
        room -= needed
        return True

    train_loader: Any = None
    kind = 'none'
    if train is not None:
        assert batches is not None
        pipeline: Callable[..., Tensor] | None = None
        large_on_cpu = device.type == 'cpu' and augmentation.input_size > SMALL_IMAGE and not augmentation.no_aug
        if augment == 'batched' or (augment == 'auto' and not large_on_cpu):
            try:
                pipeline = _pipeline(augmentation, seed=seed, exact=exact, device=device)
            except UsageError as err:
                if augment == 'batched':
                    raise
                log(f'Note: augmentation runs in PIL ({err})')
        kind = 'pil' if pipeline is None else 'batched, exact' if exact else 'batched'
        if pipeline is None:
            erase = RandomErasing(
                augmentation.re_prob, mode=augmentation.re_mode, max_count=augmentation.re_count, device='cpu'
            )
            images = AugmentedImages(train, seed=seed, erase=erase if augmentation.resplit else None)
            train_loader = TimedLoader(images, batch_sampler=batches, persistent_workers=workers > 0, **options)
        else:
            crop, fixed = augmentation.crop(train=True)
            if fixed and fits(len(train)):
                cache = ImageCache(train, range(len(train)), crop, size=size, device=device, options=options)
                train_loader = CachedTraining(cache, batches, pipeline)
            else:
                train.transform = crop
                images = AugmentedImages(train, seed=seed)
                loader = TimedLoader(images, batch_sampler=batches, persistent_workers=workers > 0, **options)
                train_loader = AugmentedBatches(loader, pipeline, device)
        if device.type == 'cuda':
            train_loader = Prefetched(train_loader, device)
    if train is not None and fits(len(shard)):  # an evaluation alone reads each image once anyway
        crop = augmentation.crop(train=False)[0]
        cache = ImageCache(val, shard.indices, crop, size=size, device=device, options=options)
        return train_loader, CachedEvaluation(cache, batch_size=eval_batch_size), kind
    return train_loader, TimedLoader(val, sampler=shard, batch_size=eval_batch_size, **options), kind
