"""Images of every kind as RGB or grey, and the base class of the data sets."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import re
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from torch.utils.data import Dataset

from utils import InputError, all_reduce, log, one_line, shorten

Transform = Callable[[Image.Image], Any]

warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # `decode` says it in one line
# Formats that Pillow names but cannot draw without a further plug-in.
STUB_FORMATS = {'BUFR', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
TOO_DARK = (
    'its 16-bit values are all below 4096, as of 12-bit data: scale them to 0..65535, or give --value-range 0 4095'
)
MAX_BAD = 0.01  # the part of a data set that may be unreadable with --on-bad-image skip


class BadImageError(InputError):
    """An image that cannot be decoded, or a record whose bytes were altered."""


@cache
def image_extensions() -> frozenset[str]:
    """The file extensions that Pillow opens, in lower case: '.jpg', '.png', '.webp', …"""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in STUB_FORMATS
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become images. The defaults are those of torchvision: RGB, with the orientation as stored.

    Args:
        channels: 3 for RGB, 1 for grey.
        exif_orientation: turn images as their EXIF data says.
        value_range: the values that become black and white, of images with more than 8 bits a channel.
    """

    channels: int = 3
    exif_orientation: bool = False
    value_range: tuple[float, float] | None = None

    @property
    def mode(self) -> str:
        return 'L' if self.channels == 1 else 'RGB'

    def convert(self, image: Image.Image) -> Image.Image:
        """An image as RGB or grey, by Pillow's conversion: transparency is dropped, as in torchvision.

        Without `value_range`, 16 bits a channel, and 32-bit integers that are no more than that, keep the upper eight
        bits; Pillow alone would clip grey ones to white.

        Raises:
            ValueError: for floating point and larger integers without `value_range`; if all of 16 bits lie in the
                lowest sixteenth of the range, as 12-bit data does, which would become black, unless all are black;
                and for colours of 16 bits with it, of which Pillow reads eight.
        """
        tile = str(getattr(image, 'tile', [])[:1])
        is_deep = image.mode.startswith('I') or re.search(';16[BLN]', tile) is not None  # BGR;16 has 5 or 6 bits
        if self.exif_orientation:
            with suppress(Exception):  # EXIF data that cannot be parsed says nothing; the pixels may be good
                image = ImageOps.exif_transpose(image)
        if image.mode == 'F' or image.mode.startswith('I'):  # I;16, I;16B, I
            image = self._to_eight_bits(np.asarray(image))
        elif is_deep and self.value_range is not None:
            raise ValueError('--value-range is for grey images, its 16-bit colours are read with eight bits')
        if image.mode == 'P' and 'transparency' in image.info:
            image = image.convert('RGBA')  # without Pillow's warning
        if image.mode == self.mode:
            image.load()
        else:
            image = image.convert(self.mode)
        if is_deep and self.value_range is None and 0 < np.asarray(image).max() < 16:
            raise ValueError(TOO_DARK)
        return image

    def _to_eight_bits(self, values: np.ndarray) -> Image.Image:
        if self.value_range is not None:
            low, high = self.value_range
            scaled = np.nan_to_num((values.astype(np.float64) - low) * (255 / (high - low)))
            return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))
        how = 'save it with 8 or 16 bits, or give --value-range LOW HIGH'
        if values.dtype.kind == 'f':
            raise ValueError(f'its values are floating-point numbers, whose range nothing says: {how}')
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError(f'its 32-bit integers are not in 0..65535: {how}')
        if 0 < values.max() < 4096:
            raise ValueError(TOO_DARK)
        return Image.fromarray((values >> 8).astype(np.uint8))


AS_STORED = Reading()


def explain_error(err: Exception) -> str:
    """Why an image could not be had, in a few words."""
    if isinstance(err, MemoryError):
        return 'too little memory'
    return err.strerror if isinstance(err, OSError) and err.strerror else one_line(err)


@cache
def _note_large(width: int, height: int) -> None:
    """Says once of each size, in each process, that it is large, in place of Pillow's warning."""
    sys.stderr.write(f'Note: an image of {width} x {height} pixels is decoded; it takes {width * height >> 18} MiB\n')


def decode(data: bytes | memoryview, reading: Reading = AS_STORED) -> Image.Image:
    """Decodes an image file's bytes to RGB, or to grey.

    JPEGs go through simplejpeg, whose pixels are Pillow's (both are libjpeg-turbo at its exact settings) without
    Pillow's parsing in Python: 2.4 times as fast at 32 px, 1.1 at 224 px. What it cannot read cleanly is Pillow's to
    judge, so that the same files are good and bad as with Pillow alone.

    Raises:
        ValueError: with the reason, if that fails.
    """
    if data[:2] == b'\xff\xd8' and not reading.exif_orientation:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in ('YCbCr', 'Gray') and height * width <= (Image.MAX_IMAGE_PIXELS or 2**30):
                return reading.convert(Image.fromarray(simplejpeg.decode_jpeg(data)))  # (H, W, 3)
        except Exception:  # it does not know every kind of JPEG; then, as for damaged ones, Pillow decides
            pass
    try:
        image = Image.open(io.BytesIO(data))
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            _note_large(image.width, image.height)
        return reading.convert(image)
    except UnidentifiedImageError:
        raise ValueError('it is empty' if len(data) == 0 else 'its format is unknown') from None
    except Exception as err:  # Pillow's readers raise whatever broken bytes lead them to
        raise ValueError(explain_error(err)) from None


def shrink(data: bytes, size: int) -> bytes:
    """An image file's bytes, or those of a JPEG of quality 95 whose shorter side has `size` pixels if it has more.

    The JPEG keeps the EXIF orientation. Grey images with more than 8 bits stay as they are: --value-range is for them.

    Raises:
        ValueError: with the reason, if it cannot be decoded.
    """
    file, exif = io.BytesIO(), Image.Exif()
    with suppress(Exception):  # `decode` says what is wrong; EXIF data that cannot be parsed says nothing
        stored = Image.open(io.BytesIO(data))
        if stored.mode[0] in 'IF':
            return data
        turned = stored.getexif().get(Base.Orientation, 1)
        exif[Base.Orientation] = int(turned) if turned in range(1, 9) else 1
    image = decode(data)
    if (shorter := min(image.size)) <= size:
        return data
    width, height = (round(side * size / shorter) for side in image.size)
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, 'JPEG', quality=95, exif=exif)
    return file.getvalue()


def pack_names(names: Iterable[str]) -> np.ndarray:
    """File names as an array of bytes, for `os.fsdecode`.

    Forked loader processes share its memory; a list of a million strings would be copied, as each use of one is
    counted in it.
    """
    return np.array([os.fsencode(name) for name in names], dtype='S')


class ImageDataset(Dataset[tuple[Any, int]]):
    """A split of a data set: images with class indices, in a fixed order. It needs little memory a loader process.

    A subclass says what lies at each of its positions (`_raw`, `_name` and others); this class selects among them,
    applies the transform and treats bad images.

    Args:
        labels: the class index at each position, (n,).
        classes: class names in the order of their indices.
        transform: from an image to what the loader collates.
    """

    remedy = 'replace or remove it'
    reading = AS_STORED  # how files become images; to be set before the loaders are made

    def __init__(
        self, labels: np.ndarray | Sequence[int], classes: Sequence[str], transform: Transform | None = None
    ) -> None:
        self._labels = np.array(labels, dtype=np.int64)
        self.classes = list(classes)
        self.transform = transform
        self._positions: range | np.ndarray = range(len(self._labels))  # of the images that are selected
        self.treat_bad_images('stop')

    def treat_bad_images(self, how: str) -> None:
        """What becomes of images that cannot be decoded; to be set before the loaders are made.

        Args:
            how: 'stop'; 'next', which gives the next good image in a bad one's place; or 'leave out', which gives a
                black image with class index -1, for evaluation to leave out of its counts.
        """
        self.on_bad_image = how
        # One byte an image, shared by the loader processes: 1 for bad ones.
        self._bad = torch.zeros(len(self._labels) if how != 'stop' else 0, dtype=torch.uint8).share_memory_()
        self._logged = self._bad.clone()

    @abstractmethod
    def _raw(self, position: int) -> bytes | memoryview:
        """As `raw`, but not to be kept."""

    def _name(self, position: int) -> str:
        """As `name`: the class and the number, for images that have no name of their own."""
        return f'{self.classes[self._labels[position]]}/{position:06d}.png'

    def _path(self, position: int) -> str:
        return self._name(position)

    def _where(self, position: int) -> str:
        """What an error message calls the image."""
        return self._path(position)

    def _image(self, position: int) -> Image.Image:
        try:
            return decode(self._raw(position), self.reading)
        except (ValueError, OSError, MemoryError) as err:
            what = f'{self._where(position)} cannot be read as an image ({explain_error(err)})'
            raise BadImageError(f'{what}: {self.remedy}, or use --on-bad-image skip') from None

    def _position(self, index: int) -> int:
        return int(self._positions[index])

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def targets(self) -> np.ndarray:
        """The class index of each image, int64 (n,)."""
        return self._labels[np.asarray(self._positions, dtype=np.int64)]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """The path and the class index of each image, a new list each time."""
        return [(self.path(index), self.target(index)) for index in range(len(self))]

    def target(self, index: int) -> int:
        """The image's class index."""
        return int(self._labels[self._position(index)])

    def relabel(self, classes: Sequence[str]) -> None:
        """Takes other class indices: those of a list that names all of this data set's classes, and perhaps more."""
        number = {name: number for number, name in enumerate(classes)}
        self._labels = np.array([number[name] for name in self.classes], dtype=np.int64)[self._labels]
        self.classes = list(classes)

    def name(self, index: int) -> str:
        """The image's path relative to the data set's folder, with slashes."""
        return self._name(self._position(index))

    def path(self, index: int) -> str:
        """The image's path, or its name where it has no file of its own."""
        return self._path(self._position(index))

    def raw(self, index: int) -> bytes:
        """The bytes of the image's file, or of a PNG where it has none.

        Raises:
            OSError, ValueError: if they cannot be read, or were altered.
        """
        return bytes(self._raw(self._position(index)))

    def file_size(self, index: int) -> int:
        """The bytes of the image's file, as `raw` gives them."""
        return len(self._raw(self._position(index)))

    def load(self, index: int) -> Image.Image:
        """The image, as `reading` says.

        Raises:
            BadImageError: with its path, if it cannot be decoded.
        """
        return self._image(self._position(index))

    def _content(self) -> bytes:
        """What else than names and labels tells this data set from another; nothing for images in files."""
        return b''

    def fingerprint(self) -> str:
        """A digest of classes, labels and names in their order, and of the pixels where they are in memory.

        Equal for the same images in files and in LMDB. It does not read the files.
        """
        digest = hashlib.sha256(self._content())
        digest.update('\0'.join(self.classes).encode(errors='surrogateescape'))
        digest.update(self.targets.tobytes())
        for index in range(len(self)):
            digest.update(os.fsencode(self.name(index)) + b'\0')
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> None:
        """Keeps these of the images, in this order."""
        self._positions = np.asarray(self._positions)[indices]

    def subset(self, indices: np.ndarray) -> ImageDataset:
        """These of the images as a data set of their own, which reads them from the same place."""
        subset = copy.copy(self)
        subset.select(indices)
        subset.treat_bad_images(self.on_bad_image)  # with notes of its own
        return subset

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        stops = self.on_bad_image == 'stop'
        image, target = (self.load(index), self.target(index)) if stops else self._good_image(index)
        return image if self.transform is None else self.transform(image), target

    def _good_image(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            near = (index + step) % len(self)
            position = self._position(near)
            if not self._bad[position]:
                try:
                    return self._image(position), self.target(near)
                except BadImageError:
                    self._bad[position] = 1
                    self._check_bad()
            if self.on_bad_image == 'leave out':
                return Image.new(self.reading.mode, (64, 64)), -1
        raise InputError(f'no image of {self._where(self._position(index))} and those after it can be read')

    def _check_bad(self) -> None:
        bad = torch.nonzero(self._bad).flatten().tolist()
        if len(bad) > MAX_BAD * len(self):
            where = shorten(map(self._where, bad), most=20)
            raise InputError(f'{len(bad)} of {len(self)} images cannot be read, more than {MAX_BAD:.0%}: {where}. '
                             'Repair or remove them')  # fmt: skip

    def log_bad_images(self) -> None:
        """Logs, each once, the images that any process found bad since the last call. All processes must call it.

        Raises:
            InputError: if those of all processes together are too many.
        """
        if self.on_bad_image == 'stop':
            return
        all_reduce(self._bad, largest=True)
        for position in torch.nonzero(self._bad > self._logged).flatten().tolist():
            what = 'left out' if self.on_bad_image == 'leave out' else 'replaced by the next good one'
            log(f'Bad image, {what}: {self._where(position)}')
            self._logged[position] = 1
        self._check_bad()
