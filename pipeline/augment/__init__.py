"""The training pipeline of DeiT's recipe on batches of uint8 images, on any device: crop, flip, RandAugment or colour
jitter, normalisation, random erasing.

It draws from the distributions of timm's and torchvision's pipeline on PIL images, which `Augmentation.transform`
makes. No library offers that on batches: torchvision's and kornia's RandAugment draw one op for the whole batch, and
DALI's has other ranges. The work is divided so that the host never waits for the device:

1. the host draws all random numbers, a few for each sample, from a hash of (seed, epoch, image, repeat);
2. it turns them into parameters of ops, and groups the samples by op;
3. the device applies each op to its samples at once.

References: E. D. Cubuk et al., RandAugment, 2019; Z. Zhong et al., Random Erasing Data Augmentation, 2017. The
definitions that count are those of timm's `auto_augment` and `random_erasing`, and of Pillow's C sources.
"""

from pipeline.augment.batch import BatchedAugment, apply_op
from pipeline.augment.policy import OPS

__all__ = ['OPS', 'BatchedAugment', 'apply_op']
