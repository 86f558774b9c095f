"""The pages in docs/: their blocks run, their commands parse, and what they call a result has a log."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config.arguments import parse_args
from tests.conftest import ROOT

PAGES = ['../README.md', *sorted(path.name for path in (ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r'((?:[A-Z_]+=\S+ )*)(bash (?:run_code|finetune)\.sh|python (?:main|folder2lmdb|tools/\w+)\.py)([^`;\n]*)'
)

# Runs the commands in one process, as the imports take longer than the rest; programs each in one of its own.
DRIVER = """
import importlib, shlex, subprocess, sys

for name in sys.argv[1:]:
    print('block', name, flush=True)
    if name.endswith('.py'):
        subprocess.run([sys.executable, name], check=True)
        continue
    for line in open(name).read().replace('\\\\\\n', ' ').splitlines():
        program, script, *words = shlex.split(line)
        assert program == 'python', line
        importlib.import_module(script.removesuffix('.py').replace('/', '.')).main(words)
"""


def test_the_blocks_of_extend_run(tmp_path: Path) -> None:
    found = BLOCK.findall((ROOT / 'docs' / 'extend.md').read_text())
    assert {kind for kind, _ in found} == {'python', 'bash'} and len(found) > 8
    names = []
    for number, (kind, text) in enumerate(found):
        path = tmp_path / f'{number}.{"py" if kind == "python" else "sh"}'
        path.write_text(text)
        names.append(path.name)
    (tmp_path / 'hubconf.py').symlink_to(ROOT / 'hubconf.py')
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, *names],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    rows = (tmp_path / 'output' / 'shapes.csv').read_text().splitlines()
    assert rows[0] == 'path,class1,probability1,class2,probability2' and len(rows) == 33
    assert "{'circle':" in done.stdout


def commands(page: str) -> list[str]:
    """The commands of a page, in its blocks and in the text, as one line each."""
    text = (ROOT / 'docs' / page).read_text()
    blocks = [body.replace('\\\n', ' ') for kind, body in BLOCK.findall(text) if kind == 'bash']
    if page not in ('reproduce.md', 'extend.md'):  # whose text has whole commands too
        lines = [re.sub(r'\s+#.*', '', line) for body in blocks for line in body.splitlines()]
        return sorted({line for line in lines if COMMAND.fullmatch(line) and not re.search('<|…|SIGTERM', line)})
    spans = [span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', BLOCK.sub('', text))]
    found = {''.join(parts).strip() for part in [*blocks, *spans] for parts in COMMAND.findall(part)}
    return sorted(command.replace('$seed', '3') for command in found)


@pytest.mark.parametrize('command', [command for page in PAGES for command in commands(page)])
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    given = dict(word.split('=', 1) for word in words if re.match(r'[A-Z_]+=', word))
    program, script, *argv = words[len(given) :]
    if program == 'bash':
        for name in {'output/imagenet/checkpoint.pth', *(word for word in argv if word.endswith('.pth'))}:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({'args': {'model': 'dhvt_tiny_imagenet_patch16'}}, tmp_path / name)
        python = tmp_path / 'python'  # one that finds nothing missing, at once
        python.write_text('#!/bin/sh\n')
        python.chmod(0o755)
        done = subprocess.run(
            ['bash', str(ROOT / script), *argv],
            env={**os.environ, 'DRY_RUN': '1', 'PYTHON': str(python), 'NPROC': '1', **given},
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        flags = shlex.split(done.stdout.splitlines()[-1].partition('main.py ')[2])
        monkeypatch.chdir(tmp_path)
        args = parse_args(flags)
        assert args.model == given.get('MODEL', args.model) and args.output_dir == given.get('OUTPUT', args.output_dir)
    elif script == 'main.py':
        parse_args([word for word in argv if word not in ('--eval', '--auto-resume')])
    else:
        module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
        flags = module.get_args_parser().parse_known_args(argv)[1]
        hands_on = ('tools/benchmark.py', 'tools/largest_batch.py', 'tools/ablate.py')  # flags to main.py's parser
        assert not flags or script in hands_on, flags
        parse_args([word for word in flags if word != '$light'])


def tables(page: str) -> list[tuple[list[str], list[list[str]]]]:
    """The tables of a page: header cells, and the cells of each row."""
    found: list[tuple[list[str], list[list[str]]]] = []
    inside = False
    for line in (ROOT / 'docs' / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            inside = False
        elif not inside:
            found.append((cells, []))
            inside = True
        elif not set(line) <= set('|-: '):
            found[-1][1].append(cells)
    return found


def test_no_result_without_a_log() -> None:
    counted = 0
    for header, rows in tables('reproduce.md'):
        for row in rows:
            assert len(row) == len(header), row
            if header[-1] == 'here':
                counted += 1
                log = re.search(r'\]\(([^)]+)\)', row[-1])
                assert row[-1] == 'not run yet' or (log and (ROOT / 'docs' / log[1]).exists()), row
    assert counted > 25


def test_every_recipe_of_the_readme_is_there() -> None:
    """With the same published figures."""
    readme, page = (ROOT / 'README.md').read_text(), (ROOT / 'docs' / 'reproduce.md').read_text()
    recipes = {}
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.split('|')]
        if len(cells) == 7 and re.fullmatch(r'`\w+`', cells[1]) and re.search(r'\d\d\.\d', cells[4]):
            recipes[cells[1].strip('`')] = re.findall(r'\d\d\.\d+', cells[4])
    assert len(recipes) == 10 and {'cifar100', 'imagenet', 'deit', 'evit', 'sketch'} <= set(recipes)
    for recipe, figures in recipes.items():
        rows = [line for line in page.splitlines() if f'run_code.sh {recipe}`' in line and line.startswith('|')]
        found = {figure for line in rows for figure in re.findall(r'\d\d\.\d+', line)}
        assert rows and set(figures) <= found, (recipe, figures, found)


def test_the_front_page_is_short() -> None:
    assert len((ROOT / 'README.md').read_bytes()) <= 12000


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To files, and to headings of pages; a page of docs/ begins with its table of contents."""

    def anchors(path: Path) -> set[str]:
        heads = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL), re.MULTILINE)
        return set(map(slug, heads))

    def slug(head: str) -> str:
        return re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-')

    path = (ROOT / 'docs' / page).resolve()
    text = BLOCK.sub('', path.read_text())
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        file, _, anchor = target.partition('#')
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
    if path.parent.name == 'docs':
        contents = set(re.findall(r'^- \[.*\]\(#([^)]+)\)$', text, re.MULTILINE))
        heads = re.findall(r'^## (.*)$', text, re.MULTILINE)
        assert contents >= set(map(slug, heads)) or len(heads) < 2
