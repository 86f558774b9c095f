"""Files on the disk: the one walk over folders of images, and reading that waits for no pipe."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from pipeline.images import image_extensions
from utils import InputError, shorten

MAX_BYTES = 2**31  # of an image's file; no image that Pillow agrees to decode has more
KINDS = ((stat.S_ISREG, ''), (stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a named pipe'), (stat.S_ISSOCK, 'a socket'))


def special_kind(mode: int) -> str:
    """What stands in a file's place: 'a folder', 'a named pipe', 'a socket' or 'a device'; '' for a file."""
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), 'a device')


def read_file(path: str | Path) -> bytes:
    """The bytes of a file. What is no file is not opened: a pipe would be waited for.

    Raises:
        OSError, ValueError: with the reason, if they cannot be had.
    """
    status = os.stat(path)  # noqa: PTH116  quicker than pathlib
    if kind := special_kind(status.st_mode):
        raise ValueError(f'it is {kind}, not a file')
    if status.st_size > MAX_BYTES:
        raise ValueError(f'it has {status.st_size:,} bytes, more than an image can have')
    with open(path, 'rb') as file:
        return file.read()


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return '' if entry.is_file() else special_kind(entry.stat().st_mode)
    except OSError:  # a broken link: whoever reads it learns why
        return ''


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # other errors do not say that nothing is there


class Listing:
    """What lies below a folder: each folder is read once, which a file system far away does fast."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, dict[str, str]] = {}

    def kind(self, path: str) -> str | None:
        """What special kind stands there, '' for a file; None where nothing does."""
        folder, _, name = path.rpartition('/')
        if folder not in self._found:
            try:
                self._found[folder] = {entry.name: _kind(entry) for entry in os.scandir(self.root / folder)}
            except (OSError, ValueError) as err:  # the latter for a null byte
                if isinstance(err, OSError) and err.errno not in ABSENT:
                    raise
                self._found[folder] = {}
        return self._found[folder].get(name)


class Found(NamedTuple):
    """What `walk` found below a folder.

    Args:
        images: the names of the images in each folder that has some, sorted; '' is the folder itself.
        special: paths that end as images do and are no files, each with what it is.
        others: the endings of the other files in each folder that has some.
    """

    images: dict[str, list[str]]
    special: list[str]
    others: dict[str, list[str]]


def _stop(error: OSError) -> NoReturn:
    raise InputError(f'{error.filename}: {error.strerror}') from None


def walk(root: str | Path, fail: Callable[[OSError], object] = _stop) -> Found:
    """Finds the images in a folder and those below it; hidden files and folders are left out.

    Links are followed, and each real folder is read once: by its own name if it lies below `root`.

    Args:
        fail: called with the error of a folder that cannot be read, or of a link that leads nowhere and is not named
            as an image; it is then left out.

    Raises:
        InputError: for one of these, unless `fail` is given.
    """
    extensions = image_extensions()
    found = Found({}, [], {})
    seen: set[tuple[int, int]] = set()
    pending = deque([''])  # folders; those behind links come last
    while pending:
        folder = pending.popleft()
        try:
            where = os.path.join(root, folder)  # noqa: PTH118  keeps the path as it was given
            status = os.stat(where)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(where) as entries:
                shown = sorted((e for e in entries if not e.name.startswith('.')), key=lambda entry: entry.name)
        except OSError as err:
            fail(err)
            continue
        images: list[str] = []
        below: list[str] = []
        for entry in shown:
            ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  a million times
            kind = _kind(entry)
            if kind == 'a folder':
                path = f'{folder}/{entry.name}' if folder else entry.name
                (pending if entry.is_symlink() else below).append(path)
            if ending not in extensions:
                if not kind and entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110  perhaps of a folder
                    fail(OSError(errno.ENOENT, 'a link that leads nowhere', entry.path))
                elif not kind:
                    found.others.setdefault(folder, []).append(ending)
            elif kind:
                found.special.append(f'{entry.path} ({kind})')
            else:
                images.append(entry.name)
        pending.extendleft(reversed(below))
        if images:
            found.images[folder] = images
    return found


def note_special(where: str | Path, special: list[str]) -> list[str]:
    """A note on what is no file where an image is expected, if there is any."""
    return [f'{where}: left out, as no image files: {shorten(special)} ({len(special)} in all)'] if special else []


def note_left_out(where: str | Path, found: Iterable[Found]) -> list[str]:
    """Notes on what walks left out, if anything: one on special files, one on files with other endings."""
    found = list(found)
    others = Counter(ending for part in found for endings in part.others.values() for ending in endings)
    endings = [ending or 'without an ending' for ending, _ in others.most_common()]
    number = others.total()
    notes = [f'{where}: {number} file{"s" * (number > 1)} left out: {shorten(endings)}'] if number else []
    return note_special(where, [path for part in found for path in part.special]) + notes
