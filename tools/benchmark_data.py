"""How fast images come from files and from LMDB, beside torchvision's ImageFolder on the same files.

    python tools/benchmark_data.py speed FOLDER --input-size 32     FOLDER holds train/ and val/ with class folders
    python tools/benchmark_data.py memory --images 1281167          of loader processes, on synthetic images

`speed` reads every image once beforehand, so the files are in the page cache. It then measures all ways in turn, round
after round, and prints for each the median rate and the median of its ratios to ImageFolder in the same round. Each
process goes through a share of its own, in random order, and hands nothing over: this is the work of a loader process
without the cost of sending batches. For a GPU that work ends with the crop. The second LMDB file is that of
`folder2lmdb.py --max-size`, 256 at 224 px.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import FROM_ONE, FlagParser
from datasets import DataSource, build_datasets
from folder2lmdb import write_lmdb
from pipeline.file_dataset import FileDataset
from pipeline.images import Transform
from pipeline.layouts import Split
from pipeline.lmdb_dataset import ImageFolderLMDB
from pipeline.transforms import Augmentation
from utils import InputError, UsageError, one_line

CONTEXT = multiprocessing.get_context('fork')
KINDS = ('ImageFolder', 'files', 'LMDB')
READS = 200_000  # of loader processes, until their memory is measured


def get_args_parser() -> FlagParser:
    parser = FlagParser('benchmark_data.py', description='Images per second, and memory of loader processes.')
    parser.add_argument('what', choices=('speed', 'memory'), help="images per second, or loader processes' memory")
    parser.add_argument('folder', nargs='?', help='holds train/ and val/ (speed)')
    parser.add_argument('--input-size', type=FROM_ONE, default=32, help='pixels, of the training transform (speed)')
    parser.add_argument('--images', type=FROM_ONE, help='of the training split; all by default (speed), or the '
                        'number of synthetic ones, 1,281,167 by default (memory)')  # fmt: skip
    parser.add_argument('--rounds', type=FROM_ONE, default=5, help='measurements of each way (speed)')
    parser.add_argument('--workers', type=FROM_ONE, nargs='+', default=[1, 2], help='processes (speed)')
    return parser


_item: Callable[[int], Any]  # what the forked processes measure; not every one can be sent there


def _seconds(numbers: list[int]) -> float:
    _item(numbers[0])  # opens what is opened on first use
    began = time.perf_counter()
    for number in numbers:
        _item(number)
    return time.perf_counter() - began


def rate(item: Callable[[int], Any], images: int, processes: int) -> float:
    """Images per second of a function that gets one by its number, over all processes."""
    global _item
    _item = item
    order = np.random.default_rng(0).permutation(images)
    shares = [order[number::processes].tolist() for number in range(processes)]
    try:
        with ProcessPoolExecutor(processes, CONTEXT) as pool:
            return images / max(pool.map(_seconds, shares))
    except Exception as err:  # whatever reading leads to, or a process that is gone
        raise InputError(f'an image cannot be read: {one_line(err)}') from None


def speed(folder: Path, input_size: int, images: int | None, rounds: int, workers: Sequence[int]) -> None:
    """Prints the table of rates.

    Raises:
        InputError: if the folder cannot be read.
    """
    files = build_datasets(DataSource('FOLDER', str(folder), layout='folder')).train
    assert isinstance(files, FileDataset)
    images = min(images or len(files), len(files))
    if images < max(workers):
        raise UsageError(f'{images} images are too few for {max(workers)} processes')
    files.select(np.random.default_rng(0).permutation(len(files))[:images])
    size = sum(len(files.raw(number)) for number in range(images)) / images
    print(f'{folder}: {images:,} images, {size:,.0f} bytes on average; {rounds} rounds, page cache warm')
    augmentation = Augmentation(input_size=input_size)
    whole, crop = augmentation.transform(train=True), augmentation.crop(train=True)
    smaller = int(256 / 224 * input_size)
    names = (*KINDS, f'LMDB, --max-size {smaller}')

    with tempfile.TemporaryDirectory() as temporary:
        stores = []
        for max_size in (None, smaller):
            path = Path(temporary, f'{max_size}.lmdb')
            write_lmdb(files, path, data_set='FOLDER', max_size=max_size, workers=2)
            stores.append(ImageFolderLMDB(path))

        def from_folder(loader: Callable[[str], Any], transform: Transform | None) -> Callable[[int], Any]:
            dataset = ImageFolder(str(folder / 'train'), loader=loader, transform=transform, allow_empty=True)
            dataset.samples = list(files.samples)  # the same images, in the same order
            return dataset.__getitem__

        def ours(transform: Transform | None) -> list[Callable[[int], Any]]:
            found = [copy.copy(dataset) for dataset in (files, *stores)]
            for dataset in found:
                dataset.transform = transform
            return [dataset.__getitem__ for dataset in found]

        ways: dict[str, tuple[Callable[[int], Any], ...]] = {  # by names; LMDB's bytes as the decoder reads them
            'raw bytes': (
                from_folder(lambda path: Path(path).read_bytes(), None),
                files.raw,
                *(store._raw for store in stores),
            ),
            'decoded': (from_folder(default_loader, None), *ours(None)),
            "decoded, cropped; ImageFolder: timm's whole transform": (from_folder(default_loader, whole), *ours(crop)),
            f'training transform, {input_size} px': (from_folder(default_loader, whole), *ours(whole)),
        }
        print('| | processes | from | images/s | per core | ratio |\n|---|---|---|---|---|---|')
        for title, functions in ways.items():
            for processes in workers:
                found = [[rate(function, images, processes) for function in functions] for _ in range(rounds)]
                for number, name in enumerate(names):
                    middle = statistics.median(rates[number] for rates in found)
                    ratio = statistics.median(rates[number] / rates[0] for rates in found)
                    row = (title, processes, name, f'{middle:,.0f}', f'{middle / processes:,.0f}', f'{ratio:.2f}')
                    print('|', ' | '.join(map(str, row)), '|', flush=True)


def memory_of(process: int) -> tuple[float, float, float]:
    """A process's resident memory, the part of it that is pages of files, and the part that no other process shares."""
    found = {}
    for line in Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()[1:]:
        name, amount = line.split()[:2]
        found[name.rstrip(':')] = int(amount) / 1024  # MiB
    return found['Rss'], found['Rss'] - found['Anonymous'], found['Private_Clean'] + found['Private_Dirty']


def synthetic_files(folder: Path, images: int) -> FileDataset:
    """A data set of as many paths, in classes of a thousand, which all lead to the same thousand files."""
    folder.mkdir(exist_ok=True)
    classes = [f'n{number:08}' for number in range(-(-images // 1000))]
    for name in classes:
        if not (folder / name).exists():
            (folder / name).symlink_to(folder.parent / 'source')
    paths = [f'{classes[number // 1000]}/{number % 1000:03}.jpg' for number in range(images)]
    return FileDataset(Split(folder, paths, [number // 1000 for number in range(images)]), classes)


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a new process, whose memory goes with it."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(function, *args).result()


def write_synthetic(folder: Path, images: int, path: Path) -> None:
    write_lmdb(synthetic_files(folder, images), path, data_set='FOLDER', workers=2)


def read_at_random(make: Callable[[], Any]) -> list[tuple[float, float, float]]:
    """What each of two loader processes holds after many random reads."""
    dataset = make()
    order = np.random.default_rng(0).integers(0, len(dataset), READS).tolist()
    loader: Any = DataLoader(
        dataset, batch_size=64, sampler=order, num_workers=2, collate_fn=len, persistent_workers=True
    )
    assert sum(loader) == len(order)
    return [memory_of(worker.pid) for worker in loader._iterator._workers]


def memory(images: int) -> None:
    """Prints what loader processes hold, for a small data set and a large one."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / 'source').mkdir()
        for number in range(1000):
            Image.new('RGB', (16, 16), (number % 256, 0, 0)).save(root / 'source' / f'{number:03}.jpg')
        rows = []
        for count in (min(10000, images), images):
            folder, path = root / str(count), root / f'{count}.lmdb'
            in_process(write_synthetic, folder, count, path)
            ways = (
                partial(ImageFolder, str(folder)), partial(synthetic_files, folder, count),
                partial(ImageFolderLMDB, path)
            )  # fmt: skip
            for name, make in zip(KINDS, ways, strict=True):
                rows += [(name, count, *held) for held in in_process(read_at_random, make)]
    print('| from | images | resident, MiB | of that, pages of files | of that, its own |\n|---|---|---|---|---|')
    for name, count, *held in rows:
        print(f'| {name} | {count:,} | ' + ' | '.join(f'{value:.0f}' for value in held) + ' |')


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    with one_line_errors('benchmark_data.py'):
        if args.what == 'memory':
            if not Path('/proc/self/smaps_rollup').exists():
                raise InputError('this needs /proc/<process>/smaps_rollup, which Linux has')
            memory(args.images or 1281167)
        elif args.folder is None:
            parser.error('speed needs a FOLDER')
        else:
            speed(Path(args.folder), args.input_size, args.images, args.rounds, args.workers)


if __name__ == '__main__':
    main()
