"""Processes forked from the tests' own, which has imported everything: a start takes a tenth of a second, not five."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from subprocess import CompletedProcess
from tempfile import TemporaryFile

import torch

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return int(free.getsockname()[1])


def fork(function: Callable[[], object], out: int, err: int, env: Mapping[str, str] | None = None) -> int:
    """Forks a process that calls a function, as a program calls its main, and ends as one does; returns its number.

    Args:
        function: called once the signals that stop a run have their defaults again.
        out, err: descriptors of what becomes its standard output and error.
        env: variables added to its environment.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
        torch.set_num_threads(1)
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # the parent's
        for number in STOPS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(env or {})
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):  # of a full disk: nothing else of this program may run here
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(children: list[int]) -> list[int]:
    """The exit codes; minus the number of a signal for those that it killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def group(processes: int) -> list[dict[str, str]]:
    """The variables that torchrun gives to each process of a group on this machine."""
    shared = {'WORLD_SIZE': str(processes), 'LOCAL_WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1'}
    shared['MASTER_PORT'] = str(free_port())
    return [{**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(processes)]


def run(*functions: Callable[[], object], env: list[dict[str, str]] | None = None) -> list[CompletedProcess[str]]:
    """Runs functions at once, each in a forked process, for two minutes at most; returns how they ended."""
    with ExitStack() as stack:
        files = [[stack.enter_context(TemporaryFile('w+')) for _ in range(2)] for _ in functions]
        children = [
            fork(function, out.fileno(), err.fileno(), variables)
            for function, (out, err), variables in zip(functions, files, env or [{}] * len(functions), strict=True)
        ]
        end = time.monotonic() + 120
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            for child in set(children) - set(codes):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        printed = []
        for pair in files:
            for file in pair:
                file.seek(0)
            printed.append([file.read() for file in pair])
    return [CompletedProcess('', codes[child], *texts) for child, texts in zip(children, printed, strict=True)]
