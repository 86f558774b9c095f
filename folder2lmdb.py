"""Writes a data set's images into LMDB files, and checks such files: `python folder2lmdb.py --help`.

The format, and the data set that reads it, are in pipeline/lmdb_dataset.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

import lmdb
import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from config.errors import one_line_errors
from config.flags import FROM_ONE, FlagParser, add_data_flags, usable_workers
from datasets import DataSource, Splits, build_datasets
from pipeline.images import ImageDataset, Reading, explain_error, shrink
from pipeline.lmdb_dataset import FORMAT, HEADER, INDEX, TABLE, VERSION, ImageFolderLMDB, to_key
from pipeline.loaders import TimedLoader
from pipeline.workers import end_with_parent
from training.checkpoint import write_file
from training.lock import writing_to
from training.signals import Interrupted, Interrupts
from utils import InputError, UsageError, one_line, shorten

CHUNK_IMAGES, CHUNK_BYTES = 256, 4 * 2**20  # what a reader process hands over at once, whichever comes first
GROWTH = 256 * 2**20  # bytes by which the map grows at least


def _read_files(dataset: ImageDataset, max_size: int | None, numbers: Sequence[int]) -> tuple[list[bytes], list[int]]:
    """The files of these images, with their checksums."""
    files = []
    for number in numbers:
        try:
            file = dataset.raw(number)
            files.append(file if max_size is None else shrink(file, max_size))
        except (OSError, ValueError, MemoryError) as err:
            what = f'{dataset.path(number)}: {explain_error(err)}'
            raise InputError(f'{what}; without --max-size it is kept' if max_size else what) from None
    return files, [zlib.crc32(file) for file in files]


class AnyValues(Reading):
    def convert(self, image: Image.Image) -> Image.Image:
        """Refuses no range of values, which are main.py's to convert."""
        image.load()
        return image


def _find_problems(dataset: ImageDataset, numbers: Sequence[int]) -> tuple[int, list[str]]:
    """How many of these images there are, and what is wrong with their records."""
    problems = []
    for number in numbers:
        try:
            dataset.load(number)
        except InputError as err:
            problems.append(str(err).partition(f': {dataset.remedy}')[0])
    return len(numbers), problems


def _in_chunks(dataset: ImageDataset, read: Callable[[Sequence[int]], Any], workers: int) -> Iterator[Any]:
    """What `read` gives for the numbers of a chunk of images, in order, two chunks ahead in each reader process."""
    sample = range(0, len(dataset), max(len(dataset) // 64, 1))
    mean_bytes = sum(map(dataset.file_size, sample)) / max(len(sample), 1)
    size = int(min(max(CHUNK_BYTES / max(mean_bytes, 1), 1), CHUNK_IMAGES))
    numbers: Any = range(len(dataset))
    try:
        yield from TimedLoader(numbers, size, collate_fn=read, num_workers=workers, worker_init_fn=end_with_parent)
    except RuntimeError as err:  # how the loader reports a process that died
        raise InputError(f'a reader process failed: {one_line(err)}') from None


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
        data_set, inat_category: what it is, for its readers.
        max_size: pixels of the shorter side, to which larger images are made smaller.
        workers: reader processes beside this one, which writes.

    Raises:
        InputError: if a file cannot be read, or the database cannot be written, such as on a full disk.
    """
    started = time.perf_counter()
    if path.is_dir():
        raise InputError(f'{path} is a folder: remove it, or choose another with --out')
    interrupts = Interrupts()  # waited for, so that Ctrl-C does not hit a starting process

    def stop_if_asked() -> None:
        if interrupts.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if interrupts.signal:
            raise Interrupted(interrupts.signal, f'{path} is not written; the unfinished file is removed')

    def write(file: IO[bytes]) -> None:
        sizes: list[int] = []
        checksums: list[int] = []
        # No locks: no reader knows this name. No write map and no sparse file: the file grows as it is written.
        with (
            lmdb.open(file.name, subdir=False, lock=False, map_size=GROWTH, sync=False, meminit=False) as env,
            tqdm(total=len(dataset), desc=path.name, unit=' images') as bar,
        ):
            for files, sums in _in_chunks(dataset, partial(_read_files, dataset, max_size), workers):
                _put(env, [(to_key(number), data) for number, data in enumerate(files, start=len(sizes))])
                sizes += map(len, files)
                checksums += sums
                bar.update(len(files))
                stop_if_asked()
            index = _make_index(dataset, sizes, checksums)
            header = {'format': FORMAT, 'version': VERSION, 'images': len(dataset), 'index_crc32': zlib.crc32(index)}
            settings = {'data_set': data_set, 'inat_category': inat_category, 'max_size': max_size}
            _put(env, [(HEADER, json.dumps(header | settings).encode()), (INDEX, index)])
            env.sync(True)
        stop_if_asked()

    with interrupts.installed():
        try:
            write_file(path, write)
        except lmdb.Error as err:
            # LMDB calls a write that a full disk cut short an input/output error.
            full = shutil.disk_usage(path.parent).free < GROWTH
            reason = 'the disk is full' if full else one_line(err).rpartition(': ')[2]
            raise InputError(f'cannot write {path}: {reason}; the unfinished file is removed') from None
    seconds = time.perf_counter() - started
    print(f'{path}: {len(dataset):,} images, {path.stat().st_size / 2**20:,.1f} MiB, '
          f'{len(dataset) / seconds:,.0f} images/s', flush=True)  # fmt: skip


def _make_index(dataset: ImageDataset, sizes: list[int], checksums: list[int]) -> bytes:
    paths = [os.fsencode(dataset.name(i)) for i in range(len(dataset))]
    schema = TABLE.with_metadata({'classes': json.dumps(dataset.classes)})
    table = pa.table([paths, dataset.targets.astype(np.int32), sizes, checksums], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


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
    dataset.reading = AnyValues()
    problems: list[str] = []
    if (records := dataset.num_records()) != len(dataset):
        problems.append(f'the index counts {len(dataset)} images, the database {records}')
    with tqdm(total=len(dataset), desc=path.name, unit=' images') as bar:
        for images, found in _in_chunks(dataset, partial(_find_problems, dataset), workers):
            problems += found
            bar.update(images)
    if problems:
        raise InputError(f'{path}: {len(problems)} problem{"s" * (len(problems) > 1)}: {shorten(problems)}')
    mib = sum(map(dataset.file_size, range(len(dataset)))) / 2**20
    found = f'{len(dataset):,} images in {len(dataset.classes)} classes, {mib:,.1f} MiB'
    return f'{path}: {found}; counts and checksums are right, and every image decodes'


def get_args_parser() -> FlagParser:
    parser = FlagParser('folder2lmdb.py', description='Write train.lmdb and val.lmdb, for main.py --use-lmdb; and '
                        'test.lmdb, where test/ stands beside the folder that validates.')  # fmt: skip
    parser.add_argument('--dir', '--data-path', type=os.path.abspath, help="the data set's folder, as for main.py")
    parser.add_argument('--out', type=os.path.abspath, help='folder of the LMDB files; --dir by default')
    parser.add_argument('--max-size', type=FROM_ONE, metavar='PIXELS', help='make larger images smaller, to so many '
                        'pixels of the shorter side, as JPEGs of quality 95: faster to read, other pixels')  # fmt: skip
    parser.add_argument('--overwrite', action='store_true', help='replace LMDB files of other images')
    parser.add_argument('--check', nargs='+', metavar='FILE', help='check LMDB files instead: counts, checksums, '
                        'and that every image decodes')  # fmt: skip
    add_data_flags(parser, default='FOLDER')
    return parser


def build(splits: Splits, folder: Path, *, overwrite: bool, workers: int, **settings: Any) -> None:
    """Writes the splits; a file that has a split's images already is kept.

    Args:
        settings: `data_set`, `inat_category` and `max_size`, as for `write_lmdb`.

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
        if overwrite or not path.exists():
            jobs.append((dataset, path))
            continue
        stored = ImageFolderLMDB(path)  # whose errors name --overwrite
        if any(getattr(stored, name) != settings[name] for name in settings) or not same_images(dataset, stored):
            raise InputError(
                f'{path} exists and holds other images ({stored.data_set}): '
                'give another folder with --out, or replace it with --overwrite'
            )
        compared = 'names and labels' if stored.max_size else 'names, labels and sizes'
        print(f'{path}: complete, kept, as {compared} are the same; --overwrite writes it again')
    with writing_to(folder) if jobs else nullcontext():
        for dataset, path in jobs:
            write_lmdb(dataset, path, workers=workers, **settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; SystemExit with 2 for wrong flags, 1 for anything else that cannot be used."""
    args = get_args_parser().parse_args(argv)
    workers = usable_workers(args.num_workers)
    with one_line_errors('folder2lmdb.py'):
        if (args.check is None) == (args.dir is None):
            raise UsageError('give --dir ROOT to build, or --check FILE to check (see folder2lmdb.py --help)')
        if args.check is not None:
            if args.out or args.max_size or args.overwrite:
                raise UsageError('--check takes no --out, --max-size and --overwrite: they are for --dir')
            problems = []
            for name in args.check:
                try:
                    print(check_lmdb(Path(name), workers=workers), flush=True)
                except InputError as err:
                    problems.append(str(err))
            if problems:
                raise InputError('; '.join(problems))
            return
        category = args.inat_category or ('name' if args.data_set in ('INAT', 'INAT19') else None)
        splits = build_datasets(DataSource(args.data_set, args.dir, args.data_layout, category))
        for note in splits.notes:
            print(f'Note: {note}')
        settings = {'data_set': args.data_set, 'inat_category': category, 'max_size': args.max_size}
        build(splits, Path(args.out or args.dir), overwrite=args.overwrite, workers=workers, **settings)


if __name__ == '__main__':
    main()
