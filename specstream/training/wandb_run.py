"""Weights & Biases: one W&B run for a run folder, offline where it cannot be online."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

SECONDS_TO_CONNECT = 3.0


@dataclass(frozen=True)
class WandbRun:
    """Where the curves, the config, the provenance and the sample tables of a run are also sent.

    `offline` writes into the run folder's `wandb/`, to be sent later by `wandb sync`; so does a run
    without an account or a network, with one line that says so.
    """

    project: str = "specstream"
    name: str | None = None
    entity: str | None = None
    offline: bool = False

    def logger(self, run: Path, resuming: bool) -> WandbLogger:
        """Make the logger of a run folder; a resumed run continues the W&B run noted there."""
        import wandb

        offline = self.offline or not self._can_send()
        return WandbLogger(
            name=self.name or run.name,
            save_dir=str(run),
            project=self.project,
            entity=self.entity,
            id=noted_run_id(run) if resuming else None,
            mode="offline" if offline else "online",
            settings=wandb.Settings(console="off", silent=offline),
        )

    def _can_send(self) -> bool:
        if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            return False
        import wandb

        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        if not wandb.api.api_key:
            _say_offline("no W&B account is configured")
            return False
        try:
            address = urlparse(host)
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or host, port), SECONDS_TO_CONNECT).close()
        except OSError:
            _say_offline(f"{host} cannot be reached")
            return False
        return True


def noted_run_id(run: Path) -> str | None:
    """Return the W&B id in a run folder's wandb.json, None where there is none."""
    path = run / "wandb.json"
    return str(json.loads(path.read_text())["id"]) if path.exists() else None


def note_run_id(run: Path, identity: str) -> None:
    """Write wandb.json, by which a resumed run finds its W&B run."""
    (run / "wandb.json").write_text(json.dumps({"id": identity}) + "\n")


@rank_zero_only
def _say_offline(reason: str) -> None:
    print(f"{reason}: logging to the run folder, send it later with `wandb sync`", flush=True)
