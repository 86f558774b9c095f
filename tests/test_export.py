"""tools/export.py and hubconf.py: what is written gives the model's logits wherever it is read."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import models
from config.arguments import parse_args
from config.models import evit_kwargs
from config.pretrained import load_trained
from datasets import load_digits
from main import main as train
from models.ablations import create_model
from pipeline.transforms import build_transform
from reports.card import MACHINE, Origin, accuracy
from tests.conftest import PLAIN, ROOT
from tests.test_folding import as_trained, norms
from tools import export
from training import checkpoint as ckpt

CLASSES = ['ant', 'bee', 'cow', 'dog', 'eel']
SMALL = {'patch_size': 4, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
EVIT = {'base_keep_rate': 0.6, 'fuse_token': True, 'drop_loc': [[1], [2]]}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'dhvt_tiny_cifar_patch4': (SMALL, {}),
    'dhvt_tiny_cifar_patch4_distilled': (SMALL, {}),
    'deit_tiny_cifar_patch4': (SMALL, {}),
    'deit_tiny_patch16_shrink_base': ({**SMALL, 'depth': 3}, EVIT),
    'resnet10t': ({}, {}),
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxscript', 'onnxruntime')),
    reason='onnx is not installed',
)


def make(name: str, folder: Path, *, input_size: int = 32, **further: Any) -> tuple[str, nn.Module]:
    """A checkpoint of a model with random weights and statistics, whose moving average is another, and the model."""
    kwargs, evit = {**CONFIGS[name][0], **further}, CONFIGS[name][1]
    sizes = {} if name == 'resnet10t' else {'img_size': input_size}
    built = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=5, **sizes, **kwargs, **evit_kwargs(evit))
        built.append(as_trained(model, seed).eval())
    args = {'model': name, 'input_size': input_size, 'model_kwargs': list(kwargs.items()), **evit}
    path = folder / f'{name}.pth'
    torch.save({'model': built[0].state_dict(), 'model_ema': built[1].state_dict(), 'args': args,
                'classes': CLASSES, 'epoch': 3, 'max_accuracy': 50.0}, path)  # fmt: skip
    return str(path), built[0]


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def check(forward: Any, model: nn.Module, size: int = 32, limit: float = 1e-5) -> None:
    """At other batch sizes than the tool compares."""
    for batch in (1, 4):
        expected = model(images(batch, size))
        assert (forward(images(batch, size)) - expected).abs().max() <= limit * max(1.0, expected.abs().max())


def run(*argv: Any, expect: int = 0) -> None:
    if expect == 0:
        export.main(list(map(str, argv)))
        return
    with pytest.raises(SystemExit) as stop:
        export.main(list(map(str, argv)))
    assert stop.value.code == expect


@pytest.mark.parametrize('name', CONFIGS)
def test_timm_loads_the_folder(name: str, tmp_path: Path) -> None:
    path, model = make(name, tmp_path)
    run(path, '--format', 'timm', '--out', tmp_path / 'new' / 'folder')
    assert sorted(file.name for file in (tmp_path / 'new').rglob('*')) == [
        *('README.md', 'config.json', 'folder', 'model.safetensors'),
    ]
    loaded = timm.create_model(f'local-dir:{tmp_path}/new/folder', pretrained=True).eval()
    check(loaded, model, limit=0)
    assert loaded.pretrained_cfg['label_names'] == CLASSES and loaded.num_classes == 5
    assert not loaded.pretrained_cfg.get('test_input_size')  # of the registry's own weights
    other = timm.create_model(f'local-dir:{tmp_path}/new/folder', pretrained=True, num_classes=3)  # timm's own way
    assert other.num_classes == 3


@pytest.mark.parametrize('size', [32, 64])
def test_timm_prepares_images_as_evaluation_does(size: int, tmp_path: Path) -> None:
    path, _ = make('dhvt_tiny_cifar_patch4', tmp_path, input_size=size)
    run(path, '--format', 'timm', '--out', tmp_path / 'folder')
    model = timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True)
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    image = load_digits(train=False).load(3).resize((90, 70))
    assert torch.equal(transform(image), build_transform(train=False, input_size=size)(image))


def test_safetensors_is_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = make('deit_tiny_patch16_shrink_base', tmp_path)
    out = tmp_path / 'm.safetensors'
    run(path, '--format', 'safetensors', '--out', out)
    whole = out.read_bytes()
    run(out, '--format', 'safetensors', '--out', out, expect=2)
    assert 'which is read: give another name' in capsys.readouterr().err and out.read_bytes() == whole
    with safe_open(out, 'pt') as file:
        about = json.loads(file.metadata()['dhvt'])
    assert about['classes'] == CLASSES and about['timm']['label_names'] == CLASSES and about['epoch'] == 3
    assert about['timm']['architecture'] == 'deit_tiny_patch16_shrink_base'
    loaded, settings, _ = load_trained(str(out))
    check(loaded, model, limit=0)
    assert settings.classes == CLASSES and settings.input_size == 32


def test_safetensors_of_a_run_evaluates_alike(tmp_path: Path) -> None:
    flags = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', '--epochs', '1', '--train-fraction', '0.2']
    model = ['--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2']
    line = train([*flags, *model, '--output_dir', str(tmp_path / 'run')])
    out = str(tmp_path / 'm.safetensors')
    run(tmp_path / 'run' / 'checkpoint.pth', '--format', 'safetensors', '--out', out)
    again = train(['--eval', '--resume', out, '--device', 'cpu', '--num_workers', '0'])
    assert again['test_acc1'] == line['test_acc1'] and again['test_loss'] == line['test_loss']


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('name', ['dhvt_tiny_cifar_patch4', 'deit_tiny_patch16_shrink_base'])
def test_torch_export(name: str, fold: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, model = make(name, tmp_path)
    run(path, '--format', 'torch-export', '--out', tmp_path / 'm.pt2', *(['--fold-bn'] if fold else []))
    out = capsys.readouterr().out
    assert 'Largest difference from the model' in out and ('BatchNorms folded' in out) == fold
    extra = {'dhvt.json': ''}
    program = torch.export.load(tmp_path / 'm.pt2', extra_files=extra)
    check(program.module(), model)
    about = json.loads(extra['dhvt.json'])
    assert about['classes'] == CLASSES and about['input_size'] == 32 and len(about['mean']) == 3
    assert any('running_mean' in key for key in program.state_dict) == (norms(model) > 0 and not fold)


@needs_onnx
@pytest.mark.parametrize(('name', 'fold'), [('dhvt_tiny_cifar_patch4', True), ('deit_tiny_patch16_shrink_base', False)])
def test_onnx(name: str, fold: bool, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path, model = make(name, tmp_path)
    run(path, '--format', 'onnx', '--out', tmp_path / 'new' / 'm.onnx', *(['--fold-bn'] if fold else []))
    assert [file.name for file in (tmp_path / 'new').iterdir()] == ['m.onnx']  # the weights are in it
    session = onnxruntime.InferenceSession(tmp_path / 'new' / 'm.onnx')
    check(lambda x: torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0]), model)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['classes']) == CLASSES and json.loads(about['input_size']) == 32
    onnx.checker.check_model(onnx.load(tmp_path / 'new' / 'm.onnx'))


def test_moving_average(tmp_path: Path) -> None:
    path, model = make('dhvt_tiny_cifar_patch4', tmp_path)
    run(path, '--format', 'safetensors', '--out', tmp_path / 'm.safetensors', '--ema')
    averaged, _, _ = load_trained(path, ema=True)
    loaded, _, _ = load_trained(str(tmp_path / 'm.safetensors'))
    check(loaded, averaged, limit=0)
    assert not torch.equal(loaded(images(1)), model(images(1)))


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make('dhvt_tiny_cifar_patch4', tmp_path)
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'notes.txt').write_text('mine')
    before = sorted(tmp_path.rglob('*'))

    def refused(code: int, message: str, *argv: Any) -> None:
        capsys.readouterr()
        run(path, *argv, expect=code)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and message in err, err
        assert sorted(tmp_path.rglob('*')) == before and (tmp_path / 'file').read_text() == 'mine'

    refused(2, '--fold-bn is for torch-export and onnx', '--format', 'timm', '--out', tmp_path / 'x', '--fold-bn')
    refused(2, 'is a file', '--format', 'timm', '--out', tmp_path / 'file')
    refused(2, 'holds other files (1 name (notes.txt))', '--format', 'timm', '--out', tmp_path / 'folder')
    refused(2, 'is a folder', '--format', 'onnx', '--out', tmp_path / 'folder')
    refused(2, 'is a folder', '--format', 'safetensors', '--out', '.')
    refused(2, 'is neither a file nor a new name', '--format', 'onnx', '--out', os.devnull)
    for kind, name in (('safetensors', 'x.onnx'), ('onnx', 'x.pt2'), ('timm', 'x.safetensors'), ('onnx', 'x.pth')):
        refused(2, f'{Path(name).suffix} is the ending of', '--format', kind, '--out', tmp_path / name)
    refused(2, 'invalid choice', '--format', 'pickle', '--out', tmp_path / 'x')
    timm_folder = ('--format', 'timm', '--out', tmp_path / 'x')
    refused(2, 'give --format timm', '--format', 'onnx', '--out', tmp_path / 'x', '--push', 'me/ants')
    refused(2, 'give OWNER/NAME', *timm_folder, '--push', 'ants')
    refused(2, '--push a/b/c', *timm_folder, '--push', 'a/b/c')
    monkeypatch.setattr(export, 'get_token', lambda: None)
    refused(1, 'needs a token that may write', *timm_folder, '--push', 'me/ants')
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if 'onnx' in name else find(name))
    refused(1, 'pip install onnx onnxscript onnxruntime', '--format', 'onnx', '--out', tmp_path / 'file')

    # A writer that gets it wrong leaves nothing, and the file that was there stays.
    def wrong(model: nn.Module, *rest: Any) -> Any:
        rest[1].write_text('wrong')
        return lambda x: model(x) + 1e-3

    monkeypatch.setitem(export.FORMATS, 'torch-export', wrong)
    refused(1, 'gives other logits, by 0.001', '--format', 'torch-export', '--out', tmp_path / 'file')

    def fails(*_: Any) -> Any:
        raise RuntimeError('no such operator\nand a long story')

    monkeypatch.setitem(export.FORMATS, 'torch-export', fails)
    refused(1, 'cannot be written as torch-export: no such operator', '--format', 'torch-export', '--out',
            tmp_path / 'file')  # fmt: skip


HUB = """
import sys, types
import torch

other = types.ModuleType('utils')
sys.modules['utils'] = sys.modules['models'] = other  # the program's own, of the same names
root, checkpoint, url = sys.argv[1:]
names = [name for name in sys.stdin.read().split()]
small = dict(embed_dim=32, depth=2, num_heads=2, num_classes=4, patch_size=4)
for name in names:
    further = {'drop_loc': [1]} if 'shrink' in name else {}
    size = {'img_size': 32}
    model = torch.hub.load(root, name, source='local', **small, **size, **further)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4), name
for source in (checkpoint, url):
    model = torch.hub.load(root, 'dhvt_tiny_cifar_patch4', source='local', checkpoint=source)
    assert not model.training
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        print(model(torch.randn(1, 3, 32, 32, generator=generator)).flatten().tolist())
try:
    torch.hub.load(root, 'dhvt_small_cifar_patch4', source='local', checkpoint=checkpoint)
except ValueError as err:
    assert 'is of dhvt_tiny_cifar_patch4, not of dhvt_small_cifar_patch4' in str(err)
else:
    raise SystemExit('another model was accepted')
model = torch.hub.load(root, 'dhvt_tiny_cifar_patch4', source='local', checkpoint=checkpoint, img_size=(32, 48))
assert model(torch.zeros(1, 3, 32, 48)).isfinite().all()
try:
    torch.hub.load(root, 'dhvt_tiny_cifar_patch4', source='local', checkpoint=checkpoint, num_classes=7)
except ValueError as err:
    assert 'does not fit' in str(err) and '\\n' not in str(err)
else:
    raise SystemExit('another head was accepted')
assert sys.modules['utils'] is sys.modules['models'] is other and root not in sys.path
files = {name: str(getattr(module, '__file__', '')) for name, module in sys.modules.items()}
ours = [name for name, file in files.items() if file.startswith(root) and not file.startswith(sys.prefix)]
assert all(name.split('.')[0] == 'dhvt_hub_models' for name in ours), ours
"""


def registered() -> list[str]:
    return [
        name for module in (models.dhvt, models.distilled, models.deit, models.evit) for name in module.default_cfgs
    ]


def test_torch_hub_gives_every_model(tmp_path: Path, web_folder: tuple[Path, str]) -> None:
    """In another process and folder, which has modules of the names that this project's have."""
    path, model = make('dhvt_tiny_cifar_patch4', tmp_path)
    folder, address = web_folder
    (folder / 'm.pth').write_bytes(Path(path).read_bytes())
    assert len(registered()) == 23
    done = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning:timm', '-c', HUB, str(ROOT), path, f'{address}/m.pth'],
        input=' '.join(registered()), capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1', 'TORCH_HOME': str(tmp_path / 'hub'), 'HOME': '/nowhere'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))).flatten()
    lines = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith('[')]
    assert len(lines) == 2
    for line in lines:
        np.testing.assert_allclose(line, expected, atol=1e-6)


def test_torch_hub_beside_the_project(tmp_path: Path) -> None:
    """In a process that uses this project's modules, which stay the same ones."""
    path, model = make('deit_tiny_patch16_shrink_base', tmp_path)
    ours = ('models', 'utils', 'tools', 'config', 'training')
    before = {name: module for name, module in sys.modules.items() if name.split('.')[0] in ours}
    loaded = torch.hub.load(str(ROOT), 'deit_tiny_patch16_shrink_base', source='local', checkpoint=path)
    check(loaded, model, limit=0)
    assert isinstance(loaded, models.evit.EViT)
    path, model = make('dhvt_tiny_cifar_patch4', tmp_path, stem='no-affine')
    loaded = torch.hub.load(str(ROOT), 'dhvt_tiny_cifar_patch4', source='local', checkpoint=path)
    check(loaded, model, limit=0)
    assert isinstance(loaded, models.ablations.AblatedDHVT)
    assert all(sys.modules[name] is module for name, module in before.items())
    wider = torch.hub.load(str(ROOT), 'deit_tiny_cifar_patch4', source='local', num_classes=3, depth=1, drop_rate=0.1)
    assert wider.num_classes == 3 and len(wider.blocks) == 1


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, model = make('deit_tiny_cifar_patch4', tmp_path)
    for value in (float('nan'), float('inf')):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights['head.bias'][1] = value
        torch.save({**ckpt.load(path), 'model': weights}, path)
        run(path, '--format', 'safetensors', '--out', tmp_path / 'x', expect=1)
        err = capsys.readouterr().err
        assert 'has NaN or infinite weights (1 tensor (head.bias))' in err and err.count('\n') == 1
    assert not list(tmp_path.glob('x*'))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs: what is sent to it is in `received`, by the name of the file."""

    received: ClassVar[dict[str, bytes]] = {}
    status = 200

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers['Content-Length']))
        answer: dict[str, Any] = {'url': f'http://{self.headers["Host"]}/me/ants'}
        if '/preupload/' in self.path:
            files = [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
                     for file in json.loads(data)['files']]  # fmt: skip
            answer = {'files': files}
        elif '/commit/' in self.path:
            values = [json.loads(line)['value'] for line in data.splitlines()]
            self.received.update({v['path']: base64.b64decode(v['content']) for v in values if 'path' in v})
            answer |= {'commitUrl': f'{answer["url"]}/commit/0', 'commitOid': '0' * 40, 'hookOutput': ''}
        self.answer(answer)

    def do_GET(self) -> None:
        self.answer({'id': 'me/ants', 'siblings': []})

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content if self.status == 200 else {'error': 'you may not\nwrite here'}).encode()
        self.send_response(self.status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_push(tmp_path: Path) -> None:
    """To an endpoint on this machine, in another process each, as the library reads its environment once."""
    path, _ = make('dhvt_tiny_cifar_patch4', tmp_path)
    out = tmp_path / 'ants'
    with ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_address[1]}'

        def pushed(**env: str) -> subprocess.CompletedProcess:
            further = {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'home'), 'HF_TOKEN': 'hf_mine', **env}
            argv = [path, '--format', 'timm', '--out', str(out), '--push', 'me/ants', '--license', 'cc-by-4.0']
            return subprocess.run([sys.executable, str(ROOT / 'tools' / 'export.py'), *argv], text=True, timeout=120,
                                  capture_output=True, env={**os.environ, **further})  # fmt: skip

        done = pushed()
        assert done.returncode == 0 and f'Uploaded to {address}/me/ants' in done.stdout, done.stderr
        assert Hub.received == {file.name: file.read_bytes() for file in out.iterdir()} and len(Hub.received) == 3
        cfg = json.loads(Hub.received['config.json'])['pretrained_cfg']
        assert cfg['license'] == 'cc-by-4.0' and cfg['origin_url'] == f'{address}/me/ants'
        assert 'ArieSeirack' not in json.dumps(cfg) and not {'paper_ids', 'paper_name', 'tag'} & cfg.keys()
        card = Hub.received['README.md'].decode()
        assert 'arXiv:2210.05958' in card  # the architecture's
        assert 'license: cc-by-4.0' in card and "'hf-hub:me/ants'" in card and '50.00% top-1' in card
        assert all(f'`{name}`' in card for name in CLASSES)

        Hub.status = 403
        for message, env in (
            ('you may not write here', {}),
            ('could not be uploaded', {'HF_ENDPOINT': 'http://127.0.0.1:9'}),
        ):
            done = pushed(**env)
            assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr
        server.shutdown()


def test_card_holds_the_training_command(tmp_path: Path) -> None:
    flags = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', '--epochs', '1', '--train-fraction', '0.2']
    model = ['--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2']
    line = train([*flags, *model, '--output_dir', str(tmp_path / 'run')])
    run(tmp_path / 'run' / 'checkpoint.pth', '--format', 'timm', '--out', tmp_path / 'digits')
    card = (tmp_path / 'digits' / 'README.md').read_text()
    assert (
        f'{line["test_acc1"]:.2f}% top-1 on the test images, at the end of epoch 0' in card
        and str(tmp_path) not in card
    )
    command = shlex.split(card.split('`python ')[1].split('`')[0])
    again, first = vars(parse_args(command[1:])), vars(parse_args([*flags, *model]))
    assert all(again[name] == first[name] for name in first.keys() - MACHINE)
    inside = {'fingerprint': {}, 'progress': {'done': 1}, 'max_accuracy': 50.0}  # an epoch; that is the model's
    assert accuracy(Origin(inside, ema=True), {}) == '50.00% top-1 on the test images, the best of its run'
    assert 'license: unknown' in card and 'ArieSeirack' not in (tmp_path / 'digits' / 'config.json').read_text()


@pytest.mark.parametrize(('given', 'written'), [('m', 'm.safetensors'), ('v1.5', 'v1.5.safetensors')])
def test_ending_is_added(given: str, written: str, tmp_path: Path) -> None:
    path, _ = make('deit_tiny_cifar_patch4', tmp_path)
    run(path, '--format', 'safetensors', '--out', tmp_path / 'new' / given)
    assert [file.name for file in (tmp_path / 'new').iterdir()] == [written]
