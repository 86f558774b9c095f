"""Every model of this project for torch.hub: `torch.hub.load(FOLDER, 'dhvt_tiny_cifar_patch4', source='local')`.

Arguments go to the model's constructor. `checkpoint`, a path or URL of a file of main.py, gives trained weights, and
with them the constructor's arguments, the image size and the number of classes, where these are not given.
"""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys
import types as _types
import typing as _typing

dependencies = ['torch', 'timm', 'einops', 'safetensors', 'numpy', 'tqdm']

_ROOT = _pathlib.Path(__file__).resolve().parent
_ALIAS = 'dhvt_hub_models'
_FOLDERS = ('models', 'config', 'training', 'pipeline')


def _is_ours(module: _types.ModuleType) -> bool:
    file = getattr(module, '__file__', None)
    # The folder may also hold a virtual environment.
    return file is not None and _pathlib.Path(file).resolve().parent in (_ROOT, *map(_ROOT.joinpath, _FOLDERS))


def _load_models() -> _types.ModuleType:
    """The package models, under a name of its own: the program that asks for a model may have another `models`."""
    for name in ('models', _ALIAS):
        loaded = _sys.modules.get(name)
        if loaded is not None and _is_ours(loaded):
            return loaded
    folder = _ROOT / 'models'
    spec = _util.spec_from_file_location(_ALIAS, folder / '__init__.py', submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    package = _sys.modules[_ALIAS] = _util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_models = _load_models()


def _import_trained() -> _types.ModuleType:
    """config/pretrained.py, without a trace in sys.modules, where its and its imports' short names may be another's."""
    ours = {*_FOLDERS, *(path.stem for path in _ROOT.glob('*.py'))}
    found = {name: module for name, module in _sys.modules.items() if name.partition('.')[0] in ours}
    others = {name: module for name, module in found.items() if not _is_ours(module)}
    for name in others:
        del _sys.modules[name]
    for name, module in list(_sys.modules.items()):
        if name.partition('.')[0] == _ALIAS:
            _sys.modules.setdefault('models' + name.removeprefix(_ALIAS), module)
    _sys.path.insert(0, str(_ROOT))
    try:
        return _importlib.import_module('config.pretrained')
    finally:
        _sys.path.remove(str(_ROOT))
        for name in list(_sys.modules):
            if name.partition('.')[0] in ours and (name in others or name not in found):
                del _sys.modules[name]
        _sys.modules.update(others)


def _entry_point(name: str, create: _typing.Callable[..., _typing.Any]) -> _typing.Callable[..., _typing.Any]:
    def entry_point(checkpoint: str | None = None, **kwargs: _typing.Any) -> _typing.Any:
        build = _importlib.import_module(f'{_models.__name__}.ablations').create_model  # timm's, and ablations
        if checkpoint is None:
            return build(name, **kwargs)
        try:
            trained = _import_trained()
        except ModuleNotFoundError as err:
            raise ModuleNotFoundError(f'checkpoint= needs the packages of requirements.txt: {err}') from None
        loaded = trained.ckpt.load(checkpoint)
        weights = trained.model_weights(loaded, checkpoint)
        size = kwargs.pop('img_size', None)
        settings = trained.read_settings(loaded, weights, checkpoint, name=name, input_size=size, further=kwargs)
        if settings.args.get('model', name) != name:
            raise ValueError(f'{checkpoint} is of {settings.args["model"]}, not of {name}')
        return settings.build(weights, checkpoint)

    entry_point.__name__ = name
    entry_point.__doc__ = (
        f'{create.__doc__}\n\nArgs:\n    checkpoint: path or URL of trained weights; the model is then in eval mode.\n'
        "    **kwargs: the constructor's."
    )
    return entry_point


for _module in (getattr(_models, _name) for _name in _models.__all__):
    globals().update({_name: _entry_point(_name, getattr(_module, _name)) for _name in _module.default_cfgs})
