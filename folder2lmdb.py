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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config.errors import one_line_errors
from config.flags import FlagParser, add_data_flags, usable_workers
from datasets import DataSource, Splits, build_datasets
from pipeline.images import ImageDataset
from pipeline.lmdb_dataset import FORMAT, HEADER, INDEX, VERSION, ImageFolderLMDB, _key, _reason
from pipeline.workers import end_with_parent
from utils import InputError, UsageError, one_line, shorten

CHUNK_IMAGES, CHUNK_BYTES = 256, 4 * 2**20  # what a reader process hands over at once, whichever comes first
COMMIT_IMAGES, COMMIT_BYTES = 5000, 64 * 2**20  # of a transaction, whichever comes first
GROWTH = 256 * 2**20  # bytes by which the map grows at least


# Writing


class _Chunks(Dataset[tuple[list[bytes], list[int]]]):
    """A data set's files, a chunk of them at a time, with their checksums."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
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
                files.append(self.dataset.raw(number))
            except (OSError, ValueError) as err:
                reason = err.strerror if isinstance(err, OSError) else None
                raise InputError(f'{self.dataset.path(number)}: {reason or one_line(err)}') from None
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


def _as_is(item: Any) -> Any:
    return item


def _read(chunks: _Chunks, workers: int) -> Iterator[Any]:
    """The chunks in order, read by several processes, which end with this one; two for each are kept in memory."""
    try:
        yield from DataLoader(
            chunks, batch_size=None, num_workers=workers, collate_fn=_as_is, worker_init_fn=end_with_parent
        )
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


_locked: set[int] = set()  # descriptors of files that this process writes


def _forget_locks() -> None:
    for descriptor in _locked:
        os.close(descriptor)  # a lock lasts as long as any process has its descriptor
    _locked.clear()


if hasattr(os, 'register_at_fork'):  # not on Windows, which neither forks nor has these locks
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the body is done and is removed if it fails.

    Raises:
        InputError: if another process writes the same file.
    """
    partial = path.with_name(path.name + '.partial')
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    _locked.add(descriptor)
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f'another process is writing {partial}: wait for it, or stop it') from None
        except (OSError, ImportError):
            pass  # some network file systems have no locks, nor has Windows
        if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
            raise InputError(f'another process has just written {path}')
        try:
            os.ftruncate(descriptor, 0)  # what a killed build left
            yield partial
            os.fsync(descriptor)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    finally:
        _locked.discard(descriptor)
        os.close(descriptor)
    if os.name != 'nt':  # which opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_lmdb(
    dataset: ImageDataset, path: Path, *, data_set: str, inat_category: str | None = None, workers: int = 2
) -> None:
    """Writes the files of a data set into an LMDB file, which appears when it is complete and on the disk.

    Args:
        dataset: of any kind; its images are not decoded.
        path: of the file, replaced if it is there.
        data_set, inat_category: what it is, for its readers.
        workers: reader processes beside this one, which writes.

    Raises:
        InputError: if a file cannot be read, or the database cannot be written, such as on a full disk.
    """
    started = time.perf_counter()
    sizes: list[int] = []
    checksums: list[int] = []
    records: list[tuple[bytes, bytes]] = []
    waiting = 0
    if path.is_dir():
        raise InputError(f'{path} is a folder: remove it, or choose another with --out')
    with (
        _held_interrupts() as check_interrupt,
        _partial_file(path) as partial,
        tqdm(total=len(dataset), desc=path.name, unit=' images') as bar,
    ):
        try:
            # No locks: no reader knows this name. No write map and no sparse file: the file grows as it is written.
            env = lmdb.open(str(partial), subdir=False, lock=False, map_size=GROWTH, sync=False, meminit=False)
            with env:
                for files, sums in _read(_Chunks(dataset), workers):
                    records += zip(map(_key, range(len(sizes), len(sizes) + len(files))), files, strict=True)
                    sizes += map(len, files)
                    checksums += sums
                    waiting += sum(sizes[-len(files) :])
                    if len(records) >= COMMIT_IMAGES or waiting >= COMMIT_BYTES:
                        _put(env, records)
                        records, waiting = [], 0
                    bar.update(len(files))
                    check_interrupt()
                _put(env, [*records, *_describe(dataset, sizes, checksums, data_set, inat_category)])
                env.sync(True)
            check_interrupt()
        except lmdb.Error as err:
            # LMDB calls a write that a full disk cut short an input/output error.
            full = shutil.disk_usage(path.parent).free < COMMIT_BYTES
            reason = 'the disk is full' if full else _reason(err, partial)
            raise InputError(f'cannot write {path}: {reason}; the unfinished file is removed') from None
    seconds = time.perf_counter() - started
    print(f'{path}: {len(sizes):,} images, {path.stat().st_size / 2**20:,.1f} MiB, '
          f'{len(sizes) / seconds:,.0f} images/s', flush=True)  # fmt: skip


def _describe(
    dataset: ImageDataset, sizes: list[int], checksums: list[int], data_set: str, inat_category: str | None
) -> list[tuple[bytes, bytes]]:
    """The records of the header and the index."""
    table = pa.table(
        {
            'path': pa.array([os.fsencode(dataset.name(i)) for i in range(len(dataset))], pa.large_binary()),
            'label': pa.array(dataset.targets, pa.int32()),
            'size': pa.array(sizes, pa.int64()),
            'crc32': pa.array(checksums, pa.uint32()),
        }
    ).replace_schema_metadata({'classes': json.dumps(dataset.classes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    index = sink.getvalue().to_pybytes()
    header = {
        'format': FORMAT,
        'version': VERSION,
        'images': len(dataset),
        'data_set': data_set,
        'inat_category': inat_category,
        'index_crc32': zlib.crc32(index),
    }
    return [(HEADER, json.dumps(header).encode()), (INDEX, index)]


def same_images(dataset: ImageDataset, other: ImageDataset) -> bool:
    """Whether two data sets have the same paths, sizes of files, labels and classes in the same order."""
    return (
        len(dataset) == len(other)
        and dataset.classes == other.classes
        and bool(np.array_equal(dataset.targets, other.targets))
        and all(dataset.name(i) == other.name(i) for i in range(len(dataset)))
        and all(dataset.file_size(i) == other.file_size(i) for i in range(len(dataset)))
    )


def check_lmdb(path: Path, *, workers: int = 2) -> str:
    """Reads everything in a file: counts, labels, checksums, and each image through its decoder.

    Returns:
        What was found to be in order.

    Raises:
        InputError: saying what is wrong.
    """
    dataset = ImageFolderLMDB(path, verify=True)
    store = dataset._open()
    problems: list[str] = []
    entries = store.env.stat()['entries'] - 2
    if not store.header['images'] == len(dataset) == entries:
        problems.append(
            f'the header counts {store.header["images"]} images, the index {len(dataset)}, the database {entries}'
        )
    if len(dataset) and not 0 <= dataset.targets.min() <= dataset.targets.max() < len(dataset.classes):
        problems.append('labels outside the classes')
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
    parser = FlagParser('folder2lmdb.py', description='Write train.lmdb and val.lmdb, for main.py --use-lmdb.')
    parser.add_argument('--dir', type=os.path.abspath, help="the data set's folder, as main.py's --data-path")
    parser.add_argument('--out', type=os.path.abspath, help='folder of the LMDB files; --dir by default')
    parser.add_argument('--overwrite', action='store_true', help='replace LMDB files of other images')
    parser.add_argument('--check', nargs='+', metavar='FILE', help='check LMDB files instead: counts, checksums, '
                        'and that every image decodes')  # fmt: skip
    add_data_flags(parser, default='FOLDER')
    return parser


def build(
    splits: Splits, folder: Path, *, data_set: str, inat_category: str | None, overwrite: bool, workers: int
) -> None:
    """Writes both splits; a file that has a split's images already is kept.

    Raises:
        InputError: if a file has other images and `overwrite` is not set, or something cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for split, dataset in (('train', splits.train), ('val', splits.val)):
        assert dataset is not None
        path = folder / f'{split}.lmdb'
        if path.exists() and not overwrite:
            stored = ImageFolderLMDB(path)  # whose errors name --overwrite
            if (stored.data_set, stored.inat_category) != (data_set, inat_category) or not same_images(dataset, stored):
                raise InputError(
                    f'{path} exists and holds other images ({stored.data_set}): '
                    'give another folder with --out, or replace it with --overwrite'
                )
            print(f'{path}: complete, kept; --overwrite writes it again')
        else:
            jobs.append((dataset, path))
    for dataset, path in jobs:
        write_lmdb(dataset, path, data_set=data_set, inat_category=inat_category, workers=workers)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
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
        build(
            splits,
            Path(args.out or args.dir),
            data_set=args.data_set,
            inat_category=category,
            overwrite=args.overwrite,
            workers=workers,
        )


if __name__ == '__main__':
    main()
