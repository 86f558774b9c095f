"""Writes a data set's images into LMDB files, and checks such files: `python folder2lmdb.py --help`.

The format, and the data set that reads it, are in pipeline/lmdb_dataset.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lmdb
import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config.errors import one_line_errors
from config.flags import FROM_ONE, FlagParser, add_data_flags, usable_workers
from datasets import DataSource, Splits, build_datasets
from pipeline.images import ANY_VALUES, ImageDataset, explain_error, shrink
from pipeline.lmdb_dataset import FORMAT, HEADER, INDEX, TABLE, VERSION, ImageFolderLMDB, _key
from pipeline.workers import end_with_parent
from training.checkpoint import write_file
from training.lock import writing_to
from utils import InputError, UsageError, one_line, shorten

CHUNK_IMAGES, CHUNK_BYTES = 256, 4 * 2**20  # what a reader process hands over at once, whichever comes first
COMMIT_IMAGES, COMMIT_BYTES = 5000, 64 * 2**20  # of a transaction, whichever comes first
GROWTH = 256 * 2**20  # bytes by which the map grows at least


# Writing


class _Chunks(Dataset[tuple[list[bytes], list[int]]]):
    """A data set's files, a chunk of them at a time, with their checksums.

    Args:
        max_size: pixels of the shorter side, to which larger images are made smaller.
    """

    def __init__(self, dataset: ImageDataset, max_size: int | None = None) -> None:
        self.dataset = dataset
        self.max_size = max_size
        sample = range(0, len(dataset), max(len(dataset) // 64, 1))
        mean = sum(map(dataset.file_size, sample)) / max(len(sample), 1)
        self.size = int(min(max(CHUNK_BYTES / max(mean, 1), 1), CHUNK_IMAGES))  # images

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.size)

    def _numbers(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, len(self.dataset)))

    def __getitem__(self, chunk: int) -> tuple[list[bytes], list[int]]:
        files = []
        for number in self._numbers(chunk):
            try:
                file = self.dataset.raw(number)
                files.append(file if self.max_size is None else shrink(file, self.max_size))
            except (OSError, ValueError, MemoryError) as err:
                raise InputError(f'{self.dataset.path(number)}: {explain_error(err)}') from None
        return files, [zlib.crc32(file) for file in files]


class _Problems(_Chunks):
    """What is wrong with the records of an LMDB data set, a chunk of them at a time."""

    def __getitem__(self, chunk: int) -> Any:
        problems = []
        for number in self._numbers(chunk):
            try:
                self.dataset.load(number)
            except InputError as err:
                problems.append(str(err).partition(f': {self.dataset.remedy}')[0])
        return len(self._numbers(chunk)), problems


def _read(chunks: _Chunks, workers: int) -> Iterator[Any]:
    """The chunks in order, read by several processes, which end with this one; two for each are kept in memory."""
    try:
        yield from DataLoader(chunks, batch_size=None, num_workers=workers, worker_init_fn=end_with_parent)
    except RuntimeError as err:  # how the loader reports a process that died
        raise InputError(f'a reader process failed: {one_line(err)}') from None


@contextmanager
def _held_interrupts() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function that this gives is called, so that it does not hit a starting process.

    Raises:
        KeyboardInterrupt: from that function, if it came.
    """
    came: list[int] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _put(env: lmdb.Environment, records: Sequence[tuple[bytes, bytes]]) -> None:
    """Appends records in one transaction, in a larger map if they do not fit."""
    while True:
        try:
            with env.begin(write=True) as txn:
                txn.cursor().putmulti(records, append=True)
            return
        except lmdb.MapFullError:
            size = env.info()['map_size']
            env.set_mapsize(size + max(GROWTH, size // 2, 2 * sum(len(value) for _, value in records)))


def write_lmdb(
    dataset: ImageDataset,
    path: Path,
    *,
    data_set: str,
    inat_category: str | None = None,
    max_size: int | None = None,
    workers: int = 2,
) -> None:
    """Writes the files of a data set into an LMDB file, which appears when it is complete and on the disk.

    Args:
        dataset: of any kind; its images are not decoded, unless there is a `max_size`.
        path: of the file, replaced if it is there.
        data_set, inat_category: what it is, for its readers.
        max_size: pixels of the shorter side, to which larger images are made smaller.
        workers: reader processes beside this one, which writes.

    Raises:
        InputError: if a file cannot be read, or the database cannot be written, such as on a full disk.
    """
    started = time.perf_counter()
    if path.is_dir():
        raise InputError(f'{path} is a folder: remove it, or choose another with --out')

    def write(file: IO[bytes]) -> None:
        sizes: list[int] = []
        checksums: list[int] = []
        records: list[tuple[bytes, bytes]] = []
        waiting = 0
        # No locks: no reader knows this name. No write map and no sparse file: the file grows as it is written.
        with (
            lmdb.open(file.name, subdir=False, lock=False, map_size=GROWTH, sync=False, meminit=False) as env,
            tqdm(total=len(dataset), desc=path.name, unit=' images') as bar,
        ):
            for files, sums in _read(_Chunks(dataset, max_size), workers):
                records += zip(map(_key, range(len(sizes), len(sizes) + len(files))), files, strict=True)
                sizes += map(len, files)
                checksums += sums
                waiting += sum(sizes[-len(files) :])
                if len(records) >= COMMIT_IMAGES or waiting >= COMMIT_BYTES:
                    _put(env, records)
                    records, waiting = [], 0
                bar.update(len(files))
                check_interrupt()
            described = {'data_set': data_set, 'inat_category': inat_category, 'max_size': max_size}
            _put(env, [*records, *_describe(dataset, sizes, checksums, described)])
            env.sync(True)
        check_interrupt()

    with _held_interrupts() as check_interrupt:
        try:
            write_file(path, write)
        except lmdb.Error as err:
            # LMDB calls a write that a full disk cut short an input/output error.
            full = shutil.disk_usage(path.parent).free < COMMIT_BYTES
            reason = 'the disk is full' if full else one_line(err).rpartition(': ')[2]
            raise InputError(f'cannot write {path}: {reason}; the unfinished file is removed') from None
    seconds = time.perf_counter() - started
    print(f'{path}: {len(dataset):,} images, {path.stat().st_size / 2**20:,.1f} MiB, '
          f'{len(dataset) / seconds:,.0f} images/s', flush=True)  # fmt: skip


def _describe(
    dataset: ImageDataset, sizes: list[int], checksums: list[int], described: dict[str, Any]
) -> list[tuple[bytes, bytes]]:
    """The records of the header and the index."""
    paths = [os.fsencode(dataset.name(i)) for i in range(len(dataset))]
    schema = TABLE.with_metadata({'classes': json.dumps(dataset.classes)})
    table = pa.table([paths, dataset.targets.astype(np.int32), sizes, checksums], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    index = sink.getvalue().to_pybytes()
    header = {
        'format': FORMAT,
        'version': VERSION,
        'images': len(dataset),
        'index_crc32': zlib.crc32(index),
        **described,
    }
    return [(HEADER, json.dumps(header).encode()), (INDEX, index)]


def same_images(dataset: ImageDataset, other: ImageFolderLMDB) -> bool:
    """Whether a file has a data set's paths, labels and classes in the same order, and files of the same sizes.

    The sizes are not compared where the file's images were made smaller.
    """

    def same(i: int) -> bool:
        one, two = ((d.name(i), d.target(i), other.max_size or d.file_size(i)) for d in (dataset, other))
        return one == two

    return len(dataset) == len(other) and dataset.classes == other.classes and all(map(same, range(len(dataset))))


def check_lmdb(path: Path, *, workers: int = 2) -> str:
    """Reads everything in a file: counts, labels, checksums, and each image through its decoder.

    Returns:
        What was found to be in order.

    Raises:
        InputError: saying what is wrong.
    """
    dataset = ImageFolderLMDB(path, verify=True)
    dataset.reading = ANY_VALUES
    store = dataset._open()
    problems: list[str] = []
    entries = store.env.stat()['entries'] - 2
    if len(dataset) != entries:
        problems.append(f'the index counts {len(dataset)} images, the database {entries}')
    with tqdm(total=len(dataset), desc=path.name, unit=' images') as bar:
        for images, found in _read(_Problems(dataset), workers):
            problems += found
            bar.update(images)
    if problems:
        raise InputError(f'{path}: {len(problems)} problem{"s" * (len(problems) > 1)}: {shorten(problems)}')
    return (
        f'{path}: {len(dataset):,} images in {len(dataset.classes)} classes, {dataset.sizes.sum() / 2**20:,.1f} MiB; '
        'counts and checksums are right, and every image decodes'
    )


def get_args_parser() -> FlagParser:
    parser = FlagParser('folder2lmdb.py', description='Write train.lmdb and val.lmdb, for main.py --use-lmdb; and '
                        'test.lmdb, where test/ stands beside the folder that validates.')  # fmt: skip
    parser.add_argument('--dir', type=os.path.abspath, help="the data set's folder, as main.py's --data-path")
    parser.add_argument('--out', type=os.path.abspath, help='folder of the LMDB files; --dir by default')
    parser.add_argument('--max-size', type=FROM_ONE, metavar='PIXELS', help='make larger images smaller, to so many '
                        'pixels of the shorter side, as JPEGs of quality 95: faster to read, other pixels')  # fmt: skip
    parser.add_argument('--overwrite', action='store_true', help='replace LMDB files of other images')
    parser.add_argument('--check', nargs='+', metavar='FILE', help='check LMDB files instead: counts, checksums, '
                        'and that every image decodes')  # fmt: skip
    add_data_flags(parser, default='FOLDER')
    return parser


def build(splits: Splits, folder: Path, *, overwrite: bool, workers: int, **described: Any) -> None:
    """Writes the splits; a file that has a split's images already is kept.

    Args:
        described: `data_set`, `inat_category` and `max_size`, as for `write_lmdb`.

    Raises:
        InputError: if a file has other images and `overwrite` is not set, or something cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for split, dataset in (('train', splits.train), ('val', splits.val), ('test', splits.test)):
        path = folder / f'{split}.lmdb'
        if dataset is None:
            if path.exists():
                raise InputError(f'{path} is of other images, which have no {split} split: remove it')
            continue
        if path.exists() and not overwrite:
            stored = ImageFolderLMDB(path)  # whose errors name --overwrite
            same = all(getattr(stored, name) == value for name, value in described.items())
            if not same or not same_images(dataset, stored):
                raise InputError(
                    f'{path} exists and holds other images ({stored.data_set}): '
                    'give another folder with --out, or replace it with --overwrite'
                )
            print(f'{path}: complete, kept; --overwrite writes it again')
        else:
            jobs.append((dataset, path))
    if jobs:
        with writing_to(folder):
            for dataset, path in jobs:
                write_lmdb(dataset, path, workers=workers, **described)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; SystemExit with 2 for wrong flags, 1 for anything else that cannot be used."""
    args = get_args_parser().parse_args(argv)
    workers = usable_workers(args.num_workers)
    with one_line_errors('folder2lmdb.py'):
        if (args.check is None) == (args.dir is None):
            raise UsageError('give --dir ROOT to build, or --check FILE to check (see folder2lmdb.py --help)')
        if args.check is not None:
            for name in args.check:
                print(check_lmdb(Path(name), workers=workers), flush=True)
            return
        category = args.inat_category or ('name' if args.data_set in ('INAT', 'INAT19') else None)
        splits = build_datasets(DataSource(args.data_set, args.dir, args.data_layout, category))
        for note in splits.notes:
            print(f'Note: {note}')
        out = Path(args.out or args.dir)
        described = {'data_set': args.data_set, 'inat_category': category, 'max_size': args.max_size}
        build(splits, out, overwrite=args.overwrite, workers=workers, **described)


if __name__ == '__main__':
    main()
