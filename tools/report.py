"""Draws runs: `python tools/report.py OUTPUT [OUTPUT …]` makes one HTML file that needs no network, and its PNGs.

Curves, speed, the arguments that differ, mean and spread over seeds, and what the best run's best checkpoint does with
each test image. main.py makes the report of a run, report.html in its folder, once the run is over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import COUNT, FlagParser, output_file
from pipeline.workers import no_children_left
from reports import page


def get_args_parser() -> FlagParser:
    parser = FlagParser('report.py', description='Draw runs of main.py: an HTML file with everything inside, and PNGs.')
    parser.add_argument('folders', nargs='+', type=Path, metavar='OUTPUT', help="a run's --output_dir")
    parser.add_argument('--out', type=output_file('.html'),
                        help='the HTML file; report.html, in the folder of the run if it is one')  # fmt: skip
    parser.add_argument('--no-predictions', dest='predictions', action='store_false',
                        help='leave out what needs the checkpoint and images')  # fmt: skip
    parser.add_argument('--mistakes', default=24, type=COUNT, help='how many of the most confident mistakes are shown')
    parser.add_argument('--data-path', type=os.path.abspath, help='where the images are now, if they were moved')
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    parser.add_argument('--num_workers', type=COUNT, help='loader processes; 10, or fewer where there are fewer cores')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with one_line_errors('report.py'), no_children_left():
        made = page.make(**vars(args))
        print(f'{made}, and PNGs in {made.stem}_figures')


if __name__ == '__main__':
    main()
