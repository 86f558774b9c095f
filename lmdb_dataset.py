"""Images in one LMDB file: its format, its writer, its check and the data set that reads it.

Format, version 1. An LMDB database in a single file, whose keys are, in this order:

| key | value |
|---|---|
| 8 bytes, the image's number from 0 on, big-endian | the bytes of the image's file, unchanged |
| `header` | JSON: `format` ("image records"), `version`, `images` (their count), `data_set` and `inat_category` (of datasets.py), `index_crc32` |
| `index` | one Arrow table in IPC stream format |

The table has a row for each image: `path` (binary: relative, with slashes), `label` (int32), `size` (int64, bytes) and
`crc32` (uint32, of the bytes); its schema's metadata has `classes`, a JSON list of names in the order of their labels.
Nothing is pickled, and nothing but this module is needed to read it.
"""  # noqa: E501  a table

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from images import ImageDataset, Transform
from interrupts import end_with_parent
from utils import InputError, one_line, shorten

FORMAT, VERSION = 'image records', 1
REBUILD = 'build it again with folder2lmdb.py --overwrite'
HEADER, INDEX = b'header', b'index'  # after the numbers, whose first bytes are zero
CHUNK_IMAGES, CHUNK_BYTES = 256, 4 * 2**20  # what a reader process hands over at once, whichever comes first
COMMIT_IMAGES, COMMIT_BYTES = 5000, 64 * 2**20  # of a transaction, whichever comes first
GROWTH = 256 * 2**20  # bytes by which the map grows at least


_key = struct.Struct('>Q').pack


def _reason(error: lmdb.Error, path: Path) -> str:
    return one_line(error).removeprefix(f'{path}: ')


# Reading


class _Store:
    """An open database: one for each file and process, shared by its data sets.

    Its transaction stays open as long as it does, so records are read without a copy. What points into the database's
    memory is used by this module and the decoder alone, and not after the database is closed.
    """

    def __init__(self, path: Path, *, check_index: bool) -> None:
        self.closed = False
        self.env = _open(path)
        self.txn = self.env.begin(buffers=True)
        try:
            self.header = self._read_header(path)
            index = self.txn.get(INDEX)
            if index is None:
                raise InputError(f'{path} has no index: it is damaged; {REBUILD}')
            if check_index and zlib.crc32(index) != self.header['index_crc32']:
                raise InputError(f'{path}: its index was altered after it was written; {REBUILD}')
            buffer = pa.py_buffer(index)
            if buffer.address % 8:  # tables of a few images do not get pages of their own
                buffer = pa.py_buffer(bytes(index))
            table = pa.ipc.open_stream(buffer).read_all().combine_chunks()
            self.classes: list[str] = json.loads(table.schema.metadata[b'classes'])
            self.paths = table['path'].chunk(0)
            self.labels, self.sizes, self.checksums = (
                table[name].chunk(0).to_numpy() for name in ('label', 'size', 'crc32')
            )
        except (lmdb.Error, pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError) as err:
            self.close()
            raise InputError(f'{path} is damaged ({one_line(err)}): {REBUILD}') from None
        except BaseException:
            self.close()
            raise

    def get(self, key: bytes) -> memoryview | None:
        """A record, None if it is missing.

        Raises:
            lmdb.Error: if its page is damaged; the other records stay readable.
        """
        try:
            return self.txn.get(key)
        except lmdb.Error:  # after which a transaction is good for nothing
            self.txn.abort()
            self.txn = self.env.begin(buffers=True)
            raise

    def _read_header(self, path: Path) -> dict[str, Any]:
        value = self.txn.get(HEADER)
        if value is None:
            if self.txn.get(b'__keys__') is not None or self.txn.get(b'__len__') is not None:
                raise InputError(
                    f'{path} is in the old format of pyarrow.serialize, which pyarrow has not had since version 12: '
                    f'from the images {REBUILD}'
                )
            raise InputError(f'{path} is an LMDB database, but none of folder2lmdb.py: it has no header')
        try:
            header = json.loads(bytes(value))
            version = header['version'] if header['format'] == FORMAT else None
        except (ValueError, KeyError, TypeError):
            version = None
        if isinstance(version, int) and version != VERSION:
            raise InputError(
                f'{path} is of version {version} of its format, this program reads {VERSION}: '
                f"{REBUILD}, or use the program's version that wrote it"
            )
        kinds: dict[str, Any] = {'images': int, 'data_set': str, 'inat_category': (str, type(None)), 'index_crc32': int}
        if version is None or not all(isinstance(header.get(name, 0.0), kind) for name, kind in kinds.items()):
            raise InputError(f'{path} has a damaged header: {REBUILD}')
        return header

    def close(self) -> None:
        self.closed = True
        for name in ('paths', 'labels', 'sizes', 'checksums'):
            self.__dict__.pop(name, None)
        self.txn.abort()
        self.env.close()

    def __del__(self) -> None:
        if 'txn' in self.__dict__:
            self.close()


_stores: WeakValueDictionary[tuple[int, int], _Store] = WeakValueDictionary()  # by device and inode


def _close_copies() -> None:
    """Closes what a forked process has of its parent's environments, which LMDB forbids to use there."""
    for store in _stores.values():
        store.close()
    _stores.clear()


os.register_at_fork(after_in_child=_close_copies)


def _open_store(path: Path, *, check_index: bool) -> _Store:
    """This process's store of a file, of which LMDB allows one."""
    try:
        status = path.stat()
    except OSError as err:
        raise InputError(f'{path}: {err.strerror}; make it with folder2lmdb.py') from None
    store = _stores.get((status.st_dev, status.st_ino))
    if store is None:
        store = _stores[status.st_dev, status.st_ino] = _Store(path, check_index=check_index)
    return store


def _open(path: Path) -> lmdb.Environment:
    """Opens a database for reading, without locks and without readahead.

    Raises:
        InputError: if it cannot be opened, or is shorter than it says: reading that would kill the process.
    """
    where = path / 'data.mdb' if path.is_dir() else path
    try:
        with open(where, 'rb') as file:
            if not file.read(1):
                raise InputError(f'{where} is empty: {REBUILD}')
        env = lmdb.open(str(where), subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except OSError as err:
        raise InputError(f'{where}: {err.strerror}') from None
    except lmdb.Error as err:
        raise InputError(f'{where} is no LMDB database, or a damaged one ({_reason(err, where)}): {REBUILD}') from None
    page_size, pages = env.stat()['psize'], env.info()['last_pgno'] + 1
    size = where.stat().st_size
    if size < pages * page_size:
        env.close()
        raise InputError(
            f'{where} is truncated: it has {size:,} of {pages * page_size:,} bytes; copy it again or {REBUILD}'
        )
    return env


class ImageFolderLMDB(ImageDataset):
    """The images of a file that folder2lmdb.py wrote, with the order and the labels that they had when it did.

    It can be used in any number of processes, however they are started, and beside others on the same file. A loader
    process holds nothing of it but the pages that it reads.

    Args:
        path: the file.
        transform: from an RGB image to what the loader collates.
        on_bad_image: see `ImageDataset`.
        verify: compare each record that is read with its checksum.

    Raises:
        InputError: if it is missing, not readable, truncated, or of another format or version.
    """

    remedy = REBUILD

    def __init__(
        self,
        path: str | Path,
        transform: Transform | None = None,
        *,
        on_bad_image: str = 'stop',
        verify: bool = False,
    ) -> None:
        self.file = Path(path).absolute()
        self.verify = verify
        self._store: _Store | None = None
        store = self._open()
        self._build = store.header['index_crc32']
        self.data_set: str = store.header['data_set']
        self.inat_category: str | None = store.header['inat_category']
        super().__init__(None, store.classes, transform, on_bad_image=on_bad_image)

    def _open(self) -> _Store:
        store = self._store
        if store is None or store.closed:
            known = hasattr(self, '_build')  # a loader process's copy: the index is checked once, in the first process
            store = self._store = _open_store(self.file, check_index=not known)
            if known and store.header['index_crc32'] != self._build:
                raise InputError(f'{self.file} was replaced by another while it was in use')
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_store': None}

    def _labels(self) -> np.ndarray:
        return self._open().labels

    def _name(self, position: int) -> str:
        return os.fsdecode(self._open().paths[position].as_py())

    def _where(self, position: int) -> str:
        return f'{self.file}: record {position} ({self._name(position)})'

    def _raw(self, position: int) -> memoryview:
        """The record, without a copy: valid as long as this data set is open in this process."""
        store = self._open()
        try:
            data = store.get(_key(position))
        except lmdb.Error as err:
            raise ValueError(one_line(err)) from None
        if data is None:
            raise InputError(f'{self._where(position)} is missing: {self.remedy}')
        if len(data) != store.sizes[position] or (self.verify and zlib.crc32(data) != store.checksums[position]):
            raise ValueError('its bytes were altered after it was written')
        return data

    def file_size(self, index: int) -> int:
        return int(self._open().sizes[self._position(index)])

    @property
    def sizes(self) -> np.ndarray:
        """The bytes of each image's file, int64 (n,)."""
        sizes = np.array(self._open().sizes)
        return sizes if self._selected is None else sizes[self._selected]


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f'another process is writing {partial}: wait for it, or stop it') from None
        except OSError:
            pass  # some network file systems have no locks
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
