"""Flags from a file, their spellings, and what --help says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import main
from config.arguments import get_args_parser, parse_args
from config.recall import stored_flags
from tests.conftest import PLAIN, SMALL_MODEL
from utils import InputError, UsageError

RUN = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--train-fraction', '0.05', '--batch-size', '32', '--epochs', '1']


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_run_is_repeated_from_its_args_yaml(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in 'abc']
    further = ['--checkpoint-every', '0.5m', '--opt-betas', '0.9', '0.98', '--auto-resume', '--lr-noise', '0.5', '0.9']
    further += ['--value-range', '-1e-05', '255']
    main.main([*RUN, *further, '--output_dir', folders[0]])
    config = ['-c', f'{folders[0]}/args.yaml']
    main.main([*config, '--output_dir', folders[1]])
    main.main(['--seed', '1', *config, '--output_dir', folders[2]])
    first, again, other = (Path(folder, 'log.txt').read_text() for folder in folders)
    assert first == again and json.loads(first)['train_loss'] != json.loads(other)['train_loss']
    args = [yaml.safe_load(Path(folder, 'args.yaml').read_text()) for folder in folders]
    different = {name for name in args[0] if args[0][name] != args[2][name]}
    assert args[0].keys() == args[2].keys() and different == {'seed', 'output_dir'}
    assert main.main(config)['train_loss'] == json.loads(first)['train_loss']  # goes on in its own folder
    evit = ['--model', 'deit_tiny_patch16_224', '--drop_loc', '1', '2', '--checkpoint-every', '500', '--amp', 'off']
    for argv in ([], evit, ['--no-model-ema', '--no-aug', '--cutmix-minmax', '0.2', '0.8', '--output_dir', 'x']):
        args[0] = vars(parse_args([*argv, '--output_dir', 'x']))
        path = write(tmp_path / 'd.yaml', yaml.safe_dump({**args[0], 'derived': {'lr_scaled': 1}}))
        assert vars(parse_args([f'--config={path}'])) == args[0]


def test_a_recipe_by_hand(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / 'recipe.yaml',
        'batch-size: 32\nwarmup_epochs: 0\nlr: 1e-3\namp: off\nmodel-kwargs: {embed_dim: 32, depth: 2}\nno-aug: true\n'
        'model-ema: no\nno_report: true\neval: false\nresume:\ncheckpoint_every: 10m\noutput-dir: x\ndrop_loc: 3,6\n',
    )
    args = parse_args(['-c', recipe, '--lr', '2e-3', '--model-ema'])
    assert (args.batch_size, args.warmup_epochs, args.lr, args.amp) == (32, 0, 2e-3, 'off')
    assert args.model_kwargs == [('embed_dim', 32), ('depth', 2)] and args.no_aug and args.model_ema
    assert not args.report and not args.eval and args.resume == '' and args.checkpoint_every == ('minutes', 10.0)
    assert not hasattr(args, 'config')


@pytest.mark.parametrize(
    ('text', 'code', 'message'),
    [
        ('batch_sise: 3', 2, r"no flag 'batch_sise' \(is batch_size meant\?\)"),
        ('config: x.yaml', 2, "no flag 'config'"),
        ('epochs: 0', 2, '--epochs: 0 must be at least 1'),
        ('lr: .nan', 2, '--lr: nan must be at least 0'),
        ('lr: true', 2, 'argument --lr: expected one argument'),
        ('sched: cosin', 2, "invalid choice: 'cosin'"),
        ('eval: 1', 2, 'eval cannot be 1, but true or false'),
        ('aa:', 2, 'aa cannot be null: leave it out, or write'),
        ('seed: 2020-01-01', 2, 'seed cannot be datetime'),
        ('drop_loc: [1, --eval]', 1, 'as drop_loc'),
        ('model_kwargs: [[--eval, 1]]', 1, 'as model_kwargs'),
        ('model_kwargs: 3', 1, 'as model_kwargs'),
        ('checkpoint_every: [minutes]', 1, 'as checkpoint_every'),
        ('checkpoint_every: [minutes, x]', 1, 'as checkpoint_every'),
        ('- lr', 1, 'does not hold settings'),
        ('', 1, 'does not hold settings'),
        ('lr: {', 1, 'is not YAML of plain values'),
        ('lr: \x00', 1, 'is not YAML of plain values'),
        ('lr: 0x' + 9999 * 'f', 1, 'is not YAML of plain values'),
        ('lr: ' + 2**20 // 2 * '[', 1, 'has more than 20 levels'),
        ('lr: !!python/object/apply:os.getcwd []', 1, 'could not determine a constructor'),
        ('a: &a [x, x]\nb: [*a, *a]', 1, r'has an alias \(\*\)'),
        ('a: &a [*a]', 1, r'has an alias \(\*\)'),
        ('#' * 2**21, 1, 'it is no file of settings'),
    ],
)
def test_wrong_files_get_one_line(
    text: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / 'a.yaml', text)
    with pytest.raises(SystemExit) as stop:
        main.main(['-c', path])
    error = capsys.readouterr().err
    assert stop.value.code == code and re.search(message, error) and error.count('\n') == 1 and len(error) < 400


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, code, message in (
        (str(tmp_path / 'b.yaml'), 1, 'b.yaml: No such file or directory'),
        (str(tmp_path), 1, 'Is a directory'),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main(['-c', path])
        assert stop.value.code == code and message in capsys.readouterr().err
    (tmp_path / 'latin').write_bytes(b'lr: \xff')
    with pytest.raises(InputError, match='not YAML'):
        parse_args(['-c', str(tmp_path / 'latin')])


def test_what_a_checkpoint_says_adds_no_flags() -> None:
    for stored in ({'model': ['a', '--device', 'meta']}, {'model_kwargs': [('--device', 1)]}, {'drop_loc': ['-c']}):
        with pytest.raises(InputError, match=r'the checkpoint has .* it is not of this program'):
            stored_flags(stored)


def test_each_flag_in_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    parser = get_args_parser()
    flags = [name for name in parser._option_string_actions if name.startswith('--') and name != '--help']
    for flag in flags:
        for spelling in (flag, '--' + flag[2:].replace('_', '-'), '--' + flag[2:].replace('-', '_')):
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([spelling, '--no-such-flag'])
            assert stop.value.code == 2 and f'unrecognized arguments: {spelling} ' not in capsys.readouterr().err
    assert parser.parse_args(['--batch_size=3', '--output-dir', 'x_y', '--no_pin_mem']).output_dir == 'x_y'


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = get_args_parser()
    text = parser.format_help()
    assert 'None)' not in text and '(default: )' not in text and '[])' not in text
    assert '(default: 64)' in text and '(default: True)' in text and '(default: 0.0)' in text
    assert [action.dest for action in parser._optionals._group_actions] == ['help']  # all others are in groups
    options = re.findall(r'^  (-.*?)(?:  |$)', text, re.MULTILINE)
    names = [name for line in options for name in re.findall(r'--[\w-]+', line)]
    spelled = [name.replace('_', '-') for name in names]
    assert len(spelled) == len(set(spelled)) > 100
    assert len(re.findall(r'^    (?:python|bash) ', text.partition('\nexamples:\n')[2], re.MULTILINE)) == 5


def test_the_examples_of_help_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main.main([*RUN, '--output_dir', 'output/digits'])
    text = get_args_parser().format_help().replace('\\\n', '')
    examples = re.findall(r'^    python main.py (.*)$', text, re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        assert parse_args(example.split()).model == SMALL_MODEL[1]
    with pytest.raises(UsageError, match='holds a run already'):
        parse_args(['-c', 'output/digits/args.yaml'])
