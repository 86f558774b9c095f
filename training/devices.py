"""Devices, their precisions and switches."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from training.distributed import Process
from utils import UsageError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def find_device(name: str | None, *, process: Process | None = None) -> torch.device:
    """The device of a name such as 'cuda', 'cuda:1', 'cpu'; 'cuda' alone means the GPU of the process's local rank.

    Args:
        name: None for the best that this machine has, and that a group of processes can use.
        process: this one in its group; None where it is alone.

    Raises:
        UsageError: if there is no such device here.
    """
    process = process or Process()
    if name is None:
        mps = torch.backends.mps.is_available() and process.world_size == 1
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
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
        index = device.index
        if index is None:  # SLURM may show each of a machine's processes its own GPU only
            index = 0 if count == 1 and process.launcher == 'slurm' else process.local_rank
        if index >= count:
            need = f'process {process.rank} needs GPU {index}, but this machine shows {count or "none; use cpu"}'
            raise UsageError(f'--device {name}: {need}')
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


def set_backends(device: torch.device, *, deterministic: bool, tf32: bool) -> None:
    """What is set before a device is used: PyTorch's switches, and on a CPU `keep_freed_memory`.

    Args:
        deterministic: the same bits each time, and an error where an operation cannot; else the fastest kernels.
        tf32: products of float32 numbers with 10 bits of mantissa, where the device is a GPU that has them.
    """
    tf32 = tf32 and device.type == 'cuda'
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    if device.type == 'cpu':
        keep_freed_memory()


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
