"""What a run's best checkpoint does with each test image, and what its model costs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn import metrics

from config.arguments import parse_args
from config.builders import build_model
from config.data import load_splits, open_loaders
from config.errors import explain
from config.models import set_memory_format
from config.pretrained import load_trained
from config.recall import MODEL_FLAGS, stored_flags
from datasets import find_info
from engine import forward
from models.folding import fold_batchnorm
from models.speed import count_macs
from pipeline.images import ImageDataset
from reports.figures import MAX_NAMES, Picture, draw_classes, draw_confusion
from reports.runs import LoggedRun, printable
from training import checkpoint as ckpt
from training.checkpoint import BEST
from training.devices import find_amp_dtype, find_device
from training.distributed import Process
from training.weights import class_names, stored_args
from utils import InputError, ProgressBar, SizedLoader, one_line

MAX_PAIRS = 15  # of classes that are confused


def recall(flags: Sequence[str], source: str) -> Any:
    """The arguments that stored flags come to.

    Raises:
        InputError: if they are not those of this program.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse_args(flags)
    except SystemExit:
        raise InputError(f'{source} has flags that main.py refuses: {said.getvalue().strip()}') from None


def find_cost(run: LoggedRun) -> tuple[int, int] | None:
    """Parameters and multiply-adds of one image; None where the folder does not say what the model is.

    Raises:
        InputError: if the model cannot be built.
    """
    known_classes = find_info(str(run.args.get('data_set'))).num_classes
    num_classes = run.derived.get('nb_classes') or run.args.get('nb_classes') or known_classes
    if not run.args.get('model') or not isinstance(num_classes, int):
        return None
    return _cost(tuple(stored_flags(run.args, (*MODEL_FLAGS, 'input_size'))), num_classes)


@cache
def _cost(flags: tuple[str, ...], num_classes: int) -> tuple[int, int]:
    args = recall([*flags, '--drop-path', '0'], 'args.yaml')  # a rate that not every model takes
    model = build_model(args, num_classes)
    try:
        macs = count_macs(model, (args.in_chans, args.input_size, args.input_size))
    except Exception as err:  # the tracer has not heard of every operator of timm's models
        raise InputError(f'the multiply-adds of {args.model} cannot be counted: {one_line(err)}') from None
    return sum(p.numel() for p in model.parameters()), macs


@dataclass
class Predictions:
    """A checkpoint's predictions for n images.

    `targets` and `predicted` are class indices (n,), `confidence` the probabilities (n,) of the latter, `indices` the
    images' numbers in `dataset`; `labels` name each class that is a target or predicted; `notes` are on the images.
    """

    run: LoggedRun
    dataset: ImageDataset
    labels: list[str]
    indices: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    epoch: int | None
    notes: list[str]

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(metrics.accuracy_score(self.targets, self.predicted))

    def matrix(self) -> np.ndarray:
        """Images by class (row) and prediction (column)."""
        return metrics.confusion_matrix(self.targets, self.predicted, labels=np.arange(len(self.labels)))


def predict(
    run: LoggedRun,
    *,
    data_path: str | None = None,
    device: str | None = None,
    num_workers: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Predictions | str:
    """Evaluates a run's best checkpoint on its test images; where that cannot be, says why.

    Args:
        data_path: where the images are, if not where the run had them.
        device, num_workers: as main.py's flags.
        stop: asked before each batch.

    Raises:
        InputError: if the checkpoint is damaged, or not of main.py.
        UsageError: for a device that is not there.
    """
    path = str(run.folder / BEST)
    if not Path(path).exists():
        return f'{run.name} has no {BEST}' + ('' if run.lines else ': no epoch is whole yet')
    kept = {'--on-bad-image': run.args.get('on_bad_image'), '--timeout': run.args.get('timeout')}
    given = {**kept, '--data-path': data_path, '--num_workers': num_workers}
    flags = [f'{flag}={value}' for flag, value in given.items() if value is not None]
    process = Process()
    chosen = find_device(device)
    try:
        state = ckpt.load(path)
        if not {'model', 'data_set'} <= stored_args(state).keys():
            raise InputError(f'{path} does not say its model and data set: it is not of main.py')
        args = recall(['--eval', f'--resume={path}', *flags], path)
        model, _, _ = load_trained(path)
    except InputError as err:
        raise InputError(f'{one_line(err)}; leave it out with --no-predictions') from None
    try:
        splits = load_splits(args, process, class_names(state, path), download=False)  # for which a report is no reason
        loader = open_loaders(args, splits, process, chosen)[1]
    except (InputError, OSError) as err:
        return f'the images of {args.data_set} cannot be read: {one_line(err)}'
    try:
        model.to(chosen)
        set_memory_format(args, model)  # as main.py evaluates it: in bfloat16 some answers depend on both
        model = fold_batchnorm(model)
        found = _predict_batches(model, loader, chosen, find_amp_dtype(args.amp, chosen), stop)
    except (InputError, OSError) as err:
        return one_line(err)
    except RuntimeError as err:
        reason = explain(err, args)
        if reason is None:
            raise
        return str(reason)
    if not found:
        return 'there are no test images'
    targets, predicted, confidence = (np.concatenate(part) for part in zip(*found, strict=True))
    seen = np.flatnonzero(targets >= 0)  # the others cannot be decoded, and the run left them out too
    classes = [printable(name) for name in splits.val.classes]
    extra = range(len(classes), max(len(classes), int(predicted.max()) + 1))
    labels = [*classes, *(f'output {number}, of no class' for number in extra)]
    epoch = state.get('epoch')
    known = targets[seen], predicted[seen], confidence[seen]
    return Predictions(run, splits.val, labels, seen, *known, epoch, splits.notes)


@torch.inference_mode()
def _predict_batches(
    model: torch.nn.Module,
    loader: SizedLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    stop: Callable[[], bool] | None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Targets, predictions and their probabilities, batch by batch."""
    found = []
    for images, targets in ProgressBar(loader, header='Predictions', print_freq=10):
        if stop is not None and stop():
            raise InputError('a signal ended the evaluation')
        logits = forward(model, images.to(device, non_blocking=True), amp_dtype)
        best = logits.topk(min(5, logits.shape[1])).indices[:, :1]  # of equals, which bfloat16 has, evaluate's choice
        confidence = logits.softmax(dim=1).gather(1, best)
        found.append((targets.cpu().numpy(), best[:, 0].cpu().numpy(), confidence[:, 0].cpu().numpy()))
    return found


def thumbnail(name: str, image: Image.Image) -> Picture:
    """A small copy of an image; images that are small themselves keep their pixels."""
    image = image.copy()
    image.thumbnail((160, 160))
    kind = 'png' if max(image.size) <= 64 else 'jpeg'
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == 'png' else {'quality': 85}))
    return Picture(name, name, file.getvalue(), kind)


def confused_pairs(matrix: np.ndarray, labels: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """The commonest pairs of class and wrong prediction: names, number of images, and their percentage of the class."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    most = np.argsort(-wrong[rows, columns], kind='stable')[:MAX_PAIRS]
    return [
        (labels[row], labels[column], int(wrong[row, column]), 100 * wrong[row, column] / matrix[row].sum())
        for row, column in zip(rows[most], columns[most], strict=True)
    ]


def describe_predictions(found: Predictions, mistakes: int) -> dict[str, Any]:
    """What the page says about predictions beside themselves."""
    matrix = found.matrix()
    precision, right, _, images = metrics.precision_recall_fscore_support(
        found.targets, found.predicted, labels=np.arange(len(found.labels)), zero_division=np.nan
    )
    wrong = np.flatnonzero(found.targets != found.predicted)
    most_confident = wrong[np.argsort(-found.confidence[wrong], kind='stable')][:mistakes]
    shown = [
        {
            'picture': thumbnail(printable(found.dataset.name(index)), found.dataset.load(index)),
            'class': found.labels[found.targets[position]],
            'prediction': found.labels[found.predicted[position]],
            'confidence': 100 * float(found.confidence[position]),
        }
        for position, index in zip(most_confident, found.indices[most_confident].tolist(), strict=True)
    ]
    return {
        'wrong': len(wrong),
        'many': len(found.labels) > MAX_NAMES,
        'pairs': confused_pairs(matrix, found.labels),
        'classes': list(zip(found.labels, images, 100 * right, 100 * precision, strict=True)),
        'mistakes': shown,
        'pictures': [draw_confusion(matrix, found.labels), draw_classes(100 * right, found.labels, found.accuracy)],
    }
