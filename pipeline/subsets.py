"""Parts of a data set by class: a fraction of it, images that are held out of training, folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samplers import cumcount


def stratified_subset(targets: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """A part of a data set with each class's share, by the images' numbers in ascending order.

    Images are ranked at random within their class and taken in the order of rank / images of the class; so each class
    gives its first image before any gives its second, and a smaller part lies inside a larger one.

    Args:
        targets: class indices (n,).
        fraction: of the n images, rounded, at least one.
        seed: of the ranks and of the order of classes within a rank.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(targets))
    labels, counts = targets[order], np.bincount(targets)
    turn = rng.permutation(len(counts))
    taken = np.lexsort((turn[labels], cumcount(labels) / counts[labels]))
    return np.sort(order[taken[: max(round(fraction * len(targets)), 1)]])


@dataclass(frozen=True)
class HoldOut:
    """Which training images are held out of training, to choose the best checkpoint: a fraction, or one of the folds.

    Either has each class's share of images, to one image; a class of a single image stays in training, but for folds.

    Args:
        fraction: of the training images, below 1; 0 for folds.
        folds, fold: how many parts, which hold each image once, and the number of the one that is held out.
        seed: chooses other images.
    """

    fraction: float = 0.0
    folds: int = 1
    fold: int = 0
    seed: int = 0

    def split(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the images that stay in training, and of those that are held out, both ascending."""
        numbers = np.arange(len(targets))
        if self.fraction:
            kept = stratified_subset(targets, 1 - self.fraction, seed=self.seed)
            return kept, np.setdiff1d(numbers, kept)
        order = np.random.default_rng(self.seed).permutation(len(targets))
        by_class = order[np.argsort(targets[order], kind='stable')]  # at random inside a class
        held = np.sort(by_class[self.fold :: self.folds])
        return np.setdiff1d(numbers, held), held
