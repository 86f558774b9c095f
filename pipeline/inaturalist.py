"""iNaturalist's annotations and images as they lie on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.files import Listing, read_file
from pipeline.layouts import Layout, make_layout, present_rows
from utils import InputError, count, shorten

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')


def find_inaturalist(root: Path, *, year: int, category: str, train: bool) -> Layout:
    """Reads iNaturalist's train<year>.json, val<year>.json and categories.json.

    A label is the order of first appearance of its category in the training annotations. The images may lie in
    `train_val<year>/<super-category>/<id>/`, as they are unpacked, or without the super-category's folder, as DeiT's
    loader wants them.

    Args:
        root: the folder of the JSON files and of train_val<year>/.
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
    notes: list[str] = []
    present = {}
    for split in ('train', 'val') if train else ('val',):
        label, images = rows[split]
        absent = [str(number) for number in images if number not in label]
        if absent:
            raise InputError(f'{files[split]} has no annotation of {count(absent, "image id")}')
        listed = [(_on_disk(path, listing), class_to_idx[label[number]]) for number, path in images.items()]
        present[split] = present_rows(listing, listed, source=files[split], notes=notes)
    return make_layout(root, present, files, classes, notes)


def _on_disk(path: str, listing: Listing) -> str:
    """`train_val2018/Plantae/7477/a.jpg`, or without its super-category if it lies so."""
    top, *folders = path.split('/')
    shorter = '/'.join([top, *folders[1:]])
    lies_so = len(folders) == 3 and listing.kind(path) is None and listing.kind(shorter) is not None
    return shorter if lies_so else path


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
        where = f'{path}, entry {index}'
        if isinstance(entry, dict) and category not in entry:
            known = [name for name in INAT_CATEGORIES if name in entry]
            raise InputError(f'{where} has no key {category!r}; --inat-category may be {shorten(known)}')
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
