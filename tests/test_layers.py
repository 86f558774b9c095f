"""The plan of the code: imports run downwards, in no circle; `args` stays where flags are read."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [
    {'utils', 'samplers', 'losses', 'models'},
    {'engine', 'pipeline'},
    {'datasets', 'training'},
    {'config'},
    {'reports', 'folder2lmdb', 'hubconf'},
    {'main', 'tools'},
]
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}


def files() -> list[Path]:
    rooms = [ROOT / f'{room}.py' for room in HEIGHT] + [p for room in HEIGHT for p in (ROOT / room).rglob('*.py')]
    return sorted(path for path in rooms if path.is_file())


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module(path) for path in files()}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = path.relative_to(ROOT).parts[: -node.level]
                base = '.'.join([*parts, *filter(None, [node.module])])
            found |= {f'{base}.{alias.name}' if f'{base}.{alias.name}' in MODULES else base for alias in node.names}
    return (found & MODULES) - {module(path)}


def test_every_file_has_a_layer() -> None:
    top = {path.stem for path in ROOT.glob('*.py')}
    folders = {path.parent.name for path in ROOT.glob('*/*.py')} - {'tests', 'docs', '.venv'}
    assert top | folders == set(HEIGHT)
    assert top == {'main', 'engine', 'datasets', 'losses', 'samplers', 'utils', 'folder2lmdb', 'hubconf'}


@pytest.mark.parametrize('path', files(), ids=module)
def test_imports_run_downwards(path: Path) -> None:
    own = module(path).partition('.')[0]
    for other in imports(path):
        room = other.partition('.')[0]
        assert room == own != 'tools' or HEIGHT[room] < HEIGHT[own], f'{module(path)} imports {other}'


def test_there_is_no_circle() -> None:
    tuple(TopologicalSorter({module(path): imports(path) for path in files()}).static_order())  # raises CycleError


@pytest.mark.parametrize('path', files(), ids=module)
def test_args_stay_where_flags_are_read(path: Path) -> None:
    if module(path).partition('.')[0] in ('config', 'main', 'tools', 'folder2lmdb'):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not any(ast.unparse(a.annotation or ast.Constant(None)).endswith('Namespace') for a in arguments)


def test_sizes() -> None:
    """The front rooms, which everyone reads first."""
    assert len((ROOT / 'main.py').read_text().splitlines()) <= 350
    lengths = {
        (path.name, node.name): node.end_lineno - node.lineno + 1
        for path in (ROOT / 'main.py', ROOT / 'engine.py')
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert lengths['main.py', 'run'] <= 110 and lengths['engine.py', 'train_one_epoch'] <= 70
