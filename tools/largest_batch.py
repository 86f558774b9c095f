"""Which --batch-size fits 8, 16 and 24 GiB, by the peak memory of training steps on the CPU.

    python tools/largest_batch.py --model dhvt_tiny_imagenet_patch16 --input-size 224

For the flags of main.py alone, with --grad-checkpointing and with --accum-steps 2. Each peak is that of a process of
its own (its largest resident memory, program included) after three steps of `tools/benchmark.py step`; the largest
batch lies on the straight line through the peaks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.arguments import parse_args
from config.errors import one_line_errors
from config.flags import FROM_ONE, FlagParser
from utils import InputError, UsageError

MEMORY_GIB = (8, 16, 24)
FLAG_SETS: tuple[list[str], ...] = ([], ['--grad-checkpointing'], ['--accum-steps', '2'])


def get_args_parser() -> FlagParser:
    description = "The largest --batch-size in 8, 16 and 24 GiB. Further flags are main.py's."
    parser = FlagParser('largest_batch.py', description=description)
    parser.add_argument('--batch-sizes', type=FROM_ONE, nargs='+', default=[16, 32, 48], help='that are measured')
    return parser


def peak_memory(flags: Sequence[str]) -> float:
    """GiB that three training steps have held at most.

    Raises:
        InputError: if they fail.
    """
    tool = str(Path(__file__).with_name('benchmark.py'))
    command = [sys.executable, tool, 'step', '--device', 'cpu', '--rounds', '1', '--seconds', '1e-9', *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f'{" ".join(flags)}: exit code {process.returncode}')
    return usage.ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20)  # of bytes there, of KiB elsewhere


def main(argv: Sequence[str] | None = None) -> None:
    args, flags = get_args_parser().parse_known_args(argv)
    sizes = args.batch_sizes
    with one_line_errors('largest_batch.py'):
        if len(set(sizes)) < 2:
            raise UsageError('--batch-sizes: a line needs two sizes at least')
        parse_args(flags)
        titles = [*(f'batch {size}, GiB' for size in sizes), *(f'largest in {room} GiB' for room in MEMORY_GIB)]
        print(f'| | {" | ".join(titles)} |\n{"|---" * (len(titles) + 1)}|')
        for further in FLAG_SETS:
            peaks = [peak_memory([*flags, *further, '--batch-size', str(size)]) for size in sizes]
            image, rest = np.polyfit(sizes, peaks, 1)
            cells = [
                *(f'{peak:.2f}' for peak in peaks),
                *(f'{max((room - rest) // image, 0):.0f}' for room in MEMORY_GIB),
            ]
            print(f'| {" ".join(further) or "plain"} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
