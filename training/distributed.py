"""The process group: how its processes find each other, and why one of them stopped."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils import InputError, UsageError, barrier, get_rank, get_world_size, one_line

# A group whose processes tell each other why they stopped


def _within(seconds: float, call: Callable[[], str]) -> str | None:
    """What a call gives, or None after so many seconds: the store's answers can be waited for without end, if the
    process that holds it hangs."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def report_failure(reason: str) -> None:
    """Tells the other processes why this one stops."""
    store, rank = _store, get_rank()
    if store is None:
        return

    def tell() -> str:
        with suppress(Exception):  # the store may have gone with the process that held it
            store.set(f'stopped/{rank}', reason)
        return ''

    _within(2, tell)


def find_failed_process(error: BaseException, *, patience: float = 3.0) -> str:
    """Why a collective of this process failed: which of the others stopped, and what it said within `patience` s."""
    reason, store, rank = one_line(error), _store, get_rank()
    if store is None:
        return f'the group is broken ({reason})'

    def ask() -> str:
        try:
            store.set(f'lost/{rank}', '1')
            others = [other for other in range(get_world_size()) if other != rank]
            end = time.monotonic() + patience
            silent = others
            while silent and time.monotonic() < end:
                for other in others:
                    if store.check([f'stopped/{other}']):
                        return f'process {other} has stopped: {store.get(f"stopped/{other}").decode()}'
                silent = [other for other in silent if not store.check([f'lost/{other}'])]
                time.sleep(0.1)
        except Exception:
            return f'process 0, which held the group together, has stopped ({reason})'
        if silent:
            return f'process {", ".join(map(str, silent))} was killed or hangs: it says nothing ({reason})'
        return f'the group is broken ({reason})'

    return _within(patience + 2, ask) or f'process 0, which holds the group together, hangs ({reason})'


# Processes


@dataclass(frozen=True)
class Process:
    """This process's place in the group; `launcher` is what said so.

    `local_world_size` is the number of processes that share this one's cores: 1 under SLURM, which deals them out.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = 'none'


def find_process(env: Mapping[str, str], *, world_size: int = 1, local_rank: int = 0) -> Process:
    """Reads this process's place from torchrun's variables, else from SLURM's, else from the two flags.

    Args:
        world_size: the number of processes, for processes that are started by hand on one machine.
        local_rank: this process's number on its machine, where no launcher gives it.

    Raises:
        UsageError: for a variable that is no number, or a process outside the group.
    """
    found = Process(local_rank, world_size, local_rank, world_size, 'flags' if world_size > 1 else 'none')
    size = '--world_size'
    try:
        if 'RANK' in env and 'WORLD_SIZE' in env:
            size = 'WORLD_SIZE'
            local = int(env.get('LOCAL_RANK', local_rank))
            local_size = int(env.get('LOCAL_WORLD_SIZE', 1))
            found = Process(int(env['RANK']), int(env['WORLD_SIZE']), local, local_size, 'torchrun')
        elif 'SLURM_PROCID' in env and (tasks := int(env.get('SLURM_STEP_NUM_TASKS', 1))) > 1:
            size = 'SLURM_STEP_NUM_TASKS'  # srun's; a job's own script runs in none of its steps
            found = Process(int(env['SLURM_PROCID']), tasks, int(env.get('SLURM_LOCALID', 0)), 1, 'slurm')
    except ValueError as err:
        raise UsageError(f'a launcher variable (RANK, WORLD_SIZE, LOCAL_RANK, SLURM_*) is no number: {err}') from None
    if not 0 <= found.rank < found.world_size or found.local_rank < 0 or found.local_world_size < 1:
        place = f'{found.rank}, {found.local_rank} of {found.local_world_size} on its machine'
        raise UsageError(f'process {place}, is outside {size} {found.world_size}')
    return found


def _slurm_rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a SLURM step that does not set them: its first host, a port from the job's id."""
    found = {}
    if 'MASTER_ADDR' not in env:
        node_list = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_JOB_NODELIST', '')
        try:
            hosts = subprocess.run(
                ['scontrol', 'show', 'hostnames', node_list], capture_output=True, text=True, check=True
            ).stdout.split()
            found['MASTER_ADDR'] = hosts[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError('cannot ask SLURM for the first host: set MASTER_ADDR to its name') from None
    if 'MASTER_PORT' not in env:
        job = ''.join(filter(str.isdigit, env.get('SLURM_JOB_ID', ''))) or '0'
        found['MASTER_PORT'] = str(20000 + int(job) % 20000)
    return found


_store: dist.Store | None = None  # where processes leave words for each other


def _join_round(store: dist.Store, process: Process, timeout: float) -> str:
    """A name for this start of a group, the same on all its processes, in a store that outlives the starts.

    torchrun's agents count the restarts each for itself, and PyTorch names the starts by that count: where one agent
    restarted for a failure and another for the change of the group, they never meet. Here the main process names the
    start, and each of the others knows by its own token in the answer that it is not an earlier one's.

    Raises:
        dist.DistStoreError: if the others do not come.
    """
    end = time.monotonic() + timeout
    token = uuid.uuid4().hex
    if process.rank == 0:
        store.set('round', token)
        others = [f'{token}/{rank}' for rank in range(1, process.world_size)]
        store.wait(others, timedelta(seconds=timeout))
        store.set(f'{token}/all', ' '.join(store.get(other).decode() for other in others))
        return token
    while time.monotonic() < end:
        name = store.get('round').decode()
        store.set(f'{name}/{process.rank}', token)
        if store.check([f'{name}/all']) and token in store.get(f'{name}/all').decode().split():
            return name
        time.sleep(0.05)
    raise dist.DistStoreError(f'process 0 has not come within {timeout:g} s')


def _open_store(process: Process, dist_url: str, timeout: float) -> dist.Store:
    """The store through which the processes of a group find each other."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' and dist_url == 'env://':
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        store: dist.Store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
        return dist.PrefixStore(_join_round(store, process, timeout), store)
    return next(rendezvous(dist_url, process.rank, process.world_size, timeout=timedelta(seconds=timeout)))[0]


def init_distributed(process: Process, *, device: torch.device, dist_url: str, timeout: float) -> None:
    """Joins the process group: NCCL for tensors on GPUs, gloo for the rest. Does nothing for a single process.

    Args:
        dist_url: `env://` or `tcp://HOST:PORT`.
        timeout: seconds after which a process gives up waiting for the others.

    Raises:
        InputError: if the group cannot be made.
    """
    global _store
    if process.world_size == 1:
        return
    if process.launcher == 'slurm' and dist_url == 'env://':
        os.environ.update(_slurm_rendezvous(os.environ))
    if process.rank == 0 and process.launcher != 'torchrun':
        print(f'Waiting for {process.world_size - 1} further processes ({process.launcher})', flush=True)
    limit = timedelta(seconds=timeout)
    try:
        store = _open_store(process, dist_url, timeout)
        store.set_timeout(limit)
        _store = dist.PrefixStore('words', store)
        dist.init_process_group(
            backend='cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
            store=dist.PrefixStore('group', store),
            world_size=process.world_size,
            rank=process.rank,
            timeout=limit,
            device_id=device if device.type == 'cuda' else None,
        )
        dist.barrier()
    except (ValueError, KeyError, RuntimeError, dist.DistError) as err:
        raise InputError(f'cannot join the process group at {dist_url}: {one_line(err)}') from None


@contextmanager
def main_process_first(process: Process) -> Iterator[None]:
    """Runs its body on the main process first, then on one process of each further machine, then on the others.

    For work that leaves a file behind, which later processes find: a shared disk gets one download, and so does each
    machine's own disk.
    """
    turn = 0 if process.rank == 0 else 1 if process.local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(turn, 2):
        barrier()
