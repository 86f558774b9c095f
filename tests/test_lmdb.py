"""lmdb_dataset.py and folder2lmdb.py: the same samples as the files, in any process, and nothing broken that opens."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import lmdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import folder2lmdb
from datasets import DataSource, build_datasets
from folder2lmdb import check_lmdb
from main import main
from pipeline.images import BadImageError, shrink
from pipeline.lmdb_dataset import FORMAT, VERSION, ImageFolderLMDB, _stores
from pipeline.transforms import build_transform
from tests.conftest import PLAIN, SMALL_MODEL, make_lists
from tests.processes import fork, run, wait
from tests.test_images import deep_png
from tests.test_layouts import PAINTING, make_inaturalist
from utils import InputError

MakeFolder = Callable[..., Path]


def build(root: Path, *flags: str) -> None:
    folder2lmdb.main(['--dir', str(root), '--num_workers', '1', *flags])


def build_fails(capsys: pytest.CaptureFixture, argv: list[str], code: int = 1) -> str:
    with pytest.raises(SystemExit) as stop:
        folder2lmdb.main([*argv, '--num_workers', '0'])
    assert stop.value.code == code
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def folder(make_folder: MakeFolder) -> Path:
    """Two classes of 20 images, one of them a PNG, with its LMDB files."""
    root = make_folder({'train': ['b', 'a'], 'val': ['a', 'b']}, images=10)
    Image.new('RGBA', (9, 5), (1, 2, 3, 4)).save(root / 'train' / 'b' / 'deeper.png')
    build(root)
    return root


@contextmanager
def edit(path: Path) -> Iterator[lmdb.Transaction]:
    if _stores:
        gc.collect()  # an exception keeps the data sets of its frames, and LMDB opens a file once in a process
    with lmdb.open(str(path), subdir=False, lock=False, map_size=2**26) as env, env.begin(write=True) as txn:
        yield txn


def assert_same(root: Path, name: str, **kwargs: Any) -> None:
    files = build_datasets(DataSource(name, str(root), **kwargs))
    records = build_datasets(DataSource(name, str(root), use_lmdb=True, **kwargs))
    assert records.num_classes == files.num_classes
    for one, other in zip(files[:2], records[:2], strict=True):
        assert one is not None and isinstance(other, ImageFolderLMDB)
        assert other.classes == one.classes and other.class_to_idx == one.class_to_idx
        assert other.targets.tolist() == one.targets.tolist() and len(other) == len(one)
        assert [other.name(i) for i in range(len(one))] == [one.name(i) for i in range(len(one))]
        assert other.samples[:] == [(one.name(i), target) for i, target in enumerate(one.targets)]
        for i in range(len(one)):
            assert bytes(other.raw(i)) == bytes(one.raw(i))
            assert np.array_equal(other[i][0], one[i][0]) and other[i][1] == one[i][1]


def test_folders(folder: Path) -> None:
    assert_same(folder, 'FOLDER')
    assert_same(folder, 'IMNET')
    assert sorted(path.name for path in folder.iterdir()) == ['train', 'train.lmdb', 'val', 'val.lmdb']


def test_lists(tmp_path: Path) -> None:
    root = make_lists(tmp_path, 'painting', PAINTING)
    build(root, '--data-set', 'painting')
    assert_same(root, 'painting')


@pytest.mark.parametrize('category', ['name', 'genus'])
def test_inaturalist(tmp_path: Path, category: str, capsys: pytest.CaptureFixture) -> None:
    root = make_inaturalist(tmp_path)
    build(root, '--data-set', 'INAT', '--inat-category', category)
    assert_same(root, 'INAT', inat_category=category)
    with pytest.raises(InputError, match=f'has the labels of {category}, not of family'):
        build_datasets(DataSource('INAT', str(root), use_lmdb=True, inat_category='family'))


def test_data_sets_in_memory_become_pngs(tmp_path: Path) -> None:
    build(tmp_path, '--data-set', 'DIGITS')
    assert_same(tmp_path, 'DIGITS')
    assert build_datasets(DataSource('DIGITS', str(tmp_path), use_lmdb=True)).val.name(0).endswith('/000000.png')


def test_training_gives_the_same_tensors_and_the_same_weights(folder: Path, tmp_path: Path) -> None:
    common = [*SMALL_MODEL, *PLAIN, '--data-set', 'FOLDER', '--data-path', str(folder), '--batch-size', '4']
    batches, lines = [], []
    for use_lmdb in (False, True):
        splits = build_datasets(
            DataSource('FOLDER', str(folder), use_lmdb=use_lmdb),
            train_fraction=0.8,
        )
        splits.train.transform = build_transform(train=True, input_size=32)
        loader: Any = DataLoader(
            splits.train,  # type: ignore[arg-type]
            batch_size=8,
            shuffle=True,
            num_workers=2,
            generator=torch.Generator().manual_seed(0),
        )
        batches.append(list(loader))
        flags = ['--use-lmdb', '--verify-records', '--num_workers', '2'] if use_lmdb else []
        lines.append(main([*common, '--epochs', '1', '--output_dir', str(tmp_path / str(use_lmdb)), *flags]))
    assert len(batches[0]) == len(batches[1]) == 3
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert lines[0] == lines[1]
    # Evaluation takes --use-lmdb from the checkpoint: the files need not be there any more.
    (folder / 'val').rename(tmp_path / 'elsewhere')
    resumed = ['--eval', '--resume', str(tmp_path / 'True' / 'checkpoint.pth'), '--device', 'cpu', '--num_workers', '0']
    assert main(resumed)['test_acc1'] == lines[1]['test_acc1']


def _targets(samples: list[tuple[Any, int]]) -> list[int]:
    return [target for _, target in samples]


@pytest.mark.parametrize('context', ['fork', 'spawn', 'forkserver'])
def test_processes_and_data_sets_share_one_file(folder: Path, context: str) -> None:
    one, other = (ImageFolderLMDB(folder / 'train.lmdb') for _ in range(2))
    both: Any = torch.utils.data.ConcatDataset([one, other])
    expected = [*one.targets.tolist(), *other.targets.tolist()]
    assert np.array_equal(one[3][0], other[3][0])  # both open in this process when the others start
    workers = 1 if context == 'spawn' else 2  # a spawned one imports everything, for seconds
    loader: Any = DataLoader(both, batch_size=6, num_workers=workers, collate_fn=_targets,
                             multiprocessing_context=context, persistent_workers=workers == 1)  # fmt: skip
    for _ in range(2):
        assert [target for batch in loader for target in batch] == expected
        assert np.array_equal(one[3][0], other[3][0])


def test_a_fork_inside_a_fork(folder: Path) -> None:
    dataset = ImageFolderLMDB(folder / 'train.lmdb')
    first = bytes(dataset.raw(0))
    for _ in range(2):
        child = os.fork()
        if child == 0:  # pragma: no cover
            grandchild = os.fork()
            good = bytes(dataset.raw(0)) == first and dataset[5][1] == 0
            if grandchild:
                good = good and os.waitpid(grandchild, 0)[1] == 0
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert bytes(dataset.raw(0)) == first


def test_a_file_that_is_replaced(folder: Path) -> None:
    dataset = ImageFolderLMDB(folder / 'train.lmdb')
    Image.new('RGB', (4, 4)).save(folder / 'train' / 'a' / 'more.png')
    build(folder, '--overwrite')
    assert len(dataset) == 21 and dataset[20][1] == 1  # the old one, while it is open
    assert len(ImageFolderLMDB(folder / 'train.lmdb')) == 22
    loader: Any = DataLoader(dataset, num_workers=1, collate_fn=len)
    with pytest.raises(InputError, match='was replaced by another'):
        list(loader)


def test_check(folder: Path, capsys: pytest.CaptureFixture) -> None:
    folder2lmdb.main(['--check', str(folder / 'train.lmdb'), str(folder / 'val.lmdb'), '--num_workers', '1'])
    out = capsys.readouterr().out
    assert '21 images in 2 classes' in out and '20 images in 2 classes' in out and 'every image decodes' in out


def test_altered_and_missing_records(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / 'train.lmdb'
    with edit(path) as txn:
        data = bytearray(txn.get(bytes(7) + b'\x02'))
        data[-20] ^= 1  # decodes all the same
        txn.put(bytes(7) + b'\x02', bytes(data))
        txn.put(bytes(7) + b'\x03', b'short')
    dataset = ImageFolderLMDB(path)
    assert dataset[2][0].mode == 'RGB'
    with pytest.raises(BadImageError, match=r'train\.lmdb: record 2 \(train/a/2\.jpg\) .* altered'):
        ImageFolderLMDB(path, verify=True)[2]
    with pytest.raises(BadImageError, match=r'record 3 .* altered'):
        dataset[3]
    assert '2 problems' in build_fails(capsys, ['--check', str(path)])
    flags = [
        *SMALL_MODEL,
        *PLAIN,
        '--data-set',
        'FOLDER',
        '--data-path',
        str(folder),
        '--batch-size',
        '4',
        '--use-lmdb',
    ]
    with pytest.raises(SystemExit):
        main([*flags, '--epochs', '1', '--use-lmdb', '--verify-records'])
    err = capsys.readouterr().err
    assert 'record' in err and 'altered' in err and err.count('\n') == 1
    del dataset
    with edit(path) as txn:
        txn.delete(bytes(7) + b'\x05')
    with pytest.raises(InputError, match=r'record 5 \(train/a/5\.jpg\) is missing'):
        ImageFolderLMDB(path)[5]
    line = build_fails(capsys, ['--check', str(path)])
    assert 'the database 20' in line and 'record 5 (train/a/5.jpg) is missing' in line


def test_an_image_that_does_not_decode_is_found_by_check(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / 'train' / 'a' / '4.jpg').write_bytes((folder / 'train' / 'a' / '4.jpg').read_bytes()[:300])
    build(folder, '--overwrite')
    line = build_fails(capsys, ['--check', str(folder / 'train.lmdb')])
    assert '1 problem: ' in line and 'record 4 (train/a/4.jpg) cannot be read as an image' in line


def test_altered_index(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / 'train.lmdb'
    with edit(path) as txn:
        index = txn.get(b'index')
        table = pa.ipc.open_stream(index).read_all()
        labels = pa.array([1 - label for label in table['label'].to_pylist()], pa.int32())
        table = table.set_column(table.schema.get_field_index('label'), 'label', labels)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        txn.put(b'index', sink.getvalue().to_pybytes())
    with pytest.raises(InputError, match='index was altered'):
        ImageFolderLMDB(path)
    assert 'its index was altered' in build_fails(capsys, ['--check', str(path)])
    with edit(path) as txn:
        half = index[: len(index) // 2]
        txn.put(b'index', half)
        content = {**json.loads(txn.get(b'header')), 'index_crc32': zlib.crc32(half)}
        txn.put(b'header', json.dumps(content).encode())
    with pytest.raises(InputError, match=r'is damaged .*--overwrite'):
        ImageFolderLMDB(path)
    with edit(path) as txn:
        txn.delete(b'index')
    with pytest.raises(InputError, match='has no index'):
        ImageFolderLMDB(path)


def write_table(path: Path, table: pa.Table, **changes: Any) -> None:
    """Puts a table in a file's place for one, with the right checksum."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    write_index(path, sink.getvalue().to_pybytes(), **changes)


def write_index(path: Path, index: bytes, **changes: Any) -> None:
    with edit(path) as txn:
        txn.put(b'index', index)
        content = {**json.loads(txn.get(b'header')), 'index_crc32': zlib.crc32(index), **changes}
        txn.put(b'header', json.dumps(content).encode())


def read_index(path: Path) -> bytes:
    with edit(path) as txn:
        return bytes(txn.get(b'index'))


def with_column(name: str, values: Any, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        number = table.schema.get_field_index(name)
        column = values(table[name].to_pylist()) if callable(values) else values
        return table.set_column(number, name, pa.array(column, kind or table.schema.field(name).type))

    return change


def with_classes(classes: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({'classes': json.dumps(classes)})


LIES: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
    (with_column('label', [999] * 20), 'labels outside the 2 classes'),
    (with_column('label', [-1] * 20), 'labels outside the 2 classes'),
    (with_column('label', [0] * 20, pa.int64()), 'its columns are .*label int64'),
    (with_column('label', [0.5] * 20, pa.float32()), 'its columns are .*label float'),
    (with_column('label', [None, *[0] * 19]), 'empty cells'),
    (with_column('path', [None, *[b'a'] * 19]), 'empty cells'),
    (with_column('path', list(map(str, range(20))), pa.string()), 'its columns are path string'),
    (with_column('path', list(range(20)), pa.int64()), 'its columns are path int64'),
    (with_column('crc32', [0] * 20, pa.uint8()), 'its columns are .*crc32 uint8'),
    (with_column('size', lambda sizes: [-1, *sizes[1:]]), 'sizes of images that cannot be'),
    (with_column('size', lambda sizes: [2**62, *sizes[1:]]), 'sizes of images that cannot be'),
    (with_column('size', [2**63 - 1] * 20), 'sizes of images that cannot be'),
    (lambda table: table.drop_columns('crc32'), 'its columns are path large_binary, label int32, size int64'),
    (lambda table: table.select(['label', 'path', 'size', 'crc32']), 'its columns are label int32, path'),
    (lambda table: table.slice(0, 19), 'the header counts 20 images, the index 19'),
    (lambda table: table.slice(0, 0), 'the header counts 20 images, the index 0'),
    (lambda table: pa.concat_tables([table, table]), 'the header counts 20 images, the index 40'),
    (lambda table: table.replace_schema_metadata(None), 'no list of names'),
    (with_classes(['a']), 'labels outside the 1 classes'),
    (with_classes(['a', 'a']), 'names a class twice'),
    (with_classes(['a', 5]), 'no list of names'),
    (with_classes({'a': 0, 'b': 1}), 'no list of names'),
    (with_classes(7), 'no list of names'),
]  # fmt: skip


@pytest.mark.parametrize('number', range(len(LIES)))
def test_a_table_that_lies_with_a_right_checksum(folder: Path, capsys: pytest.CaptureFixture, number: int) -> None:
    change, message = LIES[number]
    path = folder / 'val.lmdb'
    write_table(path, change(pa.ipc.open_stream(read_index(path)).read_all()))
    with pytest.raises(InputError, match=rf'val\.lmdb is damaged .*{message}.*--overwrite'):
        build_datasets(DataSource('FOLDER', str(folder), use_lmdb=True))
    line = build_fails(capsys, ['--check', str(path)])
    assert line.startswith('folder2lmdb.py: error: ') and 'is damaged' in line


def test_offsets_and_lengths_that_lie(folder: Path) -> None:
    """In a process of its own: what they point to may lie outside its memory."""
    path = folder / 'val.lmdb'
    index = read_index(path)
    table = pa.ipc.open_stream(index).read_all()
    offsets = table['path'].chunk(0).buffers()[1].to_pybytes()[: 21 * 8]
    start = index.index(offsets)
    number = 0
    for position in (0, 8, 80, 160):
        for value in (-1, 1, 50, 10_000, 2**31, 2**40, 2**62, -(2**63)):
            changed = bytearray(index)
            changed[start + position : start + position + 8] = value.to_bytes(8, 'little', signed=True)
            if changed != index:
                number += 1
                (folder / f'{number}.lmdb').write_bytes(path.read_bytes())
                write_index(folder / f'{number}.lmdb', bytes(changed))
    for position in range(0, start, 8):  # of the message that says how long the columns are, and where
        number += 1
        changed = bytearray(index)
        changed[position : position + 4] = b'\xff\xff\xff\x7f'
        (folder / f'{number}.lmdb').write_bytes(path.read_bytes())
        write_index(folder / f'{number}.lmdb', bytes(changed))
    names = b''.join(table['path'].to_pylist()).decode()

    def read() -> None:
        for name in range(number):
            try:
                dataset = ImageFolderLMDB(folder / f'{name + 1}.lmdb')
                assert all(dataset.name(i) in names for i in range(len(dataset))), name + 1
                print('right')
            except InputError as err:
                print(err)

    (done,) = run(read)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == number > 100 and lines.count('right') < number / 2


def test_special_files_are_no_lmdb_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'val.lmdb')
    with pytest.raises(InputError, match=r'val\.lmdb is a named pipe, not a file'):
        ImageFolderLMDB(tmp_path / 'val.lmdb')


def test_what_is_left_out_is_said_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ('train', 'val'):
        (folder / split / 'a' / 'photo.HEIC').write_bytes(b'x')
    os.mkfifo(folder / 'train' / 'a' / 'pipe.jpg')
    build(folder, '--overwrite')
    out = capsys.readouterr().out
    assert out.count('2 files left out: .heic') == 1
    assert out.count('left out, as no image files') == 1 and 'pipe.jpg (a named pipe)' in out
    assert len(ImageFolderLMDB(folder / 'train.lmdb')) == 21


def test_a_damaged_page_costs_its_own_records_only(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a'], 'val': ['a']}, images=200)
    build(root)
    path = root / 'train.lmdb'
    whole = path.read_bytes()
    opened = 0
    for page in range(2, len(whole) // 4096):
        path.write_bytes(whole[: page * 4096] + bytes(4096) + whole[(page + 1) * 4096 :])
        try:
            dataset = ImageFolderLMDB(path)
        except InputError as err:
            assert '--overwrite' in str(err)
            continue
        opened += 1
        bad = 0
        for number in range(200):
            try:
                dataset.load(number)
            except InputError:
                bad += 1
        assert bad <= 20, f'{bad} records cannot be read although one page is damaged'
        del dataset
    assert opened > 10


def test_raw_bytes_outlive_the_data_set(folder: Path) -> None:
    assert bytes(ImageFolderLMDB(folder / 'train.lmdb').raw(0)) == (folder / 'train' / 'a' / '0.jpg').read_bytes()


def test_a_mended_image_is_written_again(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / 'val' / 'b' / '3.jpg').write_bytes(b'another image')
    assert 'holds other images' in build_fails(capsys, ['--dir', str(folder)])
    (folder / 'train.lmdb').write_bytes(b'')
    assert 'is empty' in (line := build_fails(capsys, ['--dir', str(folder)])) and '--overwrite' in line
    (folder / 'train.lmdb').unlink()
    (folder / 'train.lmdb').mkdir()
    assert 'is a folder: remove it' in build_fails(capsys, ['--dir', str(folder), '--overwrite'])


def header(**changes: Any) -> bytes:
    content = {'format': FORMAT, 'version': VERSION, 'images': 1, 'data_set': 'FOLDER', 'index_crc32': 0}
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    ('records', 'message'),
    [
        ({'0': b'x'}, 'has no header'),
        ({'0': b'x', '__keys__': b'', '__len__': b''}, r'old format of pyarrow\.serialize.*build it again'),
        ({'header': header(version=2)}, 'version 2 of its format, this program reads 1'),
        ({'header': header(format='other')}, 'damaged header'),
        ({'header': header(data_set=5)}, 'damaged header'),
        ({'header': header(index_crc32=None)}, 'damaged header'),
        ({'header': header(version='1')}, 'damaged header'),
        ({'header': b'{'}, 'damaged header'),
    ],
)
@pytest.mark.parametrize('subdir', [False, True])
def test_other_databases(tmp_path: Path, records: dict[str, bytes], message: str, subdir: bool) -> None:
    path = tmp_path / 'train.lmdb'
    with lmdb.open(str(path), subdir=subdir) as env, env.begin(write=True) as txn:
        for key, value in records.items():
            txn.put(key.encode(), value)
    for call in (ImageFolderLMDB, check_lmdb):
        with pytest.raises(InputError, match=message):
            call(path)


def test_truncated_files_are_refused(folder: Path) -> None:
    """In a process of its own: reading past the end of a mapped file is a SIGBUS."""
    whole = (folder / 'train.lmdb').read_bytes()
    sizes = [0, 1, 100, 4096, 5000, 8192, 8193, len(whole) // 2, len(whole) - 4096, len(whole) - 1]
    for size in sizes:
        (folder / f'{size}.lmdb').write_bytes(whole[:size])
    (folder / 'text.lmdb').write_text('no database at all' * 1000)
    paths = [str(folder / f'{name}.lmdb') for name in [*sizes, 'text', 'absent']]

    def read() -> None:
        for path in paths:
            try:
                list(ImageFolderLMDB(path))  # type: ignore[call-overload]
            except InputError as err:
                print(err)

    (done,) = run(read)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths) and all(path in line for path, line in zip(paths, lines, strict=True))
    assert sum('is truncated' in line for line in lines) >= 6 and 'is empty' in lines[0]
    assert 'no LMDB database' in lines[-2] and 'No such file' in lines[-1]


def test_build_again(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = (folder / 'train.lmdb').stat().st_mtime_ns
    build(folder)
    assert capsys.readouterr().out.count('complete, kept') == 2
    assert (folder / 'train.lmdb').stat().st_mtime_ns == before
    Image.new('RGB', (4, 4)).save(folder / 'train' / 'a' / 'more.png')
    line = build_fails(capsys, ['--dir', str(folder)])
    assert 'exists and holds other images (FOLDER): give another folder with --out, or replace it' in line
    assert (folder / 'train.lmdb').stat().st_mtime_ns == before
    build(folder, '--out', str(folder / 'new'))
    assert len(ImageFolderLMDB(folder / 'new' / 'train.lmdb')) == 22
    build(folder, '--overwrite')
    assert len(ImageFolderLMDB(folder / 'train.lmdb')) == 22


def test_domains_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_lists(make_lists(tmp_path, 'painting', PAINTING), 'sketch', PAINTING)
    build(root, '--data-set', 'painting')
    with pytest.raises(InputError, match='holds painting, not sketch'):
        build_datasets(DataSource('sketch', str(root), use_lmdb=True))
    argv = ['--dir', str(root), '--data-set', 'sketch']
    assert 'holds other images (painting)' in build_fails(capsys, argv)
    build(root, '--data-set', 'sketch', '--out', str(root / 'sketch'))
    (root / 'val.lmdb').unlink()
    assert len(build_datasets(DataSource('sketch', str(root), use_lmdb=True)).val) == 6


def test_wrong_flags(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert 'give --dir ROOT' in build_fails(capsys, [], code=2)
    assert 'give --dir ROOT' in build_fails(capsys, ['--dir', str(folder), '--check', 'a'], code=2)
    assert '--check takes no --out' in build_fails(capsys, ['--check', 'a', '--overwrite'], code=2)
    assert 'is for INAT' in build_fails(capsys, ['--dir', str(folder), '--inat-category', 'name'], code=2)
    assert 'no such folder' in build_fails(capsys, ['--dir', str(tmp_path / 'absent')])
    with pytest.raises(SystemExit):
        folder2lmdb.main(['--check', str(tmp_path / 'absent'), str(folder / 'train.lmdb'), '--num_workers', '0'])
    checked = capsys.readouterr()  # the others, too
    assert 'No such file' in checked.err and 'every image decodes' in checked.out
    with pytest.raises(SystemExit) as stop:
        main(['--data-set', 'DIGITS', '--verify-records'])
    assert stop.value.code == 2 and '--verify-records needs --use-lmdb' in capsys.readouterr().err


def test_unreadable_files_stop_the_build(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / 'val' / 'b' / 'gone.jpg').symlink_to('nowhere')
    line = build_fails(capsys, ['--dir', str(folder), '--overwrite'])
    assert 'val/b/gone.jpg: No such file or directory' in line
    assert not list(folder.glob('.*')) and len(ImageFolderLMDB(folder / 'val.lmdb')) == 20
    folder.joinpath('val', 'b', 'gone.jpg').unlink()


def test_a_full_disk_leaves_nothing(make_folder: MakeFolder) -> None:
    """A limit on file sizes stands in for the disk: the same call fails with another error number."""
    root = make_folder({'train': ['a'], 'val': ['a']}, images=60, size=64)

    def build_with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40960, 40960))
        folder2lmdb.main(['--dir', str(root), '--num_workers', '0'])

    (done,) = run(build_with_limit)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert 'cannot write' in last and 'the unfinished file is removed' in last and 'Traceback' not in done.stderr
    assert sorted(path.name for path in root.iterdir()) == ['train', 'val']


def start(root: Path, *flags: str) -> tuple[int, TextIO]:
    """Begins a build in another process; returns its number, and a pipe from its standard error."""
    reader, writer = os.pipe()
    with open(writer, 'w') as err, open(os.devnull, 'w') as out:
        argv = ['--dir', str(root), '--num_workers', '1', *flags]
        return fork(lambda: folder2lmdb.main(argv), out.fileno(), err.fileno()), open(reader)


PARTIAL = '.train.lmdb.*.dhvt-partial'  # what the writer calls a file that is not whole


def wait_for_partial(root: Path) -> None:
    end = time.monotonic() + 60
    while not list(root.glob(PARTIAL)) and time.monotonic() < end:
        time.sleep(0.002)


def test_killed_builds_leave_nothing_that_opens(tmp_path: Path) -> None:
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    Image.new('RGB', (64, 64)).save(tmp_path / 'val' / 'a' / 'source.jpg')
    for number in range(20000):
        os.link(tmp_path / 'val' / 'a' / 'source.jpg', tmp_path / 'train' / 'a' / f'{number:05}.jpg')
    rng = random.Random(0)
    for _ in range(3):
        process, errors = start(tmp_path)
        wait_for_partial(tmp_path)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process, signal.SIGKILL)
        with errors:
            errors.read()  # until the reader has ended too, which shares the pipe
        assert wait([process]) in ([-signal.SIGKILL], [0])
        for name in ('train.lmdb', 'val.lmdb'):
            if (tmp_path / name).exists():
                assert 'every image decodes' in check_lmdb(tmp_path / name, workers=0)
    build(tmp_path)
    assert len(ImageFolderLMDB(tmp_path / 'train.lmdb')) == 20000
    assert not list(tmp_path.glob('.*'))

    process, errors = start(tmp_path, '--overwrite')
    wait_for_partial(tmp_path)  # Ctrl-C as early as can be, while processes start
    os.kill(process, signal.SIGINT)
    with errors:
        assert errors.read().splitlines()[-1] == 'folder2lmdb.py: error: interrupted'
    assert wait([process]) == [130] and not list(tmp_path.glob('.*'))
    assert len(ImageFolderLMDB(tmp_path / 'train.lmdb')) == 20000


def test_every_kind_of_number_is_stored_and_checked(make_folder: MakeFolder, capsys: pytest.CaptureFixture) -> None:
    """What the values of 12 and 32 bits mean is for main.py to say; their files are whole."""
    root = make_folder({'train': ['a'], 'val': ['a']}, size=16)
    ramp = np.linspace(0, 4095, 256)
    (root / 'train' / 'a' / 'colours.png').write_bytes(deep_png(ramp.reshape(16, 16)[..., None].repeat(3, 2)))
    Image.fromarray(ramp.astype(np.float32).reshape(16, 16)).save(root / 'train' / 'a' / 'numbers.tif')
    build(root)
    assert '10 images' in (found := check_lmdb(root / 'train.lmdb', workers=0)) and 'every image decodes' in found
    deep = root / 'val' / 'a' / 'deep.png'
    Image.fromarray((ramp * 16).astype(np.uint16).reshape(16, 16)).save(deep)
    assert shrink(deep.read_bytes(), 8) == deep.read_bytes()  # for --value-range
    line = build_fails(capsys, ['--dir', str(root), '--overwrite', '--max-size', '8'])
    assert 'all below 4096' in line and line.endswith('without --max-size it is kept')


def test_two_builds_at_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    hold = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()'
    command = [sys.executable, '-c', hold, str(folder / '.lock')]
    left = folder / PARTIAL.replace('*', 'x')
    left.write_bytes(b'x' * 10000)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert 'another process writes to' in build_fails(capsys, ['--dir', str(folder), '--overwrite'])
        assert left.exists()  # the other's
        other.communicate('\n')
    build(folder, '--overwrite')  # what a killed build leaves is removed
    assert not list(folder.glob('.*'))


def test_format_as_documented(folder: Path) -> None:
    with lmdb.open(str(folder / 'val.lmdb'), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        records = dict(txn.cursor())
    content = json.loads(records.pop(b'header'))
    index = records.pop(b'index')
    assert content == {
        'format': 'image records',
        'version': 1,
        'images': 20,
        'data_set': 'FOLDER',
        'inat_category': None,
        'max_size': None,
        'index_crc32': zlib.crc32(index),
    }
    table = pa.ipc.open_stream(index).read_all()
    assert table.column_names == ['path', 'label', 'size', 'crc32']
    assert json.loads(table.schema.metadata[b'classes']) == ['a', 'b']
    assert sorted(records) == [number.to_bytes(8, 'big') for number in range(20)]
    for number, row in enumerate(table.to_pylist()):
        data = records[number.to_bytes(8, 'big')]
        assert data == (folder / row['path'].decode()).read_bytes()
        assert (row['size'], row['crc32']) == (len(data), zlib.crc32(data))
        assert row['label'] == ['a', 'b'].index(row['path'].decode().split('/')[1])


def test_the_map_grows(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('folder2lmdb.GROWTH', 65536)
    monkeypatch.setattr('folder2lmdb.CHUNK_IMAGES', 8)
    root = make_folder({'train': ['a'], 'val': ['a']}, images=200, size=64)
    build(root)
    assert (root / 'train.lmdb').stat().st_size > 200000
    assert_same(root, 'FOLDER')


def test_smaller_images(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--max-size makes large images smaller, and leaves others as they are; such a file is another data set."""
    root = make_folder({'train': ['a'], 'val': ['a']}, images=2, size=40)
    Image.new('RGB', (300, 200), 'red').save(root / 'train' / 'a' / '0.jpg')
    out = tmp_path / 'small'
    argv = ['--dir', str(root), '--num_workers', '0', '--out', str(out), '--max-size', '64']
    folder2lmdb.main(argv)
    files = build_datasets(DataSource('FOLDER', str(root))).train
    small = build_datasets(DataSource('FOLDER', str(out), use_lmdb=True)).train
    assert files is not None and small is not None
    assert small.load(0).size == (96, 64) and small.raw(1) == files.raw(1)
    assert np.abs(np.asarray(small.load(0), int) - np.asarray(files.load(0).resize((96, 64)), int)).max() <= 4
    assert small.fingerprint() != files.fingerprint()
    folder2lmdb.main(['--check', str(out / 'train.lmdb')])
    assert 'every image decodes' in capsys.readouterr().out
    folder2lmdb.main(argv)
    assert 'complete, kept' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        folder2lmdb.main(argv[:-2])
    assert 'holds other images' in capsys.readouterr().err
