"""Every model of this project for torch.hub: `torch.hub.load(FOLDER, 'dhvt_tiny_cifar_patch4', source='local')`.

Arguments go to the model's constructor. `checkpoint`, a path or URL of a file of main.py, gives trained weights, and
with them the constructor's arguments, the image size and the number of classes, where these are not given.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import types
import typing

import safetensors
import torch

dependencies = ['torch', 'timm', 'einops', 'safetensors']

_ALIAS = 'dhvt_hub_models'


def _load_models() -> types.ModuleType:
    """The package models, under a name of its own: the program that asks for a model may have another `models`."""
    file = pathlib.Path(__file__).resolve().parent / 'models' / '__init__.py'
    for name in ('models', _ALIAS):
        loaded = sys.modules.get(name)
        if loaded is not None and pathlib.Path(getattr(loaded, '__file__', None) or '').resolve() == file:
            return loaded
    spec = importlib.util.spec_from_file_location(_ALIAS, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    package = sys.modules[_ALIAS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_models = _load_models()
_ablations = importlib.import_module(f'{_models.__name__}.ablations')


def _read(source: str) -> dict[str, typing.Any]:
    """What a file of main.py holds; a URL's is fetched once, into torch.hub's folder."""
    path = pathlib.Path(source)
    if '://' in source:
        # The hub names its files by the URL's last part alone; two checkpoint.pth of different origin would be one.
        name = f'{hashlib.sha256(source.encode()).hexdigest()[:12]}-{path.name}'
        path = pathlib.Path(torch.hub.get_dir(), 'checkpoints', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            torch.hub.download_url_to_file(source, str(path))
    if path.suffix == '.safetensors':
        with safetensors.safe_open(path, 'pt') as file:
            described = json.loads((file.metadata() or {}).get('dhvt', '{}'))
            return {**described, 'model': {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
    with torch.serialization.safe_globals([argparse.Namespace]):  # which the published code stores
        return torch.load(path, map_location='cpu', weights_only=True)


def _create_trained(name: str, source: str, kwargs: dict[str, typing.Any]) -> torch.nn.Module:
    checkpoint = _read(source)
    weights, args = checkpoint['model'], checkpoint.get('args') or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if args.get('model', name) != name:
        raise ValueError(f'{source} is of {args["model"]}, not of {name}')
    said = {key: args.get(key) for key in ('in_chans', 'base_keep_rate', 'fuse_token', 'drop_loc')}
    if said['drop_loc'] is not None:  # lists of blocks; in the published code a word
        said['drop_loc'] = [int(number) for number in re.findall(r'\d+', str(said['drop_loc']))]
    said |= {'img_size': args.get('input_size'), **dict(args.get('model_kwargs') or ())}
    # Of the rest, which timm would take too, some say from which files and addresses weights are loaded.
    with torch.device('meta'):  # which takes no memory
        classes = type(_ablations.create_model(name)).__mro__[:-1]
    known = {*_ablations.OPTIONS, *(key for cls in classes for key in inspect.signature(cls).parameters)}
    said = {key: value for key, value in said.items() if key in known and value is not None}
    model = _ablations.create_model(name, **{**said, 'num_classes': len(weights['head.weight']), **kwargs})
    model.load_state_dict(weights)
    return model.eval()


def _entry_point(name: str, create: typing.Callable[..., torch.nn.Module]) -> typing.Callable[..., torch.nn.Module]:
    def entry_point(checkpoint: str | None = None, **kwargs: typing.Any) -> torch.nn.Module:
        if checkpoint is None:
            return _ablations.create_model(name, **kwargs)
        return _create_trained(name, checkpoint, kwargs)

    entry_point.__name__ = name
    entry_point.__doc__ = (
        f'{create.__doc__}\n\nArgs:\n    checkpoint: path or URL of trained weights; the model is then in eval mode.\n'
        "    **kwargs: the constructor's."
    )
    return entry_point


for _module in (getattr(_models, _name) for _name in _models.__all__):
    globals().update({_name: _entry_point(_name, getattr(_module, _name)) for _name in _module.default_cfgs})
