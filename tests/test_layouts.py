"""layouts.py: lists, folders, Tiny-ImageNet and iNaturalist as they lie on the disk, and parts of the training set."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import DATA_SETS, DOMAINNET, DataSource, build_datasets, stratified_subset
from folder2lmdb import main as build_lmdb
from main import main
from pipeline.files import Listing
from pipeline.images import ImageDataset
from tests.conftest import PLAIN, SMALL_MODEL, make_lists
from utils import InputError, UsageError

MakeFolder = Callable[..., Path]

# As in DomainNet's painting lists: train lacks t-shirt, test lacks its neighbour syringe; labels are in no order.
CLASSES = {'zebra': 0, 'syringe': 2, 't-shirt': 1, 'apple': 3}
PAINTING = {
    'train': [(f'{name}/{i}.jpg', CLASSES[name]) for name in ('zebra', 'syringe', 'apple') for i in (1, 2)],
    'test': [(f'{name}/{i}.jpg', CLASSES[name]) for name in ('apple', 't-shirt', 'zebra') for i in (3, 4)],
}


def labels(dataset: Any) -> dict[str, int]:
    return {Path(path).parent.name: target for path, target in dataset.samples}


@pytest.mark.parametrize('where', ['root', 'domain folder', 'lists inside', 'lists inside, domain folder'])
def test_lists_share_one_class_map(tmp_path: Path, where: str) -> None:
    root = make_lists(tmp_path, 'painting', PAINTING)
    if 'inside' in where:
        for split in PAINTING:
            (root / f'painting_{split}.txt').rename(root / 'painting' / f'painting_{split}.txt')
    splits = build_datasets(DataSource('painting', str(root / 'painting' if 'domain folder' in where else root)))
    assert splits.train is not None and splits.num_classes == 345
    assert labels(splits.train) == {'zebra': 0, 'syringe': 2, 'apple': 3}
    assert labels(splits.val) == {'zebra': 0, 't-shirt': 1, 'apple': 3}
    assert splits.train.classes == splits.val.classes == ['zebra', 't-shirt', 'syringe', 'apple']
    assert splits.train.class_to_idx == CLASSES
    assert [name for name, _ in splits.train.samples] == [
        str(root / 'painting' / name) for name, _ in PAINTING['train']
    ]
    assert splits.train[2][1] == 2 and splits.train[2][0].size == (20, 20)
    lacking = [note for note in splits.notes if 'no images of 1 of the 4 classes' in note]
    assert len(lacking) == 2 and 't-shirt' in lacking[0] and 'syringe' in lacking[1]


def test_counts_of_the_published_table(tmp_path: Path) -> None:
    notes = build_datasets(DataSource('painting', str(make_lists(tmp_path, 'painting', PAINTING)))).notes
    assert any('6 train images, painting is published with 50416' in note for note in notes)
    assert any('6 val images, painting is published with 21850' in note for note in notes)
    assert sum(sum(DATA_SETS[name].images) for name in DOMAINNET) == 586575  # the paper's total


def test_a_folder_that_has_both_layouts(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = make_lists(make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}), 'painting', PAINTING)
    splits = build_datasets(DataSource('painting', str(root)))
    assert len(splits.val) == 6 and any('the lists are used' in note for note in splits.notes)
    splits = build_datasets(DataSource('painting', str(root), layout='folder'))
    assert len(splits.val) == 16 and splits.val.classes == ['a', 'b']
    splits = build_datasets(DataSource('painting', str(root), layout='lists'))
    assert len(splits.val) == 6 and not any('are used' in note for note in splits.notes)


def test_a_class_named_train_is_no_split(tmp_path: Path) -> None:
    rows = {split: [('train/1.jpg', 1), ('bus/1.jpg', 0)] for split in ('train', 'test')}
    root = make_lists(tmp_path, 'real', rows)
    splits = build_datasets(DataSource('real', str(root / 'real')))
    assert splits.val.classes == ['bus', 'train'] and not any('are used' in note for note in splits.notes)
    (root / 'real_train.txt').unlink()
    (root / 'real_test.txt').unlink()
    with pytest.raises(InputError, match=r'neither the lists real_train\.txt'):
        build_datasets(DataSource('real', str(root)))


def test_folders_of_a_domain_below_the_root(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['b', 'a'], 'val': ['a']}, name='sketch')
    for path in (root, root.parent):
        assert labels(build_datasets(DataSource('sketch', str(path))).train) == {'a': 0, 'b': 1}
    (root / 'classes.txt').write_text('b\nc\na\n')
    splits = build_datasets(DataSource('sketch', str(root)))
    assert labels(splits.train) == {'a': 2, 'b': 0} and splits.val.classes == ['b', 'c', 'a']
    for text, message in (('b\n', r'lacks 1 class folder \(a\)'), ('a\nb\na\n', 'names a class twice')):
        (root / 'classes.txt').write_text(text)
        with pytest.raises(InputError, match=message):
            build_datasets(DataSource('sketch', str(root)))


def test_any_lists_as_folder(tmp_path: Path) -> None:
    root = make_lists(tmp_path, 'cartoon', PAINTING)
    assert build_datasets(DataSource('FOLDER', str(root))).num_classes == 4
    make_lists(root, 'photo', PAINTING)
    with pytest.raises(InputError, match=r'lists of cartoon, photo: choose one with --data-path .*cartoon'):
        build_datasets(DataSource('FOLDER', str(root)))
    assert len(build_datasets(DataSource('FOLDER', str(root / 'photo'))).val) == 6
    with pytest.raises(InputError, match='no folder train'):
        build_datasets(DataSource('FOLDER', str(root), layout='folder'))


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('painting/apple/1.jpg', r'painting_train\.txt, line 7: .* is not of the form'),
        ('painting/apple/1.jpg x', 'line 7'),
        ('painting/apple/1.jpg -1', 'line 7'),
        ('painting/apple/1.jpg 99999999', 'line 7'),
        ('../secret/1.jpg 1', 'line 7'),
        ('/etc/apple/1.jpg 1', 'line 7'),
        ('painting/apple/1.jpg 7', "disagree: 'apple' is 3 and 7"),
        ('painting/pear/1.jpg 3', "disagree: label 3 is 'apple' and 'pear'"),
        (
            'painting/apple/77.jpg 3',
            r'1 of the 7 images in .*_train\.txt are not in .*: painting/apple/77\.jpg',
        ),
    ],
)
def test_wrong_lists(tmp_path: Path, line: str, message: str) -> None:
    root = make_lists(tmp_path, 'painting', PAINTING)
    with open(root / 'painting_train.txt', 'a') as file:
        file.write(line + '\n')
    with pytest.raises(InputError, match=message):
        build_datasets(DataSource('painting', str(root)))


def test_missing_lists(tmp_path: Path) -> None:
    root = make_lists(tmp_path, 'painting', PAINTING)
    (root / 'painting_test.txt').write_text('')
    with pytest.raises(InputError, match=r'painting_test\.txt is empty'):
        build_datasets(DataSource('painting', str(root)))
    (root / 'painting_test.txt').unlink()
    with pytest.raises(InputError, match=r'painting_test\.txt: no such list'):
        build_datasets(DataSource('painting', str(root)))
    with pytest.raises(InputError, match=r'has no lists clipart_train\.txt'):
        build_datasets(DataSource('clipart', str(root), layout='lists'))


@pytest.mark.parametrize('name', ['FOLDER', 'TINYIMNET'])
def test_tiny_imagenet_as_it_is_unpacked(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({'train': ['n02/images', 'n01/images'], 'val': ['images']}, images=3)
    for wnid in ('n01', 'n02'):
        (root / 'train' / wnid / f'{wnid}_boxes.txt').write_text('0.jpg\t0\t0\t62\t62\n')
    rows = [('1.jpg', 'n01'), ('0.jpg', 'n02'), ('2.jpg', 'n02')]
    text = ''.join(f'{file}\t{wnid}\t0\t0\t62\t62\n' for file, wnid in rows)
    (root / 'val' / 'val_annotations.txt').write_text(text)
    splits = build_datasets(DataSource(name, str(root)))
    assert splits.num_classes == (200 if name == 'TINYIMNET' else 2)
    assert splits.train is not None and splits.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert [splits.val.name(i) for i in range(3)] == [f'val/images/{i}.jpg' for i in range(3)]
    assert splits.val.targets.tolist() == [1, 0, 1]
    assert splits.val.targets.tolist() == build_datasets(DataSource(name, str(root)), train=False).val.targets.tolist()
    (root / 'val' / 'val_annotations.txt').write_text(text + '7.jpg\tn01\t0\t0\t1\t1\n')
    with pytest.raises(InputError, match='1 of the 4 images'):
        build_datasets(DataSource(name, str(root)))
    (root / 'val' / 'val_annotations.txt').write_text('0.jpg n01\n')
    with pytest.raises(InputError, match='line 1'):
        build_datasets(DataSource(name, str(root)))


def make_inaturalist(root: Path, *, year: int = 2018, with_super: bool = True) -> Path:
    """Five categories; the training annotations name them in the order 3, 1, 4, 0; the images in another."""
    levels = ('kingdom', 'phylum', 'class', 'order', 'family', 'genus', 'name')
    categories = [
        {'id': i, **{level: f'{level} {i // 2 if level != "name" else i}' for level in levels}} for i in range(5)
    ]
    if year == 2018:
        categories = [{**entry, 'supercategory': 'Plantae' if i < 3 else 'Aves'} for i, entry in enumerate(categories)]
    (root / 'categories.json').write_text(json.dumps(categories))
    number = 0
    for split, order in (('train', [3, 1, 4, 0, 1]), ('val', [0, 1, 3, 4])):
        images, annotations = [], []
        for category in order:
            number += 1
            top = 'Plantae' if category < 3 else 'Aves'
            name = f'train_val{year}/{top}/{category}/{number}.jpg'
            images.append({'id': number, 'file_name': name, 'height': 20, 'width': 20, 'license': 3})
            annotations.append({'image_id': number, 'category_id': category, 'id': number})
            path = root / (name if with_super else name.replace(f'{top}/', ''))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (20, 20), (number * 20, 0, 0)).save(path)
        content = {'info': {}, 'images': images[::-1], 'categories': [], 'annotations': annotations, 'licenses': []}
        (root / f'{split}{year}.json').write_text(json.dumps(content))
    return root


@pytest.mark.parametrize('with_super', [True, False])
@pytest.mark.parametrize(('name', 'year'), [('INAT', 2018), ('INAT19', 2019)])
def test_inaturalist_in_both_layouts(tmp_path: Path, name: str, year: int, with_super: bool) -> None:
    root = make_inaturalist(tmp_path, year=year, with_super=with_super)
    splits = build_datasets(DataSource(name, str(root)))
    assert splits.train is not None and splits.num_classes == 4
    assert splits.train.classes == ['name 3', 'name 1', 'name 4', 'name 0']  # by first appearance
    assert splits.train.targets.tolist() == [1, 3, 2, 1, 0]  # the images' order is the reverse
    assert splits.val.targets.tolist() == [2, 0, 1, 3]
    assert splits.val[0][0].size == (20, 20)
    by_genus = build_datasets(DataSource(name, str(root), inat_category='genus'), train=False)
    assert by_genus.val.classes == ['genus 1', 'genus 0', 'genus 2'] and by_genus.num_classes == 3


def test_inaturalist_supercategory(tmp_path: Path) -> None:
    splits = build_datasets(DataSource('INAT', str(make_inaturalist(tmp_path)), inat_category='supercategory'))
    assert splits.val.classes == ['Aves', 'Plantae']


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_inaturalist_errors(tmp_path: Path) -> None:
    def expect(message: str, name: str = 'INAT', **kwargs: Any) -> None:
        with pytest.raises(InputError, match=message):
            build_datasets(DataSource(name, str(root), **kwargs))

    root = make_inaturalist(tmp_path)
    expect("unknown category 'species'; known are kingdom", inat_category='species')
    expect(r'train2019\.json: No such file', name='INAT19')
    make_inaturalist(root, year=2019)
    expect("no key 'supercategory'; --inat-category may be kingdom", name='INAT19', inat_category='supercategory')
    make_inaturalist(root)
    change_json(root / 'val2018.json', lambda content: content['annotations'].pop())
    expect(r'val2018\.json has no annotation of 1 image id \(9\)')
    change_json(root / 'val2018.json', lambda content: content['annotations'][0].pop('category_id'))
    expect(r"val2018\.json, annotation 0 has no key 'category_id'")
    change_json(root / 'train2018.json', lambda content: content.pop('annotations'))
    expect(r"train2018\.json has no key 'annotations'")
    make_inaturalist(root)
    change_json(root / 'train2018.json', lambda content: content['annotations'][0].update(category_id=77))
    expect('category_id 77, which categories.json has not')
    make_inaturalist(root)
    change_json(root / 'val2018.json', lambda content: content['annotations'][0].update(category_id=2))
    expect('has name name 2, which train2018.json has not')
    make_inaturalist(root)
    (root / 'train_val2018' / 'Aves' / '3' / '1.jpg').unlink()
    expect('1 of the 5 images')
    (root / 'train2018.json').write_text('{')
    expect(r'train2018\.json is no JSON file')
    (root / 'categories.json').unlink()
    expect(r'categories\.json: No such file')


def test_flags_that_mean_nothing_for_a_data_set_are_refused(make_folder: MakeFolder) -> None:
    root = str(make_folder({'train': ['a', 'b'], 'val': ['a']}))
    for kwargs in ({'layout': 'lists'}, {'inat_category': 'genus'}, {'verify': True}):
        for name in ('IMNET', 'DIGITS'):
            with pytest.raises(UsageError):
                build_datasets(DataSource(name, root, **kwargs))


def test_inaturalist_of_wrong_types(tmp_path: Path) -> None:
    root = make_inaturalist(tmp_path)
    whole = {path: path.read_text() for path in root.glob('*.json')}
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ('train2018.json', lambda content: content.update(annotations=None)),
        ('train2018.json', lambda content: content.update(images=3)),
        ('train2018.json', lambda content: content['annotations'][0].update(category_id=[1])),
        ('train2018.json', lambda content: content['images'][0].update(id='x')),
        ('train2018.json', lambda content: content['images'][0].update(id=content['images'][1]['id'])),
        ('train2018.json', lambda content: content['annotations'].append({'image_id': 1, 'category_id': 0})),
        ('categories.json', lambda content: content[0].update(id=None)),
    ]
    for name, change in changes:
        change_json(root / name, change)
        with pytest.raises(InputError, match=name):
            build_datasets(DataSource('INAT', str(root)))
        (root / name).write_text(whole[root / name])
    build_datasets(DataSource('INAT', str(root)))


def test_evaluation_keeps_the_class_numbers_of_the_checkpoint(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = make_folder({'train': ['a', 'b', 'c'], 'val': ['b', 'c']}, images=16)
    out = tmp_path / 'run'
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'FOLDER', '--data-path', str(root), '--epochs', '4', '--lr', '8e-3']
    line = main([*flags, '--batch-size', '8', '--output_dir', str(out)])
    (root / 'train').rename(tmp_path / 'elsewhere')
    evaluation = ['--eval', '--resume', str(out / 'checkpoint.pth'), '--device', 'cpu']
    assert main(evaluation)['test_acc1'] == line['test_acc1']
    shown = capsys.readouterr().out
    assert 'numbers its classes otherwise than the checkpoint' in shown and 'a' in shown.partition('no images of')[2]
    (root / 'val' / 'b').rename(root / 'val' / 'new')
    with pytest.raises(SystemExit):  # by their numbers, those that are known would be others
        main([*evaluation, '--nb-classes', '3'])
    assert 'has classes that the checkpoint has not (new) beside 1 that it has' in capsys.readouterr().err
    (root / 'val' / 'c').rename(root / 'val' / 'other')
    main([*evaluation, '--nb-classes', '3'])
    assert 'has classes that the checkpoint has not (new, other): labels are' in capsys.readouterr().out


def test_another_data_set_forgets_how_the_first_one_lay(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_lists(tmp_path / 'lists', 'painting', PAINTING)
    out = tmp_path / 'run'
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'painting', '--data-layout', 'lists', '--data-path', str(root)]
    main([*flags, '--epochs', '1', '--batch-size', '2', '--output_dir', str(out)])
    evaluation = ['--eval', '--resume', str(out / 'checkpoint.pth'), '--device', 'cpu']
    main(evaluation)
    main([*evaluation, '--data-set', 'IMNET', '--nb-classes', '345',
          '--data-path', str(make_folder({'val': ['zebra', 'apple']}))])  # fmt: skip


def test_unreadable_folders_are_no_empty_ones(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']})
    scandir = os.scandir

    def deny(path: Any) -> Any:
        if str(path).endswith('train/b'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', deny)
    with pytest.raises(InputError, match='train/b: Permission denied'):
        build_datasets(DataSource('FOLDER', str(root)))


@pytest.mark.parametrize('val', ['val', 'valid', 'Validation', 'TEST'])
def test_names_of_the_validation_folder(make_folder: MakeFolder, val: str) -> None:
    root = make_folder({'Train': ['a', 'b'], val: ['b']})
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.train is not None and (len(splits.train), len(splits.val)) == (16, 8)
    assert splits.val.name(0) == f'{val}/b/0.jpg' and splits.val.targets.tolist() == [1] * 8
    assert not any('validates' in note for note in splits.notes)


def folders_of(*splits: ImageDataset | None) -> list[set[str]]:
    return [{split.name(i).split('/')[0] for i in range(len(split))} for split in splits if split is not None]


@pytest.mark.parametrize('val', ['val', 'valid', 'Validation'])
def test_where_test_stands_beside_it_val_validates(make_folder: MakeFolder, val: str) -> None:
    root = make_folder({'train': ['b'], val: ['a', 'b'], 'Test': ['b', 'c']})
    source = DataSource('FOLDER', str(root))
    splits = build_datasets(source)
    assert folders_of(splits.train, splits.val, splits.test) == [{'train'}, {val}, {'Test'}]
    told = f'the 16 validation images of {root} choose the best checkpoint; its 16 test images are evaluated by it, at'
    assert sum('at the end' in note for note in splits.notes) == 1 and any(told in note for note in splits.notes)
    alone = build_datasets(source, train=False)
    assert folders_of(alone.val) == [{'Test'}] and alone.test is None
    assert (
        alone.val.classes == splits.val.classes == ['a', 'b', 'c'] and alone.val.targets.tolist() == [1] * 8 + [2] * 8
    )
    assert any(f'Test/ is evaluated, not {val}/' in note for note in alone.notes)


@pytest.mark.parametrize('test', ['', 'images'])
def test_a_test_folder_without_labels_is_not_read(make_folder: MakeFolder, test: str) -> None:
    """As ImageNet's and Tiny-ImageNet's."""
    root = make_folder({'train': ['a'], 'val': ['a'], 'validation': ['a'], 'test': [test]})
    for train in (True, False):
        splits = build_datasets(DataSource('FOLDER', str(root)), train=train)
        assert splits.test is None and folders_of(splits.val) == [{'val'}] and splits.val.classes == ['a']
        assert any('val/ validates; not read: validation, test' in note for note in splits.notes)


def test_a_split_in_two_spellings_is_named(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a'], 'Train': ['b'], 'val': ['a']})
    if len(list(root.iterdir())) == 3:  # the file system tells them apart
        splits = build_datasets(DataSource('FOLDER', str(root)), train=True)
        assert splits.train is not None and splits.train.classes == ['a']
        assert any('not read: Train' in note for note in splits.notes)


def test_a_test_folder_in_lmdb(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = make_folder({'train': ['a', 'b'], 'valid': ['a'], 'test': ['b']}), tmp_path / 'lmdb'
    build_lmdb(['--dir', str(root), '--out', str(out), '--num_workers', '0'])
    files, records = (
        [build_datasets(source, train=train) for train in (True, False)]
        for source in (DataSource('FOLDER', str(root)), DataSource('FOLDER', str(out), use_lmdb=True))
    )
    for of_files, of_records in zip(files, records, strict=True):
        assert of_files.fingerprint() == of_records.fingerprint()
    assert folders_of(records[0].val, records[0].test, records[1].val) == [{'valid'}, {'test'}, {'test'}]
    shutil.rmtree(root / 'test')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        build_lmdb(['--dir', str(root), '--out', str(out), '--num_workers', '0'])
    assert 'test.lmdb is of other images, which have no test split' in capsys.readouterr().err


def test_images_outside_class_folders(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['']})
    for train in (True, False):
        with pytest.raises(InputError, match=r'val holds 8 images \(.*\) outside class folders: .*val/<class>/<image>'):
            build_datasets(DataSource('FOLDER', str(root)), train=train)
    (root / 'val' / 'b').mkdir()
    (root / 'val' / '3.jpg').rename(root / 'val' / 'b' / '3.jpg')
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert len(splits.val) == 1 and any('7 images' in note and 'outside class folders' in note for note in splits.notes)


@pytest.mark.parametrize('folders', [{'train': ['a', 'b'], 'val': ['images']}, {'train': ['train/a'], 'val': ['a']}])
def test_splits_that_share_no_class(make_folder: MakeFolder, folders: dict[str, list[str]]) -> None:
    root = make_folder(folders)
    for train in (True, False):
        with pytest.raises(InputError, match=r'train/ and val/ share no class \((a, b|train) \| (images|a)\)'):
            build_datasets(DataSource('FOLDER', str(root)), train=train)


def test_lists_that_share_no_class(tmp_path: Path) -> None:
    rows = {'train': [('a/1.jpg', 0)], 'test': [('b/1.jpg', 1)]}
    with pytest.raises(InputError, match=r'share no class \(a \| b\)'):
        build_datasets(DataSource('painting', str(make_lists(tmp_path, 'painting', rows))))


def test_unknown_endings_are_counted_once(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a'], 'val': ['a']})
    for number in range(20):
        for split in ('train', 'val'):
            (root / split / 'a' / f'{number}.HEIC').touch()
    (root / 'train' / 'a' / '.hidden.heic').touch()
    assert [note for note in build_datasets(DataSource('FOLDER', str(root))).notes if 'left out' in note] == [
        f'{root}: 40 files left out: .heic'
    ]


def test_links_that_lead_back(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({'train': ['a/deep', 'b'], 'val': ['a', 'b']})
    expected = build_datasets(DataSource('FOLDER', str(root))).train.samples  # type: ignore[union-attr]
    for link, target in (('a/loop', root), ('a/self', root / 'train' / 'a'), ('a/deep/b', root / 'train' / 'b'),
                         ('b/round', root / 'train' / 'a' / 'deep')):  # fmt: skip
        (root / 'train' / link).symlink_to(target)
    (root / 'train' / 'b' / 'val').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'back').symlink_to(tmp_path / 'elsewhere')
    (root / 'val' / 'b' / '0.jpg').rename(tmp_path / 'elsewhere' / 'more.jpg')
    (root / 'train' / 'a' / 'loop').unlink()
    (root / 'train' / 'a' / 'loop').symlink_to('..')
    train = build_datasets(DataSource('FOLDER', str(root))).train
    assert train is not None
    assert train.samples == [*expected, (str(root / 'train' / 'b' / 'val' / 'more.jpg'), 1)]


def test_a_link_that_leads_nowhere_is_no_missing_class(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']})
    (root / 'val' / 'c').symlink_to('unmounted')
    with pytest.raises(InputError, match='val/c: a link that leads nowhere'):
        build_datasets(DataSource('FOLDER', str(root)))


def test_class_names_have_one_unicode_form(make_folder: MakeFolder) -> None:
    composed, apart = 'caf\u00e9', 'cafe\u0301'
    root = make_folder({'train': [apart, 'tea'], 'val': [composed, 'tea']})
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.train is not None and splits.val.classes == splits.train.classes == [composed, 'tea']
    assert splits.val.targets.tolist() == splits.train.targets.tolist() == [0] * 8 + [1] * 8
    assert splits.train.load(0).size == (20, 20)  # found by the name that it has on the disk
    (root / 'classes.txt').write_text(f'tea\n{apart}\n')
    assert build_datasets(DataSource('FOLDER', str(root))).val.classes == ['tea', composed]


def test_special_files_are_left_out_with_a_line(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']})
    os.mkfifo(root / 'train' / 'a' / 'pipe.jpg')
    (root / 'train' / 'a' / 'device.png').symlink_to('/dev/zero')
    (root / 'train' / 'b' / 'folder.jpg').mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        before = Path.cwd()
        os.chdir(root / 'val' / 'a')  # a socket's path may not be long
        try:
            one.bind('socket.jpg')
        finally:
            os.chdir(before)
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.train is not None and (len(splits.train), len(splits.val)) == (16, 16)
    (note,) = (note for note in splits.notes if 'left out' in note)
    for part in ('device.png (a device)', 'pipe.jpg (a named pipe)', 'folder.jpg (a folder)', 'socket.jpg (a socket)'):
        assert part in note
    assert '4 in all' in note


def test_special_files_in_lists(tmp_path: Path) -> None:
    root = make_lists(tmp_path, 'painting', PAINTING)
    (root / 'painting' / 'zebra' / '1.jpg').unlink()
    os.mkfifo(root / 'painting' / 'zebra' / '1.jpg')
    splits = build_datasets(DataSource('painting', str(root)))
    assert splits.train is not None and len(splits.train) == 5 and splits.train.targets[0] == 0
    assert any('painting/zebra/1.jpg (a named pipe)' in note for note in splits.notes)
    for name, _ in PAINTING['test']:
        (root / 'painting' / name).unlink()
        os.mkfifo(root / 'painting' / name)
    with pytest.raises(InputError, match=r'painting_test\.txt names nothing that is an image file'):
        build_datasets(DataSource('painting', str(root)))


def test_special_files_in_inaturalist(tmp_path: Path) -> None:
    root = make_inaturalist(tmp_path)
    path = root / 'train_val2018' / 'Aves' / '3' / '1.jpg'
    path.unlink()
    os.mkfifo(path)
    splits = build_datasets(DataSource('INAT', str(root)))
    assert (
        splits.train is not None and len(splits.train) == 4 and any('1.jpg (a named pipe)' in n for n in splits.notes)
    )
    (root / 'val2018.json').unlink()
    os.mkfifo(root / 'val2018.json')
    with pytest.raises(InputError, match=r'val2018\.json is no JSON file: it is a named pipe'):
        build_datasets(DataSource('INAT', str(root)))


def test_images_listed_twice_are_noted(tmp_path: Path) -> None:
    rows = {**PAINTING, 'test': [*PAINTING['test'], PAINTING['train'][0]]}
    notes = build_datasets(DataSource('painting', str(make_lists(tmp_path, 'painting', rows)))).notes
    assert any('name 1 image (painting/zebra/1.jpg) more than once' in note for note in notes)


def test_stratified_parts_lie_inside_larger_ones() -> None:
    targets = np.random.default_rng(1).choice(10, 5000, p=np.arange(1, 11) / 55)
    whole = np.bincount(targets)
    smaller: set[int] = set()
    for fraction in (0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        part = stratified_subset(targets, fraction, seed=0)
        assert len(part) == round(5000 * fraction) and np.all(np.diff(part) > 0)
        assert np.all(np.abs(np.bincount(targets[part], minlength=10) - fraction * whole) <= 1 + (fraction < 0.01))
        assert smaller <= set(part.tolist())
        smaller = set(part.tolist())
    assert len(smaller) == 5000
    again, other = (stratified_subset(targets, 0.1, seed=seed) for seed in (0, 1))
    assert np.array_equal(again, stratified_subset(targets, 0.1, seed=0)) and not np.array_equal(again, other)
    assert set(targets[stratified_subset(targets, 10 / 5000, seed=3)]) == set(range(10))  # each class before any twice
    assert len(stratified_subset(targets, 1e-9, seed=0)) == 1


def test_training_on_a_part(make_folder: MakeFolder, capsys: pytest.CaptureFixture) -> None:
    root = make_folder({'train': ['a', 'b', 'c'], 'val': ['a', 'b', 'c']}, images=8)
    splits = build_datasets(DataSource('FOLDER', str(root)), train_fraction=0.5)
    assert (
        splits.train is not None and np.bincount(splits.train.targets).tolist() == [4, 4, 4] and len(splits.val) == 24
    )
    assert all(splits.train[i][1] == splits.train.targets[i] for i in range(12))
    flags = [
        *SMALL_MODEL,
        *PLAIN,
        '--data-set',
        'FOLDER',
        '--data-path',
        str(root),
        '--epochs',
        '1',
        '--batch-size',
        '4',
    ]
    main([*flags, '--train-fraction', '0.5'])
    out = capsys.readouterr().out
    assert 'Note: 12 of 24 training images are used: --train-fraction 0.5' in out and '12 training and 24 test' in out
    with pytest.raises(SystemExit) as stop:
        main([*flags, '--train-fraction', '0'])
    assert stop.value.code == 2


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a').mkdir()
    assert Listing(tmp_path).kind('a/1.jpg') is None and Listing(tmp_path).kind('b/1.jpg') is None

    def refuse(path: Path) -> None:
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError):
        assert Listing(tmp_path).kind('a/1.jpg') == ''
