"""A model card: what a trained model is, what it was trained on and how, and how to load it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme
from torch import nn

from config.arguments import get_args_parser
from config.pretrained import Settings
from config.recall import stored_flags

PATHS = ('data_path', 'finetune', 'teacher_path')  # of which a card gives the last part
MACHINE = {  # what says nothing about the model
    *('output_dir', 'resume', 'auto_resume', 'force_resume', 'checkpoint_every', 'export_safetensors', 'report'),
    *('device', 'num_workers', 'cache_gib', 'world_size', 'local_rank', 'dist_url', 'timeout', 'start_epoch'),
    *('log_wandb', 'wandb_project', 'wandb_tags', 'experiment'),
}


@dataclass(frozen=True)
class Origin:
    """Where weights come from: a checkpoint or its moving average, and what their owner says of them."""

    checkpoint: dict[str, Any]
    ema: bool = False
    license: str | None = None
    name: str | None = None  # OWNER/NAME on the Hub
    url: str | None = None

    @property
    def claims(self) -> dict[str, str]:
        """The owner's licence and address, as timm's configuration names them."""
        return {key: value for key, value in (('license', self.license), ('origin_url', self.url)) if value}


def training_command(checkpoint: dict[str, Any], args: dict[str, Any]) -> str | None:
    """The command of the run that wrote a checkpoint, None if it is not of main.py.

    Paths are cut to their last part, and what only says where the run was is left out.

    Raises:
        InputError: if the arguments are not of this program.
    """
    if 'fingerprint' not in checkpoint:
        return None
    defaults = vars(get_args_parser().parse_args([]))
    names = [name for name in defaults if name not in MACHINE and args.get(name, defaults[name]) != defaults[name]]
    args = args | {name: Path(args[name]).name for name in PATHS if args.get(name)}
    processes = (checkpoint['fingerprint'] or {}).get('processes') or 1
    launcher = ['python'] if processes == 1 else ['torchrun', f'--nproc_per_node={processes}']
    return shlex.join([*launcher, 'main.py', *stored_flags(args, names)])


def accuracy(origin: Origin, args: dict[str, Any]) -> str:
    """What the checkpoint says of these weights' accuracy; of a run that was stopped inside an epoch, of its best's."""
    checkpoint = origin.checkpoint
    images = 'held-out' if args.get('val_fraction') or args.get('folds') else 'test'
    row = (checkpoint.get('history') or [{}])[-1] if 'fingerprint' in checkpoint else {}  # of main.py
    average = origin.ema or 'trained_model' in checkpoint  # which stands for the model in a best checkpoint
    found = None if checkpoint.get('progress') else row.get('ema_test_acc1' if average else 'test_acc1')
    if isinstance(found, (int, float)):
        of_average = ', of the moving average of the weights' if origin.ema else ''
        return f'{found:.2f}% top-1 on the {images} images, at the end of epoch {row.get("epoch", "?")}{of_average}'
    best = checkpoint.get('max_accuracy')
    if isinstance(best, (int, float)) and math.isfinite(best) and best >= 0:
        return f'{best:.2f}% top-1 on the {images} images, the best of its run'
    return 'the checkpoint does not say'


def model_card(model: nn.Module, settings: Settings, origin: Origin) -> str:
    """README.md of an exported model, with the fields that the Hub reads at its head."""
    args, own = settings.args, type(model).__module__.startswith('models.')
    papers = model.pretrained_cfg.get('paper_ids')  # type: ignore[operator,union-attr]
    data = [str(args.get('data_set') or 'the checkpoint does not say'), Path(str(args.get('data_path') or '')).name]
    command = training_command(origin.checkpoint, args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    details = {
        'Model': f'`{settings.name}`, {parameters / 1e6:.2f}M parameters, images of {settings.input_size} px',
        **({'Architecture': papers} if papers else {}),
        'Trained on': data[0] + f' (`{data[1]}`)' * bool(data[1]),
        f'Classes ({len(settings.classes)})': ', '.join(f'`{name}`' for name in settings.classes),
        'Accuracy': accuracy(origin, args),
        **({'Training command': f'`{command}`'} if command else {}),
        'License of the weights': origin.license or 'not given; ask their owner',
        **({'Origin': origin.url} if origin.url else {}),
    }
    register = 'import dhvt  # registers the model: `pip install` the code that it was trained with\n' if own else ''
    place = f'hf-hub:{origin.name}' if origin.name else 'local-dir:.'
    usage = (
        f'```python\nimport timm\n{register}\n'
        f"model = timm.create_model('{place}', pretrained=True).eval()\n"
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n'
        f'logits = model(transform(image)[None])  # of a PIL image of mode {settings.reading.mode}\n'
        "names = model.pretrained_cfg['label_names']\n```"
    )
    head = {'tags': ['image-classification', 'timm'], 'license': origin.license or 'unknown'}
    return generate_readme({**head, 'details': details, 'usage': usage}, (origin.name or settings.name).split('/')[-1])
