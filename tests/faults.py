"""Makes faults and looks at what they leave: the program behind the table in docs/guarantees.md.

    python tests/faults.py [NAME …] [--times N] [--seed N]

Each fault is a function that makes it once, at a random place, and fails with an AssertionError if the promise does
not hold; `tests/test_faults.py` makes each of them a time or two. Trainings are forked as in torture_resume.py.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from pipeline import transforms  # noqa: E402
from samplers import Draw  # noqa: E402
from tests.processes import free_port, wait  # noqa: E402
from tests.torture_resume import FLAGS, Case, differences, start  # noqa: E402
from tools import prepare_domainnet  # noqa: E402
from training import checkpoint as ckpt  # noqa: E402
from training.output import OutputFolder  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHORT = Case(epochs=2, batch=256, augment='pil')  # faults are put into how images are read one by one
BATCHES = 1437 // 256
_reference: dict[tuple[Case, tuple[str, ...]], Path] = {}
Fault = Callable[[Path, random.Random], None]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def text(folder: Path, rank: int = 0) -> str:
    """What a process of the trainings in a folder has printed."""
    return folder.with_suffix(f'.{rank}.txt').read_text()


def train(folder: Path, *more: str, case: Case = SHORT, first: Callable[[], object] = int) -> list[int]:
    return wait(start(case, folder, *more, first=first))


def reference(*more: str, case: Case = SHORT) -> Path:
    """The folder of an undisturbed training, made once."""
    if (case, more) not in _reference:
        folder = Path(tempfile.mkdtemp(prefix='reference')) / 'run'
        assert set(train(folder, *more, case=case)) == {0}, text(folder)
        _reference[case, more] = folder
    return _reference[case, more]


def one_line(folder: Path, rank: int = 0) -> str:
    """The message that a training ended with, after a check that it is one line without a traceback."""
    printed = text(folder, rank)
    assert 'Traceback' not in printed, printed
    messages = [line for line in printed.splitlines() if line.startswith('main.py')]
    assert len(messages) == 1, printed
    return messages[0]


def goes_on(folder: Path, *more: str, case: Case = SHORT) -> None:
    """Starts the same command again and compares its end with the undisturbed one, to the bit."""
    assert set(train(folder, *more, case=case)) == {0}, text(folder)[-2000:]
    assert not differences(folder, reference(*more, case=case)), folder


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come to that'
        time.sleep(0.005)


def damaged(root: Path, rng: random.Random, change: Callable[[bytes], bytes]) -> None:
    """A training stopped in its second epoch goes on from the checkpoint before the newest, which is changed."""
    folder = root / 'run'
    child = start(SHORT, folder)
    wait_for(lambda: 'Epoch 1' in text(folder) if folder.with_suffix('.0.txt').exists() else False)
    os.kill(child[0], signal.SIGTERM)
    assert wait(child) in ([143], [0])
    path = folder / 'checkpoint.pth'
    path.write_bytes(change(path.read_bytes()))
    goes_on(folder)
    assert f'{path} is damaged' in text(folder) and 'Resumed from' in text(folder)
    assert (folder / 'damaged_checkpoint.pth').exists()


@fault
def truncated_checkpoint(root: Path, rng: random.Random) -> None:
    damaged(root, rng, lambda data: data[: rng.randrange(len(data))])


@fault
def flipped_byte(root: Path, rng: random.Random) -> None:
    def flip(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # between its records a byte may say nothing
            record = max(archive.infolist(), key=lambda entry: entry.file_size)
            place = data.index(archive.read(record)) + rng.randrange(record.file_size)
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]

    damaged(root, rng, flip)


@fault
def sigterm(root: Path, rng: random.Random) -> None:
    """Or one of the others, at a random moment: a checkpoint within seconds, the exit code says which signal."""
    folder, number = root / 'run', rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    children = start(SHORT, folder)
    wait_for(lambda: folder.with_suffix('.0.txt').exists() and 'Epoch 0' in text(folder))
    time.sleep(rng.uniform(0, 1))
    os.kill(children[0], number)
    begun = time.monotonic()
    (code,) = wait(children)
    assert time.monotonic() - begun < 20
    if code != 0:  # it had ended by itself
        assert code == 128 + number, text(folder)
        assert 'stopped: ' + signal.Signals(number).name in one_line(folder)
    goes_on(folder)


def _slow_disk() -> None:
    """Makes every file take a second."""
    write = ckpt.write_bytes

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(1)
        write(*args, **kwargs)

    ckpt.write_bytes = slowly


@fault
def preempted_group(root: Path, rng: random.Random) -> None:
    """Two processes get the signal, and a launcher ends the other once one has left: the checkpoint is whole."""
    folder, case = root / 'run', Case(processes=2, epochs=2, batch=256)
    children = start(case, folder, first=_slow_disk)
    wait_for(lambda: folder.with_suffix('.0.txt').exists() and 'Epoch 0 [5' in text(folder))
    for child in children:
        os.kill(child, signal.SIGUSR1)
    left = {}

    def one_has_left() -> bool:
        for child in children:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                left[pid] = status
                return True
        return False

    wait_for(one_has_left)
    ((first, status),) = left.items()
    (other,) = set(children) - {first}
    os.kill(other, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(status) == 138, text(folder)
    wait([other])
    assert ckpt.load(str(folder / 'checkpoint.pth'))['progress'] is not None
    goes_on(folder, case=case)


@fault
def second_signal(root: Path, rng: random.Random) -> None:
    """It ends the process at once, and leaves no broken file."""
    folder = root / 'run'
    children = start(SHORT, folder)
    wait_for(lambda: folder.with_suffix('.0.txt').exists() and 'Epoch 1' in text(folder))
    for _ in range(2):
        os.kill(children[0], signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    assert wait(children)[0] in (143, 0)
    goes_on(folder)


def _state(number: int) -> dict[str, Any]:
    history = [{'epoch': epoch, 'test_acc1': epoch / 7} for epoch in range(number + 1)]
    return {
        'model': {f'{i}': torch.full((256, 256), float(number)) for i in range(16)},
        **{'epoch': number, 'progress': None, 'history': history, 'timings': history},
    }


@fault
def killed_save(root: Path, rng: random.Random) -> None:
    """SIGKILL while checkpoints of 4 MiB and the log are written without a pause."""
    folder, (reader, writer) = root / 'run', os.pipe()
    child = os.fork()
    if child == 0:
        try:
            output = OutputFolder(str(folder))
            for number in itertools.count():
                output.save(_state(number))
                output.wait()
                os.write(writer, b'%d\n' % number)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        written = int(pipe.readline())
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written = max([written, *map(int, pipe.read().split())])
    output = OutputFolder(str(folder))
    found = output.newest()
    assert found is not None
    state = ckpt.from_bytes(found[1], found[0])
    number = state['epoch']
    assert number >= written and all(bool((value == number).all()) for value in state['model'].values())
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    assert lines == _state(len(lines) - 1)['history'] and number - len(lines) + 1 in (0, 1)
    output.close()
    assert not [path.name for path in folder.glob('.checkpoint*')], 'temporary files are left'


@fault
def broken_log(root: Path, rng: random.Random) -> None:
    """A log that ends in half a line, or has lines twice: the next start writes it anew."""
    folder = root / 'run'
    shutil.copytree(reference(), folder)
    content = (folder / 'log.txt').read_bytes()
    (folder / 'log.txt').write_bytes(content + content[: rng.randrange(1, len(content))])
    goes_on(folder)


def can_mount() -> bool:
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / 'disk'):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: str = '6m') -> Iterator[None]:
    """A file system of its own; a root user's right."""
    folder.mkdir()
    subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], check=True, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


@fault
def full_disk(root: Path, rng: random.Random) -> None:
    """It fills up while a training runs, and is emptied again: the old checkpoint stays, the run goes on."""
    with small_disk(root / 'disk'):
        folder = root / 'disk' / 'run'
        case = Case(epochs=6, batch=256)
        children = start(case, folder)
        log = folder.with_suffix('.0.txt')
        wait_for(lambda: log.exists() and 'Epoch 1' in log.read_text())
        filler = root / 'disk' / 'filler'
        with open(filler, 'wb', buffering=0) as file:
            try:
                while file.write(b'x' * 4096):
                    pass
            except OSError:
                pass
        time.sleep(rng.uniform(0.3, 1))
        for name in ('checkpoint.pth', 'previous_checkpoint.pth'):
            if (folder / name).exists():
                ckpt.load(str(folder / name))
        filler.unlink()
        assert wait(children) == [0], log.read_text()
        assert 'could not be written: No space left on device' in log.read_text()
        assert not differences(folder, reference(case=case))


@fault
def full_disk_to_the_end(root: Path, rng: random.Random) -> None:
    """A disk too small for a second checkpoint: the run says so and ends with an error, the first stays whole."""
    with small_disk(root / 'disk', size='1200k'):
        folder = root / 'disk' / 'run'
        folder.mkdir()
        folder.with_suffix('.0.txt').symlink_to(root / 'log.txt')
        assert train(folder) == [1]
        assert 'could not be written: No space left on device' in one_line(folder), text(folder)
        assert 'the run goes on, and tries again at the next save' in text(folder)
        assert ckpt.load(str(folder / 'checkpoint.pth'))['model']


@fault
def read_only_folder(root: Path, rng: random.Random) -> None:
    """One line before anything is computed, on a new run and on one that goes on."""
    with small_disk(root / 'disk'):
        folder = root / 'disk' / 'run'
        shutil.copytree(reference(), folder)
        folder.with_suffix('.0.txt').symlink_to(root / 'log.txt')
        subprocess.run(['mount', '-o', 'remount,ro', str(root / 'disk')], check=True)
        assert train(folder, '--epochs', '3', '--force-resume') == [1]
        assert 'Read-only file system' in one_line(folder)
        ckpt.load(str(folder / 'checkpoint.pth'))
    assert train(root / 'run', '--output_dir', '/proc/run') == [1]
    one_line(root / 'run')


def make_folder(root: Path, images: int, split: str = 'val') -> Path:
    rng = np.random.default_rng(images)
    for i in range(images):
        path = root / split / f'{i % 3}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return root


@fault
def missing_data(root: Path, rng: random.Random) -> None:
    """The data folder is gone when a run goes on, then it has other images, then it is back."""
    data, folder = make_folder(root / 'data', 600, 'train'), root / 'run'
    make_folder(data, 12)
    flags = ['--data-set', 'FOLDER', '--data-path', str(data)]
    assert train(folder, *flags) == [0], text(folder)
    before = (folder / 'checkpoint.pth').read_bytes()
    data.rename(root / 'elsewhere')
    for change, message in ((lambda: None, 'no such folder'), (lambda: make_folder(data, 18), 'the data set was')):
        folder.with_suffix('.0.txt').unlink()
        change()
        make_folder(data, 601, 'train') if data.exists() else None
        assert train(folder, *flags) == [1] and message in one_line(folder), text(folder)
        assert (folder / 'checkpoint.pth').read_bytes() == before
    shutil.rmtree(data)
    (root / 'elsewhere').rename(data)
    assert train(folder, *flags) == [0]


def _poison(draw_to_poison: Draw) -> None:
    """Makes the image of one draw NaN."""
    original = transforms.AugmentedImages.__getitem__

    def poisoned(self: Any, draw: Draw) -> Any:
        image, target = original(self, draw)
        return (image * float('nan') if draw == draw_to_poison else image), target

    transforms.AugmentedImages.__getitem__ = poisoned  # type: ignore[method-assign]


@fault
def nan_input(root: Path, rng: random.Random) -> None:
    """The run stops, says where, and leaves a good checkpoint; --on-nan rewind leaves the batch out, and --auto-resume
    after a kill ends with the same weights."""
    from samplers import TrainBatches

    folder = root / 'run'
    plan = TrainBatches(1437, batch_size=256, repeated=True)
    plan.set_epoch(1)
    batch = rng.randrange(len(plan))
    draw = rng.choice(plan.draws(batch)[0])
    assert train(folder, first=lambda: _poison(draw)) == [1]
    message = one_line(folder)
    assert f'at epoch 1, step {batch} of {BATCHES}' in message and 'learning rate' in message
    name = f'non_finite_epoch1_step{batch}.json'
    dump = json.loads((folder / name).read_text())
    assert draw.image in [sample['index'] for sample in dump['samples'][0][0]]
    assert {'losses', 'gradient_norm', 'learning_rate', 'loss_scale'} <= set(dump)
    goes_on(folder)  # without the NaN

    # Batches 256 are left out: the weights are those of a run that never had them.
    ends = []
    for number, kill in enumerate((False, True)):
        folder = root / f'rewound{number}'
        children = start(SHORT, folder, '--on-nan', 'rewind', first=lambda: _poison(draw))
        if kill:
            wait_for(lambda folder=folder: (folder / name).exists())  # type: ignore[misc]
            os.kill(children[0], signal.SIGKILL)
            wait(children)
            children = start(SHORT, folder, '--on-nan', 'rewind', first=lambda: _poison(draw))
        assert wait(children) == [0], text(folder)
        assert 'the 256 samples of that step are left out' in text(folder)
        ends.append(folder)
    assert not differences(*ends)
    state = ckpt.load(str(ends[0] / 'checkpoint.pth'))
    assert state['left_out'] == [(1, 256 * batch, 256 * (batch + 1))]
    assert all(bool(torch.isfinite(value).all()) for value in state['model'].values())


def _hang_in_worker(kind: str) -> None:
    """Makes a loader process sleep, stop or die when it is asked for its third batch."""
    original = transforms.AugmentedImages.__getitems__
    calls = [0]

    def hanging(self: Any, draws: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            if kind == 'sleep':
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSTOP if kind == 'stop' else signal.SIGKILL)
        return original(self, draws)

    transforms.AugmentedImages.__getitems__ = hanging  # type: ignore[method-assign]


@fault
def stuck_loader(root: Path, rng: random.Random) -> None:
    """A loader process that sleeps, is stopped, or dies."""
    late, dead = 'gave no batch in 3 s', 'is killed by signal|exited unexpectedly'  # by whether its signal came first
    for kind, message in (('sleep', late), ('stop', late), ('die', dead)):
        folder = root / kind
        begun = time.monotonic()
        codes = train(folder, '--num_workers', '1', '--timeout', '3', first=lambda kind=kind: _hang_in_worker(kind))  # type: ignore[misc]
        assert codes == [1] and re.search(message, one_line(folder)), text(folder)
        assert time.monotonic() - begun < 20
    goes_on(root / 'sleep')


@fault
def dead_process(root: Path, rng: random.Random) -> None:
    """One of two processes is killed or stopped: the other ends, and says which and why."""
    case = Case(processes=2, epochs=40, batch=256)
    for number, limit in ((signal.SIGKILL, 10), (signal.SIGSTOP, 20)):
        folder, gone = root / str(int(number)), rng.randrange(2)
        children = start(case, folder, '--timeout', '6')
        wait_for(lambda folder=folder: folder.with_suffix('.0.txt').exists() and 'Epoch 1' in text(folder))  # type: ignore[misc]
        os.kill(children[gone], number)
        begun = time.monotonic()
        (code,) = wait([children[1 - gone]])
        assert time.monotonic() - begun < limit and code == 1
        os.kill(children[gone], signal.SIGKILL)
        wait([children[gone]])
        message = one_line(folder, 1 - gone)
        assert f'process {gone}' in message, message


def _environment() -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


def _children(parent: int) -> list[int]:
    """The processes that another one has started."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            if int(path.read_text().rpartition(')')[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _torchrun(root: Path, agents: int, each: int) -> list[subprocess.Popen]:
    flags = [*FLAGS, '--amp', 'off', '--epochs', '6', '--batch-size', '64', '--num_workers', '0', '--output_dir']
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', str(agents), '--nproc_per_node', str(each)]
    command += [
        '--rdzv_backend',
        'c10d',
        '--rdzv_endpoint',
        f'localhost:{free_port()}',
        '--rdzv_id',
        'x',
        '--max_restarts',
        '3',
    ]
    started = []
    for agent in range(agents):
        with open(root / f'agent{agent}.txt', 'w') as file:
            started.append(
                subprocess.Popen(
                    [*command, str(ROOT / 'main.py'), *flags, str(root / 'run')],
                    env=_environment(), stdout=file, stderr=subprocess.STDOUT
                )
            )  # fmt: skip
    return started


def restarted_group(root: Path, rng: random.Random, *, agents: int, each: int) -> None:
    running = _torchrun(root, agents, each)
    log = root / 'run' / 'log.txt'
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, seconds=120)
    victims = [child for agent in running for child in _children(agent.pid)]
    assert len(victims) == agents * each
    os.kill(rng.choice(victims), signal.SIGKILL)
    codes = [agent.wait(timeout=300) for agent in running]
    printed = ''.join((root / f'agent{agent}.txt').read_text() for agent in range(agents))
    assert codes == [0] * agents, printed[-3000:]
    assert 'Resumed from' in printed
    case = Case(processes=2, epochs=6, batch=128)
    assert not differences(root / 'run', reference(case=case))


@fault
def killed_rank(root: Path, rng: random.Random) -> None:
    """torchrun --max-restarts: the group goes on from the last checkpoint."""
    restarted_group(root, rng, agents=1, each=2)


@fault
def killed_rank_of_two_agents(root: Path, rng: random.Random) -> None:
    restarted_group(root, rng, agents=2, each=1)


@fault
def other_processes(root: Path, rng: random.Random) -> None:
    """A run stopped with one process goes on with two, and again with one: no draw is left out or taken twice."""
    folder = root / 'run'
    seen: list[Draw] = []

    def watch(steps: int) -> None:
        original = transforms.AugmentedImages.__getitem__

        def noted(self: Any, draw: Draw) -> Any:
            with open(root / 'draws.txt', 'a') as file:
                file.write(f'{json.dumps(draw)}\n')
            return original(self, draw)

        transforms.AugmentedImages.__getitem__ = noted  # type: ignore[method-assign]
        _stop_after(steps)

    for processes, steps in ((1, 6), (2, 4), (1, 0)):
        case = Case(processes=processes, epochs=1, batch=64, augment='pil')
        stop = ('--checkpoint-every', '1')
        children = start(case, folder, *stop, first=lambda steps=steps: watch(steps))  # type: ignore[misc]
        codes = set(wait(children))
        assert codes == ({143} if steps else {0}), text(folder)
    for line in (root / 'draws.txt').read_text().splitlines():
        seen.append(Draw(*json.loads(line)))
    from samplers import TrainBatches

    whole = [draw for batch in TrainBatches(1437, batch_size=64, repeated=True) for draw in batch]
    assert sorted(seen) == sorted(whole), (len(seen), len(set(seen)), len(whole))


def _stop_after(steps: int) -> None:
    """Sends this process SIGTERM in a training's step of that number, if it is not 0."""
    from training import run as training

    original = training.Run._after_step
    done = [0]

    def counted(self: Any, batch: int, read: Callable[[], None]) -> None:
        done[0] += 1
        if done[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, read)

    training.Run._after_step = counted  # type: ignore[method-assign]


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@fault
def malicious_pickle(root: Path, rng: random.Random) -> None:
    """As --finetune, --resume, and as the checkpoint that --auto-resume finds: refused by name, and not run."""
    marker, folder = root / 'marker', root / 'run'
    state = {'model': {'weight': torch.ones(1)}, 'args': _Malicious(marker)}
    torch.save(state, root / 'zip.pth')
    (root / 'plain.pth').write_bytes(pickle.dumps(state['args']))
    for name, flag in itertools.product(('zip.pth', 'plain.pth'), ('--finetune', '--resume')):
        folder.with_suffix('.0.txt').unlink(missing_ok=True)
        assert train(folder, flag, str(root / name)) == [1]
        assert name == 'plain.pth' or 'refused, it holds' in one_line(folder), text(folder)
    folder.mkdir(exist_ok=True)
    shutil.copy(root / 'zip.pth', folder / 'checkpoint.pth')
    folder.with_suffix('.0.txt').unlink()
    assert train(folder) == [1] and 'none is whole' in one_line(folder), text(folder)
    assert not marker.exists()


@fault
def climbing_archive(root: Path, rng: random.Random) -> None:
    """A DomainNet archive, and a list, with names that lead out of their folder."""
    data = root / 'data'
    data.mkdir()
    for name in ('../evil.png', f'{root}/evil.png', 'sketch/../../evil.png'):
        with zipfile.ZipFile(data / 'sketch.zip', 'w') as archive:
            archive.writestr(name, b'x')
            archive.writestr('sketch/a/1.png', b'x')
        for split in ('train', 'test'):
            (data / f'sketch_{split}.txt').write_text(f'{name} 0\n')
        try:
            prepare_domainnet.main([str(data), str(root / 'out')])
            raise AssertionError(f'{name} was accepted')
        except SystemExit as stop:
            assert stop.code in (1, 2)
        for split in ('train', 'test'):  # in the archive alone
            (data / f'sketch_{split}.txt').write_text('sketch/a/1.png 0\n')
        prepare_domainnet.main([str(data), str(root / 'out')])
        shutil.rmtree(root / 'out')
        assert not (root.parent / 'evil.png').exists() and not list(root.rglob('evil*')), 'a file was written outside'


def evaluated(root: Path, checkpoint: Path, *, images: int, batch: int, processes: int) -> str:
    """The accuracies that an evaluation on so many images prints, after a check that it counted all of them."""
    data = root / str(images)
    if not data.exists():
        make_folder(data, images)
    folder = root / f'{images}-{batch}-{processes}'
    flags = ['--eval', '--resume', str(checkpoint), '--data-set', 'FOLDER', '--data-path', str(data)]
    case = Case(processes=processes, batch=batch * processes)
    assert set(train(folder, *flags, case=case)) == {0}, text(folder)
    found = re.search(r'on the (\d+) test images.*\n  (acc@1 \S+  acc@5 \S+)', text(folder))
    assert found is not None and int(found[1]) == images, text(folder)
    return found[2]


@fault
def exact_evaluation(root: Path, rng: random.Random) -> None:
    """12 to 16 images, batch sizes 1 to 6, one to three processes: each image counts once."""
    checkpoint = reference() / 'checkpoint.pth'
    for images in range(12, 17):
        kinds = itertools.product(range(1, 7), range(1, 4))
        found = {evaluated(root, checkpoint, images=images, batch=b, processes=p) for b, p in kinds}
        assert len(found) == 1, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('names', nargs='*', help=', '.join(FAULTS))
    parser.add_argument('--times', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    for name in args.names or FAULTS:
        begun = time.monotonic()
        held = 0
        for _ in range(args.times):
            root = Path(tempfile.mkdtemp())
            try:
                FAULTS[name](root, rng)
                held += 1
            except AssertionError as err:
                print(f'{name}: {str(err)[-3000:]} ({root})', flush=True)
                continue
            shutil.rmtree(root)
        print(f'{name}: held {held} of {args.times}, {time.monotonic() - begun:.0f} s', flush=True)


if __name__ == '__main__':
    main()
