"""A picture of samples while they are drawn: what was last said of their data, not their states.

It costs a pass of the autoencoder for each sample that has moved on, between two rounds.  So it is
timed, and the next one waits until all of them together are a tenth of the time or less.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from specstream.generation.media_loading import MediaRun
from specstream.media_processor import write_sheet
from specstream.structures import StateStep

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE = 0.1  # of the time since sampling began, at most; but for the first
GREY = 128  # where a sample has not begun


class Preview:
    """Writes a picture of all samples now and then; leaving the context removes it.

    After Ctrl-C it stays: it is all there is.

    Args:
        run: what is sampled.
        path: of the picture.
        samples: how many are drawn.
        every: seconds from one picture to the next, at least.
    """

    def __init__(self, run: MediaRun, path: Path, samples: int, every: float) -> None:
        self.run = run
        self.path = path
        self.samples = samples
        self.every = every
        self.is_written = False
        self.said: dict[int, Tensor] = {}  # (*S) by sample, of those that have moved on since
        self.running: set[int] = set()  # samples that have begun and not ended
        self.stills: dict[int, NDArray[np.uint8]] = {}  # (H, W, C) by sample
        self.spent = self.last = 0.0  # seconds of all pictures, and of the last one
        self.began = self.ended = perf_counter()  # sampling, and the last picture

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_written and (kind is None or issubclass(kind, Exception)):
            self.path.unlink(missing_ok=True)

    def show(self, step: StateStep) -> None:
        """Take in what a round did to a sample, and write a picture where it is time.

        A batch's first round is told sample by sample: it is shown once all of them are known.
        """
        is_whole = step.sample in self.running or not self.running
        if self.said and is_whole and self._is_due():
            self._write()
        self.said[step.sample] = step.estimate
        self.running -= {step.sample}
        if not step.finished:
            self.running.add(step.sample)

    def _is_due(self) -> bool:
        now = perf_counter()
        if now - self.ended < self.every:
            return False
        return self.spent + self.last <= SHARE * (now - self.began + self.last)

    def _write(self) -> None:
        began = perf_counter()
        for sample, estimate in self.said.items():
            (self.stills[sample],) = self.run.processor.stills(self.run.media(estimate[None]))
        self.said = {row: said for row, said in self.said.items() if row in self.running}
        blank = np.full_like(next(iter(self.stills.values())), GREY)
        sheet = [self.stills.get(sample, blank) for sample in range(self.samples)]
        write_sheet(np.stack(sheet), self.path)
        self.is_written = True
        self.ended = perf_counter()
        self.last = self.ended - began
        self.spent += self.last
