"""Which images each process sees, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler


class RASampler(RepeatAugSampler):
    """Repeated augmentation: each image stands in an epoch up to three times, augmented anew each time.

    Gives the published sampler's sequence of indices: a permutation seeded with the epoch alone, each index repeated,
    dealt out to the processes in turn, of which each keeps its share of the data set's length rounded down to a
    multiple of 256. An epoch is thus as long as without repetition and shows about a third of the images. Below 256
    images the published one is empty; this one then keeps the whole length. Source: DeiT (Touvron et al. 2021),
    after Hoffer et al., "Augment your batch", CVPR 2020.

    Args:
        dataset: anything with a length.
        num_replicas: the number of processes.
        rank: this process's number.
        shuffle: permute the images; call `set_epoch` before each epoch to permute them anew.
        num_repeats: how often each image stands in the sequence that is dealt out.
    """

    def __init__(
        self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, num_repeats: int = 3
    ) -> None:
        super().__init__(
            dataset,
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            num_repeats=num_repeats,
            selected_round=256 if len(dataset) >= 256 else 0,
        )


class EvalSampler(Sampler[int]):
    """Every `num_replicas`-th image from `rank` on: over all processes each image exactly once, with no padding.

    Shares differ by one image where the number of processes does not divide the data set's length, so the loop that
    uses them must not communicate at each batch.
    """

    def __init__(self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0) -> None:
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
