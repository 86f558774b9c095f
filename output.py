"""The folder that a run leaves behind: settings, checkpoints, log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import SummaryWriter

from checkpoint import save, write_file
from utils import is_main_process


class OutputFolder:
    """The files of a run, written by the main process; an empty path writes none.

    Args:
        path: the folder, made if absent.
        settings: what goes into args.yaml.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = Path(path) if path and is_main_process() else None
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(settings, sort_keys=False)
            write_file(self.path / 'args.yaml', lambda file: file.write(text.encode()))
            self.writer = SummaryWriter(str(self.path / 'runs'))

    def save(self, state: dict[str, Any], *, best: bool) -> None:
        """Writes checkpoint.pth, and best_checkpoint.pth too if this is the best so far."""
        if self.path is not None:
            save(self.path / 'checkpoint.pth', state)
            if best:
                save(self.path / 'best_checkpoint.pth', state)

    def write_log(self, line: dict[str, Any]) -> None:
        """Appends a line to log.txt and to tensorboardX; `line` holds finite numbers, 'epoch' among them."""
        if self.path is not None:
            with open(self.path / 'log.txt', 'a') as file:
                file.write(json.dumps(line, allow_nan=False) + '\n')
            for name, value in line.items():
                self.writer.add_scalar(name, value, line['epoch'])
            self.writer.flush()

    def close(self) -> None:
        if self.path is not None:
            self.writer.close()
