"""Every model of this project for torch.hub: `torch.hub.load(FOLDER, 'dhvt_tiny_cifar_patch4', source='local')`.

Arguments go to the model's constructor. `checkpoint`, a path or URL of a file of main.py, gives trained weights, and
with them the constructor's arguments, the image size and the number of classes, where these are not given. To read one
takes the packages of requirements.txt.
"""

import importlib as _importlib
import importlib.util as _util
import json as _json
import pathlib as _pathlib
import subprocess as _subprocess
import sys as _sys
import tempfile as _tempfile
import types as _types
import typing as _typing

dependencies = ['torch', 'timm', 'einops', 'safetensors', 'numpy', 'tqdm']

_ROOT = _pathlib.Path(__file__).resolve().parent
_ALIAS = 'dhvt_hub_models'


def _load_models() -> _types.ModuleType:
    """The package models, under a name of its own: the program that asks for a model may have another `models`."""
    folder = _ROOT / 'models'
    for name in ('models', _ALIAS):
        file = getattr(_sys.modules.get(name), '__file__', None)
        if file is not None and _pathlib.Path(file).resolve().parent == folder:
            return _sys.modules[name]
    spec = _util.spec_from_file_location(_ALIAS, folder / '__init__.py', submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    package = _sys.modules[_ALIAS] = _util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_models = _load_models()
_create_model = _importlib.import_module(f'{_models.__name__}.ablations').create_model  # timm's, and ablations


def _load_trained(name: str, checkpoint: str, kwargs: dict[str, _typing.Any]) -> _typing.Any:
    """A checkpoint's model, by way of tools/export.py in a process of its own: this one may have another `utils`."""
    from safetensors.torch import load_file, safe_open

    size = [f'--input-size={kwargs["img_size"]}'] if isinstance(kwargs.get('img_size'), int) else []
    with _tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/model.safetensors'
        command = [_sys.executable, str(_ROOT / 'tools' / 'export.py'), checkpoint, '--model', name, *size]
        done = _subprocess.run([*command, '--format', 'safetensors', '--out', path], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().rpartition('\n')[2].removeprefix('export.py: error: '))
        with safe_open(path, 'pt') as file:
            config = _json.loads(file.metadata()['dhvt'])['timm']
        weights = load_file(path)
    model = _create_model(name, **{**config['model_args'], 'num_classes': config['num_classes'], **kwargs})
    try:
        model.load_state_dict(weights)
    except RuntimeError as err:
        raise ValueError(f'{checkpoint} does not fit {kwargs}: {" ".join(str(err).split())[:200]}') from None
    return model.eval()


def _entry_point(name: str, create: _typing.Callable[..., _typing.Any]) -> _typing.Callable[..., _typing.Any]:
    def entry_point(checkpoint: str | None = None, **kwargs: _typing.Any) -> _typing.Any:
        return _create_model(name, **kwargs) if checkpoint is None else _load_trained(name, checkpoint, kwargs)

    entry_point.__name__ = name
    entry_point.__doc__ = (
        f'{create.__doc__}\n\nArgs:\n    checkpoint: path or URL of trained weights; the model is then in eval mode.\n'
        "    **kwargs: the constructor's."
    )
    return entry_point


for _module in (getattr(_models, _name) for _name in _models.__all__):
    globals().update({_name: _entry_point(_name, getattr(_module, _name)) for _name in _module.default_cfgs})
