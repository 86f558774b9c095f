"""`pip install` of this project: the models as the package dhvt, in a project that has nothing else of it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.conftest import PLAIN, ROOT, SMALL_MODEL

USE = """
import sys
for name in ('torchprofile', 'lmdb', 'pyarrow', 'simplejpeg', 'sklearn', 'tensorboardX', 'matplotlib'):
    sys.modules[name] = None
import dhvt, timm, torch
import dhvt.ablations, dhvt.folding, dhvt.speed
model = timm.create_model('dhvt_tiny_cifar_patch4', depth=2, num_classes=3)
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape), dhvt.__file__)
print({'models', 'utils', 'training', 'config'} & set(sys.modules))
"""


def pip(*argv: str, cwd: Path) -> None:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet', *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves folders beside what it builds."""
    source = tmp_path_factory.mktemp('source')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for folder in ('models', 'training'):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns('__pycache__'))
    pip('wheel', '.', '--no-deps', '--no-build-isolation', '--wheel-dir', 'wheels', cwd=source)
    (path,) = (source / 'wheels').iterdir()
    return path


def test_the_wheel_holds_the_models_and_asks_for_little(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if '.dist-info/' not in name}
        (metadata,) = (name for name in file.namelist() if name.endswith('.dist-info/METADATA'))
        fields = HeaderParser().parsestr(file.read(metadata).decode())
    assert names == {f'dhvt/{path.name}' for path in (ROOT / 'models').glob('*.py')}
    needed = fields.get_all('Requires-Dist', [])
    assert sorted(line.split('>')[0] for line in needed if 'extra ==' not in line) == ['einops', 'timm', 'torch']
    assert fields.get_all('Provides-Extra') == ['train', 'check', 'hfds'] and any('numpy' in line for line in needed)


def test_the_wheel_works_in_another_project(wheel: Path, tmp_path: Path) -> None:
    pip('install', str(wheel), '--no-deps', '--target', str(tmp_path / 'site'), cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, '-c', USE],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f'(2, 3) {tmp_path}/site/dhvt/__init__.py', 'set()']


def test_dhvt_can_be_copied_alone() -> None:
    nodes = list(ast.walk(ast.parse((ROOT / 'models' / 'dhvt.py').read_text())))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)


def test_the_models_import_nothing_else() -> None:
    allowed = {*sys.stdlib_module_names, 'torch', 'timm', 'einops'}
    for path in (ROOT / 'models').glob('*.py'):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert {name.partition('.')[0] for name in names} <= allowed, path


HIDDEN = """
import os, signal, sys
import torch, timm.data, multiprocessing.util, subprocess, pyarrow, lmdb, sklearn.datasets
sys.modules['fcntl'] = sys.modules['resource'] = None
for module, names in ((signal, 'SIGHUP SIGUSR1 SIGALRM SIGCHLD setitimer ITIMER_REAL'),
                      (os, 'register_at_fork sched_getaffinity fchmod')):
    for name in names.split():
        delattr(module, name)
import ctypes, folder2lmdb, main  # after the libraries, which know what the system has
ctypes.CDLL = lambda *_: None  # no mallopt
line = main.main(sys.argv[1:])
"""


def test_a_system_without_locks_and_signals(tmp_path: Path) -> None:
    """As on Windows: no fcntl, no SIGHUP, SIGUSR1, SIGALRM, no fork to register for. The run trains, and says so."""
    argv = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--train-fraction', '0.05', '--batch-size', '32']
    argv += ['--epochs', '1', '--output_dir', str(tmp_path / 'out'), '--num_workers', '0']
    done = subprocess.run(
        [sys.executable, '-c', HIDDEN, *argv],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert 'Note: this system has no file locks' in done.stdout and (tmp_path / 'out' / 'checkpoint.pth').exists()
