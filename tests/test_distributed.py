"""Several processes on this machine over gloo, started as by torchrun and by hand; test_scripts.py has torchrun."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401
from main import main
from tests.conftest import PLAIN, SMALL_MODEL
from tests.processes import free_port, group, run
from training import checkpoint as ckpt

DIGITS = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS']


def trained_by(processes: int, argv: list[str]) -> str:
    """What main.py prints in so many processes, which get torchrun's variables."""
    env = group(processes) if processes > 1 else None
    done = run(*[partial(main, [*argv, '--device', 'cpu'])] * processes, env=env)
    assert [process.returncode for process in done] == [0] * processes, [process.stderr[-3000:] for process in done]
    return ''.join(process.stdout for process in done)


def accuracy_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if 'acc@1' in line or 'Accuracy of the network' in line]


@pytest.mark.parametrize(('opt', 'lr'), [('sgd', '0.8'), ('adamw', '8e-3')])
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path, opt: str, lr: str) -> None:
    """One epoch with the same total batch, BatchNorm in eval mode, nothing random: equal to 1e-5.

    The keys' bias has no effect on attention, so its gradient is rounding error, which Adam scales up to its step
    size: with AdamW that third of qkv.bias is left out. So that it does not do the same to single weights whose
    gradient happens to be next to nothing, its epsilon is 1e-6.
    """
    common = [*DIGITS, '--no-train-mode', '--epochs', '1', '--opt', opt, '--lr', lr, '--smoothing', '0']
    if opt == 'adamw':
        common += ['--opt-eps', '1e-6']
    for processes in (1, 2):
        out = str(tmp_path / str(processes))
        trained_by(processes, [*common, '--batch-size', str(64 // processes), '--output_dir', out])
    one, two = (ckpt.load(str(tmp_path / name / 'checkpoint.pth'))['model'] for name in ('1', '2'))
    torch.manual_seed(0)
    start = timm.create_model(SMALL_MODEL[1], num_classes=10, img_size=16, embed_dim=32, depth=2, num_heads=2)
    for key, value in one.items():
        other = two[key]
        if opt == 'adamw' and key.endswith('qkv.bias'):
            value, other = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (value, other))
        torch.testing.assert_close(other, value, rtol=0, atol=1e-5, msg=lambda text, key=key: f'{key}: {text}')
    moved = [(one[key] - value).abs().max().item() for key, value in start.named_parameters()]
    assert sorted(moved)[len(moved) // 2] > 1e-3, 'training changed too little to compare'
    losses = [json.loads((tmp_path / name / 'log.txt').read_text())['train_loss'] for name in ('1', '2')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tells some digits apart, from two processes with a moving average and the recipe's sampler."""
    out = tmp_path_factory.mktemp('trained')
    argv = [flag for flag in DIGITS if flag not in ('--no-repeated-aug', '--no-model-ema')]
    extra = ['--epochs', '3', '--batch-size', '32', '--lr', '0.03', '--model-ema-decay', '0.99', '--dist-eval']
    trained_by(2, [*argv, *extra, '--output_dir', str(out)])
    return out


def test_evaluation_repeats_what_two_processes_logged(trained: Path) -> None:
    """Each process has its own BatchNorm statistics; all must evaluate the ones that are saved."""
    last = json.loads((trained / 'log.txt').read_text().splitlines()[-1])
    text = trained_by(1, ['--eval', '--resume', str(trained / 'checkpoint.pth'), '--num_workers', '0'])
    assert f'acc@1 {last["test_acc1"]:.4f}' in text
    state = ckpt.load(str(trained / 'checkpoint.pth'))
    torch.save({**state, 'model': state['model_ema']}, trained / 'ema.pth')
    text = trained_by(1, ['--eval', '--resume', str(trained / 'ema.pth'), '--num_workers', '0'])
    assert f'acc@1 {last["ema_test_acc1"]:.4f}' in text


def write_digits(root: Path, images: int) -> None:
    """The first val images of the digits, and for 361 one of the training images, as a folder data set."""
    from datasets import load_digits

    val, train = load_digits(train=False), load_digits(train=True)
    for i in range(images):
        image, target = val[i] if i < len(val) else train[i - len(val)]
        folder = root / 'val' / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f'{i}.png')


@pytest.mark.parametrize('images', [360, 361])
def test_shared_evaluation_is_exact(trained: Path, tmp_path: Path, images: int) -> None:
    write_digits(tmp_path, images)
    argv = ['--eval', '--resume', str(trained / 'checkpoint.pth'), '--data-set', 'FOLDER', '--data-path', str(tmp_path)]
    one, three = (trained_by(n, [*argv, '--num_workers', '0', '--dist-eval']) for n in (1, 3))
    assert f'on the {images} test images' in three
    assert [line.rpartition('loss')[0] for line in accuracy_lines(one)] == [
        line.rpartition('loss')[0] for line in accuracy_lines(three)
    ]


def test_processes_started_by_hand() -> None:
    url = f'tcp://127.0.0.1:{free_port()}'
    argv = [*DIGITS, '--epochs', '1', '--batch-size', '64', '--world_size', '2', '--dist_url', url, '--local_rank']
    done = run(*(partial(main, [*argv, str(rank)]) for rank in range(2)))
    assert [process.returncode for process in done] == [0, 0], done
    assert '2 processes on cpu' in done[0].stdout and not done[1].stdout, 'only the main process prints'


def test_missing_rendezvous_is_one_line() -> None:
    (done,) = run(partial(main, DIGITS), env=[{'RANK': '0', 'WORLD_SIZE': '2'}])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('main.py: error: cannot join the process group at env://')
    assert 'Traceback' not in done.stderr
