"""The shell scripts: recipes, shares of the batch, the environment check."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from config.arguments import parse_args
from main import main
from tests.conftest import ROOT
from tools import ablate, check_env


@pytest.fixture(autouse=True)
def whole_python(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that lacks nothing and says so at once: tools/check_env.py imports torchvision, for four seconds."""
    python = tmp_path_factory.mktemp('python') / 'python'
    python.write_text(f"""#!/bin/sh
case $1 in *check_env.py) exit ;; esac
exec '{sys.executable}' "$@"
""")
    python.chmod(0o755)
    monkeypatch.setenv('PYTHON', str(python))


def script(name: str, *argv: str, expect: int = 0, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        ['bash', str(ROOT / name), *argv],
        env={**os.environ, 'DRY_RUN': '1', 'NPROC': '1', **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where the tests run under nohup
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stderr


def flags_of(text: str) -> tuple[str, dict[str, Any]]:
    """The launcher part of the printed command, and the flags of main.py as its parser sees them."""
    launcher, _, flags = text.strip().splitlines()[-1].partition('main.py ')
    return launcher, vars(parse_args(shlex.split(flags)))


PAPER = {  # data set, input size, total batch of T and S, learning rate, warm-up, epochs
    'cifar100': ('CIFAR', 32, 512, 256, 1e-3, 5, 300),
    'cifar10': ('CIFAR10', 32, 512, 256, 1e-3, 5, 300),
    'imagenet': ('IMNET', 224, 512, 512, 5e-4, 10, 300),
    **{
        name: (name, 224, 256, 128, 1e-3, 20, 300)
        for name in ('clipart', 'infograph', 'painting', 'quickdraw', 'real', 'sketch')
    },
}


@pytest.mark.parametrize('recipe', PAPER)
def test_published_recipes(recipe: str) -> None:
    for size, batch in zip(('tiny', 'small'), PAPER[recipe][2:4], strict=True):
        family = (
            'cifar_patch4' if 'cifar' in recipe else 'imagenet_patch16' if recipe == 'imagenet' else 'domain_patch16'
        )
        model = f'dhvt_{size}_{family}'
        _, flags = flags_of(script('run_code.sh', recipe, **({'MODEL': model} if size == 'small' else {})))
        names = ('data_set', 'input_size', 'batch_size', 'lr', 'warmup_epochs', 'epochs')
        assert tuple(flags[name] for name in names) == (*PAPER[recipe][:2], batch, *PAPER[recipe][4:])
        assert flags['model'] == model
        published: dict[str, Any] = {
            'weight_decay': 0.05,
            'aa': 'rand-m9-mstd0.5-inc1',
            'mixup': 0.8,
            'cutmix': 1.0,
            'reprob': 0.25,
        }
        published |= {'smoothing': 0.1, 'color_jitter': 0.4, 'repeated_aug': True, 'drop_path': 0.1, 'sched': 'cosine'}
        assert {name: flags[name] for name in published} == published


def make_checkpoint(path: Path, model: str = 'dhvt_tiny_imagenet_patch16') -> None:
    torch.save({'model': {'head.bias': torch.zeros(1)}, 'args': {'model': model}}, path)


def test_published_finetuning(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / 'a.pth')
    _, flags = flags_of(script('finetune.sh', str(tmp_path / 'a.pth'), 'cifar100', '--train-mode'))
    expected: dict[str, Any] = {
        'input_size': 224,
        'batch_size': 256,
        'lr': 5e-4,
        'min_lr': 1e-6,
        'weight_decay': 1e-8,
        'epochs': 100,
    }
    expected |= {'warmup_epochs': 2, 'repeated_aug': False, 'finetune': str(tmp_path / 'a.pth'), 'train_mode': True}
    expected |= {'model': 'dhvt_tiny_imagenet_patch16', 'data_set': 'CIFAR'}
    assert {name: flags[name] for name in expected} == expected
    assert 'no such checkpoint' in script('finetune.sh', str(tmp_path / 'b.pth'), 'cifar100', DRY_RUN='', expect=1)
    assert 'usage' in script('finetune.sh', expect=2)


def test_deit_and_evit_recipes(tmp_path: Path) -> None:
    common = {'data_set': 'IMNET', 'input_size': 224, 'epochs': 300, 'lr': 5e-4, 'warmup_epochs': 5}
    evit = {'base_keep_rate': 0.7, 'fuse_token': True, 'shrink_start_epoch': 10, 'shrink_epochs': 100}
    for recipe, expected in (
        ('deit', {**common, 'model': 'deit_small_patch16_224', 'batch_size': 128, 'base_keep_rate': None}),
        ('evit', {**common, **evit, 'model': 'deit_small_patch16_shrink_base', 'batch_size': 256}),
    ):
        _, flags = flags_of(script('run_code.sh', recipe, NPROC='8'))
        assert {name: flags[name] for name in expected} == expected
    make_checkpoint(tmp_path / 'a.pth', 'deit_small_patch16_224')
    _, flags = flags_of(script('finetune.sh', str(tmp_path / 'a.pth'), 'evit', NPROC='8'))
    tuned = {'lr': 2e-5, 'min_lr': 2e-6, 'weight_decay': 1e-6, 'warmup_epochs': 0, 'epochs': 30, 'batch_size': 256}
    tuned |= {'base_keep_rate': 0.7, 'fuse_token': True, 'shrink_start_epoch': 0, 'shrink_epochs': 0}
    assert {name: flags[name] for name in tuned} == tuned
    _, flags = flags_of(script('finetune.sh', str(tmp_path / 'a.pth'), 'deit'))
    assert flags['model'] == 'deit_small_patch16_224'


def test_deit_and_evit_recipes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On digits, which are real and small: a DeiT, then an EViT from its weights, then one from scratch."""
    small = ['--data-set', 'DIGITS', '--input-size', '16', '--batch-size', '128', '--epochs', '1', '--num_workers', '0']
    small += ['--model-kwargs', 'embed_dim=48', 'depth=4', 'num_heads=3', 'patch_size=4', '--device', 'cpu']
    small += ['--train-fraction', '0.3', '--no-report']
    blocks = ['--drop_loc', '1', '2', '--shrink_start_epoch', '0']

    def run(name: str, *argv: str) -> str:
        """What the command prints that the script makes."""
        out = str(tmp_path / f'{len(list(tmp_path.iterdir()))}')
        line = script(name, *argv, *small, OUTPUT=out).splitlines()[-1]
        main(shlex.split(line.partition('main.py ')[2]))
        return capsys.readouterr().out

    text = script('run_code.sh', 'deit', *small, DRY_RUN='', OUTPUT=str(tmp_path / '0'), OMP_NUM_THREADS='1')
    assert 'Training time' in text
    text = run('finetune.sh', str(tmp_path / '0' / 'checkpoint.pth'), 'evit', *blocks)
    assert 'Training time' in text and 'missing' not in text and 'dropped' not in text
    assert 'Training time' in run('run_code.sh', 'evit', *blocks)


@pytest.mark.parametrize(
    'name', ['run_code.sh', 'finetune.sh', 'slurm.sh', 'check.sh', 'tools/benchmarks.sh', 'tools/full_size.sh']
)
def test_help_is_the_comment_on_top(name: str) -> None:
    for flag in ('-h', '--help'):
        lines = script(name, flag, SLURM_JOB_ID='').splitlines()
        assert re.search(rf'(bash|sbatch .*) {re.escape(name)}', lines[0])
        assert not [line for line in lines if line.startswith(('#', 'set '))]


def test_default_and_further_flags() -> None:
    _, flags = flags_of(script('run_code.sh', '--epochs', '3', '--seed', '7'))
    assert (flags['data_set'], flags['epochs'], flags['seed']) == ('DIGITS', 3, 7)
    _, flags = flags_of(script('run_code.sh'))
    assert (flags['data_set'], flags['epochs'], flags['batch_size']) == ('DIGITS', 12, 64)


def test_the_printed_command_can_be_pasted(tmp_path: Path) -> None:
    """Arguments are quoted."""
    further = ['--epochs=3', '--warmup_epochs', '0', '--model-ema', '--model-kwargs', "x='a b'", '--no_repeated_aug']
    further += ['-c', 'my flags.yaml', '--num_workers', '2', '--lr', '-1']
    env = {'PYTHON': sys.executable, 'OUTPUT': 'my out', 'DATA': "it's"}
    line = script('run_code.sh', 'digits', *further, **env).splitlines()[-1]
    for expected in (further, ['--output_dir', 'my out'], ['--data-path', "it's"], ['--aa', 'none']):
        assert f'\n{chr(10).join(expected)}\n' in f'\n{chr(10).join(shlex.split(line))}\n'
    pasted = subprocess.run(['bash', '-c', f'printf "%s\\n" {line}'], capture_output=True, text=True, check=True)
    assert pasted.stdout.splitlines() == shlex.split(line) and shlex.split(line)[0] == sys.executable


def test_a_hang_up_does_not_end_a_group_under_nohup(tmp_path: Path) -> None:
    """torchrun passes SIGHUP on by itself, though nohup has it ignored."""
    argv = ['run_code.sh', 'digits', '--epochs', '2', '--device', 'cpu', '--no-report', '--train-fraction', '0.2']
    argv += ['--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2']
    assert '--signals-to-handle' not in script(*argv, NPROC='2')
    env = {**os.environ, 'NPROC': '2', 'OUTPUT': str(tmp_path / 'out'), 'DRY_RUN': ''}
    log = tmp_path / 'log'
    with log.open('w') as file:
        run = subprocess.Popen(
            ['nohup', 'bash', str(ROOT / argv[0]), *argv[1:]], cwd=ROOT, env={**env, 'OMP_NUM_THREADS': '1'},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while 'Epoch' not in log.read_text() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGHUP)
        assert run.wait(timeout=300) == 0, log.read_text()
    assert '--signals-to-handle SIGTERM\\,SIGINT\\,SIGQUIT' in log.read_text()
    assert '2 processes on cpu' in log.read_text() and len((tmp_path / 'out' / 'log.txt').read_text().splitlines()) == 2


def test_the_total_batch_does_not_depend_on_the_processes() -> None:
    for nproc, nnodes, accum in ((1, 1, 1), (4, 1, 1), (8, 2, 1), (4, 1, 2)):
        env = {'NPROC': str(nproc), 'NNODES': str(nnodes), 'ACCUM': str(accum), 'MASTER_ADDR': 'host0'}
        launcher, flags = flags_of(script('run_code.sh', 'cifar100', MASTER_PORT='12345', **env))
        assert flags['batch_size'] * flags['accum_steps'] * nproc * nnodes == 512 and flags['lr'] == 1e-3
        if nnodes > 1:
            assert '--nproc_per_node 8' in launcher and '--nnodes 2' in launcher
            assert '--rdzv_backend c10d --rdzv_endpoint host0:12345' in launcher
        elif nproc > 1:
            assert f'--nproc_per_node {nproc} --max_restarts 0 --standalone' in launcher
        else:
            assert 'torch.distributed' not in launcher
    assert "not '08'" in script('run_code.sh', 'cifar100', expect=2, NPROC='08')
    assert 'cannot be run' in script('run_code.sh', expect=2, PYTHON='/nowhere/python')
    for port in ('abc', '65536', '0'):
        said = script('run_code.sh', 'cifar100', expect=2, NNODES='2', MASTER_ADDR='host0', MASTER_PORT=port)
        assert f"MASTER_PORT are whole numbers from 1 to 65535, not '{port}'" in said
    for epochs in ('100', '100 300 5', '0 1', 'a b'):
        assert 'EPOCHS is two whole numbers' in script('tools/full_size.sh', '1', expect=2, EPOCHS=epochs)
    assert 'cannot be shared out' in script('run_code.sh', 'cifar100', expect=2, NPROC='3')
    assert 'MASTER_ADDR' in script('run_code.sh', 'cifar100', expect=2, NNODES='2', MASTER_ADDR='')


def test_a_restart_finds_its_folder_again(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / 'a.pth')
    for argv, folder in (
        (['run_code.sh', 'cifar100'], 'output/cifar100'),
        (['run_code.sh'], 'output/digits'),
        (['finetune.sh', str(tmp_path / 'a.pth'), 'cifar100'], 'output/cifar100-finetune'),
    ):
        _, flags = flags_of(script(*argv))
        assert flags['output_dir'] == folder and flags['auto_resume'] and flags['checkpoint_every'] == ('minutes', 10)
    assert not flags_of(script('run_code.sh', '--no-auto-resume', '--output_dir', 'x'))[1]['auto_resume']
    launcher, _ = flags_of(script('run_code.sh', RESTARTS='3'))
    assert '--nproc_per_node 1 --max_restarts 3 --standalone' in launcher
    assert "RESTARTS is a whole number below 100000, not 'x'" in script('run_code.sh', expect=2, RESTARTS='x')


def test_slurm_starts_a_task_for_each_gpu(tmp_path: Path) -> None:
    """A stand-in for srun starts two tasks as SLURM does; the job trains, and requeues where it was told to stop."""
    job = {'SLURM_JOB_ID': '7', 'SLURM_JOB_NUM_NODES': '2', 'SLURM_NTASKS_PER_NODE': '4', 'NPROC': ''}
    launcher, flags = flags_of(script('slurm.sh', 'cifar100', **job))
    assert (
        launcher.startswith('srun --kill-on-bad-exit=1 --ntasks=8 --ntasks-per-node=4 ') and flags['batch_size'] == 64
    )
    make_checkpoint(tmp_path / 'a.pth')
    _, flags = flags_of(script('slurm.sh', 'finetune', str(tmp_path / 'a.pth'), 'cifar100', **job))
    assert flags['finetune'] == str(tmp_path / 'a.pth') and flags['batch_size'] == 32
    assert 'this is a job for SLURM' in script('slurm.sh', expect=2, SLURM_JOB_ID='')
    assert 'has no run_code.sh' in script('slurm.sh', expect=1, SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(tmp_path))

    srun = tmp_path / 'srun'
    srun.write_text("""#!/usr/bin/env bash
shift 3
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 MASTER_ADDR=127.0.0.1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
""")
    srun.chmod(0o755)
    small = ['--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '--epochs', '1', '--device', 'cpu']
    small += ['--train-fraction', '0.2', '--no-report']
    job = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS_PER_NODE': '2', 'NPROC': '', 'DRY_RUN': '', 'OMP_NUM_THREADS': '1'}
    out = str(tmp_path / 'out')
    text = script('slurm.sh', 'digits', *small, PATH=f'{tmp_path}:{os.environ["PATH"]}', OUTPUT=out, **job)
    assert '2 processes on cpu' in text and 'Training time' in text
    assert (tmp_path / 'out' / 'checkpoint.pth').exists()


def test_data_and_output_come_from_the_environment(tmp_path: Path) -> None:
    _, flags = flags_of(script('run_code.sh', 'sketch', cwd=tmp_path, DATA='my/data', OUTPUT='my/out'))
    assert (flags['data_path'], flags['output_dir']) == (str(Path.cwd() / 'my/data'), 'my/out')
    assert "unknown recipe 'mnist'" in script('run_code.sh', 'mnist', expect=2)


def test_the_fast_recipe(tmp_path: Path) -> None:
    """Its values, which the command line overrides; and a run of it on digits."""
    _, flags = flags_of(script('run_code.sh', 'fast', '--epochs', '30', '--data-set', 'TINYIMNET'))
    expected = {'data_set': 'TINYIMNET', 'epochs': 30, 'batch_size': 64, 'opt': 'muon', 'sched_on_updates': True}
    expected |= {'model_ema_warmup': True, 'repeated_aug': False, 'model': 'dhvt_tiny_cifar_patch4'}
    assert {name: flags[name] for name in expected} == expected
    free = {'model', 'train_fraction', 'val_fraction', 'output_dir', 'auto_resume'}
    table = ablate.TABLES['fast']
    rows = {row.name: row for row in table.rows}
    for name, *recipe in (
        ('the recipe, 10 epochs', 'fast'),
        ('the recipe, 30 epochs', 'fast', '--epochs', '30'),
        ('the recipe, 100 epochs', 'fast', '--epochs', '100'),
        ("the paper's recipe, 30 epochs", 'cifar10', '--epochs', '30'),
        ("the paper's recipe, 10 epochs", 'cifar10', '--epochs', '10'),
    ):
        given = [*table.flags, *rows[name].flags.split(), '--batch-size', str(rows[name].batch), '--output-dir', 'x']
        searched = vars(parse_args(given))
        _, flags = flags_of(script('run_code.sh', *recipe, OUTPUT='', DATA=''))
        assert {key for key in flags if flags[key] != searched[key]} <= free, name
    for further, part in (
        ('--epochs=19', 0),
        ('--epochs=20', 0.5),
        ('--epochs 30 --epochs 3', 0),
        ('--epochs 30 --cutmix 0', 0),
    ):
        _, flags = flags_of(script('run_code.sh', 'fast', *further.split()))
        assert flags['mixup_prob'] * flags['cutmix'] == part, further
    for epochs, policy in (('49', 'none'), ('50', 'rand-m5-mstd0.5-inc1')):
        assert flags_of(script('run_code.sh', 'fast', '--epochs', epochs))[1]['aa'] == policy, epochs
    small = ['--data-set', 'DIGITS', '--input-size', '16', '--epochs', '2', '--num_workers', '0', '--device', 'cpu']
    small += ['--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '--train-fraction', '0.2']
    text = script('run_code.sh', 'fast', *small, DRY_RUN='', OUTPUT=str(tmp_path), OMP_NUM_THREADS='1')
    assert 'Training time' in text


def test_full_size_runs(tmp_path: Path) -> None:
    env = {'DATA': str(tmp_path), 'OUTPUT': 'out', 'EPOCHS': '2 3'}
    text = script('tools/full_size.sh', '5', '--train-fraction', '0.1', **env)
    runs = [flags_of(line)[1] for line in text.splitlines() if 'main.py ' in line]
    assert [(Path(run['output_dir']).name, run['model'], run['epochs'], run['opt']) for run in runs] == [
        ('fast-tiny', 'dhvt_tiny_cifar_patch4', 2, 'muon'),
        ('fast-small', 'dhvt_small_cifar_patch4', 2, 'muon'),
        ('cifar10-tiny', 'dhvt_tiny_cifar_patch4', 3, 'adamw'),
        ('cifar10-small', 'dhvt_small_cifar_patch4', 3, 'adamw'),
    ]
    assert {(run['data_set'], run['data_path'], run['train_fraction']) for run in runs} == {
        ('FOLDER', str(tmp_path), 0.1)
    }
    assert 'benchmark.py step' in text
    assert 'usage' in script('tools/full_size.sh', 'long', expect=2)


def test_environment_check_reads_all_requirements() -> None:
    text = (ROOT / 'pyproject.toml').read_text()
    found = check_env.required(text, ['check'])
    if importlib.util.find_spec('tomllib'):
        import tomllib  # Python 3.11

        project = tomllib.loads(text)['project']
        groups = project['optional-dependencies']
        assert found == project['dependencies'] + groups['train'] + groups['check']
    assert check_env.unmet(found) == []
    assert check_env.unmet(['torch>=99', 'no-such-package']) == [
        f'torch>=99 is needed, {check_env.metadata.version("torch")} is installed',
        'no-such-package is not installed',
    ]


def test_pins_lie_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / 'requirements.txt').read_text().splitlines() if line and line[0] != '#']
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r'==[\d.]+', str(pin.specifier)) for pin in pins)
    ranges = {r.name: r for r in map(Requirement, check_env.required((ROOT / 'pyproject.toml').read_text(), ['check']))}
    assert {pin.name for pin in pins} == set(ranges)
    assert all(ranges[pin.name].specifier.contains(str(pin.specifier)[2:]) for pin in pins)
