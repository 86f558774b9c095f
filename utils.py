"""Distributed set-up, console output and small helpers that every other module may use."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

T = TypeVar('T')
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class InputError(Exception):
    """What the user gave cannot be used. Its text is one line: what is wrong, and what to do about it."""

    exit_code = 1
    label = 'error'


class UsageError(InputError):
    """Flags that are wrong in themselves, whatever lies on the disk."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """The text of an error as one line; of one that a loader process sent, the line after its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith('Caught ') and len(lines) > 1:  # how torch wraps what a loader process raised
        return lines[-1].partition(': ')[2] or lines[-1]
    return lines[0]


# Random numbers


def seed_all(*numbers: int, devices: bool = True) -> None:
    """Seeds Python's, NumPy's and PyTorch's random numbers with whole numbers from 0 on, all of which count.

    What is drawn after it depends on nothing that came before it; so a run that goes on from a checkpoint needs no
    state of theirs, on however many processes.

    Args:
        numbers: mixed by NumPy's SeedSequence.
        devices: seed those of the GPUs too.
    """
    low, high = (int(part) for part in np.random.SeedSequence(numbers).generate_state(2))
    random.seed(low)
    np.random.seed(low)
    seed = low | (high >> 1) << 32  # below 2**63
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


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
        env: the environment.
        world_size: the number of processes, for processes that are started by hand on one machine.
        local_rank: this process's number on its machine, where no launcher gives it.

    Raises:
        UsageError: for a variable that is no number, or a `local_rank` outside the group.
    """
    try:
        if 'RANK' in env and 'WORLD_SIZE' in env:
            local = int(env.get('LOCAL_RANK', local_rank))
            local_size = int(env.get('LOCAL_WORLD_SIZE', 1))
            return Process(int(env['RANK']), int(env['WORLD_SIZE']), local, local_size, 'torchrun')
        tasks = int(env.get('SLURM_STEP_NUM_TASKS', env.get('SLURM_NTASKS', 1)))
        if 'SLURM_PROCID' in env and tasks > 1:
            return Process(int(env['SLURM_PROCID']), tasks, int(env.get('SLURM_LOCALID', 0)), 1, 'slurm')
    except ValueError as err:
        raise UsageError(f'a launcher variable (RANK, WORLD_SIZE, LOCAL_RANK, SLURM_*) is no number: {err}') from None
    if world_size < 1 or not 0 <= local_rank < world_size:
        raise UsageError(f'--local_rank {local_rank} is outside --world_size {world_size}')
    return Process(local_rank, world_size, local_rank, world_size, 'flags' if world_size > 1 else 'none')


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


def get_store() -> dist.Store | None:
    return _store


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
        process: this process's place.
        device: where its tensors live.
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


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


@contextmanager
def in_turn(process: Process) -> Iterator[None]:
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


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor, on each of them."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> None:
    """Replaces a tensor by the largest values over all processes."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.MAX)


def from_main_process(value: T) -> T:
    """The main process's value, on all of them; `value` is not looked at on the others."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device('cpu'))
    return values[0]


def share_batchnorm_statistics(model: nn.Module) -> None:
    """Gives every process the main one's running statistics, so that all evaluate the model that is saved."""
    if is_distributed():
        distribute_bn(model, get_world_size(), reduce=False)


# Console


def log(message: str) -> None:
    """Prints a line on the main process, above a progress bar if there is one.

    Where standard output is a file on a full disk, the line waits until there is room: a run need not end for it.
    """
    if is_main_process():
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


class SizedLoader(Protocol):
    """Anything that has a length and can be iterated over."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


LoaderT = TypeVar('LoaderT', bound=SizedLoader)


class Progress(Generic[LoaderT]):
    """Iterates over a loader and shows how far it is: a bar on a terminal, a plain line every few steps elsewhere.

    Args:
        loader: gives a batch for each step.
        header: what the line starts with.
        print_freq: steps between two lines or bar updates with values.
        first: the number of the first step, where an epoch goes on.
    """

    def __init__(self, loader: LoaderT, *, header: str, print_freq: int, first: int = 0) -> None:
        self.loader = loader
        self.header = header
        self.print_freq = print_freq
        self.first = first
        self.steps = first + len(loader)
        self.step = first
        self.data_time = 0.0  # seconds spent waiting for the loader
        self.start = time.perf_counter()
        self.bar: tqdm | None = None

    def __iter__(self) -> Iterator[Any]:
        if is_main_process() and sys.stdout.isatty():
            self.bar = tqdm(
                total=self.steps, initial=self.first, desc=self.header, file=sys.stdout, leave=False, dynamic_ncols=True
            )
        self.start = asked = time.perf_counter()
        try:
            for step, batch in enumerate(self.loader, start=self.first):
                self.step = step
                self.data_time += time.perf_counter() - asked
                yield batch
                if self.bar is not None:
                    self.bar.update()
                asked = time.perf_counter()
        finally:
            if self.bar is not None:
                self.bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def due(self) -> bool:
        """Whether values are to be shown at this step."""
        return self.step % self.print_freq == 0 or self.step == self.steps - 1

    def show(self, values: Mapping[str, str], *, images: int) -> None:
        """Shows values at this step, and images per second from the images seen so far by all processes."""
        rate = images / max(self.seconds, 1e-9)
        text = '  '.join(f'{name} {value}' for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f'{text}  {rate:.0f} images/s')
        elif is_main_process():
            left = self.seconds / (self.step + 1 - self.first) * (self.steps - self.step - 1)
            position = f'[{self.step + 1:{len(str(self.steps))}}/{self.steps}]'
            log(f'{self.header} {position}  {text}  {rate:.0f} images/s  {format_seconds(left)} left')


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{rest:02d}'


# Devices


def default_device(process: Process) -> str:
    """'cuda', 'mps' or 'cpu': the best that this machine has, and that a group of processes can use."""
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() and process.world_size == 1 else 'cpu'


def find_device(name: str, *, process: Process) -> torch.device:
    """The device of a name such as 'cuda', 'cuda:1', 'cpu'; 'cuda' alone means the GPU of the process's local rank.

    Raises:
        UsageError: if there is no such device here.
    """
    try:
        device = torch.device(name)
        if device.type not in ('cuda', 'mps', 'cpu'):
            raise RuntimeError
    except RuntimeError:
        raise UsageError(f'--device {name}: no such kind of device; use cuda, mps or cpu') from None
    if process.world_size > 1 and (device.type == 'mps' or device.index is not None):
        raise UsageError(f'--device {name}: {process.world_size} processes need cuda, one GPU for each, or cpu')
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None:
            index = device.index
        else:  # SLURM may show each of a machine's processes its own GPU only
            index = 0 if count == 1 and process.launcher == 'slurm' else process.local_rank
        if index >= count:
            raise UsageError(
                f'--device {name}: process {process.rank} needs GPU {index}, but this machine shows {count}'
            )
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    elif device.type == 'mps' and not torch.backends.mps.is_available():
        raise UsageError(f'--device {name}: this machine has none; use cpu')
    return device


def find_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, or None for float32.

    'auto' is bfloat16 where the hardware computes in it (CUDA capability 8 and later, CPUs with avx512_bf16, amx_bf16
    or Arm's bf16), float16 on older GPUs, and float32 elsewhere.
    """
    if amp == 'auto':
        if device.type == 'cuda':
            amp = 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'
        elif device.type == 'cpu':
            features: Mapping[str, Any] = torch.cpu.get_capabilities()
            amp = 'bf16' if any(features.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16')) else 'off'
        else:
            amp = 'off'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}[amp]


def set_backends(*, deterministic: bool, tf32: bool) -> None:
    """PyTorch's switches: the same bits each time, or the fastest kernels; TensorFloat-32 for float32 products on GPUs.

    Args:
        deterministic: an operation that cannot give the same bits each time is an error.
        tf32: products of float32 numbers with 10 bits of mantissa, where the GPU has them.
    """
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')


def keep_freed_memory() -> None:
    """Has glibc keep the memory that is freed: by default it gives each large activation back to the system.

    Every forward pass would then be handed zeroed pages anew, which costs a CPU a quarter of an evaluation's time.
    Does nothing elsewhere, nor where the environment configures the allocator (MALLOC_…, GLIBC_TUNABLES, LD_PRELOAD).
    """
    configured = any(name.startswith('MALLOC_') or name in ('GLIBC_TUNABLES', 'LD_PRELOAD') for name in os.environ)
    if configured or not sys.platform.startswith('linux'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def num_compiled_graphs() -> int:
    """How many graphs torch.compile has compiled in this process."""
    counters = getattr(sys.modules.get('torch._dynamo.utils'), 'counters', None)  # not loaded where nothing is compiled
    return int(counters['stats']['unique_graphs']) if counters is not None else 0


def amp_name(amp_dtype: torch.dtype | None) -> str:
    """'float32', 'bfloat16' or 'float16', for people."""
    return 'float32' if amp_dtype is None else str(amp_dtype).removeprefix('torch.')


def num_usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def shorten(names: Iterable[str], *, most: int = 5) -> str:
    """'a, b, c, …': the first few names, for messages."""
    names = list(names)
    return ', '.join(names[:most]) + (', …' if len(names) > most else '')


def count(names: Iterable[str], noun: str) -> str:
    """'3 keys (a, b, c)', for messages."""
    names = list(names)
    return f'{len(names)} {noun}{"" if len(names) == 1 else "s"}' + (f' ({shorten(names)})' if names else '')
