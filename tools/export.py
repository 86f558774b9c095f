"""Writes a trained model in a form that other programs read, and checks that it gives the same logits there.

    python tools/export.py CHECKPOINT --format torch-export --out model.pt2
    python tools/export.py CHECKPOINT --format onnx --out model.onnx
    python tools/export.py CHECKPOINT --format safetensors --out model.safetensors
    python tools/export.py CHECKPOINT --format timm --out FOLDER --push OWNER/NAME

What is written is first read back and compared with the model; then it gets its name, and with `--push` it goes to the
Hub, from where `timm.create_model('hf-hub:OWNER/NAME', pretrained=True)` has it. Each form takes any number of
images (B, C, S, S) at once, normalised, and gives logits (B, classes); the classes' names, the image size S, mean and
standard deviation are in it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import FlagParser, refuse_inputs
from config.pretrained import Settings, add_checkpoint_flags, compare, fold_if_equal, load_chosen, load_trained
from pipeline.transforms import SMALL_IMAGE
from reports.card import Origin, model_card
from training import checkpoint as ckpt
from utils import InputError, UsageError, count, one_line

PROGRAM = 'export.py'
BATCH_SIZES = (1, 2, 5)  # of the comparison; none is made at the size that was traced, 3
ABOUT = 'dhvt'  # the name under which a file holds what describes the model, as JSON
Forward = Callable[[Tensor], Tensor]


def get_args_parser() -> FlagParser:
    parser = FlagParser(PROGRAM, description='Write a trained model for other programs.')
    add_checkpoint_flags(parser)
    parser.add_argument('--format', required=True, choices=tuple(FORMATS), help='docs/tools.md says what reads it')
    parser.add_argument('--out', required=True, metavar='PATH',
                        help='the file to write, whose ending may be left out; for timm a folder')  # fmt: skip
    parser.add_argument('--push', metavar='OWNER/NAME', help='upload the folder to this repository of the Hub too')
    parser.add_argument('--license', metavar='NAME', help='yours, for the weights, as the Hub spells it: cc-by-4.0')
    parser.add_argument('--fold-bn', action='store_true', help='fold BatchNorms into the convolutions before them')
    return parser


def describe(settings: Settings, origin: Origin) -> dict[str, Any]:
    """What a program needs to know to use the logits, and its owner's licence."""
    said = {'model': settings.name, 'input_size': settings.input_size, 'classes': settings.classes}
    return {**said, 'mean': list(settings.mean), 'std': list(settings.std), **origin.claims}


def describe_run(settings: Settings, origin: Origin) -> dict[str, Any]:
    """What main.py and hubconf.py need to know beside the weights."""
    metadata = ckpt.export_metadata(origin.checkpoint)
    metadata['args'] = {**metadata['args'], 'model': settings.name, 'input_size': settings.input_size}
    metadata |= describe(settings, origin)
    del metadata['model']  # where a checkpoint has its weights
    return metadata


# Each of these writes to a path, and gives the logits of what it has read back from there.


def write_torch_export(model: nn.Module, settings: Settings, path: Path, origin: Origin) -> Forward:
    """A program of torch.export, with what describes it as the extra file dhvt.json."""
    images = torch.randn(3, *settings.shape)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.export.save(program, path, extra_files={f'{ABOUT}.json': json.dumps(describe(settings, origin))})
    return torch.export.load(path).module()


def write_onnx(model: nn.Module, settings: Settings, path: Path, origin: Origin) -> Forward:
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
    about = describe(settings, origin)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def timm_config(model: nn.Module, settings: Settings, path: Path, origin: Origin) -> None:
    """Writes timm's config.json: architecture, arguments, classes, and the images that the model was trained on."""
    small = settings.input_size <= SMALL_IMAGE  # evaluation resizes such images whole, whatever their shape
    written: Any = model
    written.pretrained_cfg = {
        **{name: value for name, value in written.pretrained_cfg.items() if name not in CLAIMS},
        **origin.claims,
        'input_size': settings.shape,
        'interpolation': 'bicubic',
        'crop_pct': 1.0 if small else 224 / 256,
        'crop_mode': 'squash' if small else 'center',
        'mean': settings.mean,
        'std': settings.std,
    }
    written._model_args.pop('model_cls', None)  # of an ablation, whose options are there too
    save_config_for_hf(model, str(path), model_config={'label_names': settings.classes})


def write_safetensors(model: nn.Module, settings: Settings, path: Path, origin: Origin) -> Forward:
    """One file that main.py and hubconf.py read as a checkpoint; timm's config.json is in its metadata too."""
    with tempfile.TemporaryDirectory() as folder:
        timm_config(model, settings, Path(folder, 'config.json'), origin)
        config = json.loads(Path(folder, 'config.json').read_text())
    path.write_bytes(ckpt.to_safetensors(model.state_dict(), {**describe_run(settings, origin), 'timm': config}))
    return load_trained(str(path))[0]


def write_timm(model: nn.Module, settings: Settings, path: Path, origin: Origin) -> Forward:
    """A folder for timm.create_model('local-dir:FOLDER', pretrained=True), and for whatever reads checkpoints here."""
    path.mkdir()
    (path / 'README.md').write_text(model_card(model, settings, origin), encoding='utf-8')
    timm_config(model, settings, path / 'config.json', origin)  # takes the claims of timm's registry out of the model
    (path / ckpt.EXPORTED).write_bytes(ckpt.to_safetensors(model.state_dict(), describe_run(settings, origin)))
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


FORMATS: dict[str, Callable[[nn.Module, Settings, Path, Origin], Forward]] = {
    'torch-export': write_torch_export,
    'onnx': write_onnx,
    'safetensors': write_safetensors,
    'timm': write_timm,
}
# Of the weights that the registry's entry is of, which are not these.
CLAIMS = ('license', 'origin_url', 'paper_ids', 'paper_name', 'tag', 'notes', 'test_input_size', 'test_crop_pct')
ENDINGS = {'torch-export': '.pt2', 'onnx': '.onnx', 'safetensors': '.safetensors', 'timm': ''}
TIMM_FILES = {'README.md', 'config.json', ckpt.EXPORTED}


def find_target(kind: str, given: Path) -> Path:
    """The place to write to: the given one, with the format's ending. It is looked at before any work is done.

    Raises:
        UsageError: if the format cannot be written there.
    """
    ending = ENDINGS[kind]
    owners = {**{end: name for name, end in ENDINGS.items() if end}, '.pth': 'a checkpoint'}
    owner = owners.get(given.suffix, kind)
    if owner != kind:
        hint = f'end it in {ending}, or in nothing' if ending else 'give the name of a folder'
        raise UsageError(f'--out {given}: {given.suffix} is the ending of {owner}, not of {kind}: {hint}')
    out = given if given.suffix == ending or given.is_dir() else Path(f'{given}{ending}')
    for place in (given, out):
        if place.exists() and not (place.is_file() if ending else place.is_dir()):
            what = 'a folder' if place.is_dir() else 'a file' if place.is_file() else 'neither a file nor a new name'
            raise UsageError(f'--out {place} is {what}: --format {kind} writes a {"file" if ending else "folder"}')
    strange = sorted(path.name for path in out.iterdir() if path.name not in TIMM_FILES) if out.is_dir() else []
    if strange:
        raise UsageError(f'--out {out} holds other files ({count(strange, "name")}): give a new folder')
    return out


@torch.no_grad()
def export(
    model: nn.Module, settings: Settings, kind: str, out: Path, origin: Origin, *, reference: nn.Module
) -> tuple[float, float]:
    """Writes a model in a format to `out`, once what was written gives the reference's logits.

    Args:
        model, reference: in eval mode, on the CPU; the same model, or the first with folded BatchNorms.
        settings: what `load_trained` gave with it.
        kind: of `FORMATS`.

    Returns:
        The largest difference of logits, and the largest logit.

    Raises:
        InputError: if the format cannot hold the model, or what it holds gives other logits.
    """
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', suffix=ckpt.TEMPORARY, dir=out.parent) as folder:
        made = Path(folder, f'model{ENDINGS[kind]}')
        try:
            forward = FORMATS[kind](model, settings, made, origin)
            equal, difference, largest = compare(forward, reference, settings.shape, BATCH_SIZES)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as err:
            raise InputError(f'{settings.name} cannot be written as {kind}: {one_line(err)}') from None
        if not equal:
            raise InputError(
                f'{settings.name} as {kind} gives other logits, by {difference:.2g} (the largest is {largest:.3g}): '
                'nothing was written'
            )
        if made.is_file():
            ckpt.write_bytes(out, made.read_bytes())
        else:
            out.mkdir(exist_ok=True)
            for file in sorted(made.iterdir(), reverse=True):  # the weights first
                ckpt.write_bytes(out / file.name, file.read_bytes())
    return difference, largest


def hub_url(name: str) -> str:
    """The address of a repository of the Hub, once it is a name, and there is a token to write to it.

    Raises:
        UsageError: if it is no name.
        InputError: if there is no token.
    """
    try:
        validate_repo_id(name)
    except ValueError as err:
        raise UsageError(f'--push {name}: {one_line(err)}') from None
    if '/' not in name:
        raise UsageError(f"--push {name}: give OWNER/NAME, with your name on the Hub before the model's")
    if get_token() is None:
        raise InputError('--push needs a token that may write: run `hf auth login`, or set HF_TOKEN')
    return f'{ENDPOINT}/{name}'


def push(folder: Path, name: str) -> None:
    """Uploads what was written to a repository of the Hub, which is made if there is none.

    Raises:
        InputError: if that fails.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        files = sorted(TIMM_FILES)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message='Add model')
    except Exception as err:  # of the library's HTTP client, which differs by version
        reason = ' '.join(str(err).split()) or type(err).__name__
        raise InputError(f'{folder} is written, but {name} could not be uploaded: {reason}') from None


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with one_line_errors(PROGRAM):
        if args.push and args.format != 'timm':
            raise UsageError('--push uploads what timm loads: give --format timm')
        out = find_target(args.format, Path(args.out))
        refuse_inputs('--out', out, [args.checkpoint])
        url = hub_url(args.push) if args.push else None
        if args.fold_bn and args.format in ('safetensors', 'timm'):
            raise UsageError(
                f'--fold-bn is for torch-export and onnx: {args.format} holds weights for a model that has BatchNorms'
            )
        model, settings, loaded = load_chosen(args)
        reference = model
        if args.fold_bn:
            model, difference = fold_if_equal(model, settings.shape)
            print(f'BatchNorms folded; largest difference of logits {difference:.2g}')
        origin = Origin(loaded, ema=args.ema, license=args.license, name=args.push, url=url)
        out.parent.mkdir(parents=True, exist_ok=True)
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of exporters, about themselves
            difference, largest = export(model, settings, args.format, out, origin, reference=reference)
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
        if args.push:
            push(out, args.push)
            print(f'Uploaded to {url}')


if __name__ == '__main__':
    main()
