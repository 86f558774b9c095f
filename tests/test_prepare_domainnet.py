"""tools/prepare_domainnet.py: folders from lists, by link or copy, from folders and zip files, again and again."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets import DataSource, build_datasets
from tests.conftest import ROOT, make_lists
from tests.test_layouts import CLASSES, PAINTING
from tools.prepare_domainnet import METHODS, main


@pytest.fixture
def download(tmp_path: Path) -> Path:
    return make_lists(tmp_path / 'download', 'painting', PAINTING)


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Each file below a folder, with its inode and time of change."""
    found = {}
    for path in sorted(root.rglob('*')):
        if not path.is_dir():
            status = path.lstat()
            found[path.relative_to(root).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def fails(capsys: pytest.CaptureFixture, *argv: str, code: int = 1) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == code
    captured = capsys.readouterr()
    return captured.out, captured.err.splitlines()[-1]


def assert_labels_of_the_lists(download: Path, out: Path) -> None:
    lists, folders = (build_datasets(DataSource('painting', str(root))) for root in (download, out))
    for one, other in zip(lists[:2], folders[:2], strict=True):
        assert one is not None and other is not None and other.classes == one.classes
        by_name = dict(zip([Path(path).name for path, _ in other.samples], other.targets, strict=True))
        assert by_name == {Path(path).name: target for path, target in one.samples}


PAINTING_NAMED: dict[str, Any] = {
    split: [(name.replace('/', f'/{split}_{name.partition("/")[0]}_'), label) for name, label in rows]
    for split, rows in PAINTING.items()
}


@pytest.mark.parametrize('method', METHODS)
def test_folders_by_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    for name in METHODS:
        if name == method:
            break
        monkeypatch.setitem(METHODS, name, refuse)
    download = make_lists(tmp_path / 'download', 'painting', PAINTING_NAMED)
    before = files(download)
    out = tmp_path / 'out'
    main([str(download), str(out)])
    assert files(download) == before, 'the download was changed'
    made = out / 'painting' / 'train' / 'zebra' / 'train_zebra_1.jpg'
    source = download / 'painting' / 'zebra' / 'train_zebra_1.jpg'
    assert made.samefile(source) == (method != 'copy') and made.is_symlink() == (method == 'symbolic link')
    assert made.read_bytes() == source.read_bytes()
    assert_labels_of_the_lists(download, out)
    first = files(out)
    assert len(first) == 13
    main([str(download), str(out)])
    assert files(out) == first, 'a second run changed something'


def test_interrupted_run_goes_on(download: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    main([str(download), str(out)])
    first = files(out)
    for name in ('painting/train/apple/1.jpg', 'painting/val/t-shirt/3.jpg', 'painting/classes.txt'):
        (out / name).unlink()
    (out / 'painting' / 'train' / 'apple' / '.1.jpg.x.dhvt-partial').write_bytes(b'half')
    main([str(download), str(out)])
    assert files(out).keys() == first.keys()
    (out / 'painting' / 'classes.txt').write_text('mine')
    with pytest.raises(SystemExit):
        main([str(download), str(out)])
    assert (out / 'painting' / 'classes.txt').read_text() == 'mine'


def test_zip_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    download = make_lists(tmp_path / 'download', 'painting', PAINTING_NAMED)
    unpacked = make_lists(tmp_path / 'unpacked', 'painting', PAINTING_NAMED)
    with zipfile.ZipFile(download / 'painting.zip', 'w') as archive:
        for path in sorted((download / 'painting').rglob('*.jpg')):
            archive.write(path, path.relative_to(download))
        archive.writestr('../../evil.jpg', b'')
    shutil.rmtree(download / 'painting')
    main([str(download), str(tmp_path / 'out')])
    assert '12 out of painting.zip' in capsys.readouterr().out
    assert_labels_of_the_lists(unpacked, tmp_path / 'out')
    assert not list(tmp_path.rglob('evil.jpg')) and not (download / 'painting').exists()

    whole = (download / 'painting.zip').read_bytes()
    (download / 'painting.zip').write_bytes(whole[: len(whole) // 2])
    assert 'painting.zip is no zip file, or a part of one' in fails(capsys, str(download), str(tmp_path / 'new'))[1]
    data = bytearray(whole)
    data[200] ^= 255
    (download / 'painting.zip').write_bytes(bytes(data))
    line = fails(capsys, str(download), str(tmp_path / 'new'))[1]
    assert 'is damaged' in line and 'download it again' in line


def test_links_lead_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a linked OUT, and from a download that is itself made of links."""
    download = make_lists(tmp_path / 'download', 'painting', PAINTING_NAMED)
    store = tmp_path / 'store'
    store.mkdir()
    for number, path in enumerate(sorted((download / 'painting' / 'apple').iterdir())):
        path.rename(store / f'{number}.jpg')
        path.symlink_to(f'../../../store/{number}.jpg')
    (tmp_path / 'far' / 'deep').mkdir(parents=True)
    for name in ('hard', 'soft'):
        (tmp_path / name).symlink_to('far/deep')
        main([str(download), str(tmp_path / name)])
        made = list((tmp_path / 'far').rglob('*.jpg'))
        assert len(made) == 12 and all(path.is_file() for path in made)
        shutil.rmtree(tmp_path / 'far' / 'deep' / 'painting')
        monkeypatch.delitem(METHODS, 'hard link', raising=False)
    (store / '0.jpg').unlink()
    with pytest.raises(SystemExit):
        main([str(download), str(tmp_path / 'new')])


def test_files_that_would_be_one(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with open(download / 'painting_train.txt', 'a') as file:
        file.write('painting/other/apple/1.jpg 3\n')
    line = fails(capsys, str(download), str(tmp_path / 'out'))[1]
    assert '1 file' in line and 'more than once' in line


def test_missing_files(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / 'out'
    for name in ('zebra/1.jpg', 't-shirt/3.jpg', 't-shirt/4.jpg'):
        (download / 'painting' / name).unlink()
    listed, line = fails(capsys, str(download), str(out))
    assert '3 of the 12 listed files of painting are missing' in line and '--allow-missing' in line
    assert [row for row in listed.splitlines() if row.startswith('missing: ')] == [
        'missing: painting/zebra/1.jpg',
        'missing: painting/t-shirt/3.jpg',
        'missing: painting/t-shirt/4.jpg',
    ]
    assert not out.exists()
    main([str(download), str(out), '--allow-missing'])
    assert '3 missing' in capsys.readouterr().out
    splits = build_datasets(DataSource('painting', str(out)))
    assert splits.train is not None and (len(splits.train), len(splits.val)) == (5, 4)
    assert splits.val.class_to_idx == CLASSES  # t-shirt keeps its place although no image of it is left


def test_wrong_use(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert 'DomainNet has a class "train"' in fails(capsys, str(download), str(download))[1]
    assert 'no such folder' in fails(capsys, str(tmp_path / 'absent'), str(tmp_path / 'out'))[1]
    (tmp_path / 'empty').mkdir()
    assert 'has no lists' in fails(capsys, str(tmp_path / 'empty'), str(tmp_path / 'out'))[1]
    assert (
        'sketch_train.txt: no such list'
        in fails(capsys, str(download), str(tmp_path / 'out'), '--domains', 'sketch')[1]
    )
    main([str(download), str(tmp_path / 'out')])
    Image.new('RGB', (2, 2)).save(tmp_path / 'out' / 'painting' / 'val' / 'apple' / 'of another list.jpg')
    assert 'holds 1 file' in fails(capsys, str(download), str(tmp_path / 'out'))[1]
    shutil.rmtree(download / 'painting')
    assert 'neither the folder painting nor painting.zip' in fails(capsys, str(download), str(tmp_path / 'new'))[1]


def test_command_line(download: Path, tmp_path: Path) -> None:
    command: list[str] = [sys.executable, str(ROOT / 'tools' / 'prepare_domainnet.py')]
    run: Callable[..., Any] = subprocess.run
    done = run(
        [*command, str(download), str(tmp_path / 'out')], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0 and '12 images in 4 classes (12 hard link); 0 missing' in done.stdout
    assert run(command).returncode == 2
