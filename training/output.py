"""The folder that a run leaves behind: settings, checkpoints, log."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from training import checkpoint as ckpt
from training.checkpoint import BEST, CHECKPOINT, PREVIOUS
from training.lock import take_lock
from training.state import as_best
from training.tracking import WandbRun
from utils import InputError, is_main_process, log, one_line


def holds_run(folder: Path) -> bool:
    """Whether a folder has a run's checkpoints or log."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS, BEST, 'log.txt'))


def copy_to_host(value: Any) -> Any:
    """A copy, in host memory, of tensors inside dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == 'cpu' else value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(item) for item in value)
    return value


def _finite(value: Any) -> Any:
    """The same with words in place of the numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class BackgroundWriter:
    """Writes whole files in a thread, so that training goes on.

    A file that cannot be written, as on a full disk, is reported and kept in memory; it is tried again with the next
    ones, unless there is newer content for its name by then.

    Args:
        previous: the name that a file's old content gets, for files that have one.
        check: called before each file; after an InputError of it nothing more is written, and each call raises it.
    """

    def __init__(self, previous: Mapping[Path, Path], check: Callable[[], object] = lambda: None) -> None:
        self._previous = previous
        self._check = check
        self._thread = ThreadPoolExecutor(1, 'writer')
        self._work: Future[None] | None = None  # the last
        self._pending: dict[Path, bytes] = {}
        self._failure = ''
        self._unmade: Callable[[], Mapping[Path, bytes]] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last files are still being written."""
        return self._work is not None and not self._work.done()

    def put(self, make: Callable[[], Mapping[Path, bytes]]) -> None:
        """Has the thread make files' bytes and write them, after what it is writing."""
        self.wait()
        self._work = self._thread.submit(self._write, make)

    def wait(self) -> None:
        """Waits until the last files are on the disk; raises the InputError of `check`."""
        if self._work is not None:
            self._work.result()

    def _write(self, make: Callable[[], Mapping[Path, bytes]]) -> None:
        try:
            made = make()
        except Exception as err:
            self._failure, self._unmade = f'a checkpoint could not be made: {one_line(err)}', make
            log(f'Warning: {self._failure}; the run goes on, and tries again at the next save')
            return
        self._failure, self._unmade = '', None
        # In the order in which they were made, also where an older one waits.
        self._pending = {path: data for path, data in self._pending.items() if path not in made} | {**made}
        for path, data in list(self._pending.items()):
            try:
                self._check()
                ckpt.write_bytes(path, data, previous=self._previous.get(path))
                del self._pending[path]
            except OSError as err:
                self._failure = f'{path} could not be written: {err.strerror or one_line(err)}'
                log(f'Warning: {self._failure}; what it held stays, the run goes on, and tries again at the next save')

    def close(self) -> None:
        """Waits, and tries a last time what could not be written; raises InputError if that fails again."""
        self.wait()
        if self._failure:
            self.put(self._unmade or dict)
            self.wait()
        if self._failure:
            raise InputError(self._failure)


class _Events:
    """tensorboardX's event file, written in the caller's thread: the library's own stops for good on a full disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventsWriter | None = None
        self._unwritten: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self._unwritten.append(line)
        try:
            if self._writer is None:
                self._folder.mkdir(exist_ok=True)
                self._writer = EventsWriter(str(self._folder / 'events'))
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(session_log=start, step=self._unwritten[0]['epoch']))
            for entry in self._unwritten:
                for name, value in entry.items():
                    point = summary.scalar(name, value)
                    self._writer.write_event(Event(wall_time=time.time(), step=entry['epoch'], summary=point))
            self._writer.flush()
            self._unwritten.clear()
        except OSError as err:
            self._writer = None  # its file may end in half a line
            log(f'Warning: {self._folder}: {err.strerror or one_line(err)}; the run goes on, and tries again later')

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _set_aside(path: Path, prefix: str) -> Path:
    """Renames a file to PREFIX_NAME, or PREFIX_NAME.1 and so on where that is there already; returns its new path."""
    names = (path.with_name(f'{prefix}_{path.name}{f".{number}" * (number > 0)}') for number in itertools.count())
    return path.replace(next(name for name in names if not name.exists()))


def _accuracy_of(path: Path) -> Any:
    """The accuracy that a best checkpoint says; None if it is damaged."""
    try:
        return ckpt.load(str(path)).get('max_accuracy')
    except InputError:
        return None


class OutputFolder(BackgroundWriter):
    """The files of a run, written by the main process; an empty path writes none.

    Args:
        export: a safetensors file for the best weights, if there is to be one.

    Raises:
        InputError: if another process writes to the folder.
        OSError: if it cannot be written.
    """

    def __init__(self, path: str, *, export: str | None = None) -> None:
        self.path = Path(path) if path and is_main_process() else None
        self._export = Path(export) if export and is_main_process() else None
        self._exported = False
        self.wanted = bool(path)  # also on the other processes
        self._lock: int | None = None
        self._folder: int | None = None
        self.writers: list[_Events | WandbRun] = []  # of an epoch's numbers
        previous = {} if self.path is None else {self.path / CHECKPOINT: self.path / PREVIOUS}
        super().__init__(previous, self._check_folder)
        if self._export is not None:
            self._export.parent.mkdir(parents=True, exist_ok=True)
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(self.path, os.O_RDONLY) if os.name != 'nt' else None  # which opens no folders
            self._lock = take_lock(self.path)
            ckpt.remove_temporary(self.path)

    def _check_folder(self) -> None:
        """Raises InputError once the path is no longer the folder that was opened: what is there is another run's."""
        if self.path is None or self._folder is None:
            return
        try:
            same = os.path.samestat(self.path.stat(), os.fstat(self._folder))
        except FileNotFoundError:
            same = False
        except OSError:  # a disk that is away for a while
            return
        if not same:
            raise InputError(
                f'{self.path} is no longer the folder that this run began in: it was moved or replaced. What was '
                'written is in it, under its new name; --auto-resume goes on there'
            )

    def newest(self) -> tuple[str, bytes] | None:
        """The newest whole checkpoint, as its path and bytes; None if there are none.

        A damaged one is reported, and set aside under a name that begins with `damaged_`.

        Raises:
            InputError: if there are checkpoints, but none is whole.
        """
        if self.path is None:
            return None
        found = ckpt.newest_in(self.path)
        first = self.path / CHECKPOINT
        if found is not None and first.exists() and found[0] != str(first):
            _set_aside(first, 'damaged')
        return found

    def begin(self, settings: dict[str, Any], *, lines: Sequence[dict], timings: Sequence[dict], best: float) -> None:
        """Writes args.yaml, and the logs up to here, which replace whatever an earlier start left of them.

        Args:
            best: the best accuracy so far, in percent; a best checkpoint of another is set aside.
        """
        if self.path is None:
            return
        self._check_folder()
        if (self.path / BEST).is_file() and _accuracy_of(self.path / BEST) != best:
            where = _set_aside(self.path / BEST, 'old').name
            log(f'Note: {self.path / BEST} is not of the epochs that this run goes on from, and is kept as {where}')
        log_file = self.path / 'log.txt'
        if not lines and log_file.is_file() and log_file.stat().st_size:
            log(f'Note: {log_file} is of a run without checkpoints, and is kept as {_set_aside(log_file, "old").name}')
        ckpt.write_bytes(self.path / 'args.yaml', yaml.safe_dump(settings, sort_keys=False).encode())
        for path, data in self._logs(lines, timings).items():
            if lines or path.exists():
                ckpt.write_bytes(path, data)
        self.writers.append(_Events(self.path / 'runs'))

    def _logs(self, lines: Sequence[dict], timings: Sequence[dict]) -> dict[Path, bytes]:
        assert self.path is not None
        return {
            self.path / name: ''.join(json.dumps(_finite(entry), allow_nan=False) + '\n' for entry in entries).encode()
            for name, entries in (('log.txt', lines), ('timing.txt', timings))
        }

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Writes checkpoint.pth, and best_checkpoint.pth too if this is the best so far, in the background.

        Returns when the tensors are copied to host memory; waits for an earlier save that is not finished. log.txt and
        timing.txt are written with it, from the state's `history` and `timings`.
        """
        if self.path is None and (self._export is None or not best):
            return
        copied = copy_to_host(state)
        self._exported |= best
        # Computed here: tensors' work in the writer's thread would give it OpenMP threads of its own, beside which
        # those of the training no longer wait in a loop, and each step takes a tenth longer.
        spoilt = any(value.is_floating_point() and bool(value.isnan().any()) for value in copied['model'].values())
        best_state = as_best(copied)
        files: dict[Path, bytes] = {}  # the checkpoint after what it says is there: a kill between has both redone
        if best and self._export is not None and not spoilt:
            files[self._export] = ckpt.to_safetensors(best_state['model'], ckpt.export_metadata(copied))

        def make() -> dict[Path, bytes]:
            if spoilt:
                raise ValueError('its weights are not all numbers')
            if self.path is not None:
                data = ckpt.to_bytes(copied)
                if best:
                    files[self.path / BEST] = data if best_state is copied else ckpt.to_bytes(best_state)
                files[self.path / CHECKPOINT] = data
                if copied['progress'] is None:
                    files.update(self._logs(copied['history'], copied['timings']))
            return files

        self.put(make)

    def add_events(self, line: dict[str, Any]) -> None:
        """Adds an epoch's numbers, 'epoch' among them, to tensorboardX's file, and to wandb if it is asked for."""
        for writer in self.writers:
            writer.add(line)

    def dump(self, name: str, content: Mapping[str, Any]) -> str:
        """Writes a JSON file; returns ' (its path)', or an empty string if there is no folder."""
        if self.path is None:
            return ''
        self._check_folder()
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        ckpt.write_bytes(self.path / name, text.encode())
        return f' ({self.path / name})'

    def close(self) -> None:
        """Waits for all files; raises InputError if one of them could not be written."""
        try:
            super().close()
            if self._export and not self._exported:
                best = self.path and self.path / BEST
                if best and best.is_file():  # of an earlier start
                    state = ckpt.load(str(best))
                    ckpt.write_bytes(self._export, ckpt.to_safetensors(state['model'], ckpt.export_metadata(state)))
                else:
                    log(f'Warning: no epoch was a better one, and there is no {BEST}: {self._export} is not written')
        finally:
            for writer in self.writers:
                writer.close()
            for descriptor in (self._lock, self._folder):
                if descriptor is not None:
                    os.close(descriptor)
            self._lock = self._folder = None
