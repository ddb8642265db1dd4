"""A progress display for work that is usually quick: it appears only when it is not."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE = 2.0  # seconds before anything is shown


class SlowProgress:
    """Shows what is being done, and how far, once two seconds have passed."""

    def __init__(self, action: str) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns)
        self._action = action
        self._task = self._progress.add_task(action)
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> SlowProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            self._progress.stop()

    def show(self, state: str) -> None:
        """Say how far the work has come."""
        self._progress.update(self._task, description=f"{self._action} {state}")
        if not self._shown and time.monotonic() - self._began > PATIENCE:
            self._shown = True
            self._progress.start()
