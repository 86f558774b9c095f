"""Writes a trained model in a form that other programs read, and checks that it gives the same logits there.

    python tools/export.py CHECKPOINT --format torch-export --out model.pt2
    python tools/export.py CHECKPOINT --format onnx --out model.onnx
    python tools/export.py CHECKPOINT --format safetensors --out model.safetensors
    python tools/export.py CHECKPOINT --format timm --out FOLDER

What is written is first read back and compared with the model; then it gets its name. Each form takes any number of
images (B, 3, S, S) at once, normalised, and gives logits (B, classes); the classes' names, the image size S, mean and
standard deviation are in it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import FROM_ONE, FlagParser
from config.pretrained import Settings, fold_if_equal, load_trained, takes_image_size
from pipeline.transforms import SMALL_IMAGE
from training import checkpoint as ckpt
from utils import InputError, UsageError, count, one_line

PROGRAM = 'export.py'
BATCH_SIZES = (1, 2, 5)  # of the comparison; none is made at the size that was traced, 3
TOLERANCE = 1e-5  # as a part of the largest logit where that is above 1
ABOUT = 'dhvt'  # the name under which a file holds what describes the model, as JSON
Forward = Callable[[Tensor], Tensor]


def get_args_parser() -> FlagParser:
    parser = FlagParser(PROGRAM, description='Write a trained model for other programs.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='of main.py, path or URL; or safetensors')
    parser.add_argument('--format', required=True, choices=tuple(FORMATS))
    parser.add_argument('--out', required=True, metavar='PATH', help='the file to write; for timm a folder')
    parser.add_argument('--fold-bn', action='store_true', help='fold BatchNorms into the convolutions before them')
    parser.add_argument('--ema', action='store_true', help='take the moving average of the weights')
    parser.add_argument('--model', help="a name of timm's registry, where the checkpoint says none")
    parser.add_argument('--input-size', type=FROM_ONE, help="pixels, in place of the checkpoint's")
    return parser


def describe(settings: Settings) -> dict[str, Any]:
    """What a program needs to know to use the logits."""
    return {
        'model': settings.name,
        'input_size': settings.input_size,
        'classes': settings.classes,
        'mean': list(settings.mean),
        'std': list(settings.std),
    }


# Each of these writes to a path, and gives the logits of what it has read back from there.


def write_torch_export(model: nn.Module, settings: Settings, path: Path, loaded: dict[str, Any]) -> Forward:
    """A program of torch.export, with what describes it as the extra file dhvt.json."""
    images = torch.randn(3, *settings.shape)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.export.save(program, path, extra_files={f'{ABOUT}.json': json.dumps(describe(settings))})
    return torch.export.load(path).module()


def write_onnx(model: nn.Module, settings: Settings, path: Path, loaded: dict[str, Any]) -> Forward:
    """ONNX in one file, with what describes it among the model's properties. Read back by onnxruntime.

    Raises:
        InputError: if a package is missing.
    """
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'--format onnx needs {" and ".join(missing)}: pip install {" ".join(missing)}')
    import onnxruntime

    program = torch.onnx.export(
        model,
        (torch.randn(3, *settings.shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        input_names=['images'],
        output_names=['logits'],
        verbose=False,
    )
    assert program is not None
    about = describe(settings)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def timm_config(model: nn.Module, settings: Settings, path: Path) -> None:
    """Writes timm's config.json: architecture, arguments, classes, and the images that the model was trained on.

    Raises:
        InputError: if an argument of the model is nothing that JSON has.
    """
    small = settings.input_size <= SMALL_IMAGE  # evaluation resizes such images whole, whatever their shape
    model.pretrained_cfg = {  # type: ignore[assignment]
        **model.pretrained_cfg,  # type: ignore[dict-item]
        'input_size': settings.shape,
        'interpolation': 'bicubic',
        'crop_pct': 1.0 if small else 224 / 256,
        'crop_mode': 'squash' if small else 'center',
        'mean': settings.mean,
        'std': settings.std,
        'num_classes': settings.kwargs.get('num_classes', model.num_classes),
    }
    arguments = {name: value for name, value in settings.kwargs.items() if name != 'num_classes'}
    if takes_image_size(model):
        arguments['img_size'] = settings.input_size
    try:
        save_config_for_hf(model, str(path), model_config={'label_names': settings.classes}, model_args=arguments)
    except (TypeError, ValueError) as err:
        raise InputError(f"timm's config.json cannot hold the model's arguments: {one_line(err)}") from None


def write_safetensors(model: nn.Module, settings: Settings, path: Path, loaded: dict[str, Any]) -> Forward:
    """One file that main.py and hubconf.py read as a checkpoint; timm's config.json is in its metadata too."""
    with tempfile.TemporaryDirectory() as folder:
        timm_config(model, settings, Path(folder, 'config.json'))
        config = json.loads(Path(folder, 'config.json').read_text())
    described = ckpt.description(loaded)
    described['args'] = {**described['args'], 'model': settings.name, 'input_size': settings.input_size}
    described |= {**describe(settings), 'timm': config}
    described.pop('model')  # where a checkpoint has its weights
    path.write_bytes(ckpt.to_safetensors(model.state_dict(), described))
    return load_trained(str(path))[0]


def write_timm(model: nn.Module, settings: Settings, path: Path, loaded: dict[str, Any]) -> Forward:
    """A folder for timm.create_model('local-dir:FOLDER', pretrained=True)."""
    path.mkdir()
    timm_config(model, settings, path / 'config.json')
    (path / 'model.safetensors').write_bytes(ckpt.to_safetensors(model.state_dict(), describe(settings)))
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


FORMATS: dict[str, Callable[[nn.Module, Settings, Path, dict[str, Any]], Forward]] = {
    'torch-export': write_torch_export,
    'onnx': write_onnx,
    'safetensors': write_safetensors,
    'timm': write_timm,
}
ENDINGS = {'torch-export': '.pt2', 'onnx': '.onnx', 'safetensors': '.safetensors', 'timm': ''}
TIMM_FILES = {'config.json', 'model.safetensors'}


def compare(forward: Forward, model: nn.Module, settings: Settings) -> tuple[float, float]:
    """The largest difference of logits on random images, at several batch sizes, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    differences, logits = [], []
    for batch in BATCH_SIZES:
        images = torch.randn(batch, *settings.shape, generator=generator)
        expected = model(images)
        differences.append(float((forward(images) - expected).abs().max()))
        logits.append(float(expected.abs().max()))
    return max(differences), max(logits)


def check_target(kind: str, out: Path) -> None:
    """Looks at the place to write to before any work is done.

    Raises:
        UsageError: if the format cannot be written there.
    """
    if kind == 'timm':
        others = sorted(path.name for path in out.iterdir() if path.name not in TIMM_FILES) if out.is_dir() else []
        if others:
            raise UsageError(f'--out {out} holds other files ({count(others, "name")}): give a new folder')
        if out.exists() and not out.is_dir():
            raise UsageError(f'--out {out} is a file: --format timm writes a folder')
    elif out.is_dir():
        raise UsageError(f'--out {out} is a folder: --format {kind} writes a file')
    elif out.exists() and not out.is_file():
        raise UsageError(f'--out {out} is neither a file nor a new name')
    elif kind == 'safetensors' and out.suffix != '.safetensors':
        raise UsageError(f'--out {out}: the name must end in .safetensors, by which it is known when it is read')


def put_in_place(made: Path, out: Path) -> None:
    """Moves a file, or the files of a folder, each under its name when it is whole and on the disk."""
    pairs = [(made, out)]
    if made.is_dir():
        out.mkdir(exist_ok=True)
        pairs = [(path, out / path.name) for path in sorted(made.iterdir(), reverse=True)]  # the weights first
    for source, target in pairs:
        with open(source, 'rb') as data:
            ckpt.write_file(target, lambda file, data=data: shutil.copyfileobj(data, file))  # type: ignore[misc]


@torch.no_grad()
def export(
    model: nn.Module, settings: Settings, kind: str, out: Path, loaded: dict[str, Any], *, reference: nn.Module
) -> tuple[float, float]:
    """Writes a model in a format to `out`, once what was written gives the reference's logits.

    Args:
        model, reference: in eval mode, on the CPU; the same model, or the first with folded BatchNorms.
        settings, loaded: what `load_trained` gave with it.
        kind: of `FORMATS`.

    Returns:
        The largest difference of logits, and the largest logit.

    Raises:
        InputError: if the format cannot hold the model, or what it holds gives other logits.
    """
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', suffix=ckpt.TEMPORARY, dir=out.parent) as folder:
        made = Path(folder, f'model{ENDINGS[kind]}')
        try:
            forward = FORMATS[kind](model, settings, made, loaded)
            difference, largest = compare(forward, reference, settings)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as err:
            raise InputError(f'{settings.name} cannot be written as {kind}: {one_line(err)}') from None
        if not difference <= TOLERANCE * max(largest, 1.0):
            raise InputError(
                f'{settings.name} as {kind} gives other logits, by {difference:.2g} (the largest is {largest:.3g}): '
                'nothing was written'
            )
        put_in_place(made, out)
    return difference, largest


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; `one_line_errors` says how it ends."""
    args = get_args_parser().parse_args(argv)
    with one_line_errors(PROGRAM):
        out = Path(args.out)
        check_target(args.format, out)
        if args.fold_bn and args.format in ('safetensors', 'timm'):
            raise UsageError(
                f'--fold-bn is for torch-export and onnx: {args.format} holds weights for a model that has BatchNorms'
            )
        model, settings, loaded = load_trained(
            args.checkpoint, ema=args.ema, name=args.model, input_size=args.input_size
        )
        reference = model
        if args.fold_bn:
            model, difference = fold_if_equal(model, settings.input_size, settings.reading.channels)
            print(f'BatchNorms folded; largest difference of logits {difference:.2g}')
        out.parent.mkdir(parents=True, exist_ok=True)
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of exporters, about themselves
            difference, largest = export(model, settings, args.format, out, loaded, reference=reference)
        files = [path for path in out.iterdir() if path.name in TIMM_FILES] if out.is_dir() else [out]
        size = sum(path.stat().st_size for path in files) / 2**20
        print(
            f'{out}: {settings.name} as {args.format}, {len(settings.classes)} classes, {settings.input_size} px, '
            f'{size:.1f} MiB'
        )
        print(
            f'Largest difference from the model {difference:.2g} at batch sizes {", ".join(map(str, BATCH_SIZES))} '
            f'(largest logit {largest:.3g})'
        )


if __name__ == '__main__':
    main()
