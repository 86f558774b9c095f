"""Images in one LMDB file: its format, and the data set that reads it. folder2lmdb.py writes and checks such files.

Format, version 1. An LMDB database in a single file, whose keys are, in this order:

| key | value |
|---|---|
| 8 bytes, the image's number from 0 on, big-endian | the bytes of the image's file, unchanged |
| `header` | JSON: `format` ("image records"), `version`, `images` (their count), `data_set` and `inat_category` (of datasets.py), `max_size` (pixels, or null), `index_crc32` |
| `index` | one Arrow table in IPC stream format |

The table has a row for each image: `path` (large_binary: relative, with slashes), `label` (int32), `size` (int64, bytes)
and `crc32` (uint32, of the bytes), all without nulls; its schema's metadata has `classes`, a JSON list of different
names in the order of their labels.
Nothing is pickled, and nothing but this module is needed to read it.
"""  # noqa: E501  a table

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import pyarrow as pa

from pipeline.files import special_kind
from pipeline.images import ImageDataset, Transform
from utils import InputError, one_line

FORMAT, VERSION = 'image records', 1
REBUILD = 'build it again with folder2lmdb.py --overwrite'
HEADER, INDEX = b'header', b'index'  # after the numbers, whose first bytes are zero
TABLE = pa.schema([('path', pa.large_binary()), ('label', pa.int32()), ('size', pa.int64()), ('crc32', pa.uint32())])
to_key = struct.Struct('>Q').pack  # of an image's number


def _read_header(path: Path, txn: lmdb.Transaction) -> dict[str, Any]:
    value = txn.get(HEADER)
    if value is None:
        if txn.get(b'__keys__') is not None or txn.get(b'__len__') is not None:
            raise InputError(
                f'{path} is in the old format of pyarrow.serialize, which pyarrow has not had since version 12: '
                f'from the images {REBUILD}'
            )
        raise InputError(f'{path} is an LMDB database, but none of folder2lmdb.py: it has no header')
    try:
        header = {'max_size': None, **json.loads(bytes(value))}  # which older files have not
        version = header['version'] if header['format'] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if isinstance(version, int) and version != VERSION:
        raise InputError(
            f'{path} is of version {version} of its format, this program reads {VERSION}: '
            f"{REBUILD}, or use the program's version that wrote it"
        )
    kinds = {'images': int, 'data_set': str, 'inat_category': str | None, 'max_size': int | None, 'index_crc32': int}
    if version is None or not all(isinstance(header.get(name, ...), kind) for name, kind in kinds.items()):
        raise InputError(f'{path} has a damaged header: {REBUILD}')
    return header


def _check_table(table: pa.Table, header: dict[str, Any], file_size: int) -> list[str]:
    """Checks what a table says, as far as that needs no records; returns the class names."""
    if not table.schema.equals(TABLE):
        raise ValueError(f'its columns are {", ".join(f"{field.name} {field.type}" for field in table.schema)}')
    table.validate(full=True)  # what its offsets point to lies in it, and they are in order
    if table.num_rows != header['images']:
        raise ValueError(f'the header counts {header["images"]} images, the index {table.num_rows}')
    if any(column.null_count for column in table.columns):
        raise ValueError('its table has empty cells')
    classes = json.loads((table.schema.metadata or {}).get(b'classes', 'null'))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError('its class names are no list of names')
    if len(set(classes)) < len(classes):
        raise ValueError('it names a class twice')
    labels, sizes = table['label'].to_numpy(), table['size'].to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f'labels outside the {len(classes)} classes')
    if len(sizes) and (sizes.min() < 0 or sizes.sum(dtype=np.float64) > file_size):
        raise ValueError('sizes of images that cannot be')
    return classes


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
            self.header = _read_header(path, self.txn)
            index = self.txn.get(INDEX)
            if index is None:
                raise InputError(f'{path} has no index: it is damaged; {REBUILD}')
            if check_index and zlib.crc32(index) != self.header['index_crc32']:
                raise InputError(f'{path}: its index was altered after it was written; {REBUILD}')
            buffer = pa.py_buffer(index)
            if buffer.address % 8:  # tables of a few images do not get pages of their own
                buffer = pa.py_buffer(bytes(index))
            table = pa.ipc.open_stream(buffer).read_all()
            self.classes = _check_table(table, self.header, Path(self.env.path()).stat().st_size)
            self.paths, *numbers = (column.chunk(0) for column in table.combine_chunks().columns)
            self.labels, self.sizes, self.checksums = (column.to_numpy() for column in numbers)
        except (lmdb.Error, pa.ArrowException, OSError, LookupError, ValueError, TypeError, RecursionError) as err:
            self.close()
            raise InputError(f'{path} is damaged ({one_line(err)}): {REBUILD}') from None
        except BaseException:
            self.close()
            raise

    def get(self, key: bytes) -> memoryview | None:
        """A record, None if it is missing; lmdb.Error if its page is damaged."""
        try:
            return self.txn.get(key)
        except lmdb.Error:  # after which a transaction is good for nothing; the other records are
            self.txn.abort()
            self.txn = self.env.begin(buffers=True)
            raise

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


if hasattr(os, 'register_at_fork'):  # Windows does not fork
    os.register_at_fork(after_in_child=_close_copies)


def _open(path: Path) -> lmdb.Environment:
    """Opens a database for reading, without locks and without readahead."""
    where = path / 'data.mdb' if path.is_dir() else path
    try:
        if kind := special_kind(where.stat().st_mode):
            raise InputError(f'{where} is {kind}, not a file')
        with open(where, 'rb') as file:
            if not file.read(1):
                raise InputError(f'{where} is empty: {REBUILD}')
        env = lmdb.open(str(where), subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except OSError as err:
        raise InputError(f'{where}: {err.strerror}') from None
    except lmdb.Error as err:
        reason = one_line(err).removeprefix(f'{where}: ')
        raise InputError(f'{where} is no LMDB database, or a damaged one ({reason}): {REBUILD}') from None
    page_size, pages = env.stat()['psize'], env.info()['last_pgno'] + 1
    size = where.stat().st_size
    if size < pages * page_size:  # reading it would kill the process
        env.close()
        raise InputError(
            f'{where} is truncated: it has {size:,} of {pages * page_size:,} bytes; copy it again or {REBUILD}'
        )
    return env


class ImageFolderLMDB(ImageDataset):
    """The images of a file that folder2lmdb.py wrote, with the order and the labels that they had when it did.

    It can be used in any number of processes, however they are started, and beside others on the same file. A loader
    process holds nothing of it but the labels and the pages that it reads.

    Args:
        transform: see `ImageDataset`.
        verify: compare each record that is read with its checksum.

    Raises:
        InputError: if it is missing, not readable, truncated, of another format or version, or if its table is wrong.
    """

    remedy = REBUILD

    def __init__(self, path: str | Path, transform: Transform | None = None, *, verify: bool = False) -> None:
        self.file = Path(path).absolute()
        self.verify = verify
        self._store: _Store | None = None
        store = self._open()
        self._build = store.header['index_crc32']
        self.data_set: str = store.header['data_set']
        self.inat_category: str | None = store.header['inat_category']
        self.max_size: int | None = store.header['max_size']
        super().__init__(store.labels, store.classes, transform)

    def _open(self) -> _Store:
        """This process's store of the file, of which LMDB allows one."""
        if self._store is not None and not self._store.closed:
            return self._store
        try:
            status = self.file.stat()
        except OSError as err:
            raise InputError(f'{self.file}: {err.strerror}; make it with folder2lmdb.py') from None
        known = hasattr(self, '_build')  # a loader process's copy: the index is checked once, in the first process
        key = status.st_dev, status.st_ino
        store = self._store = _stores[key] = _stores.get(key) or _Store(self.file, check_index=not known)
        if known and store.header['index_crc32'] != self._build:
            raise InputError(f'{self.file} was replaced by another while it was in use')
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_store': None}

    def _content(self) -> bytes:
        return b'' if self.max_size is None else f'{self.max_size} px'.encode()

    def _name(self, position: int) -> str:
        return os.fsdecode(self._open().paths[position].as_py())

    def _where(self, position: int) -> str:
        return f'{self.file}: record {position} ({self._name(position)})'

    def _raw(self, position: int) -> memoryview:
        """The record, without a copy: valid as long as this data set is open in this process."""
        store = self._open()
        try:
            data = store.get(to_key(position))
        except lmdb.Error as err:
            raise ValueError(one_line(err)) from None
        if data is None:
            raise InputError(f'{self._where(position)} is missing: {self.remedy}')
        if len(data) != store.sizes[position] or (self.verify and zlib.crc32(data) != store.checksums[position]):
            raise ValueError('its bytes were altered after it was written')
        return data

    def file_size(self, index: int) -> int:
        return int(self._open().sizes[self._position(index)])

    def num_records(self) -> int:
        """How many images the database has, whatever the index says."""
        return self._open().env.stat()['entries'] - len((HEADER, INDEX))
