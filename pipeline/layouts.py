"""How data sets lie on the disk: folders of classes, DomainNet's lists, Tiny-ImageNet's and iNaturalist's files.

Each `find_…` function gives the paths and labels of both splits, with one class map for both, without reading an image.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeVar

from pipeline.files import Found, Listing, note_left_out, note_special, read_file, walk
from utils import InputError, count, shorten

T = TypeVar('T')
INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
VAL_NAMES = ('val', 'valid', 'validation', 'test')  # the first of these that is there validates
CLASSES_FILE = 'classes.txt'  # one name a line: the order of the labels, where it is not that of the alphabet


class Split(NamedTuple):
    """The images of a split: paths relative to a folder, with slashes, and their class indices."""

    root: Path
    paths: list[str]
    targets: list[int]


class Layout(NamedTuple):
    """What lies on the disk. `train` is None where only evaluation was asked for; `notes` are for the user."""

    train: Split | None
    val: Split
    classes: list[str]
    notes: list[str]


def _nfc(name: str) -> str:
    """A class name in the one Unicode form that names are compared in: macOS writes another."""
    return unicodedata.normalize('NFC', name)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))


def _stop(error: OSError) -> NoReturn:
    raise InputError(f'{error.filename}: {error.strerror}') from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8-sig').splitlines()
    except OSError as err:
        raise InputError(f'{path}: {err.strerror}') from None
    except UnicodeDecodeError:
        raise InputError(f'{path} is not a text file in UTF-8') from None


# Folders


def _find_splits(root: Path) -> tuple[dict[str, str], list[str]]:
    """The names of the folders of train and val, whose case does not matter, and of others that could be val."""
    names = {name.lower(): name for name in _class_folders(root)} if root.is_dir() else {}
    found = [names[name] for name in VAL_NAMES if name in names]
    splits = {'train': names['train']} if 'train' in names else {}
    return {**splits, 'val': found[0]} if found else splits, found[1:]


def has_folders(root: Path, *, train: bool) -> bool:
    """Whether a folder holds the splits as folders. DomainNet has a class named train, so that alone says nothing."""
    splits, _ = _find_splits(root)
    return 'val' in splits and ('train' in splits or not train)


def find_folders(root: Path, *, train: bool) -> Layout:
    """Reads `train/<class>/…` and `val/<class>/…`, at any depth below the class. See `VAL_NAMES` for val's names.

    Classes are numbered in the order of their names, or of `classes.txt` if there is one. Tiny-ImageNet's val/images
    with val_annotations.txt is read as it is.

    Raises:
        InputError: if a folder is missing or empty, images lie outside class folders, or the splits share no class.
    """
    if not root.is_dir():
        raise InputError(f'{root}: no such folder; give the one that holds train/ and val/ with --data-path')
    folders, others = _find_splits(root)
    needed = ('train', 'val') if train else ('val',)
    absent = [split for split in needed if split not in folders]
    if absent:
        raise InputError(f'{root} has no folder {" and no folder ".join(absent)}; it needs <split>/<class>/<image>')
    notes = [f'{root}: {folders["val"]}/ validates; not read: {", ".join(others)}'] if others else []

    rows: dict[str, list[tuple[str, str]]] = {}
    names: dict[str, list[str]] = {}  # of the classes
    walked = []
    for split, folder in folders.items():
        rows[split] = _read_annotations(root / folder, notes)
        names[split] = [name for _, name in rows[split]] or list(map(_nfc, _class_folders(root / folder)))
    classes = _number_classes(root, sorted({name for found in names.values() for name in found}))
    for split in needed:
        if not rows[split]:
            walked.append(walk(root / folders[split], _stop))
            rows[split] = _in_class_folders(root / folders[split], walked[-1], notes)
    class_to_idx = {name: index for index, name in enumerate(classes)}
    used = [{name for _, name in rows[split]} or set(names[split]) for split in folders]
    _check_shared(root, f'{"/ and ".join(folders.values())}/', used)

    splits = {}
    for split in needed:
        folder = folders[split]
        if not rows[split]:
            raise InputError(f'{root / folder} holds no images (file names must end in .jpg, .png, …)')
        paths, labels = zip(*((f'{folder}/{path}', class_to_idx[name]) for path, name in rows[split]), strict=True)
        splits[split] = Split(root, list(paths), list(labels))
        notes += note_lacking(root / folder, labels, classes)
    return Layout(splits.get('train'), splits['val'], classes, notes + note_left_out(root, walked))


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


def _check_shared(where: Path, splits: str, names: Sequence[set[str]]) -> None:
    if len(names) == 2 and all(names) and not names[0] & names[1]:
        train, val = (shorten(sorted(found)) for found in names)
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
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            name, _, rest = line.partition('\t')
            label = rest.partition('\t')[0].strip()
            if not label or '/' in name:
                raise InputError(f'{path}, line {number}: {line!r} is not a file name, a tab and a class')
            rows.append((f'images/{name}', _nfc(label)))
    return sorted(_present(Listing(folder), rows, source=path, notes=notes))


def _number_classes(root: Path, found: list[str]) -> list[str]:
    """The class names in the order of their labels."""
    if not found:
        raise InputError(f'{root}: train/ and val/ hold no class folders; they need <split>/<class>/<image>')
    path = root / CLASSES_FILE
    if not path.is_file():
        return found
    classes = [_nfc(line) for line in _lines(path) if line.strip()]
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
    test: Path


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
        if lists.train.is_file() or lists.test.is_file():
            return lists
    return None


def read_list(path: Path) -> list[tuple[str, int]]:
    """Reads a list's lines, `<domain>/<class>/<file> <label>`, one space between them.

    Raises:
        InputError: with the line's number, for a line of another form or a path that leaves its folder.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(' ')
        parts = PurePosixPath(name).parts
        if not (label.isdecimal() and len(label) < 7) or len(parts) < 2 or parts[0] == '/' or '..' in parts:
            raise InputError(f'{path}, line {number}: {line!r} is not of the form domain/class/file label')
        rows.append((name, int(label)))
    if not rows:
        raise InputError(f'{path} is empty')
    return rows


def read_lists(lists: Lists) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Reads both lists; one of them may be absent. The class names, in the order of the labels, come from both.

    A label that neither names gets a name that says so.

    Raises:
        InputError: for a list that cannot be read, or lists that disagree about a class.
    """
    rows = {path.stem.rpartition('_')[2]: read_list(path) for path in (lists.train, lists.test) if path.is_file()}
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for split in rows.values():
        for path, label in split:
            name = _nfc(PurePosixPath(path).parent.name)
            if names.setdefault(label, name) != name or labels.setdefault(name, label) != label:
                raise InputError(
                    f'{lists.train} and {lists.test.name} disagree: label {label} is {names[label]!r} and {name!r}'
                    if names[label] != name
                    else f'{lists.train} and {lists.test.name} disagree: {name!r} is {labels[name]} and {label}'
                )
    return rows, [names.get(label, f'label {label}, which no list names') for label in range(max(names) + 1)]


def find_listed(lists: Lists, *, train: bool) -> Layout:
    """The images that the lists name, in their order, with their labels.

    Raises:
        InputError: if a list or an image is missing.
    """
    for path in (lists.train, lists.test) if train else (lists.test,):
        if not path.is_file():
            raise InputError(f'{path}: no such list; DomainNet has one for training and one for testing')
    rows, classes = read_lists(lists)
    used = [{classes[label] for _, label in split} for split in rows.values()]
    _check_shared(lists.root, f'{lists.train.name} and {lists.test.name}', used)
    splits: dict[str, Split] = {}
    notes: list[str] = []
    for name, source in (('train', lists.train), ('test', lists.test)):
        if name == 'test' or train:
            present = _present(Listing(lists.root), rows[name], source=source, notes=notes)
            paths, targets = map(list, zip(*present, strict=True))
            splits[name] = Split(lists.root, paths, targets)
            notes += note_lacking(source, targets, classes)
    listed = [name for split in rows.values() for name, _ in split]
    if len(set(listed)) < len(listed):
        again = [name for name, times in Counter(listed).items() if times > 1]
        notes.append(f'{lists.train} and {lists.test.name} name {count(again, "image")} more than once')
    return Layout(splits.get('train'), splits['test'], classes, notes)


def _present(listing: Listing, rows: list[tuple[str, T]], *, source: Path, notes: list[str]) -> list[tuple[str, T]]:
    """The rows whose first entry is a file; those where something else stands in its place are noted.

    Raises:
        InputError: if nothing is there for some, or no row is left.
    """
    absent = [path for path, _ in rows if path not in listing]
    if absent:
        where = listing.root
        raise InputError(f'{len(absent)} of the {len(rows)} images in {source} are not in {where}: {shorten(absent)}')
    special = {path: kind for path, _ in rows if (kind := listing.special_kind(path))}
    notes += note_special(source, [f'{path} ({kind})' for path, kind in special.items()])
    if rows and len(rows) == len(special):
        raise InputError(f'{source} names nothing that is an image file')
    return [row for row in rows if row[0] not in special]


# iNaturalist


def find_inaturalist(root: Path, *, year: int, category: str, train: bool) -> Layout:
    """Reads iNaturalist's train<year>.json, val<year>.json and categories.json.

    A label is the order of first appearance of its category in the training annotations. The images may lie in
    `train_val<year>/<super-category>/<id>/`, as they are unpacked, or without the super-category's folder, as DeiT's
    loader wants them.

    Args:
        root: the folder of the JSON files and of train_val<year>/.
        year: 2018 or 2019.
        category: one of `INAT_CATEGORIES`.
        train: whether the training split is needed; its annotations always are.

    Raises:
        InputError: if a file, a key or an image is missing.
    """
    names = _read_categories(root / 'categories.json', category)
    files = {split: root / f'{split}{year}.json' for split in ('train', 'val')}
    rows = {split: _read_inaturalist(path, names) for split, path in files.items()}
    classes = list(dict.fromkeys(rows['train'][0].values()))
    class_to_idx = {name: index for index, name in enumerate(classes)}
    unknown = sorted(set(rows['val'][0].values()) - set(classes))
    if unknown:
        raise InputError(f'{files["val"]} has {category} {shorten(unknown)}, which {files["train"].name} has not')
    listing = Listing(root)
    splits: dict[str, Split] = {}
    notes: list[str] = []
    for split, (label, images) in rows.items():
        if split == 'val' or train:
            absent = [str(number) for number in images if number not in label]
            if absent:
                raise InputError(f'{files[split]} has no annotation of {count(absent, "image id")}')
            listed = [(_on_disk(path, listing), class_to_idx[label[number]]) for number, path in images.items()]
            paths, targets = map(list, zip(*_present(listing, listed, source=files[split], notes=notes), strict=True))
            splits[split] = Split(root, paths, targets)
            notes += note_lacking(files[split], targets, classes)
    return Layout(splits.get('train'), splits['val'], classes, notes)


def _on_disk(path: str, listing: Listing) -> str:
    """`train_val2018/Plantae/7477/a.jpg`, or without its super-category if it lies so."""
    parts = path.split('/')
    if len(parts) == 4 and path not in listing:
        shorter = '/'.join([parts[0], *parts[2:]])
        if shorter in listing:
            return shorter
    return path


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except OSError as err:
        raise InputError(f"{path}: {err.strerror}; it comes with iNaturalist's annotations") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f'{path} is no JSON file: {err}') from None


def _get(entry: Any, key: str, where: str, kind: type = int) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise InputError(f'{where} has no key {key!r}')
    if not isinstance(entry[key], kind):
        raise InputError(f'{where} has {entry[key]!r:.40} as {key!r}')
    return entry[key]


def _read_categories(path: Path, category: str) -> dict[int, str]:
    """The value of a category level for each category id."""
    if category not in INAT_CATEGORIES:
        raise InputError(f'unknown category {category!r}; known are {", ".join(INAT_CATEGORIES)}')
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{path} is not a list of categories')
    names = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and category not in entry:
            known = [name for name in INAT_CATEGORIES if name in entry]
            raise InputError(f'{path}, entry {index} has no key {category!r}; --inat-category may be {shorten(known)}')
        where = f'{path}, entry {index}'
        number = _get(entry, 'id', where) if isinstance(entry, dict) and 'id' in entry else index
        names[number] = _get(entry, category, where, str)
    return names


def _read_inaturalist(path: Path, names: dict[int, str]) -> tuple[dict[int, str], dict[int, str]]:
    """The annotations' category names and the images' paths, both by image id in the file's order."""
    content = _read_json(path)
    annotations: dict[int, str] = {}
    images: dict[int, str] = {}
    for index, entry in enumerate(_get(content, 'annotations', str(path), list)):
        where = f'{path}, annotation {index}'
        category = _get(entry, 'category_id', where)
        if category not in names:
            raise InputError(f'{where} has category_id {category}, which categories.json has not')
        if annotations.setdefault(_get(entry, 'image_id', where), names[category]) != names[category]:
            raise InputError(f'{where} gives image {entry["image_id"]} a second category')
    for index, entry in enumerate(_get(content, 'images', str(path), list)):
        where = f'{path}, image {index}'
        file_name = _get(entry, 'file_name', where, str)
        if file_name.startswith('/') or '..' in file_name.split('/'):
            raise InputError(f'{where}: {file_name!r} leaves its folder')
        if images.setdefault(_get(entry, 'id', where), file_name) != file_name:
            raise InputError(f'{where} has the id of another image, {entry["id"]}')
    if not images:
        raise InputError(f'{path} has no images')
    return annotations, images
