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

SMALL_IMAGE = 32  # pixels; up to here a random crop with padding replaces the random resized crop


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The settings of the training pipeline; see `build_transform` for each.

    `resplit` erases in the second half of each batch only, as timm defines it.
    """

    input_size: int
    no_aug: bool
    hflip: float
    color_jitter: float
    auto_augment: str | None
    interpolation: str
    re_prob: float
    re_mode: str
    re_count: int
    resplit: bool

    def transform(self, *, train: bool) -> Transform:
        """The pipeline on PIL images; with `resplit` it leaves erasing to what sees the batch."""
        return build_transform(
            train=train,
            input_size=self.input_size,
            no_aug=self.no_aug,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            re_prob=0.0 if self.resplit else self.re_prob,
            re_mode=self.re_mode,
            re_count=self.re_count,
        )

    def crop(self, *, train: bool) -> tuple[Transform, bool]:
        """What of the pipeline must see an image by itself: to a uint8 tensor (3, input_size, input_size).

        Also says whether that is the same each time. Up to 32 px it is: images are of one size, and their random crop
        is taken from whole batches.
        """
        if not train or self.no_aug or self.input_size <= SMALL_IMAGE:
            return transforms.Compose([*_resize(self.input_size), transforms.PILToTensor()]), True
        crop = RandomResizedCropAndInterpolation(self.input_size, interpolation=self.interpolation)
        return transforms.Compose([crop, transforms.PILToTensor()]), False


def _resize(input_size: int) -> list[Any]:
    """Evaluation's way to one size."""
    bicubic = transforms.InterpolationMode.BICUBIC
    if input_size <= SMALL_IMAGE:
        return [transforms.Resize((input_size, input_size), bicubic)]
    return [transforms.Resize(int(256 / 224 * input_size), bicubic), transforms.CenterCrop(input_size)]


def build_transform(
    *,
    train: bool,
    input_size: int,
    no_aug: bool = False,
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
    interpolation: str = 'bicubic',
    re_prob: float = 0.25,
    re_mode: str = 'pixel',
    re_count: int = 1,
) -> Transform:
    """The transform of DeiT's recipe, from an image to a normalised tensor (3, input_size, input_size).

    Training uses timm's. Up to 32 px a random crop with padding 4 stands in its random resized crop's place.
    Evaluation resizes the shorter side to 256/224 of the size and crops the centre; up to 32 px it only resizes.

    Args:
        train: training or evaluation.
        input_size: pixels.
        no_aug: use evaluation's transform in training too.
        hflip: probability of a horizontal flip.
        color_jitter: strength, used where `auto_augment` is not.
        auto_augment: timm's policy string, or None.
        interpolation: of the training crop: random, bilinear, bicubic.
        re_prob, re_mode, re_count: random erasing's probability, fill and count.

    Raises:
        UsageError: for a policy or mode that timm does not know.
    """
    if train and not no_aug:
        try:
            transform = create_transform(
                input_size=input_size,
                is_training=True,
                hflip=hflip,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation=interpolation,
                re_prob=re_prob,
                re_mode=re_mode,
                re_count=re_count,
            )
        except (AssertionError, ValueError, KeyError, NotImplementedError) as err:
            raise UsageError(f'--aa {auto_augment} --remode {re_mode}: timm refuses this ({one_line(err)})') from None
        if input_size <= SMALL_IMAGE:
            transform.transforms[:1] = [*_resize(input_size), transforms.RandomCrop(input_size, padding=4)]
        return transform
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*_resize(input_size), transforms.ToTensor(), normalize])


class AugmentedImages(Dataset[tuple[Any, int]]):
    """The training images, each draw with its own random numbers: those of (seed, epoch, image, repeat).

    So a batch does not depend on which loader process makes it, nor on what was drawn before. Reading one seeds the
    random numbers of the process that reads it.

    Args:
        dataset: the images, with their transform.
        seed: the run's.
        erase: random erasing for the second half of each batch only (`--resplit`), as timm defines it.
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
