"""From data sets to batches: loader processes, images that stay on the device, augmentation of whole batches there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import BatchedAugment
from pipeline.images import ImageDataset
from pipeline.transforms import Augmentation, AugmentedImages, normalization
from pipeline.workers import check_loader_processes, deadline, ignore_signals
from samplers import Draw, EvalSampler, TrainBatches
from utils import SizedLoader, UsageError, log

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S), class indices (B,)
GIB = 2**30
FEW_IMAGES = 4096  # are read faster than loader processes start


class TrainLoader(SizedLoader, Protocol):
    """The batches of an epoch, as `batch_sampler` says."""

    batch_sampler: TrainBatches


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How batches are made, and where.

    Args:
        device: where the model is.
        workers: loader processes.
        augment: 'pil', 'batched', or 'auto', which chooses batched augmentation where it knows the policy, but not for
            large images on a CPU, which Pillow handles faster.
        exact: timm's pixels to the bit in batched augmentation, more slowly.
        cache_gib: memory for images on the device, in GiB; at most half of what a GPU has free.
        pin_memory: pin batches in host memory, for GPUs.
        timeout: seconds to wait for a loader process.
    """

    device: torch.device
    workers: int
    augment: str = 'auto'
    exact: bool = False
    cache_gib: float = 4.0
    pin_memory: bool = True
    timeout: float = 0.0

    def cache_bytes(self) -> float:
        """The memory for images on the device."""
        room = self.cache_gib * GIB
        return min(room, torch.cuda.mem_get_info(self.device)[0] / 2) if self.device.type == 'cuda' else room

    def loader(self, dataset: Dataset[Any], *, processes: bool = True, **sampling: Any) -> TimedLoader:
        """A DataLoader with these options; `processes` False reads in this process."""
        workers = self.workers if processes else 0
        if workers:
            check_loader_processes(workers)
        return TimedLoader(
            dataset,
            num_workers=workers,
            pin_memory=self.pin_memory and self.device.type == 'cuda',
            timeout=self.timeout if workers else 0,
            worker_init_fn=ignore_signals,
            **sampling,
        )


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
    """Images uint8 (B, channels, H, W) to float32 with `normalization`, as the transforms do."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in normalization(channels))

    def __call__(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class ImageCache:
    """Images of a data set on the device, uint8 (n, C, S, S), with their class indices.

    Args:
        dataset: its transform gives uint8 tensors (C, S, S), the same each time.
        indices: the images, in this order.
        size: S.
        options: of the loader that reads them, once.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], *, size: int, options: LoaderOptions) -> None:
        self.device = options.device
        shape = (len(indices), dataset.reading.channels, size, size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.targets = torch.empty(len(indices), dtype=torch.int64, device=self.device)
        loader = options.loader(dataset, processes=len(indices) >= FEW_IMAGES, batch_size=256, sampler=indices)
        first = 0
        for images, targets in loader:
            self.images[first : first + len(images)].copy_(images, non_blocking=True)
            self.targets[first : first + len(images)].copy_(targets, non_blocking=True)
            first += len(images)

    def take(self, indices: Sequence[int]) -> Batch:
        index = torch.tensor(indices)
        if self.device.type == 'cuda':
            index = index.pin_memory().to(self.device, non_blocking=True)
        return self.images[index], self.targets[index]


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
        self.normalize = Normalize(cache.images.shape[1], cache.device)

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


def _batched_pipeline(
    augmentation: Augmentation, *, seed: int, options: LoaderOptions
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What the device does with the batches of training, None where PIL augments the images one by one.

    Raises:
        UsageError: if batched augmentation is asked for and does not cover the policy.
    """
    large_on_cpu = options.device.type == 'cpu' and not augmentation.has_fixed_crop
    if options.augment == 'pil' or (options.augment == 'auto' and large_on_cpu):
        return None
    if augmentation.no_aug:
        return Normalize(augmentation.channels, options.device)
    try:
        return BatchedAugment(augmentation, seed=seed, exact=options.exact)
    except UsageError as err:
        if options.augment == 'batched':
            raise
        log(f'Note: augmentation runs in PIL ({err})')
        return None


def _training_loader(
    train: ImageDataset,
    batches: TrainBatches,
    pipeline: Callable[[Tensor, Tensor], Tensor] | None,
    *,
    augmentation: Augmentation,
    seed: int,
    options: LoaderOptions,
    cached: bool,
) -> TrainLoader:
    """The loader of training, which gives the images their transform.

    Args:
        pipeline: of `_batched_pipeline`.
        cached: keep the images on the device.
    """
    loader: Any
    train.transform = augmentation.transform(train=True) if pipeline is None else augmentation.crop(train=True)
    if cached and pipeline is not None:
        cache = ImageCache(train, range(len(train)), size=augmentation.input_size, options=options)
        loader = CachedTraining(cache, batches, pipeline)
    else:
        erase = None
        if pipeline is None and augmentation.resplit:
            erase = RandomErasing(
                augmentation.re_prob, mode=augmentation.re_mode, max_count=augmentation.re_count, device='cpu'
            )
        images = AugmentedImages(train, seed=seed, erase=erase)
        loader = options.loader(images, batch_sampler=batches, persistent_workers=options.workers > 0)
        if pipeline is not None:
            loader = AugmentedBatches(loader, pipeline, options.device)
    return Prefetched(loader, options.device) if options.device.type == 'cuda' else loader


def build_loaders(
    train: ImageDataset | None,
    val: ImageDataset,
    *,
    batches: TrainBatches | None,
    shard: EvalSampler,
    eval_batch_size: int,
    augmentation: Augmentation,
    seed: int,
    options: LoaderOptions,
) -> tuple[TrainLoader | None, SizedLoader, str]:
    """The loaders of a run, and how training images are augmented: 'none', 'pil', 'batched' or 'batched, exact'.

    The loaders choose the transforms of the splits. Images whose crop is the same each time, which all are at
    evaluation and up to 32 px, are kept on the device where they fit; but an evaluation alone reads each once anyway.

    Args:
        train, val: the splits; train is None for evaluation alone.
        batches: of training.
        shard: this process's share of evaluation.
        eval_batch_size: images.
        augmentation: the pipeline's settings.
        seed: the run's.
        options: how batches are made.

    Raises:
        UsageError: if the policy is not covered by what is asked for.
    """
    kind = 'none'
    train_loader: TrainLoader | None = None
    keeps_val = False
    if train is not None:
        assert batches is not None
        pipeline = _batched_pipeline(augmentation, seed=seed, options=options)
        kind = 'pil' if pipeline is None else 'batched, exact' if options.exact else 'batched'
        image_bytes, room = augmentation.channels * augmentation.input_size**2, options.cache_bytes()
        keeps_train = pipeline is not None and augmentation.has_fixed_crop and len(train) * image_bytes <= room
        keeps_val = (len(shard) + keeps_train * len(train)) * image_bytes <= room
        train_loader = _training_loader(
            train, batches, pipeline, augmentation=augmentation, seed=seed, options=options, cached=keeps_train
        )
    if keeps_val:
        val.transform = augmentation.crop(train=False)
        cache = ImageCache(val, shard.indices, size=augmentation.input_size, options=options)
        return train_loader, CachedEvaluation(cache, batch_size=eval_batch_size), kind
    val.transform = augmentation.transform(train=False)
    return train_loader, options.loader(val, sampler=shard, batch_size=eval_batch_size), kind
