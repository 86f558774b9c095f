"""Names what images show: `python tools/predict.py CHECKPOINT INPUT [INPUT …] --out predictions.csv`.

An INPUT is an image, a folder (with all below it), an .lmdb file of folder2lmdb.py, or `-` for a list of these on
standard input, one a line. Model, classes and image size come from the checkpoint. The rows are in the order of the
inputs. Images that cannot be read are named on standard error and have no row.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import COUNT, FROM_ONE, PIXELS, FlagParser, usable_workers
from config.pretrained import fold_if_equal, load_trained
from pipeline.files import note_left_out, read_file, walk
from pipeline.images import Reading, Transform, decode, explain_error, pack_names
from pipeline.lmdb_dataset import ImageFolderLMDB
from pipeline.transforms import build_transform
from pipeline.workers import ignore_signals, no_children_left
from training import checkpoint as ckpt
from training.devices import amp_name, default_device, find_amp_dtype, find_device
from training.distributed import find_process
from utils import InputError, one_line

PROGRAM = 'predict.py'
PRECISIONS = ('auto', 'off', 'fp16', 'bf16')
Batch = tuple[Tensor, list[int], list[tuple[int, str]]]  # good images (B, 3, S, S), their numbers; bad ones and why
Row = tuple[str, list[str], list[float]]  # path, classes, probabilities


def get_args_parser() -> FlagParser:
    parser = FlagParser(PROGRAM, description='Name what images show.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='of main.py, path or URL; or safetensors')
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder, .lmdb file, or - for a list')
    parser.add_argument('--out', metavar='FILE', help='the file to write; standard output if not given')
    parser.add_argument(
        '--format', choices=('csv', 'jsonl'), help='of the rows; by the ending of --out if not given, else csv'
    )
    parser.add_argument('--topk', default=5, type=FROM_ONE, help='classes in a row, the likeliest first')
    parser.add_argument('--batch-size', default=128, type=FROM_ONE)
    parser.add_argument('--num_workers', type=COUNT, help='loader processes; 10, or fewer where there are fewer cores')
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    parser.add_argument('--amp', choices=PRECISIONS, help="mixed precision; the run's by default")
    parser.add_argument('--ema', action='store_true', help='use the moving average of the weights')
    parser.add_argument('--tta', action='store_true', help='mean logits of each image and its mirror image')
    parser.add_argument('--model', help="a name of timm's registry, where the checkpoint says none")
    parser.add_argument('--input-size', type=PIXELS, help="pixels, in place of the checkpoint's")
    return parser


def say(message: str) -> None:
    """Writes a line on standard error, above a progress bar if there is one."""
    tqdm.write(f'{PROGRAM}: {message}', file=sys.stderr)


# Inputs


class _File:
    """An image in a file of its own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = pack_names(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def raw(self, index: int) -> bytes:
        return read_file(self.path(index))


class _Records:
    """The images of an LMDB file; their path is the file's and their name in it."""

    def __init__(self, path: str) -> None:
        self.file = path
        self.dataset = ImageFolderLMDB(path)

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        return f'{self.file}/{self.dataset.name(index)}'

    def raw(self, index: int) -> bytes:
        return self.dataset.raw(index)


def _images_below(folder: str, complain: Callable[[str], None]) -> Iterator[str]:
    """The images in a folder and below it, by name; hidden ones are left out."""

    found = walk(folder, lambda error: complain(f'{error.filename}: {error.strerror}'))
    for note in note_left_out(folder, [found]):
        complain(note)
    for below in sorted(found.images, key=lambda path: path.split('/')):
        for name in found.images[below]:
            yield os.path.join(folder, below, name)  # noqa: PTH118  keeps the path as it was given


def _read_list(stream: IO[bytes]) -> Iterator[str]:
    for line in stream:
        path = os.fsdecode(line.rstrip(b'\r\n'))
        if path:
            yield path


def find_parts(inputs: Iterable[str], stream: IO[bytes], complain: Callable[[str], None]) -> list[_File | _Records]:
    """What the inputs name, in their order.

    Args:
        inputs: images, folders, .lmdb files, and '-' for more of them.
        stream: the list that '-' stands for.
        complain: called with a line for each input that cannot be had.
    """
    parts: list[_File | _Records] = []
    files: list[str] = []
    for path in itertools.chain.from_iterable(_read_list(stream) if path == '-' else [path] for path in inputs):
        if path.endswith('.lmdb'):
            try:
                records = _Records(path)
            except InputError as err:
                complain(one_line(err))
                continue
            if files:
                parts.append(_File(files))
                files = []
            parts.append(records)
        elif os.path.isdir(path):  # noqa: PTH112  of a path that is not to change
            found = len(files)
            files += _images_below(path, complain)
            if len(files) == found:
                complain(f'{path} holds no images')
        else:
            files.append(path)
    if files:
        parts.append(_File(files))
    return parts


class Inputs(Dataset[tuple[int, Tensor | str]]):
    """The images of all parts, each as a tensor (C, S, S), or the reason why there is none."""

    def __init__(self, parts: Sequence[_File | _Records], transform: Transform, reading: Reading) -> None:
        self.parts = parts
        self.reading = reading
        self.transform = transform
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _place(self, number: int) -> tuple[_File | _Records, int]:
        part = bisect.bisect_right(self.ends, number)
        return self.parts[part], number - (self.ends[part - 1] if part else 0)

    def path(self, number: int) -> str:
        part, index = self._place(number)
        return part.path(index)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        part, index = self._place(number)
        try:
            return number, self.transform(decode(part.raw(index), self.reading))
        except (OSError, ValueError, MemoryError, InputError) as err:
            return number, explain_error(err)


def collate(samples: Sequence[tuple[int, Tensor | str]]) -> Batch:
    good = [(number, image) for number, image in samples if isinstance(image, Tensor)]
    bad = [(number, reason) for number, reason in samples if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return images, [number for number, _ in good], bad


# Outputs


def write_csv(file: IO[str], topk: int) -> Callable[[Row], object]:
    """Writes the header, and gives what writes a row."""
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['path', *(f'{what}{place}' for place in range(1, topk + 1) for what in ('class', 'probability'))])

    def write(row: Row) -> None:
        path, classes, probabilities = row
        pairs = zip(classes, probabilities, strict=True)
        writer.writerow([path, *itertools.chain.from_iterable((name, f'{value:.6f}') for name, value in pairs)])

    return write


def write_jsonl(file: IO[str], topk: int) -> Callable[[Row], object]:
    """Gives what writes a row."""

    def write(row: Row) -> None:
        path, classes, probabilities = row
        rounded = [round(value, 6) for value in probabilities]
        file.write(json.dumps({'path': path, 'classes': classes, 'probabilities': rounded}) + '\n')

    return write


WRITERS = {'csv': write_csv, 'jsonl': write_jsonl}


@contextmanager
def _as_text(file: IO[bytes]) -> Iterator[IO[str]]:
    """A binary file as text, in which names of files are the bytes that they are on the disk."""
    text = io.TextIOWrapper(file, encoding='utf-8', errors='surrogateescape', newline='')
    try:
        yield text
        text.flush()
    finally:
        text.detach()  # or it would close the file


def fold_if_possible(model: nn.Module, input_size: int, channels: int = 3) -> nn.Module:
    """A model with its BatchNorms folded; the model itself where that would change its outputs."""
    try:
        return fold_if_equal(model, input_size, channels)[0]
    except InputError:
        return model


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: DataLoader,
    classes: Sequence[str],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    topk: int,
    tta: bool = False,
    path: Callable[[int], str],
    complain: Callable[[str], None],
) -> Iterator[list[Row]]:
    """A model's most likely classes of a loader's images, batch by batch.

    Args:
        loader: gives `Batch`es.
        classes: the names of the logits.
        tta: take the mean logits of each image and its mirror image.
        path: of an image, by its number.
        complain: called with a line for each bad image.
    """
    for images, numbers, bad in loader:
        for number, reason in bad:
            complain(f'{path(number)} cannot be read as an image ({reason})')
        if not numbers:
            continue
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            images = images.to(device, non_blocking=True)
            logits = model(images).float()
            if tta:
                logits = (logits + model(images.flip(-1)).float()) / 2
        found = logits.softmax(dim=1).topk(topk)
        yield [
            (path(number), [classes[index] for index in indices], values)
            for number, indices, values in zip(numbers, found.indices.tolist(), found.values.tolist(), strict=True)
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; `one_line_errors` says how it ends."""
    args = get_args_parser().parse_args(argv)
    with one_line_errors(PROGRAM), no_children_left():
        process = find_process({})
        device = find_device(args.device or default_device(process), process=process)
        model, settings, _ = load_trained(args.checkpoint, ema=args.ema, name=args.model, input_size=args.input_size)
        stored = settings.args.get('amp')
        amp_dtype = find_amp_dtype(args.amp or (stored if stored in PRECISIONS else 'auto'), device)
        model = fold_if_possible(model, settings.input_size, settings.reading.channels).to(device)
        topk = min(args.topk, len(settings.classes))
        skipped = 0

        def complain(message: str) -> None:
            nonlocal skipped
            skipped += 1
            say(f'skipped: {message}')

        parts = find_parts(
            args.inputs, sys.stdin.buffer if '-' in args.inputs and sys.stdin else io.BytesIO(), complain
        )
        transform = build_transform(train=False, input_size=settings.input_size, channels=settings.reading.channels)
        inputs = Inputs(parts, transform, settings.reading)
        workers = min(usable_workers(args.num_workers), -(-len(inputs) // args.batch_size))
        loader = DataLoader(
            inputs,
            batch_size=args.batch_size,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == 'cuda',
        )
        ending = Path(args.out).suffix[1:].lower() if args.out else ''
        kind = args.format or (ending if ending in WRITERS else 'csv')
        written = 0
        began = time.perf_counter()

        def run(file: IO[str]) -> None:
            nonlocal written
            write = WRITERS[kind](file, topk)
            batches = predict(model, loader, settings.classes, device=device, amp_dtype=amp_dtype, topk=topk,
                              tta=args.tta, path=inputs.path, complain=complain)  # fmt: skip
            with tqdm(total=len(inputs), unit=' images', disable=None, leave=False) as bar:
                for rows in batches:
                    for row in rows:
                        write(row)
                    file.flush()
                    written += len(rows)
                    bar.update(len(rows))
            if not written:
                raise InputError(f'none of the {skipped} inputs could be read')

        def run_in_file(file: IO[bytes]) -> None:
            with _as_text(file) as text:
                run(text)

        try:
            if args.out:
                out = Path(args.out)
                if out.exists() and not out.is_file():  # a pipe or a device is written to, not replaced
                    with open(out, 'wb') as file:
                        run_in_file(file)
                else:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    ckpt.write_file(out, run_in_file)
            else:
                results = getattr(sys.stdout, 'stream', sys.stdout)  # which end with their reader, as messages do not
                if isinstance(results, io.TextIOWrapper):
                    results.reconfigure(errors='surrogateescape')
                run(results)
        except torch.OutOfMemoryError:
            raise InputError('out of GPU memory: lower --batch-size') from None
        except RuntimeError as err:
            if 'DataLoader worker' not in str(err):
                raise
            raise InputError(f'{one_line(err)}: was it short of memory? Fewer --num_workers need less') from None
        seconds = time.perf_counter() - began
        where = f' to {args.out}' if args.out else ''
        mirrored = ', with mirror images' if args.tta else ''
        say(
            f'{written} images{where}, {skipped} skipped, in {seconds:.1f} s: {written / seconds:.0f} images/s, '
            f'{amp_name(amp_dtype)} on {device}, {settings.name} at {settings.input_size} px{mirrored}'
        )


if __name__ == '__main__':
    main()
