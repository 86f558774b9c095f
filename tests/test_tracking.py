"""--log-wandb, in its offline mode."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from main import main
from tests.conftest import PLAIN, SMALL_MODEL

RUN = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '256', '--train-fraction', '0.2', '--log-wandb']


def test_offline_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv('WANDB_MODE', 'offline')
    made: list[dict[str, Any]] = []
    logged: list[tuple[str, int]] = []
    init, log = wandb.init, wandb.Run.log

    def spied_init(**given: Any) -> Any:
        made.append(given)
        return init(**given)

    def spied_log(run: Any, data: dict[str, Any], step: int) -> None:
        logged.append((run.id, step))
        log(run, data, step=step)

    monkeypatch.setattr(wandb, 'init', spied_init)
    monkeypatch.setattr(wandb.Run, 'log', spied_log)
    out = tmp_path / 'out'
    flags = [*RUN, '--output_dir', str(out), '--wandb-tags', 'small', 'digits', '--experiment', 'first']
    main([*flags, '--epochs', '2'])
    main([*flags, '--epochs', '3', '--auto-resume', '--force-resume'])
    assert [step for _, step in logged] == [0, 1, 2] and len({run for run, _ in logged}) == 1
    assert made[0]['name'] == 'first' and made[0]['tags'] == ['small', 'digits'] and made[0]['config']['epochs'] == 2
    assert made[0]['id'] is None and made[1]['id'] == logged[0][0] and made[1]['resume'] == 'allow'
    assert list((out / 'wandb').glob('offline-run-*/*.wandb'))
    assert [json.loads(line)['epoch'] for line in (out / 'log.txt').read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize('missing', [True, False])
def test_no_package_and_no_account(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def refuse(**given: Any) -> None:
        raise wandb.errors.UsageError('no key\nset one')

    monkeypatch.setattr(wandb, 'init', refuse)
    load = builtins.__import__

    def find(name: str, *rest: Any) -> Any:
        if name == 'wandb' and missing:
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, '__import__', find)
    with pytest.raises(SystemExit) as stop:
        main([*RUN, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count('\n') == 1, error
    assert ('pip install wandb' if missing else 'WANDB_MODE=offline needs neither') in error
