"""The state of a selection log in the checkpoints of a trainer."""

from __future__ import annotations

import json
import os

from ftw_optim.integrations._trainers.window import Recorder

STATE = "selection_log.json"
"""The file of a checkpoint that holds the state of the selection log."""


def save_log(log: Recorder | None, folder: str) -> None:
    """Write the state of a log, if there is one, into the folder of a checkpoint."""
    if log is not None:
        with open(os.path.join(folder, STATE), "w", encoding="utf-8") as file:
            json.dump(log.state_dict(), file)


def load_log(log: Recorder | None, checkpoint: str | None) -> None:
    """Let a log go on from the state that a checkpoint holds, if there is any."""
    if log is not None and checkpoint is not None and os.path.isfile(path := os.path.join(checkpoint, STATE)):
        with open(path, encoding="utf-8") as file:
            log.load_state_dict(json.load(file))
