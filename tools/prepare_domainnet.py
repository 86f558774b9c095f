"""Arranges a download of DomainNet into train/ and val/ folders: `python tools/prepare_domainnet.py ROOT OUT`.

main.py reads the download as it is; this is for programs that want folders, and for downloads with files missing.

ROOT holds <domain>_train.txt, <domain>_test.txt and the images, unpacked (<domain>/<class>/<file>) or in <domain>.zip.
OUT/<domain>/{train,val}/<class>/<file> become hard links where the file system allows it, else symbolic links, else
copies (as are files out of a zip). Nothing under ROOT is moved or changed. What is there already stays, so a second run
changes nothing and a stopped one goes on. OUT/<domain>/classes.txt holds the classes in the order of the lists' labels,
which is not that of the alphabet, so that main.py gives the folders the labels of the lists.
"""

from __future__ import annotations

import errno
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import FlagParser
from pipeline.layouts import CLASSES_FILE, Lists, read_lists
from training.checkpoint import remove_temporary, write_bytes
from training.lock import writing_to
from utils import InputError, count, one_line


def _symlink(source: Path, target: Path) -> None:
    target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))


METHODS: dict[str, Callable[[Path, Path], object]] = {
    'hard link': lambda source, target: target.hardlink_to(source.resolve()),  # not of a link, which may be relative
    'symbolic link': _symlink,
    'copy': lambda source, target: write_bytes(target, source.read_bytes()),
}
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EINVAL}


def get_args_parser() -> FlagParser:
    parser = FlagParser('prepare_domainnet.py', description='Arrange a DomainNet download into train/ and val/.')
    parser.add_argument('root', metavar='ROOT', type=os.path.abspath, help='the download')
    parser.add_argument('out', metavar='OUT', type=os.path.abspath, help='where <domain>/{train,val}/ are made')
    parser.add_argument('--domains', nargs='+', metavar='DOMAIN', help='those whose lists are in ROOT by default')
    parser.add_argument('--allow-missing', action='store_true', help='leave out listed files that are not there')
    return parser


def find_domains(root: Path) -> list[str]:
    """The domains whose lists lie in a folder, or in a domain's folder below it."""
    lists = [*root.glob('*_train.txt'), *root.glob('*/*_train.txt')]
    return sorted({path.name.removesuffix('_train.txt') for path in lists})


def find_sources(root: Path, domain: str) -> tuple[Lists, zipfile.ZipFile | None]:
    """A domain's lists, and its zip file if there is one."""
    folder = next((path for path in (root, root / domain) if (path / f'{domain}_train.txt').is_file()), root)
    lists = Lists(root, folder / f'{domain}_train.txt', folder / f'{domain}_test.txt')
    for path in lists[1:]:
        if not path.is_file():
            raise InputError(f'{path}: no such list; DomainNet has {domain}_train.txt and {domain}_test.txt')
    archive = next((path for path in (root / f'{domain}.zip', root / domain / f'{domain}.zip') if path.is_file()), None)
    if archive is None and not (root / domain).is_dir():
        raise InputError(f'{root} has neither the folder {domain} nor {domain}.zip')
    try:
        return lists, zipfile.ZipFile(archive) if archive is not None else None
    except Exception as err:  # zipfile raises several kinds on damaged files
        raise InputError(f'{archive} is no zip file, or a part of one ({one_line(err)}): download it again') from None


def link_or_copy(source: Path, target: Path, methods: list[str]) -> str:
    """Places a file by the first method that works here; those that do not are taken off the list."""
    target.unlink(missing_ok=True)  # a link that leads nowhere
    while True:
        try:
            METHODS[methods[0]](source, target)
            return methods[0]
        except OSError as err:
            if err.errno not in NO_LINKS or len(methods) == 1:
                raise
            methods.pop(0)


def read_member(archive: zipfile.ZipFile | None, name: str) -> bytes:
    """The bytes of a file in a zip file, which verifies its checksum."""
    assert archive is not None
    try:
        return archive.read(name)
    except Exception as err:  # zipfile and its decompressors raise several kinds on damaged files
        raise InputError(f'{archive.filename}: {name} is damaged ({one_line(err)}): download it again') from None


def prepare(root: Path, out: Path, domain: str, *, allow_missing: bool) -> str:
    """Arranges one domain; returns a line that says what was done."""
    lists, archive = find_sources(root, domain)
    folder = out / domain
    if folder.resolve() == (root / domain).resolve():
        raise InputError(f'{folder} holds the images by class, and DomainNet has a class "train": choose another OUT')
    rows, classes = read_lists(lists)
    members = set(archive.namelist()) if archive is not None else set()
    listed = [
        (name, folder / split / PurePosixPath(name).parent.name / PurePosixPath(name).name)
        for split in ('train', 'val')
        for name, _ in rows[split]
    ]
    times = Counter(target for _, target in listed)
    if len(times) < len(listed):
        again = [str(target) for target in times if times[target] > 1]
        raise InputError(f'{lists.train} and {lists.val.name} name {count(again, "file")} more than once')
    here = {name for name, _ in listed if (root / name).is_file()}  # no folders or broken links
    absent = [name for name, target in listed if name not in here and name not in members and not target.is_file()]
    if absent:
        print('\n'.join(f'missing: {name}' for name in absent))
        if not allow_missing:
            raise InputError(
                f'{len(absent)} of the {len(listed)} listed files of {domain} are missing: '
                'unpack it again, or leave them out with --allow-missing'
            )
    missing = set(absent)
    jobs = [(name, target) for name, target in listed if name not in missing]
    folder.mkdir(parents=True, exist_ok=True)
    with writing_to(folder):
        names = ('\n'.join(classes) + '\n').encode()
        path = folder / CLASSES_FILE
        if not path.exists():
            write_bytes(path, names)
        elif path.read_bytes() != names:
            raise InputError(f'{path} has other classes than the lists: remove it, or give another folder')
        for parent in {target.parent for _, target in jobs}:
            parent.mkdir(parents=True, exist_ok=True)
            remove_temporary(parent)
        done: Counter[str] = Counter()
        methods = list(METHODS)
        for name, target in tqdm(jobs, desc=domain, unit=' images'):
            try:
                if target.exists():
                    done['there already'] += 1
                elif name in here:
                    done[link_or_copy(root / name, target, methods)] += 1
                else:
                    write_bytes(target, read_member(archive, name))
                    done[f'out of {domain}.zip'] += 1
            except OSError as err:
                err.filename = err.filename or str(target)  # a full disk names no file
                raise
    others = [str(path) for path in folder.glob('*/*/*') if path not in times and not path.name.startswith('.')]
    if others:
        raise InputError(
            f'{folder} holds {count(others, "file")} that these lists do not name: remove what is not theirs'
        )
    counts = ', '.join(f'{number} {what}' for what, number in done.items())
    return f'{folder}: {len(jobs)} images in {len(classes)} classes ({counts}); {len(absent)} missing'


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    root, out = Path(args.root), Path(args.out)
    with one_line_errors('prepare_domainnet.py'):
        if not root.is_dir():
            raise InputError(f'{root}: no such folder')
        domains = args.domains or find_domains(root)
        if not domains:
            raise InputError(f'{root} has no lists such as clipart_train.txt')
        for domain in domains:
            print(prepare(root, out, domain, allow_missing=args.allow_missing), flush=True)


if __name__ == '__main__':
    main()
