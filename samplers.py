"""Which images each process sees, in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler as RASampler  # as the published code calls it
from torch.utils.data import DistributedSampler, Sampler


class BalancedSampler(DistributedSampler[int]):
    """Each class equally often, in an epoch as long as the data set: rounds of one image of each class, in any order.

    A class gives its images in turn, shuffled anew whenever all have been; so those of a small class stand several
    times in an epoch, and some of a large one not at all. Any beginning of an epoch is balanced, to one round.

    Args:
        targets: class indices (n,).
        num_repeats: how often each image stands at its place, for repeated augmentation.
    """

    def __init__(self, targets: np.ndarray, *, seed: int, num_repeats: int = 1) -> None:
        super().__init__(targets, num_replicas=1, rank=0, seed=seed)  # type: ignore[arg-type]
        by_class = np.split(np.argsort(targets, kind='stable'), np.cumsum(np.bincount(targets))[:-1])
        self.members = [images for images in by_class if len(images)]
        self.num_repeats = num_repeats

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rounds = math.ceil(len(self) / (len(self.members) * self.num_repeats))
        columns = [
            np.concatenate([rng.permutation(images) for _ in range(math.ceil(rounds / len(images)))])[:rounds]
            for images in self.members
        ]
        order = rng.permuted(np.stack(columns, axis=1), axis=1).reshape(-1)  # (rounds, classes) to (rounds * classes,)
        return iter(order.repeat(self.num_repeats)[: len(self)].tolist())


def cumcount(order: np.ndarray) -> np.ndarray:
    """How often the number at each place of a sequence has stood in it before."""
    places = np.argsort(order, kind='stable')
    ranked = order[places]
    before = np.empty_like(places)
    before[places] = np.arange(len(order)) - np.searchsorted(ranked, ranked)
    return before


class Draw(NamedTuple):
    """One appearance of an image in training. With the run's seed, it decides the image's augmentation."""

    image: int  # its index in the data set
    epoch: int
    repeat: int  # how often the image has stood in this epoch before


class TrainBatches(Sampler[list[Draw]]):
    """The batches of one process, for a DataLoader's `batch_sampler`.

    An epoch is a fixed sequence of draws, the published one: repeated augmentation's, or a permutation seeded with the
    epoch; or a balanced one. Batch k of all processes together takes the k-th part of it, whose draws are dealt out in
    turn; what does not fill a last batch is left out. An epoch that goes on in the middle may have other processes or
    batch sizes than it began with: the draws that remain are dealt out to those, each once, but for fewer draws than
    processes, which are left out.

    Args:
        batch_size: draws for each process and batch.
        repeated: use repeated augmentation, DeiT's (Touvron et al. 2021) after Hoffer et al., "Augment your batch",
            CVPR 2020.
        even: give each process an even number of draws, which mixing needs.
        balanced: class indices (num_images,), to draw each class equally often, in the order of a `seed`.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        repeated: bool = False,
        even: bool = False,
        balanced: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.total_batch = batch_size * num_replicas
        self.num_replicas = num_replicas
        self.rank = rank
        self.even = even
        self._sampler: RASampler | DistributedSampler
        if balanced is not None:
            self._sampler = BalancedSampler(balanced, seed=seed, num_repeats=3 if repeated else 1)
        elif repeated:
            # A permutation seeded with the epoch alone, each index three times in a row, as long as the data set
            # rounded down to a multiple of 256, if it has so many: it shows about a third of the images. Over one
            # process: the sequence that the published samplers deal out to several.
            self._sampler = RASampler(range(num_images), num_replicas=1, rank=0)
        else:
            self._sampler = DistributedSampler(range(num_images), num_replicas=1, rank=0)  # type: ignore[arg-type]
        length = len(self._sampler)
        if not isinstance(self._sampler, RASampler) or num_images < 256:  # the last turn is filled up, or cut off
            length += -length % num_replicas
        self.num_draws = length // self.total_batch * self.total_batch
        self.set_epoch(0)

    def set_epoch(
        self,
        epoch: int,
        *,
        done: int = 0,
        num_draws: int | None = None,
        left_out: Sequence[tuple[int, int]] = (),
        first: int = 0,
    ) -> None:
        """Sets the epoch, and the place in it, for the next iteration.

        Args:
            done: draws of all processes that have been trained with.
            num_draws: the epoch's length, if it began with other processes or batch sizes.
            left_out: ranges of draws, from and up to, that are not to be trained with.
            first: the number of the first batch, for those that count them.
        """
        self.epoch, self.first = epoch, first
        self.length = self.num_draws if num_draws is None else num_draws
        places: np.ndarray = np.arange(done, self.length)
        for begin, end in left_out:
            places = places[(places < begin) | (places >= end)]
        count, rest = divmod(len(places), self.total_batch)
        self._dealt_by = 2 if rest and self.even else 1
        turns = len(places) // (self._dealt_by * self.num_replicas)
        if rest:  # of another number of processes: batches as equal as can be, none of which leaves a process without
            count = min(count + 1, turns)
        places = places[: len(places) // self._dealt_by * self._dealt_by].reshape(-1, self._dealt_by)
        self._batches = [part.reshape(-1) for part in np.array_split(places, count)] if count else []
        self.unplaced = 0 if count else places.size  # draws, fewer than there are processes

    def __len__(self) -> int:
        return len(self._batches)

    def batch_range(self, number: int) -> tuple[int, int]:
        """Where in the epoch's sequence batch `number` of all processes begins and ends."""
        batch = self._batches[number - self.first]
        return int(batch[0]), int(batch[-1]) + 1

    def draws(self, number: int) -> list[list[Draw]]:
        """The draws of batch `number`, for each process."""
        order = self._order()
        return [self._deal(self._batches[number - self.first], rank, order) for rank in range(self.num_replicas)]

    def _order(self) -> np.ndarray:
        """The epoch's images, and how often each has stood in it before, (2, n)."""
        self._sampler.set_epoch(self.epoch)
        images = np.fromiter(self._sampler, dtype=np.int64, count=len(self._sampler))
        images = np.resize(images, max(len(images), self.length))  # begins anew to fill up the last turn
        return np.stack([images, cumcount(images)])

    def _deal(self, batch: np.ndarray, rank: int, order: np.ndarray) -> list[Draw]:
        own = batch.reshape(-1, self._dealt_by)[rank :: self.num_replicas].reshape(-1)
        return [Draw(image, self.epoch, repeat) for image, repeat in order[:, own].T.tolist()]

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self._order()
        for batch in self._batches:
            yield self._deal(batch, self.rank, order)
