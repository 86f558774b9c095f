"""What happens to an image on its way to a batch, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset
from torchvision import transforms

from pipeline.images import ImageDataset, Transform
from samplers import Draw
from utils import UsageError, one_line, seed_all

SMALL_IMAGE, PADDING = 32, 4  # pixels; up to that size a random crop with padding replaces the random resized crop


def normalization(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation of each channel; for grey images, as in timm, the mean of the three."""
    values = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = values if channels == 3 else ((sum(value) / 3,) for value in values)
    return mean, std


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The settings of the training pipeline, in timm's names. The defaults are those of DeiT's recipe.

    Args:
        input_size: pixels.
        channels: of the images, 3 or 1.
        no_aug: use evaluation's transform in training too.
        hflip: probability of a horizontal flip.
        color_jitter: strength, used where `auto_augment` is not, and beside 3-Augment.
        auto_augment: timm's policy string, or None.
        interpolation: of the training crop: random, bilinear, bicubic.
        re_prob, re_mode, re_count: random erasing's probability, fill (const, rand, pixel) and most boxes an image.
        resplit: erase in the second half of each batch only, as timm defines it.
    """

    input_size: int
    channels: int = 3
    no_aug: bool = False
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = 'rand-m9-mstd0.5-inc1'
    interpolation: str = 'bicubic'
    re_prob: float = 0.25
    re_mode: str = 'pixel'
    re_count: int = 1
    resplit: bool = False

    @property
    def is_small(self) -> bool:
        return self.input_size <= SMALL_IMAGE

    def transform(self, *, train: bool) -> Transform:
        """The transform from an image to a normalised tensor (channels, input_size, input_size).

        Training uses timm's; up to 32 px a random crop with padding 4 stands in its random resized crop's place. With
        `resplit`, erasing is left to what sees the batch. Evaluation resizes the shorter side to 256/224 of the size
        and crops the centre; up to 32 px it only resizes.

        Raises:
            UsageError: for a policy or mode that timm does not know.
        """
        mean, std = normalization(self.channels)
        if not train or self.no_aug:
            normalize = transforms.Normalize(mean, std)
            return transforms.Compose([*self._resize(), transforms.ToTensor(), normalize])
        try:
            transform = create_transform(
                input_size=self.input_size,
                is_training=True,
                hflip=self.hflip,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                interpolation=self.interpolation,
                re_prob=0.0 if self.resplit else self.re_prob,
                re_mode=self.re_mode,
                re_count=self.re_count,
                mean=mean,
                std=std,
            )
        except (AssertionError, ValueError, KeyError, NotImplementedError) as err:
            raise UsageError(f'--aa {self.auto_augment}: timm refuses this ({one_line(err)})') from None
        if self.is_small:
            transform.transforms[:1] = [*self._resize(), transforms.RandomCrop(self.input_size, padding=PADDING)]
        return transform

    @property
    def has_fixed_crop(self) -> bool:
        """Whether `crop` gives the same each time. Up to 32 px, whole batches are cropped at random after it."""
        return self.no_aug or self.is_small

    def crop(self, *, train: bool) -> Transform:
        """What of the pipeline must see an image by itself: to a uint8 tensor (channels, input_size, input_size)."""
        if train and not self.has_fixed_crop:
            steps = [RandomResizedCropAndInterpolation(self.input_size, interpolation=self.interpolation)]
        else:
            steps = self._resize()
        return transforms.Compose([*steps, transforms.PILToTensor()])

    def _resize(self) -> list[Any]:
        bicubic = transforms.InterpolationMode.BICUBIC
        if self.is_small:
            return [transforms.Resize((self.input_size, self.input_size), bicubic)]
        return [transforms.Resize(int(256 / 224 * self.input_size), bicubic), transforms.CenterCrop(self.input_size)]


def build_transform(*, train: bool, input_size: int, **settings: Any) -> Transform:
    """`Augmentation.transform` from the settings that differ from the recipe's."""
    return Augmentation(input_size=input_size, **settings).transform(train=train)


class AugmentedImages(Dataset[tuple[Any, int]]):
    """The training images, each draw with its own random numbers: those of (seed, epoch, image, repeat).

    So a batch does not depend on which loader process makes it, nor on what was drawn before. Reading one seeds the
    random numbers of the process that reads it.

    Args:
        dataset: the images, with their transform.
        seed: the run's.
        erase: random erasing for the second half of each batch only (`--resplit`).
    """

    def __init__(self, dataset: ImageDataset, *, seed: int, erase: RandomErasing | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.erase = erase

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        seed_all(self.seed, draw.epoch, draw.image, draw.repeat, devices=False)
        return self.dataset[draw.image]

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Any, int]]:
        """The samples of a batch, which the loader asks for together."""
        samples = []
        for position, draw in enumerate(draws):
            image, target = self[draw]
            if self.erase is not None and position >= len(draws) // 2:
                image = self.erase(image)
            samples.append((image, target))
        return samples
