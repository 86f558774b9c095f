"""Names what images show: `python tools/predict.py CHECKPOINT INPUT [INPUT …] --out predictions.csv`.

An INPUT is an image, a folder (with all below it), an .lmdb file of folder2lmdb.py, or `-` for a list of these on
standard input, one a line. Model, classes and image size come from the checkpoint. The rows are in the order of the
inputs. Images that cannot be read are named on standard error and have no row.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import COUNT, FROM_ONE, FlagParser, output_file, refuse_inputs, usable_workers
from config.pretrained import Settings, add_checkpoint_flags, fold_if_equal, load_chosen
from engine import forward
from pipeline.file_dataset import FileDataset
from pipeline.files import note_left_out, walk
from pipeline.images import ImageDataset, decode, explain_error
from pipeline.layouts import Split
from pipeline.lmdb_dataset import ImageFolderLMDB
from pipeline.loaders import LoaderOptions
from pipeline.workers import no_children_left
from training import checkpoint as ckpt
from training.devices import amp_name, find_amp_dtype, find_device
from utils import InputError, SizedLoader, one_line

PROGRAM = 'predict.py'
PRECISIONS = ('auto', 'off', 'fp16', 'bf16')
Sample = tuple[str, Tensor | str]  # path, and the model's input (C, S, S) or why there is none
Batch = tuple[list[str], Tensor, list[tuple[str, str]]]  # paths, images (B, C, S, S); paths of bad ones, and why


class Row(NamedTuple):
    path: str
    classes: list[str]  # the likeliest first
    probabilities: list[float]


def get_args_parser() -> FlagParser:
    parser = FlagParser(PROGRAM, description='Name what images show.')
    add_checkpoint_flags(parser)
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder, .lmdb file, or - for a list')
    parser.add_argument('--out', metavar='FILE', type=output_file('.csv', '.jsonl', devices=True),
                        help='the file to write; standard output if not given')  # fmt: skip
    parser.add_argument(
        '--format', choices=('csv', 'jsonl'), help='of the rows; by the ending of --out if not given, else csv'
    )
    parser.add_argument('--topk', default=5, type=FROM_ONE, help='classes in a row, the likeliest first')
    parser.add_argument('--batch-size', default=128, type=FROM_ONE, help='images at a time')
    parser.add_argument('--num_workers', type=COUNT, help='loader processes; 10, or fewer where there are fewer cores')
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    parser.add_argument('--amp', choices=PRECISIONS, help="mixed precision; the run's by default")
    parser.add_argument('--tta', action='store_true', help='mean logits of each image and its mirror image')
    return parser


def say(message: str) -> None:
    """Writes a line on standard error, above a progress bar if there is one."""
    tqdm.write(f'{PROGRAM}: {message}', file=sys.stderr)


@dataclass
class Counts:
    """What became of the inputs."""

    written: int = 0
    skipped: int = 0

    def skip(self, message: str) -> None:
        self.skipped += 1
        say(f'skipped: {message}')


# Inputs


@dataclass
class PredictDataset(Dataset[Sample]):
    """The images of a data set as the model wants them, each under its name after a prefix."""

    images: ImageDataset
    settings: Settings
    prefix: str = ''

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        path = self.prefix + self.images.name(index)
        try:
            return path, self.settings.transform(decode(self.images.raw(index), self.settings.reading))
        except (OSError, ValueError, MemoryError, InputError) as err:
            return path, explain_error(err)


def _images_below(folder: str, complain: Callable[[str], None]) -> Iterator[str]:
    """The images in a folder and below it, by name; hidden ones are left out."""
    found = walk(folder, lambda error: complain(f'{error.filename}: {error.strerror}'))
    for note in note_left_out(folder, [found]):
        complain(note)
    for below in sorted(found.images, key=lambda path: path.split('/')):
        for name in found.images[below]:
            yield os.path.join(folder, below, name)  # noqa: PTH118  keeps the path as it was given


def find_images(
    inputs: Iterable[str], stream: IO[bytes], settings: Settings, complain: Callable[[str], None]
) -> ConcatDataset[Sample]:
    """What the inputs name, in their order.

    Args:
        inputs: images, folders, .lmdb files, and '-' for more of them.
        stream: the list that '-' stands for.
        complain: called with a line for each input that cannot be had.
    """
    parts: list[PredictDataset] = []
    files: list[str] = []

    def add_files() -> None:
        parts.append(PredictDataset(FileDataset(Split(Path(), files, [0] * len(files)), ['']), settings))
        files.clear()

    listed = (os.fsdecode(line.rstrip(b'\r\n')) for line in stream)
    for path in itertools.chain.from_iterable(filter(None, listed) if path == '-' else [path] for path in inputs):
        if path.endswith('.lmdb'):
            try:
                records = ImageFolderLMDB(path)
            except InputError as err:
                complain(one_line(err))
                continue
            add_files()
            parts.append(PredictDataset(records, settings, f'{path}/'))
        elif os.path.isdir(path):  # noqa: PTH112  of a path that is not to change
            found = len(files)
            files += _images_below(path, complain)
            if len(files) == found:
                complain(f'{path} holds no images')
        else:
            files.append(path)
    add_files()
    return ConcatDataset(parts)


def collate(samples: Sequence[Sample]) -> Batch:
    good = [(path, image) for path, image in samples if isinstance(image, Tensor)]
    bad = [(path, reason) for path, reason in samples if isinstance(reason, str)]
    return [path for path, _ in good], torch.stack([image for _, image in good]) if good else torch.empty(0), bad


# Outputs


def write_csv(file: IO[str], topk: int) -> Callable[[Row], object]:
    """Writes the header, and gives what writes a row."""
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['path', *(f'{what}{place}' for place in range(1, topk + 1) for what in ('class', 'probability'))])

    def write(row: Row) -> None:
        pairs = zip(row.classes, row.probabilities, strict=True)
        writer.writerow([row.path, *itertools.chain.from_iterable((name, f'{value:.6f}') for name, value in pairs)])

    return write


def write_jsonl(file: IO[str], topk: int) -> Callable[[Row], object]:
    """Gives what writes a row."""
    return lambda row: file.write(json.dumps(row._asdict()) + '\n')


WRITERS = {'csv': write_csv, 'jsonl': write_jsonl}


def write_to(out: Path | None, write: Callable[[IO[str]], None]) -> None:
    """Has text written to a file, which gets its name when it is whole; to pipes and standard output as it comes.

    Names of files are the bytes in it that they are on the disk.
    """
    if not out:
        results = getattr(sys.stdout, 'stream', sys.stdout)  # which end with their reader, as messages do not
        if isinstance(results, io.TextIOWrapper):
            results.reconfigure(errors='surrogateescape')
        write(results)
        return

    def write_bytes(file: IO[bytes]) -> None:
        text: Any = codecs.getwriter('utf-8')(file, 'surrogateescape')
        write(text)

    if out.exists() and not out.is_file():  # a pipe or a device is written to, not replaced
        with open(out, 'wb') as file:
            write_bytes(file)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        ckpt.write_file(out, write_bytes)


@torch.inference_mode()
def predict(
    model: nn.Module,
    classes: Sequence[str],
    paths: Sequence[str],
    images: Tensor,
    *,
    amp_dtype: torch.dtype | None,
    topk: int,
    tta: bool = False,
) -> list[Row]:
    """A model's most likely classes of images (B, C, S, S).

    Args:
        classes: the names of the logits.
        tta: take the mean logits of each image and its mirror image.
    """
    images = images.to(next(model.parameters()).device, non_blocking=True)
    logits = forward(model, images, amp_dtype)
    if tta:
        logits = (logits + forward(model, images.flip(-1), amp_dtype)) / 2
    found = logits.softmax(dim=1).topk(topk)
    return [
        Row(path, [classes[index] for index in indices], [round(value, 6) for value in values])
        for path, indices, values in zip(paths, found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def write_rows(
    file: IO[str],
    write: Callable[[Row], object],
    loader: SizedLoader,
    answer: Callable[[list[str], Tensor], list[Row]],
    counts: Counts,
    total: int,
) -> None:
    """Writes the rows of a loader's `Batch`es as they come.

    Raises:
        InputError: if there are none.
    """
    with tqdm(total=total, unit=' images', disable=None, leave=False) as bar:
        for paths, images, bad in loader:
            for path, reason in bad:
                counts.skip(f'{path} cannot be read as an image ({reason})')
            for row in answer(paths, images) if paths else ():
                write(row)
            file.flush()
            counts.written += len(paths)
            bar.update(len(paths))
    if not counts.written:
        raise InputError(f'none of the {counts.skipped} inputs could be read')


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with one_line_errors(PROGRAM), no_children_left():
        if args.out:
            refuse_inputs('--out', args.out, ['/dev/stdin' if name == '-' else name for name in args.inputs])
        device = find_device(args.device)
        model, settings, _ = load_chosen(args)
        stored = settings.args.get('amp')
        amp_dtype = find_amp_dtype(args.amp or (stored if stored in PRECISIONS else 'auto'), device)
        with suppress(InputError):  # where folding would change the logits
            model, _ = fold_if_equal(model, settings.shape)
        model = model.to(device)
        topk = min(args.topk, len(settings.classes))
        answer = partial(predict, model, settings.classes, amp_dtype=amp_dtype, topk=topk, tta=args.tta)
        counts = Counts()
        listed = sys.stdin.buffer if '-' in args.inputs and sys.stdin else io.BytesIO()
        inputs = find_images(args.inputs, listed, settings, counts.skip)
        workers = min(usable_workers(args.num_workers), -(-len(inputs) // args.batch_size))
        options = LoaderOptions(device=device, workers=workers)
        loader = options.loader(inputs, batch_size=args.batch_size, collate_fn=collate)
        ending = Path(args.out or '').suffix[1:].lower()
        writer = WRITERS[args.format or (ending if ending in WRITERS else 'csv')]
        began = time.perf_counter()
        write_to(args.out, lambda file: write_rows(file, writer(file, topk), loader, answer, counts, len(inputs)))
        seconds = time.perf_counter() - began
        where = f' to {args.out}' if args.out else ''
        mirrored = ', with mirror images' if args.tta else ''
        rate = f'{seconds:.1f} s: {counts.written / seconds:.0f} images/s'
        how = f'{amp_name(amp_dtype)} on {device}, {settings.name} at {settings.input_size} px{mirrored}'
        say(f'{counts.written} images{where}, {counts.skipped} skipped, in {rate}, {how}')


if __name__ == '__main__':
    main()
