"""From data sets to batches: loader processes, images that stay on the device, augmentation of whole batches there."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from pipeline.augment import BatchedAugment
from pipeline.augment.steps import send
from pipeline.images import ImageDataset
from pipeline.transforms import Augmentation, AugmentedImages, normalization
from pipeline.workers import check_loader_processes, deadline, ignore_signals
from samplers import TrainBatches
from utils import SizedLoader, UsageError, log

Batch = tuple[Tensor, Tensor]  # images (B, C, S, S), class indices (B,)
Augment = Callable[[Tensor, Tensor], Tensor]  # of images and their draws
FEW_IMAGES = 4096  # are read faster than loader processes start


class TrainLoader(SizedLoader, Protocol):
    """The batches of an epoch, as `batch_sampler` says."""

    batch_sampler: TrainBatches


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How batches are made, and where.

    Args:
        workers: loader processes.
        augment: 'pil', 'batched', or 'auto', which chooses batched augmentation where it knows the policy, but not for
            large images on a CPU, which Pillow handles faster.
        exact: timm's pixels to the bit in batched augmentation, more slowly.
        cache_gib: memory for images on the device, in GiB; at most half of what a GPU has free.
        timeout: seconds to wait for a loader process.
    """

    device: torch.device
    workers: int
    augment: str = 'auto'
    exact: bool = False
    cache_gib: float = 4.0
    pin_memory: bool = True
    timeout: float = 0.0

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

    That process hands over the memory itself: PyTorch waits for it without end if it stops just then, and if it dies
    reports what broke between the two.

    Raises:
        RuntimeError: if a loader process gives no batch in time, or has died.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        workers = [process.sentinel for process in multiprocessing.active_children()]
        patience = self.timeout + 2 if self.timeout else 0  # PyTorch's own limit goes first, where it works
        while True:
            try:
                with deadline(patience, lambda: RuntimeError(f'DataLoader timed out after {patience:g} seconds')):
                    batch = next(iterator, None)
            except (OSError, EOFError, RuntimeError) as err:  # RuntimeError: pinning met one
                if workers and 'DataLoader' not in str(err) and wait(workers, timeout=1):
                    raise RuntimeError('DataLoader worker exited unexpectedly') from err
                raise
            if batch is None:
                return
            yield batch


class Normalize:
    """Images uint8 (B, channels, H, W) to float32 with `normalization`, as the transforms do."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in normalization(channels))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class CachedLoader:
    """Batches of images that stay on the device, augmented there: they are read once, and then by no loader process.

    Args:
        dataset: its transform gives uint8 tensors (C, S, S), the same each time.
        indices: the images to keep.
        batches: the draws of each batch, or at evaluation the places in `indices`.
        augment: from images uint8 (B, C, S, S) and draws (B, 3) to what the model gets.
        size: S.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: Sequence[int],
        batches: Any,
        augment: Augment,
        *,
        size: int,
        options: LoaderOptions,
    ) -> None:
        self.batch_sampler = batches
        self.augment = augment
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

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batch_sampler:
            draws = np.array(batch).reshape(len(batch), -1)  # (B, 3); (B, 1) at evaluation
            (places,) = send([draws[:, 0]], self.device)
            yield self.augment(self.images.index_select(0, places), torch.from_numpy(draws)), self.targets[places]


class AugmentedLoader:
    """Training batches uint8 (B, C, S, S) that loader processes decode and crop, augmented on the device."""

    def __init__(self, loader: DataLoader, augment: Augment, device: torch.device) -> None:
        self.loader = loader
        self.batch_sampler: TrainBatches = loader.batch_sampler  # type: ignore[assignment]
        self.augment = augment
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for draws, (images, targets) in zip(self.batch_sampler, self.loader, strict=True):
            images, targets = (part.to(self.device, non_blocking=True) for part in (images, targets))
            yield self.augment(images, torch.from_numpy(np.array(draws))), targets


class PrefetchLoader:
    """Batches that are on a GPU when they are asked for: the next is copied, and augmented, on a stream of its own."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler
        self.device = device
        self.stream = torch.cuda.Stream(device)  # one for all epochs: memory is reused within a stream only

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still be filling the cache
        iterator = iter(self.loader)

        def fetch() -> tuple[Batch, torch.cuda.Event] | None:
            with torch.cuda.stream(self.stream):
                batch = next(iterator, None)
                if batch is None:
                    return None
                images, targets = (part.to(self.device, non_blocking=True) for part in batch)
                return (images, targets), self.stream.record_event()

        ahead = fetch()
        while ahead is not None:
            batch, copied = ahead
            ahead = fetch()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for part in batch:
                part.record_stream(current)  # so that its memory is not reused while this stream reads it
            yield batch


def _batched_augment(augmentation: Augmentation, *, seed: int, options: LoaderOptions) -> Augment | None:
    """What the device does with the batches of training, None where PIL augments the images one by one."""
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


def build_loaders(
    train: ImageDataset | None,
    val: ImageDataset,
    *,
    batches: TrainBatches | None,
    shard: range,
    eval_batch_size: int,
    augmentation: Augmentation,
    seed: int,
    options: LoaderOptions,
) -> tuple[TrainLoader | None, SizedLoader, str]:
    """The loaders of a run, and how training images are augmented: 'none', 'pil', 'batched' or 'batched, exact'.

    The loaders choose the transforms of the splits. Images whose crop is the same each time, which all are at
    evaluation and up to 32 px, are kept on the device where they fit; but an evaluation alone reads each once anyway.

    Args:
        train, batches: what is trained with, and its batches; None for evaluation alone.
        val, shard: what is evaluated, and this process's share of it. Shares may differ by an image, so the loop that
            uses them must not communicate at each batch.

    Raises:
        UsageError: if the policy is not covered by what is asked for.
    """
    kind = 'none'
    loader: Any = None
    size, device = augmentation.input_size, options.device
    keeps_val = False
    if train is not None:
        assert batches is not None
        augment = _batched_augment(augmentation, seed=seed, options=options)
        kind = 'pil' if augment is None else 'batched, exact' if options.exact else 'batched'
        train.transform = augmentation.transform(train=True) if augment is None else augmentation.crop(train=True)
        image_bytes, room = augmentation.channels * size**2, options.cache_gib * 2**30
        if device.type == 'cuda':
            room = min(room, torch.cuda.mem_get_info(device)[0] / 2)
        if augment is not None and augmentation.has_fixed_crop and len(train) * image_bytes <= room:
            loader = CachedLoader(train, range(len(train)), batches, augment, size=size, options=options)
            room -= len(train) * image_bytes
        else:
            erase = None
            if augment is None and augmentation.resplit:
                settings = {'mode': augmentation.re_mode, 'max_count': augmentation.re_count, 'device': 'cpu'}
                erase = RandomErasing(augmentation.re_prob, **settings)
            images = AugmentedImages(train, seed=seed, erase=erase)
            loader = options.loader(images, batch_sampler=batches, persistent_workers=options.workers > 0)
            loader = loader if augment is None else AugmentedLoader(loader, augment, device)
        loader = PrefetchLoader(loader, device) if device.type == 'cuda' else loader
        keeps_val = len(shard) * image_bytes <= room
    if keeps_val:
        val.transform = augmentation.crop(train=False)
        places = BatchSampler(range(len(shard)), eval_batch_size, drop_last=False)
        cached = CachedLoader(val, shard, places, Normalize(augmentation.channels, device), size=size, options=options)
        return loader, cached, kind
    val.transform = augmentation.transform(train=False)
    return loader, options.loader(val, sampler=shard, batch_size=eval_batch_size), kind
