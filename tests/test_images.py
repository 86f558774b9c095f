"""images.py: every kind of image becomes RGB, the fast decoder gives Pillow's pixels, bad images are found."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from datasets import DataSource, build_datasets
from main import main
from pipeline.images import BadImageError, Reading, decode, image_extensions, pack_names, shrink
from tests.conftest import PLAIN, ROOT, SMALL_MODEL
from tests.processes import run
from tests.test_distributed import trained_by
from utils import InputError

MakeFolder = Callable[..., Path]
SMOOTH = np.kron(np.random.default_rng(0).integers(0, 256, (7, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)[:51, :67]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0'])
@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK', 'YCbCr'])
@pytest.mark.parametrize('quality', [30, 75, 100])
def test_jpegs_have_the_pixels_of_pillow(subsampling: str, progressive: bool, mode: str, quality: int) -> None:
    for pixels in (SMOOTH, np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)):
        image = Image.fromarray(pixels).convert(mode)
        options: dict[str, Any] = {} if mode in ('L', 'CMYK') else {'subsampling': subsampling}
        data = encode(image, 'JPEG', quality=quality, progressive=progressive, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
        for given in (data, memoryview(data)):
            decoded = decode(given)
            assert decoded.mode == 'RGB'
            np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_a_jpeg_that_the_fast_decoder_does_not_know() -> None:
    """4:4:1: the luminance factors of a 4:2:0 image turned to 1 x 4."""
    data = bytearray(encode(Image.new('RGB', (32, 32), (200, 30, 90)), 'JPEG', subsampling='4:2:0'))
    data[data.index(b'\xff\xc0') + 11] = 0x14
    assert decode(bytes(data)).size == (32, 32)


def sixteen_bits(kind: str) -> bytes:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    return encode(Image.fromarray(ramp), kind)


def paletted() -> Image.Image:
    image = Image.fromarray(SMOOTH).quantize(16)
    image.info['transparency'] = bytes(range(0, 256, 16))
    return image


IMAGES = {
    'L.png': lambda: encode(Image.fromarray(SMOOTH).convert('L'), 'PNG'),
    'one bit.png': lambda: encode(Image.fromarray(SMOOTH).convert('1'), 'PNG'),
    'LA.png': lambda: encode(Image.fromarray(SMOOTH).convert('LA'), 'PNG'),
    'P.gif': lambda: encode(Image.fromarray(SMOOTH).quantize(16), 'GIF'),
    'P transparent.png': lambda: encode(paletted(), 'PNG'),
    'RGBA.webp': lambda: encode(Image.fromarray(SMOOTH).convert('RGBA'), 'WEBP', lossless=True),
    'RGBA.PNG': lambda: encode(Image.fromarray(SMOOTH).convert('RGBA'), 'PNG'),
    'CMYK.tiff': lambda: encode(Image.fromarray(SMOOTH).convert('CMYK'), 'TIFF'),
    'plain.bmp': lambda: encode(Image.fromarray(SMOOTH), 'BMP'),
    'plain.ppm': lambda: encode(Image.fromarray(SMOOTH), 'PPM'),
    '16 bits.png': lambda: sixteen_bits('PNG'),
    '16 bits.tif': lambda: sixteen_bits('TIFF'),
}


def test_any_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    for split in ('train', 'test'):
        (tmp_path / split / 'a').mkdir(parents=True)
        for name, make in IMAGES.items():
            (tmp_path / split / 'a' / name).write_bytes(make())
    splits = build_datasets(DataSource('FOLDER', str(tmp_path)))
    assert [Path(path).name for path, _ in splits.val.samples] == sorted(IMAGES)
    assert splits.train is not None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = {Path(path).name: splits.train[i][0] for i, (path, _) in enumerate(splits.train.samples)}
    assert all(image.mode == 'RGB' for image in found.values())
    plain = np.asarray(Image.fromarray(SMOOTH))
    for name in ('RGBA.webp', 'RGBA.PNG', 'plain.bmp', 'plain.ppm', 'CMYK.tiff'):
        np.testing.assert_array_equal(np.asarray(found[name]), plain, name)
    for name in ('16 bits.png', '16 bits.tif'):  # Pillow's own conversion would be white but for the first two
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8) >> 8
        np.testing.assert_array_equal(np.asarray(found[name])[..., 0], ramp, name)
    colours = np.asarray(paletted().convert('RGBA'))[..., :3]
    np.testing.assert_array_equal(np.asarray(found['P transparent.png']), colours)


def tiff(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels), 'TIFF')


def test_five_bits_a_channel_are_not_sixteen() -> None:
    """A BMP of 16 bits a pixel, red, green and blue together, whose values are all small."""
    header = struct.pack('<IiiHHIIiiII', 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0) + struct.pack('<III', 0xF800, 0x7E0, 0x1F)
    data = b'BM' + struct.pack('<IHHI', 14 + 52 + 32, 0, 0, 14 + 52) + header + struct.pack('<H', 0x0821) * 16
    for reading in (Reading(), Reading(value_range=(0, 4095))):
        assert 0 < np.asarray(decode(data, reading)).max() < 16


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write: uint16 (H, W, 3)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b''.join(b'\0' + row.tobytes() for row in pixels.astype('>u2'))
    header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        chunk(*part) for part in ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    )


RAMP = np.linspace(0, 65535, 192)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (tiff(RAMP.reshape(12, 16).astype(np.float32)), 'floating-point numbers'),
        (tiff(RAMP.reshape(12, 16).astype(np.int32) * 100), r'32-bit integers are not in 0\.\.65535'),
        (tiff(RAMP.reshape(12, 16).astype(np.int32) - 1), r'32-bit integers are not in 0\.\.65535'),
        (tiff((RAMP / 16).reshape(12, 16).astype(np.int32)), 'all below 4096, as of 12-bit data'),
        (tiff((RAMP / 16).reshape(12, 16).astype(np.uint16)), 'all below 4096, as of 12-bit data'),
        (encode(Image.fromarray((RAMP / 16).reshape(12, 16).astype(np.uint16)), 'PNG'), 'all below 4096'),
        (deep_png((RAMP / 16).reshape(8, 8, 3)), 'all below 4096, as of 12-bit data'),
        (tiff((RAMP / 257).reshape(12, 16).astype(np.int32)), 'all below 4096'),  # 8-bit data as they are
        (tiff((RAMP / 257).reshape(12, 16).astype(np.uint16)), 'all below 4096'),
    ],
)
def test_what_would_be_flattened_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_sixteen_bits_of_every_kind_keep_the_upper_eight() -> None:
    expected = (RAMP.astype(np.uint16) >> 8).reshape(12, 16)
    grey = RAMP.reshape(12, 16)
    for data in (tiff(grey.astype(np.uint16)), tiff(grey.astype(np.int32)),
                 encode(Image.fromarray(grey.astype(np.uint16)), 'PPM')):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(decode(data))[..., 1], expected)
    np.testing.assert_array_equal(np.asarray(decode(deep_png(RAMP.reshape(8, 8, 3)))), expected.reshape(8, 8, 3))
    assert np.asarray(decode(deep_png(np.zeros((8, 8, 3), np.uint16)))).max() == 0  # all black, whatever the range
    assert np.asarray(decode(encode(Image.new('L', (8, 8), 3), 'PNG'))).max() == 3  # dark, but of 8 bits


@pytest.mark.skipif('.avif' not in image_extensions(), reason='Pillow was built without AVIF')
def test_avif() -> None:
    assert decode(encode(Image.new('RGB', (16, 16), (200, 0, 0)), 'AVIF')).getpixel((3, 3))[0] > 180


def test_special_files_are_not_waited_for(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where one takes an image's place after the folders were read."""
    root = make_folder({'train': ['a'], 'val': ['a']})
    val = build_datasets(DataSource('FOLDER', str(root))).val
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: path.symlink_to('/dev/zero'), make_sparse)):
        path = root / 'val' / 'a' / f'{number}.jpg'
        path.unlink()
        make(path)
    for number, reason in enumerate(('a named pipe', 'a folder', 'a device', 'more than an image can have')):
        with pytest.raises(BadImageError, match=rf'{number}\.jpg cannot be read as an image \(it .*{reason}'):
            val.load(number)

    def no_memory(*_: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr('pipeline.images.decode', no_memory)
    with pytest.raises(BadImageError, match=r'7\.jpg cannot be read as an image \(too little memory\)'):
        val.load(7)


def make_sparse(path: Path) -> None:
    with open(path, 'wb') as file:
        file.truncate(2**40)


def test_orientation_is_kept_as_torchvision_keeps_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned
    assert decode(encode(Image.new('RGB', (40, 20)), 'JPEG', exif=exif)).size == (40, 20)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('mode', ['RGB', 'L', 'I;16'])
def test_images_are_turned_where_that_is_asked_for(orientation: int, mode: str) -> None:
    """Whatever they are stored as; and a smaller copy of one in LMDB is turned as it is."""
    upright = SMOOTH[:48, :64, 0] if mode != 'RGB' else SMOOTH[:48, :64]
    inverse: list[Any] = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1),
                          np.rot90, lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a, -1)]  # fmt: skip
    stored = np.ascontiguousarray(inverse[orientation - 1](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored.astype(np.uint16) << 8 if mode == 'I;16' else stored)
    data = encode(image, 'PNG', exif=exif)
    found = np.asarray(decode(data, Reading(exif_orientation=True)))
    np.testing.assert_array_equal(found if mode == 'RGB' else found[..., 0], upright)
    smaller = decode(shrink(data, 24), Reading(exif_orientation=True))
    assert smaller.size == ((64, 48) if mode == 'I;16' else (32, 24))  # grey of 16 bits is kept as it is


def test_exif_data_that_cannot_be_parsed_turns_nothing() -> None:
    data = encode(Image.fromarray(SMOOTH), 'JPEG', exif=b'Exif\0\0not a TIFF header')
    assert decode(data, Reading(exif_orientation=True)).size == (67, 51)
    for orientation in ('6', b'6', 9, 70000, 6.0):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with suppress(Exception):  # Pillow writes some of these only
            data = encode(Image.fromarray(SMOOTH), 'JPEG', exif=exif)
        assert decode(shrink(data, 24)).size == (32, 24)


@pytest.mark.parametrize('kind', [np.uint16, np.int32, np.float32])
def test_a_range_of_values(kind: type) -> None:
    values: Any = np.linspace(-100 if kind != np.uint16 else 0, 5000, 192).reshape(12, 16).astype(kind)
    found = np.asarray(decode(tiff(values), Reading(value_range=(100, 4095))))
    expected = np.rint(((values.astype(float) - 100) * (255 / 3995)).clip(0, 255))
    np.testing.assert_array_equal(found[..., 1], expected)
    eight = encode(Image.fromarray(SMOOTH), 'PNG')
    np.testing.assert_array_equal(np.asarray(decode(eight, Reading(value_range=(100, 4095)))), SMOOTH)
    with pytest.raises(ValueError, match='16-bit colours are read with eight bits'):
        decode(deep_png(RAMP.reshape(8, 8, 3)), Reading(value_range=(0, 4095)))


def test_grey_images() -> None:
    """By Pillow's conversion, which leaves grey as it is."""
    grey = Reading(channels=1)
    plain = Image.fromarray(SMOOTH)
    for data in (encode(plain, 'PNG'), encode(plain, 'JPEG'), encode(plain.convert('L'), 'JPEG'),
                 encode(plain.convert('P'), 'PNG')):  # fmt: skip
        found = decode(data, grey)
        assert found.mode == 'L'
        np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(data).convert('L')))
    assert decode(encode(plain.convert('CMYK'), 'TIFF'), grey).mode == 'L'
    assert decode(tiff(RAMP.reshape(12, 16).astype(np.uint16)), grey).mode == 'L'


def test_extensions() -> None:
    extensions = image_extensions()
    assert {'.jpg', '.jpeg', '.png', '.webp', '.tif', '.bmp', '.gif', '.ppm', '.jp2'} <= extensions
    assert not {'.txt', '.csv', '.json', '.pdf', '.h5', '.mpg', ''} & extensions


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'it is empty'),
        (b'no image at all', 'its format is unknown'),
        (encode(Image.fromarray(SMOOTH), 'JPEG')[:900], 'truncated'),
        (encode(Image.fromarray(SMOOTH), 'PNG')[:200], 'truncated'),
        (b'\xff\xd8\xff\xe0' + b'\x00' * 100, 'format is unknown|truncated|no marker'),
    ],
)
def test_what_cannot_be_decoded_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f'(?i){reason}'):
        decode(data)


def damage(data: bytes, number: int, rng: np.random.Generator) -> bytes:
    """Whole, cut off, or with a few bytes altered: in turn, at random."""
    if number % 4 == 0:
        return data[: rng.integers(len(data))]
    altered = bytearray(data)
    for position in rng.integers(0, len(data), number % 4 - 1):
        altered[position] = rng.integers(0, 256)
    return bytes(altered)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, about damaged metadata
def test_damaged_jpegs_are_good_and_bad_as_with_pillow_alone() -> None:
    """2,000 files: by the fast decoder, and by `folder2lmdb.py --max-size`, which makes an image smaller first."""
    image = Image.fromarray(SMOOTH)
    kinds = [
        encode(image.convert(mode), 'JPEG', progressive=progressive, quality=90)
        for mode in ('RGB', 'L', 'CMYK')
        for progressive in (False, True)
    ]
    twelve_bits = bytearray(kinds[0])
    twelve_bits[twelve_bits.index(b'\xff\xc0') + 4] = 12
    good = {True: 0, False: 0}
    rng = np.random.default_rng(0)
    for number in range(2000):
        data = damage([*kinds, bytes(twelve_bits)][number % 7], number // 7, rng)
        found = []
        for way in (
            lambda file: Reading().convert(Image.open(io.BytesIO(file))),
            decode,
            lambda file: decode(shrink(file, 24)),
        ):
            try:
                found.append(way(data))
            except Exception:  # Pillow's readers raise whatever broken bytes lead them to
                found.append(None)
        exact, fast, smaller = found
        assert (exact is None) == (fast is None) == (smaller is None), number
        good[exact is not None] += 1
        if exact is not None:
            assert fast.tobytes() == exact.tobytes() and min(smaller.size) == min(24, *exact.size), number
    assert min(good.values()) > 500


def unpack(names: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in names]


def test_packed_names() -> None:
    names = ['a', '', 'ä/b c.jpg', 'x' * 300, 'not-utf8-\udcff']
    packed = pack_names(names)
    assert unpack(packed) == names and len(packed) == 5
    assert os.fsdecode(packed[-1]) == names[-1] and unpack(packed[1:3]) == names[1:3]
    assert unpack(pickle.loads(pickle.dumps(packed))) == names
    with pytest.raises(IndexError):
        packed[5]
    assert unpack(pack_names([])) == []


def break_image(root: Path, name: str) -> Path:
    path = root / name
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_bad_image_is_replaced_by_the_next_good_one(make_folder: MakeFolder, capsys: pytest.CaptureFixture) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=110)
    bad = break_image(root, 'train/a/107.jpg')
    break_image(root, 'train/a/108.jpg')
    with pytest.raises(BadImageError, match=r'107\.jpg cannot be read .* --on-bad-image skip'):
        list(build_datasets(DataSource('FOLDER', str(root))).train)  # type: ignore[call-overload]
    train = build_datasets(DataSource('FOLDER', str(root)), skip_bad_images=True).train
    assert train is not None
    position = [path for path, _ in train.samples].index(str(bad))
    image, target = train[position]
    good, good_target = train[position + 2]
    assert np.array_equal(image, good) and target == good_target
    for _ in range(2):
        for context in ('fork', 'forkserver'):
            loader: Any = DataLoader(train, num_workers=2, collate_fn=len, multiprocessing_context=context)
            assert sum(loader) == 220
        train.log_bad_images()
    out = capsys.readouterr().out
    assert out.count('107.jpg') == 1 and out.count('108.jpg') == 1


def test_more_than_one_percent_of_bad_images_fail(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=60)
    for number in (3, 4):
        break_image(root, f'train/a/{number}.jpg')
    train = build_datasets(DataSource('FOLDER', str(root)), skip_bad_images=True).train
    with pytest.raises(InputError, match='2 of 120 images cannot be read, more than 1%'):
        list(train)  # type: ignore[call-overload]


def test_two_processes_log_each_bad_image_once(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=80)
    break_image(root, 'train/b/7.jpg')
    break_image(root, 'val/a/9.jpg')
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'FOLDER', '--data-path', str(root), '--epochs', '3', '--dist-eval']
    text = trained_by(2, [*flags, '--batch-size', '16', '--on-bad-image', 'skip', '--amp', 'off'])
    assert text.count('Bad image, replaced') == 1 and text.count('Bad image, left out') == 1
    assert text.count('on the 159 test images') == 3


def test_training_skips_a_bad_image_and_evaluation_leaves_it_out(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture
) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=60)
    break_image(root, 'train/b/7.jpg')
    bad = break_image(root, 'val/a/9.jpg')
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'FOLDER', '--data-path', str(root), '--epochs', '2']
    for workers in ('0', '2'):
        line = main([*flags, '--on-bad-image', 'skip', '--num_workers', workers])
        assert line['epoch'] == 1
        out = capsys.readouterr().out
        assert out.count('Bad image, replaced by the next good one') == 1 and 'train/b/7.jpg' in out
        assert out.count('Bad image, left out') == 1 and str(bad) in out
        assert 'on the 119 test images' in out
    for workers in ('0', '2'):
        (done,) = run(partial(main, [*flags, '--num_workers', workers]))
        assert done.returncode == 1
        assert done.stderr.count('\n') == 1 and 'train/b/7.jpg cannot be read as an image' in done.stderr


def _targets(samples: list[tuple[Any, int]]) -> list[int]:
    return [target for _, target in samples]


@pytest.mark.parametrize('context', ['fork', 'spawn', 'forkserver'])
def test_file_data_sets_reach_processes_however_they_start(make_folder: MakeFolder, context: str) -> None:
    train = build_datasets(
        DataSource('FOLDER', str(make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=3)))
    ).train
    assert train is not None
    loader = DataLoader(train, batch_size=3, num_workers=1, collate_fn=_targets, multiprocessing_context=context)
    assert list(loader) == [[0, 0, 0], [1, 1, 1]]


LARGE = """
import sys
from PIL import Image
from pipeline.images import decode
Image.MAX_IMAGE_PIXELS = 1000
data = open(sys.argv[1], 'rb').read()
assert [decode(data).size for _ in range(2)] == [(40, 30)] * 2
"""


def test_a_large_image_is_one_line(tmp_path: Path) -> None:
    Image.new('RGB', (40, 30)).save(tmp_path / 'x.png')
    done = subprocess.run([sys.executable, '-c', LARGE, str(tmp_path / 'x.png')], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and done.stderr.startswith('Note: an image of 40 x 30 pixels'), done.stderr
    assert done.stderr.count('\n') == 1
