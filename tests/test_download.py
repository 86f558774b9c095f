"""Checkpoints from the web: whatever a server does, only a whole file enters the cache, and nothing hangs."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from training import checkpoint as ckpt
from utils import InputError

FILE = io.BytesIO()
torch.save({'model': {'a': torch.arange(3.0)}, 'epoch': 4}, FILE)
GOOD = FILE.getvalue()
HEAD = b'HTTP/1.1 200 OK\r\n'
ANSWERS = {
    'good': HEAD + b'Content-Length: %d\r\n\r\n' % len(GOOD) + GOOD,
    'no length': HEAD + b'\r\n' + GOOD,
    'cut off': HEAD + b'Content-Length: %d\r\n\r\n' % len(GOOD) + GOOD[:200],
    'cut off without length': HEAD + b'\r\n' + GOOD[:-90],
    'page': HEAD + b'Content-Type: text/html\r\n\r\n<html>Sign in</html>',
    'empty': HEAD + b'Content-Length: 0\r\n\r\n',
    'garbage status': b'\x00\xff\x00 nothing\r\n\r\n',
    'broken chunk': HEAD + b'Transfer-Encoding: chunked\r\n\r\nzz\r\nabc',
    'length that is none': HEAD + b'Content-Length: many\r\n\r\n' + GOOD,
    'missing': b'HTTP/1.1 404 Not Found\r\n\r\n',
    'silent': None,
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[bytes | None]]]:
    """A URL on this machine, and the answers that it gives, in turn; None keeps silent."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(ckpt, 'TIMEOUT', 10)
    answers: list[bytes | None] = []
    kept = []
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(4096)
                answer = answers.pop(0)
                if answer is None:
                    kept.append(connection)
                    continue
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}/a file.pth', answers
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize('kind', list(ANSWERS))
def test_answers(
    kind: str, server: tuple[str, list[bytes | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    if kind == 'silent':
        monkeypatch.setattr(ckpt, 'TIMEOUT', 0.3)
    answers += [ANSWERS[kind], ANSWERS['good']]
    cached = tmp_path / 'hub' / 'checkpoints'
    if kind in ('good', 'no length'):
        assert ckpt.load(url)['epoch'] == 4
        assert ckpt.load(url)['epoch'] == 4 and len(answers) == 1  # from the cache
        return
    with pytest.raises(InputError, match='cannot download http') as caught:
        ckpt.load(url)
    monkeypatch.setattr(ckpt, 'TIMEOUT', 10)
    assert url in str(caught.value) and str(cached) in str(caught.value) and '\n' not in str(caught.value)
    assert list(cached.glob('*.pth')) == []
    assert ckpt.load(url)['epoch'] == 4


def test_a_damaged_file_in_the_cache_is_fetched_anew(server: tuple[str, list[bytes | None]], tmp_path: Path) -> None:
    url, answers = server
    answers += [ANSWERS['good']] * 3
    ckpt.load(url)
    (path,) = (tmp_path / 'hub' / 'checkpoints').glob('*.pth')
    for damaged in (b'', GOOD[:300]):
        path.write_bytes(damaged)
        assert ckpt.load(url)['epoch'] == 4
    assert not answers


def test_processes_that_start_together_fetch_once(server: tuple[str, list[bytes | None]]) -> None:
    url, answers = server
    answers += [ANSWERS['good']]
    with ThreadPoolExecutor(4) as pool:
        assert [loaded['epoch'] for loaded in pool.map(ckpt.load, [url] * 4)] == [4] * 4
    assert not answers


def test_a_file_of_safetensors_is_known_by_its_content(server: tuple[str, list[bytes | None]], tmp_path: Path) -> None:
    data = ckpt.to_safetensors({'a': torch.arange(3.0)}, {'epoch': 4})
    url, answers = server
    answers += [HEAD + b'Content-Length: %d\r\n\r\n' % len(data) + data]
    (tmp_path / 'MODEL.SafeTensors').write_bytes(data)
    for source in (f'{url.rpartition("/")[0]}/model.safetensors?download=true', str(tmp_path / 'MODEL.SafeTensors')):
        loaded = ckpt.load(source)
        assert loaded['epoch'] == 4 and loaded['model']['a'].tolist() == [0, 1, 2]


ADDRESSES = ('127.0.0.1:port/a', '127.0.0.1:99999/a', '/a', '127.0.0.1:1/a', '[::1/a', 'x.invalid/a')


@pytest.mark.parametrize('url', [f'http://{address}' for address in ADDRESSES])
def test_addresses(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(InputError) as caught:
        ckpt.load(url)
    assert url in str(caught.value)
