"""Weights & Biases, for runs that ask for it: the package is optional."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import InputError, log, one_line

ID = 'wandb_id.txt'  # in the run's folder: a run that goes on there goes on in the same one


class WandbRun:
    """A run at wandb.ai, or on the disk alone with WANDB_MODE=offline.

    Args:
        folder: the run's; None for a run without.
        config: the run's settings.
        project, name, tags: as wandb has them; the name is the folder's by default.

    Raises:
        InputError: if the package is missing, or refuses, as without an account.
    """

    def __init__(
        self, folder: Path | None, config: Mapping[str, Any], *, project: str, name: str | None, tags: Sequence[str]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError('--log-wandb needs a package: pip install wandb') from None
        logging.getLogger('wandb').setLevel(logging.ERROR)
        id_file = None if folder is None else folder / ID
        known = id_file.read_text().strip() if id_file is not None and id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name or (None if folder is None else folder.name),
                tags=list(tags),
                config=dict(config),
                dir=None if folder is None else str(folder),
                id=known or None,
                resume='allow' if known else None,
                settings=wandb.Settings(console='off', silent=True),
            )
        except Exception as err:  # of many types, its own and the network's
            hint = 'WANDB_MODE=offline needs neither account nor network'
            raise InputError(f'--log-wandb: {one_line(err)}; {hint}') from None
        if id_file is not None:
            id_file.write_text(f'{self._run.id}\n')

    def add(self, line: Mapping[str, Any]) -> None:
        """Logs an epoch's numbers, 'epoch' among them."""
        try:
            self._run.log(dict(line), step=line['epoch'])
        except Exception as err:
            log(f'Warning: wandb: {one_line(err)}; the run goes on')

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as err:
            log(f'Warning: wandb: {one_line(err)}')
