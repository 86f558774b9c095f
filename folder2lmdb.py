"""Writes a data set's images into LMDB files, and checks such files: `python folder2lmdb.py --help`.

The format, its writer and the data set that reads it are in lmdb_dataset.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Splits, build_datasets
from flags import FlagParser, add_data_flags, one_line_errors, usable_workers
from lmdb_dataset import ImageFolderLMDB, check_lmdb, same_images, write_lmdb
from utils import InputError, UsageError


def get_args_parser() -> FlagParser:
    parser = FlagParser('folder2lmdb.py', description='Write train.lmdb and val.lmdb, for main.py --use-lmdb.')
    parser.add_argument('--dir', type=os.path.abspath, help="the data set's folder, as main.py's --data-path")
    parser.add_argument('--out', type=os.path.abspath, help='folder of the LMDB files; --dir by default')
    parser.add_argument('--overwrite', action='store_true', help='replace LMDB files of other images')
    parser.add_argument('--check', nargs='+', metavar='FILE', help='check LMDB files instead: counts, checksums, '
                        'and that every image decodes')  # fmt: skip
    add_data_flags(parser, default='FOLDER')
    return parser


def build(
    splits: Splits, folder: Path, *, data_set: str, inat_category: str | None, overwrite: bool, workers: int
) -> None:
    """Writes both splits; a file that has a split's images already is kept.

    Raises:
        InputError: if a file has other images and `overwrite` is not set, or something cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for split, dataset in (('train', splits.train), ('val', splits.val)):
        assert dataset is not None
        path = folder / f'{split}.lmdb'
        if path.exists() and not overwrite:
            stored = ImageFolderLMDB(path)  # whose errors name --overwrite
            if (stored.data_set, stored.inat_category) != (data_set, inat_category) or not same_images(dataset, stored):
                raise InputError(
                    f'{path} exists and holds other images ({stored.data_set}): '
                    'give another folder with --out, or replace it with --overwrite'
                )
            print(f'{path}: complete, kept; --overwrite writes it again')
        else:
            jobs.append((dataset, path))
    for dataset, path in jobs:
        write_lmdb(dataset, path, data_set=data_set, inat_category=inat_category, workers=workers)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    args = get_args_parser().parse_args(argv)
    workers = usable_workers(args.num_workers)
    with one_line_errors('folder2lmdb.py'):
        if (args.check is None) == (args.dir is None):
            raise UsageError('give --dir ROOT to build, or --check FILE to check (see folder2lmdb.py --help)')
        if args.check is not None:
            for name in args.check:
                print(check_lmdb(Path(name), workers=workers), flush=True)
            return
        category = args.inat_category or ('name' if args.data_set in ('INAT', 'INAT19') else None)
        splits = build_datasets(args.data_set, args.dir, data_layout=args.data_layout, inat_category=category)
        for note in splits.notes:
            print(f'Note: {note}')
        build(
            splits,
            Path(args.out or args.dir),
            data_set=args.data_set,
            inat_category=category,
            overwrite=args.overwrite,
            workers=workers,
        )


if __name__ == '__main__':
    main()
