"""What the command lines share: a parser, types of numbers, the flags of the data, and errors of one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from datasets import DATA_SETS, find_name
from pipeline.inaturalist import INAT_CATEGORIES
from utils import InputError, UsageError, num_usable_cores

MAX_PIXELS = 8192  # of an image's side
MAX_BYTES = 2**20  # of a file of settings
MAX_LEVELS = 20
MAX_COUNT = 2**31 - 1  # of what flags count


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one to show: for None, '' and [] the text says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_switch = action.nargs == 0 and (not action.default or action.const is False)
        says_nothing = is_switch or action.default in (None, '', [])
        return action.help if says_nothing else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """Takes each long flag with hyphens and with underscores, and answers a wrong one in one line."""

    def __init__(self, prog: str, *, description: str, epilog: str = '') -> None:
        super().__init__(
            prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=HelpFormatter
        )
        self._negative_number_matcher = re.compile(r'-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$', re.IGNORECASE)  # with exponents

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        spellings = {name.replace('_', '-'): name for name in self._option_string_actions}
        normal = []
        for arg in sys.argv[1:] if args is None else args:
            flag, equals, value = arg.partition('=')
            normal.append(spellings.get(flag.replace('_', '-'), flag) + equals + value if arg[:2] == '--' else arg)
        return super().parse_known_args(normal, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def read_mapping(path: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds, of plain values.

    Raises:
        InputError: if it holds anything else, or is too large. Aliases are refused: a few make a value of any size.
        OSError: if it cannot be opened.
    """
    if Path(path).is_fifo():  # which would be waited for
        raise InputError(f'{path} is a named pipe, and no file')
    with open(path, 'rb') as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f'{path} has more than {MAX_BYTES} bytes: it is no file of settings')
    try:
        text = data.decode()
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_LEVELS:
                what = 'an alias (*)' if depth <= MAX_LEVELS else f'more than {MAX_LEVELS} levels'
                raise InputError(f'{path} has {what}: write plain values')
        found = yaml.safe_load(text)
        repr(found)  # fails for a whole number too large to be written
    except (yaml.YAMLError, ValueError) as err:
        raise InputError(f'{path} is not YAML of plain values: {" ".join(str(err).split())[:200]}') from None
    if not isinstance(found, dict):
        raise InputError(f'{path} does not hold settings, a line each: name: value')
    return found


def number(kind: type, *, low: float, high: float = float('inf'), low_open: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number within limits."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if low_open else low <= value) or not value <= high or value == float('inf'):
            limits = f'above {low:g}' if low_open else f'at least {low:g}'
            limits += f', at most {high:g}' if high < float('inf') else ''
            raise argparse.ArgumentTypeError(f'{text} must be {limits}')
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, FROM_ONE = number(int, low=0, high=MAX_COUNT), number(int, low=1, high=MAX_COUNT)
PIXELS = number(int, low=1, high=MAX_PIXELS)
AMOUNT, POSITIVE = number(float, low=0.0), number(float, low=0.0, low_open=True)
PROBABILITY, PART = number(float, low=0.0, high=1.0), number(float, low=0.0, high=1.0, low_open=True)
SEED = COUNT
SECONDS = number(float, low=0.0, high=1e6, low_open=True)  # of a wait: polls take no more milliseconds than 2**31


def output_file(*endings: str, devices: bool = False) -> Callable[[str], Path]:
    """An argparse type: a file to write, whose name ends as such files do, so that a slip replaces none of other kinds.

    Args:
        devices: pipes and devices may be written to, whatever their names.
    """

    def parse(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f'{text} is a folder: give the name of a file')
        device = path.exists() and not path.is_file()
        if not (devices if device else path.suffix.lower() in endings):
            raise argparse.ArgumentTypeError(f'{text} must be a file that ends in {" or ".join(endings)}')
        return path

    return parse


def refuse_inputs(flag: str, out: str | Path, inputs: Iterable[str]) -> None:
    """Raises UsageError if the file or folder that a flag has written is one that is read, or holds one."""
    out = Path(out)
    if not out.is_file() and not out.is_dir():  # devices may be both
        return
    for path in map(Path, filter(None, inputs)):
        if path.exists() and (out.samefile(path) or out.samefile(path.parent)):
            raise UsageError(f'{flag} {out} would replace {path}, which is read: give another name')


def data_set(text: str) -> str:
    """An argparse type: a name of the table of data sets, in its spelling."""
    try:
        return find_name(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from None


def add_data_flags(parser: Any, *, default: str) -> None:
    """The flags that say which data set is meant and how it lies on the disk."""
    parser.add_argument('--data-set', default=default, type=data_set, help=f"{', '.join(DATA_SETS)}, "
                        "or torch/NAME of torchvision's, hfds/NAME of the Hugging Face Hub or a folder")  # fmt: skip
    parser.add_argument('--data-layout', default='auto', choices=('auto', 'lists', 'folder'), help="how DomainNet's "
                        "and FOLDER's images lie: auto takes lists if there are any, else folders")  # fmt: skip
    parser.add_argument('--inat-category', choices=INAT_CATEGORIES, help="level of iNaturalist's labels (name)")
    parser.add_argument('--num_workers', type=COUNT, help='loader processes; 10, or fewer where there are fewer cores')


def usable_workers(asked: int | None, *, processes: int = 1) -> int:
    """The loader processes to start: as asked, else one for each core that `processes` share, at most 10."""
    return min(10, max(num_usable_cores() // processes, 1)) if asked is None else asked
