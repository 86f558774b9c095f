"""What benchmark.py starts in a process of its own for each variant: main.py of some commit, held where it is measured.

The variant's flags go to that commit's own `main.main`, which builds everything as for a run. Where it calls
`engine.train_one_epoch` or `engine.evaluate` for the first time, the call is caught and made again and again with a
batch that already lies on the device, as often as benchmark.py asks. So what is measured is what runs.

Requests come as lines of JSON on stdin, answers go to what stdout was at the start; all that is printed goes to stderr.
Nothing of this project is imported before the first request has said which tree it is to come from.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

DEFAULTS = ('--model', 'dhvt_tiny_cifar_patch4', '--input-size', '32', '--batch-size', '128')
DATA_FLAGS = {'--data-set', '--data-path'}
DISTINCT = 64  # made-up images; the others are links to them


class Finished(BaseException):
    """benchmark.py asks for no more; no handler of main.py's is to catch it."""


class Channel:
    """Lines of JSON from and to benchmark.py."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), 'w')
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise Finished
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + '\n')
        self._answers.flush()


# The data


def write_images(folder: Path, *, train: int, val: int, size: int) -> None:
    """Writes <split>/a/<number>.jpg: smooth made-up images of `size` px, the same each time."""
    rng = np.random.default_rng(0)
    source = folder / 'source'
    source.mkdir(parents=True)
    for number in range(DISTINCT):
        small = rng.integers(0, 256, (max(size // 8, 2), max(size // 8, 2), 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(source / f'{number}.jpg')
    for split, count in (('train', train), ('val', val)):
        (folder / split / 'a').mkdir(parents=True)
        for number in range(count):
            os.link(source / f'{number % DISTINCT}.jpg', folder / split / 'a' / f'{number:06}.jpg')


def _mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with each of its tensors changed, whatever tuples and dictionaries it is made of."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _mapped(function, value) for key, value in batch.items()}
    return type(batch)(_mapped(function, part) for part in batch) if isinstance(batch, (tuple, list)) else batch


def _is_images(tensor: Tensor) -> bool:
    return tensor.dim() > 2


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its images on the device; the rest stays where a loader leaves it, in pinned memory for GPUs."""

    def move(tensor: Tensor) -> Tensor:
        if _is_images(tensor):
            return tensor.to(device)
        return tensor.pin_memory() if device.type == 'cuda' and tensor.device.type == 'cpu' else tensor

    return _mapped(move, batch)


def size_of(batch: Any) -> int:
    """The number of images of a batch."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)


class Repeated:
    """A loader that gives copies of one batch (mixup overwrites its images); all else is that of the true loader."""

    def __init__(self, loader: Any, batch: Any, length: int) -> None:
        self._loader, self._batch, self._length = loader, batch, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._length):
            yield _mapped(lambda tensor: tensor.clone() if _is_images(tensor) else tensor, self._batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


# The plain baseline


def make_plain() -> None:
    """Puts the published forward passes, spelt out, in place of DHVT's attention and feed-forward.

    Attention is explicit, all three convolutions of the feed-forward are convolutions, on maps that are contiguous
    (B, D, H/P, W/P). Attention of timm's own models is made explicit by TIMM_FUSED_ATTN=0, which benchmark.py sets.
    """
    dhvt: Any = importlib.import_module('models.dhvt')

    def attention(self: Any, x: Tensor) -> Tensor:
        batch, num_tokens, width = x.shape
        x = torch.cat([x, self.head_tokens(x)], dim=1)  # (B, 1+N+h, D)
        qkv = self.qkv(x).reshape(batch, -1, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, h, T, d)
        attn = (q @ k.transpose(-2, -1)) * (width // self.num_heads) ** -0.5
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = self.proj((attn @ v).transpose(1, 2).reshape(batch, -1, width))
        prefix, patches, heads = x.tensor_split([self.num_prefix_tokens, num_tokens], dim=1)
        return self.proj_drop(torch.cat([prefix + heads.mean(dim=1, keepdim=True), patches], dim=1))

    def convolve(conv: Any, x: Tensor, **kwargs: Any) -> Tensor:
        weight = conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, None, None]
        return F.conv2d(x, weight, conv.bias, **kwargs)

    def normalise(norm: nn.Module, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(norm, x) if isinstance(norm, nn.BatchNorm2d) else norm(x)

    def feed_forward(self: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, _, width = x.shape
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = patches.transpose(1, 2).reshape(batch, width, *grid).contiguous()  # (B, D, H/P, W/P)
        x = self.act(normalise(self.bn1, convolve(self.conv1, x)))
        x = x + self.act(normalise(self.bn2, convolve(self.conv2, x, padding=1, groups=x.shape[1])))
        x = normalise(self.bn3, convolve(self.conv3, x))
        patches = x.flatten(2).transpose(1, 2)  # (B, N, D)
        weight = self.excitation(self.act(self.compress(patches.mean(dim=1, keepdim=True))))
        return torch.cat([prefix * weight, patches], dim=1)

    dhvt.HeadInteractedAttention.forward = attention
    dhvt.DynamicAggregationFeedForward.forward = feed_forward


# Measuring


def synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def timed(run: Callable[[int], int], number: int, device: torch.device) -> tuple[int, float]:
    """The images and the seconds of so many units of work, the device's included."""
    synchronize(device)
    began = time.perf_counter()
    images = run(number)
    synchronize(device)
    return images, time.perf_counter() - began


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of square matrix products in FLOP/s, over sizes that double until one takes a fifth of a second."""
    best, size = 0.0, 1024
    while size <= 16384:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def multiply(number: int, a: Tensor = a, b: Tensor = b) -> int:
            for _ in range(number):
                a @ b
            return number

        timed(multiply, 2, device)
        number = 20 if device.type != 'cpu' else 1
        seconds = statistics.median(timed(multiply, number, device)[1] / number for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.2:
            break
        size *= 2
    return best


def reset_peak_memory(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    elif Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')  # the kernel's mark of the peak


def peak_memory(device: torch.device) -> float | None:
    """MiB since the last reset: what was allocated on a GPU, else what this process had resident, where Linux says."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path('/proc/self/status')
    found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


def release_memory(device: torch.device) -> None:
    """Gives the system what is free, so that variants which wait do not hold the memory of one that is measured."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    elif sys.platform.startswith('linux'):
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # musl has none
        if trim is not None:
            trim(0)


def limit_memory() -> None:
    """Lets an allocation fail that this machine has no memory for, before the kernel ends some process for it."""
    meminfo = Path('/proc/meminfo')
    found = re.search(r'MemAvailable:\s+(\d+) kB', meminfo.read_text()) if meminfo.exists() else None
    if found:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = int(int(found[1]) * 1024 * 0.9)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def idle_time(intervals: Sequence[tuple[float, float]]) -> tuple[float, float, list[float]]:
    """What intervals (start, end) cover, how long it is from the first to the last, and the gaps between them."""
    busy, gaps, reached = 0.0, [], -math.inf
    for start, end in sorted(intervals):
        if start > reached > -math.inf:
            gaps.append(start - reached)
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy, busy + sum(gaps), gaps


def profile(run: Callable[[int], int], device: torch.device, path: str, *, number: int = 3) -> None:
    """Writes the operators (CPU) or kernels (GPU) by their own time, and on a GPU the time between kernels."""
    cuda = device.type == 'cuda'
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profiler:
        _, seconds = timed(run, number, device)
    by = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    text = f'{number} steps in {seconds * 1e3:.1f} ms, by {by}\n'
    if cuda:
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, 'is_user_annotation', False)
        ]
        busy, span, gaps = idle_time(kernels)
        text += (
            f'{len(kernels) / number:.0f} kernels and copies a step; the GPU works {busy / 1e3:.2f} of '
            f'{span / 1e3:.2f} ms and is idle in {len(gaps)} gaps, the longest of '
            f'{max(gaps, default=0.0) / 1e3:.3f} ms\n'
        )
    text += profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
    Path(path).write_text(text + '\n')


# The job


class Job:
    """One variant.

    Args:
        channel: to benchmark.py.
        what: step, eval, loader, epoch or memory.
        tree: the checkout whose code is measured.
        flags: of main.py.
        scratch: an empty folder.
        plain: put the plain forward passes in place.
        tolerant: leave out flags that the tree's main.py does not know.
        seconds: the least length of a measurement.
        images: of the made-up training set, for loader and epoch.
        env: names of environment variables, whose values are reported.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        what: str,
        tree: str,
        flags: Sequence[str],
        scratch: str,
        plain: bool,
        tolerant: bool,
        seconds: float,
        images: int,
        env: Sequence[str],
    ) -> None:
        self.channel, self.what, self.seconds = channel, what, seconds
        self.scratch = Path(scratch)
        if what == 'memory':
            limit_memory()
        sys.path[0] = tree
        self.program: Any = importlib.import_module('main')
        self.engine: Any = importlib.import_module('engine')
        if plain:
            make_plain()
        asked = [*DEFAULTS, *flags]
        parser = self.program.get_args_parser()
        self.args, unknown = parser.parse_known_args(asked)
        if unknown and not tolerant:
            parser.error(f'unrecognized arguments: {" ".join(unknown)}')
        self.flags = _without(asked, unknown)
        names = {flag.partition('=')[0].replace('_', '-') for flag in self.flags}
        made_up = what not in ('loader', 'epoch')
        if made_up and names & DATA_FLAGS:
            parser.error(f'{what} measures with made-up images: leave out {min(names & DATA_FLAGS)}')
        if not names & DATA_FLAGS:
            self._make_data(images)
        if made_up:
            self.flags += ['--num_workers', '0']
        self.facts: dict[str, Any] = {
            'env': {name: os.environ.get(name) for name in env},
            'flags_left_out': unknown,
            'flags': self.flags,
        }

    def _make_data(self, images: int) -> None:
        import timm

        size, batch = self.args.input_size, self.args.batch_size
        folder = self.scratch / 'images'
        train = max(images if self.what in ('loader', 'epoch') else 0, -(-batch // 256) * 256)
        write_images(folder, train=train, val=-(-batch * 3 // 2), size=size if size <= 64 else size * 8 // 7)
        self.flags += ['--data-set', 'FOLDER', '--data-path', str(folder)]
        if self.args.nb_classes is None and timm.is_model(self.args.model):
            config = timm.models.get_pretrained_cfg(self.args.model, allow_unregistered=False)
            self.flags += ['--nb-classes', str(config.num_classes if config is not None else 1000)]
            self.args = self.program.get_args_parser().parse_args(self.flags)

    def run(self) -> None:
        """Runs main.py, up to where it is measured."""
        self.facts['torch'] = str(torch.__version__)
        if self.what == 'epoch':
            self._run_epoch()
            return
        name = 'evaluate' if self.what == 'eval' else 'train_one_epoch'
        flags = self.flags
        if self.what == 'eval':
            weights = self.scratch / 'weights.pth'
            torch.save({'model': self._new_model().state_dict()}, weights)
            flags = [*flags, '--eval', '--resume', str(weights)]
        original = getattr(self.engine, name)

        def caught(**kwargs: Any) -> Any:
            self._serve(original, kwargs)

        _replace(original, caught)
        self.program.main(flags)

    def _new_model(self) -> nn.Module:
        model: nn.Module = self.program.build_model(self.args, self.args.nb_classes)
        return model

    def _serve(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        """Measures as often as benchmark.py asks; raises Finished in the end."""
        device, loader = kwargs['device'], kwargs['loader']
        unit = self._pass_of(loader) if self.what == 'loader' else self._steps_of(original, kwargs, device)
        precision = _precision(kwargs.get('amp_dtype'), device)
        began = time.perf_counter()
        reset_peak_memory(device)
        unit(1)  # compiles, tunes, and fills caches
        self.facts |= {
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'threads': torch.get_num_threads(),
            'precision': precision,
            'first_seconds': time.perf_counter() - began,
        }
        number = 1
        if self.what != 'memory':
            least = 1 if device.type == 'cpu' else 5
            _, seconds = timed(unit, least, device)
            number = min(max(math.ceil(self.seconds * least / seconds), 1), 10000)
        if self.what in ('step', 'eval'):
            self._count(kwargs, device)
        release_memory(device)
        self.channel.send(self.facts)
        while True:
            request = self.channel.receive()
            if 'profile' in request:
                profile(unit, device, request['profile'])
                self.channel.send({})
                continue
            if self.what in ('step', 'eval'):
                reset_peak_memory(device)
                unit(1)  # memory is as it is in the middle of a run again
            images, seconds = timed(unit, number, device)
            peak = peak_memory(device)
            release_memory(device)
            self.channel.send({'images': images, 'units': number, 'seconds': seconds, 'peak_memory_mib': peak})

    def _count(self, kwargs: dict[str, Any], device: torch.device) -> None:
        """The work of an image, and the rate of the best matrix product in the same precision."""
        speed = importlib.import_module('models.speed')
        size = self.args.input_size
        macs = speed.count_macs(self._new_model(), (3, size, size))
        self.facts |= {
            'macs': macs,
            'flop_per_image': 2 * macs * (3 if self.what == 'step' else 1),  # backward: to weights, and to activations
            'gemm_flops': gemm_peak(device, kwargs.get('amp_dtype') or torch.float32),
        }

    def _steps_of(
        self, original: Callable[..., Any], kwargs: dict[str, Any], device: torch.device
    ) -> Callable[[int], int]:
        """Training steps, or batches of an evaluation, on a batch that lies on the device."""
        loader = kwargs['loader']
        batch = on_device(next(iter(loader)), device)
        images = size_of(batch)
        self.facts['batch'] = images
        fresh = {name: kwargs[name] for name in kwargs if name not in ('tally', 'after_step', 'first')}

        def unit(number: int) -> int:
            original(**{**fresh, 'loader': Repeated(loader, batch, number)})
            return images * number

        return unit

    def _pass_of(self, loader: Any) -> Callable[[int], int]:
        """Whole passes over the loader, each an epoch of its own."""
        passed = 0

        def unit(number: int) -> int:
            nonlocal passed
            images = 0
            for _ in range(number):
                if hasattr(getattr(loader, 'batch_sampler', None), 'start'):
                    loader.batch_sampler.start(passed)
                passed += 1
                for batch in loader:
                    images += size_of(batch)
            return images

        self.facts['batch'], self.facts['batches'] = self.args.batch_size, len(loader)
        return unit

    def _run_epoch(self) -> None:
        """A run of main.py; what is sent is of its last epoch."""
        images = [0]
        device = [torch.device('cpu')]
        bars: list[Any] = []
        original, progress = self.engine.train_one_epoch, self.engine.Progress

        def train(**kwargs: Any) -> Any:
            images.append(len(kwargs['loader']) * self.args.batch_size)
            device.append(kwargs['device'])
            self.facts['precision'] = _precision(kwargs.get('amp_dtype'), kwargs['device'])
            return original(**kwargs)

        def show(*args: Any, **kwargs: Any) -> Any:
            bars.append(progress(*args, **kwargs))
            return bars[-1]

        _replace(original, train)
        _replace(progress, show)
        epochs = [] if any(flag.partition('=')[0] == '--epochs' for flag in self.flags) else ['--epochs', '1']
        output = self.scratch / 'run'
        reset_peak_memory(device[-1])
        began = time.perf_counter()
        self.program.main([*self.flags, *epochs, '--output_dir', str(output)])
        whole = time.perf_counter() - began
        timing = json.loads((output / 'timing.txt').read_text().splitlines()[-1])
        trained = [bar for bar in bars if bar.header.startswith('Epoch')]
        waited = timing.get('data_seconds', trained[-1].data_time if trained else None)
        name = torch.cuda.get_device_name(device[-1]) if device[-1].type == 'cuda' else device[-1].type
        self.facts |= {'device': name, 'threads': torch.get_num_threads(), 'batch': self.args.batch_size}
        self.channel.send(self.facts)
        self.channel.receive()
        self.channel.send(
            {
                'images': images[-1],
                'seconds': timing['train_seconds'],
                'data_seconds': waited,
                'test_seconds': timing['test_seconds'],
                'program_seconds': whole,
                'peak_memory_mib': peak_memory(device[-1]),
            }
        )


def _without(flags: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """The flags but those that the parser did not take, which it names in their order."""
    left, kept = list(unknown), []
    for flag in flags:
        if left and flag == left[0]:
            left.pop(0)
        else:
            kept.append(flag)
    return kept


def _replace(old: Any, new: Any) -> None:
    """Puts something else wherever a module holds a function or a class under its name."""
    name = old.__name__
    for module in list(sys.modules.values()):
        if getattr(module, name, None) is old:
            setattr(module, name, new)


def _precision(amp_dtype: torch.dtype | None, device: torch.device) -> str:
    if amp_dtype is not None:
        return str(amp_dtype).removeprefix('torch.')
    return 'tf32' if device.type == 'cuda' and torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'float32'


def main() -> None:
    channel = Channel()
    try:
        Job(channel, **channel.receive()).run()
    except Finished:
        os._exit(0)  # nothing of a run that was stopped half-way is worth a farewell
    except Exception as err:
        if not hasattr(err, 'exit_code'):
            raise
        print(' '.join(str(err).split()), file=sys.stderr)  # an InputError of the tree's own utils
        sys.exit(err.exit_code)


if __name__ == '__main__':
    main()
