"""Says whether this Python satisfies pyproject.toml: exit code 0 if it does, 1 and a line each for what does not.

Asks for what training needs, and runs without any package installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path


def required(pyproject: str, groups: list[str]) -> list[str]:
    """The requirement strings of `dependencies`, `train` and further optional groups, one quoted string a line.

    Read without tomllib, which Python 3.10 has not.
    """
    lines: list[str] = []
    for name in ['dependencies', 'train', *groups]:
        block = re.search(rf'^{name} = \[\n(.*?)^\]', pyproject, re.MULTILINE | re.DOTALL)
        if block is None:
            raise SystemExit(f'pyproject.toml has no list {name}')
        lines += re.findall(r'^ *"([^"]+)"', block.group(1), re.MULTILINE)
    return lines


def unmet(requirements: list[str]) -> list[str]:
    """Those that this Python does not satisfy, each with what is there instead."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # timm needs it too
        return ['packaging is not installed']
    problems = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f'{text} is not installed')
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f'{text} is needed, {version} is installed')
    return problems


def import_error() -> list[str]:
    """Why torchvision, which must have been built for the installed torch, cannot be imported; empty if it can."""
    try:
        import torchvision  # noqa: F401
    except Exception as err:  # a wrong build raises RuntimeError, OSError or others
        return [f'torchvision cannot be imported: {err}'.splitlines()[0]]
    return []


def main() -> None:
    parser = argparse.ArgumentParser('check_env.py', description=__doc__)
    parser.add_argument('groups', nargs='*', metavar='GROUP', help='optional one that must be there too, such as check')
    groups = parser.parse_args().groups
    if sys.version_info < (3, 10):  # noqa: UP036  this file runs before anything has checked it
        raise SystemExit(f'Python 3.10 or later is needed, this is {sys.version.split()[0]}')
    pyproject = (Path(__file__).resolve().parent.parent / 'pyproject.toml').read_text(encoding='utf-8')
    problems = unmet(required(pyproject, groups)) or import_error()
    if problems:
        raise SystemExit('\n'.join(problems))


if __name__ == '__main__':
    main()
