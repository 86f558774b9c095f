"""How data sets lie on the disk: folders of classes, DomainNet's lists, Tiny-ImageNet's files.

Each `find_…` function gives the paths and labels of both splits, with one class map for both, without reading an image.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from pipeline.files import Found, Listing, note_left_out, note_special, walk
from utils import InputError, count, shorten

T = TypeVar('T')
Rows = dict[str, list[tuple[str, int]]]  # paths and labels of each split
VAL_NAMES = ('val', 'valid', 'validation', 'test')  # the first of these that is there validates; test/ tests then
CLASSES_FILE = 'classes.txt'  # one name a line: the order of the labels, where it is not that of the alphabet


class Split(NamedTuple):
    """The images of a split: paths relative to a folder, with slashes, and their class indices."""

    root: Path
    paths: list[str]
    targets: list[int]


class Layout(NamedTuple):
    """What lies on the disk: those of the splits 'train', 'val' and 'test' that are needed, and notes for the user."""

    splits: dict[str, Split]
    classes: list[str]
    notes: list[str]


def evaluated_split(splits: Container[str]) -> str:
    """Which of the splits an evaluation alone is of: 'test' where that stands beside 'val'."""
    return 'test' if 'test' in splits else 'val'


def make_layout(root: Path, rows: Rows, sources: Mapping[str, Path], classes: list[str], notes: list[str]) -> Layout:
    """What lies below `root`, from the rows of its splits; `sources` are what notes call these."""
    splits = {split: Split(root, *map(list, zip(*listed, strict=True))) for split, listed in rows.items()}
    lacking = [note for name, split in splits.items() for note in note_lacking(sources[name], split.targets, classes)]
    return Layout(splits, classes, notes + lacking)


def _nfc(name: str) -> str:
    """A class name in the one Unicode form that names are compared in: macOS writes another."""
    return unicodedata.normalize('NFC', name)


def _folders(parent: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith('.'))


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1 on."""
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except OSError as err:
        raise InputError(f'{path}: {err.strerror}') from None
    except UnicodeDecodeError:
        raise InputError(f'{path} is not a text file in UTF-8') from None
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


# Folders


def _find_splits(root: Path) -> tuple[dict[str, str], list[str]]:
    """The names of the folders of train, val and test, whose case does not matter, and of others that could be val."""
    folders = _folders(root) if root.is_dir() else []
    names = {name.lower(): name for name in folders}  # of `Train` and `train` the latter
    found = [name for name in VAL_NAMES if name in names]
    places = {'train': 'train', 'val': found[0] if found else '', 'test': 'test' if found[:-1] else ''}
    splits = {split: names[name] for split, name in places.items() if name in names}
    again = [name for name in folders if name.lower() in ('train', *VAL_NAMES) and name != names[name.lower()]]
    return splits, [names[name] for name in found[1:] if name != 'test'] + again


def has_folders(root: Path, *, train: bool) -> bool:
    """Whether a folder holds the splits as folders. DomainNet has a class named train, so that alone says nothing."""
    splits, _ = _find_splits(root)
    return 'val' in splits and ('train' in splits or not train)


def find_folders(root: Path, *, train: bool) -> Layout:
    """Reads `train/<class>/…` and `val/<class>/…`, at any depth below the class. See `VAL_NAMES` for val's names.

    Classes are numbered in the order of their names, or of `classes.txt` if there is one. Tiny-ImageNet's val/images
    with val_annotations.txt is read as it is. Where test/ stands beside val/ and has a class of theirs, it is the test
    split, which evaluation alone reads in place of val/.

    Raises:
        InputError: if a folder is missing or empty, images lie outside class folders, or the splits share no class.
    """
    if not root.is_dir():
        raise InputError(f'{root}: no such folder; give the one that holds train/ and val/ with --data-path')
    folders, others = _find_splits(root)
    absent = [split for split in (('train', 'val') if train else ('val',)) if split not in folders]
    if absent:
        raise InputError(f'{root} has no folder {" and no folder ".join(absent)}; it needs <split>/<class>/<image>: '
                         'give the folder that holds train/ and val/ with --data-path')  # fmt: skip
    notes: list[str] = []
    sources = {split: root / folder for split, folder in folders.items()}
    rows = {split: _read_annotations(folder, notes) for split, folder in sources.items()}
    names = {
        split: {name for _, name in rows[split]} or set(map(_nfc, _folders(folder)))
        for split, folder in sources.items()
    }
    tests = names.pop('test', set())
    if tests.isdisjoint(set().union(*names.values())):  # as ImageNet's, whose images have no labels
        others += [folders['test']] if 'test' in folders else []
    else:
        names['test'] = tests
        if not train:
            notes.append(f'{root}: {folders["test"]}/ is evaluated, not {folders["val"]}/')
    if others:
        notes.append(f'{root}: {folders["val"]}/ validates; not read: {", ".join(others)}')
    needed = list(names) if train else [evaluated_split(names)]
    classes = _number_classes(root, sorted(set().union(*names.values())))
    walked = []
    for split in needed:
        if not rows[split]:
            walked.append(walk(sources[split]))
            rows[split] = _in_class_folders(sources[split], walked[-1], notes)
            if not rows[split]:
                raise InputError(f'{sources[split]} holds no images (file names must end in .jpg, .png, …)')
            names[split] = {name for _, name in rows[split]}
    _check_shared(root, f'{folders.get("train")}/ and {folders["val"]}/', names)

    class_to_idx = {name: index for index, name in enumerate(classes)}
    numbered = {
        split: [(f'{folders[split]}/{path}', class_to_idx[name]) for path, name in rows[split]] for split in needed
    }
    return make_layout(root, numbered, sources, classes, notes + note_left_out(root, walked))


def _in_class_folders(folder: Path, found: Found, notes: list[str]) -> list[tuple[str, str]]:
    """The paths and class names of a split's images, in torchvision's order; those outside class folders are noted."""
    outside = found.images.pop('', [])
    found.others.pop('', None)  # a README beside the class folders
    rows = [
        (f'{below}/{name}', _nfc(below.partition('/')[0]))
        for below in sorted(found.images, key=lambda path: path.partition('/'))
        for name in found.images[below]
    ]
    if outside and not rows:
        raise InputError(
            f'{folder} holds {count(outside, "image")} outside class folders: move each into the folder of its class, '
            f"{folder.name}/<class>/<image>; for ImageNet's val the script valprep.sh does so"
        )
    if outside:
        notes.append(f'{folder}: left out, as outside class folders: {count(outside, "image")}')
    return rows


def _check_shared(where: Path, splits: str, names: Mapping[str, set[str]]) -> None:
    if names.get('train') and names['val'] and names['train'].isdisjoint(names['val']):
        train, val = (shorten(sorted(names[split])) for split in ('train', 'val'))
        raise InputError(
            f'{where}: {splits} share no class ({train} | {val}): both need the same class folders, '
            '<split>/<class>/<image>'
        )


def note_lacking(where: Path | str, targets: Iterable[int], classes: Sequence[str]) -> list[str]:
    """A note on classes without images, if there are any."""
    present = set(targets)
    lacking = [name for index, name in enumerate(classes) if index not in present]
    if not lacking:
        return []
    return [f'{where} has no images of {len(lacking)} of the {len(classes)} classes: {shorten(lacking)}']


def _read_annotations(folder: Path, notes: list[str]) -> list[tuple[str, str]]:
    """Paths and class names of Tiny-ImageNet's validation split, sorted; none if this is not one."""
    path = folder / 'val_annotations.txt'
    if not (path.is_file() and (folder / 'images').is_dir()):
        return []
    rows = []
    for number, line in _lines(path):
        name, _, rest = line.partition('\t')
        label = rest.partition('\t')[0].strip()
        if not label or '/' in name:
            raise InputError(f'{path}, line {number}: {line!r} is not a file name, a tab and a class')
        rows.append((f'images/{name}', _nfc(label)))
    return sorted(present_rows(Listing(folder), rows, source=path, notes=notes))


def _number_classes(root: Path, found: list[str]) -> list[str]:
    """The class names in the order of their labels."""
    if not found:
        raise InputError(f'{root}: train/ and val/ hold no class folders; they need <split>/<class>/<image>')
    path = root / CLASSES_FILE
    if not path.is_file():
        return found
    classes = [_nfc(line) for _, line in _lines(path)]
    unknown = sorted(set(found) - set(classes))
    if unknown or len(set(classes)) < len(classes):
        problem = f'lacks {count(unknown, "class folder")}' if unknown else 'names a class twice'
        raise InputError(f'{path} {problem}: mend it, or remove it to number the classes in the order of their names')
    return classes


# Lists


class Lists(NamedTuple):
    """Where a domain's lists lie, and the folder that their paths start from."""

    root: Path
    train: Path
    val: Path


def find_lists(path: Path, domain: str | None) -> Lists | None:
    """Looks for `<domain>_train.txt` and `<domain>_test.txt` at `path`, in its folder `<domain>`, or above if `path`
    is that folder; without a domain, for the one that has lists.

    Raises:
        InputError: if several domains have lists there.
    """
    if domain is None:
        names = sorted(file.name.removesuffix('_train.txt') for file in path.glob('*_train.txt'))
        names = [name for name in names if (path / name).is_dir() or path.name == name]
        if len(names) > 1:
            raise InputError(f'{path} has lists of {shorten(names)}: choose one with --data-path {path / names[0]}')
        domain = names[0] if names else path.name
    root = path if (path / domain).is_dir() else path.parent if path.name == domain else None
    if root is None:
        return None
    for folder in (root, root / domain):
        lists = Lists(root, folder / f'{domain}_train.txt', folder / f'{domain}_test.txt')
        if lists.train.is_file() or lists.val.is_file():
            return lists
    return None


def read_list(path: Path) -> list[tuple[str, int]]:
    """Reads a list's lines, `<domain>/<class>/<file> <label>`, one space between them.

    Raises:
        InputError: with the line's number, for a line of another form or a path that leaves its folder.
    """
    rows = []
    for number, line in _lines(path):
        name, _, label = line.strip().rpartition(' ')
        parts = PurePosixPath(name).parts
        if not (label.isdecimal() and len(label) < 7) or len(parts) < 2 or parts[0] == '/' or '..' in parts:
            raise InputError(f'{path}, line {number}: {line!r} is not of the form domain/class/file label')
        rows.append((name, int(label)))
    if not rows:
        raise InputError(f'{path} is empty')
    return rows


def read_lists(lists: Lists) -> tuple[Rows, list[str]]:
    """Reads both lists; one of them may be absent. The class names, in the order of the labels, come from both.

    A label that neither names gets a name that says so.

    Raises:
        InputError: for a list that cannot be read, or lists that disagree about a class.
    """
    rows = {split: read_list(path) for split, path in (('train', lists.train), ('val', lists.val)) if path.is_file()}
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for split in rows.values():
        for path, label in split:
            name = _nfc(PurePosixPath(path).parent.name)
            if names.setdefault(label, name) != name or labels.setdefault(name, label) != label:
                relabeled = f'{name!r} is {labels.get(name)} and {label}'
                problem = relabeled if names[label] == name else f'label {label} is {names[label]!r} and {name!r}'
                raise InputError(f'{lists.train} and {lists.val.name} disagree: {problem}')
    return rows, [names.get(label, f'label {label}, which no list names') for label in range(max(names) + 1)]


def find_listed(lists: Lists, *, train: bool) -> Layout:
    """The images that the lists name, in their order, with their labels.

    Raises:
        InputError: if a list or an image is missing.
    """
    sources = {'train': lists.train, 'val': lists.val} if train else {'val': lists.val}
    for path in sources.values():
        if not path.is_file():
            raise InputError(f'{path}: no such list; DomainNet has one for training and one for testing')
    rows, classes = read_lists(lists)
    used = {split: {classes[label] for _, label in listed} for split, listed in rows.items()}
    _check_shared(lists.root, f'{lists.train.name} and {lists.val.name}', used)
    listing = Listing(lists.root)
    notes: list[str] = []
    present = {split: present_rows(listing, rows[split], source=path, notes=notes) for split, path in sources.items()}
    listed = Counter(name for split in rows.values() for name, _ in split)
    again = [name for name, times in listed.items() if times > 1]
    if again:
        notes.append(f'{lists.train} and {lists.val.name} name {count(again, "image")} more than once')
    return make_layout(lists.root, present, sources, classes, notes)


def present_rows(listing: Listing, rows: list[tuple[str, T]], *, source: Path, notes: list[str]) -> list[tuple[str, T]]:
    """The rows whose first entry is a file; those where something else stands in its place are noted.

    Raises:
        InputError: if nothing is there for some, or no row is left.
    """
    kinds = [listing.kind(path) for path, _ in rows]
    absent = [path for (path, _), kind in zip(rows, kinds, strict=True) if kind is None]
    if absent:
        where = listing.root
        raise InputError(f'{len(absent)} of the {len(rows)} images in {source} are not in {where}: {shorten(absent)}')
    special = {path: kind for (path, _), kind in zip(rows, kinds, strict=True) if kind}
    notes += note_special(source, [f'{path} ({kind})' for path, kind in special.items()])
    if rows and len(rows) == len(special):
        raise InputError(f'{source} names nothing that is an image file')
    return [row for row in rows if row[0] not in special]
