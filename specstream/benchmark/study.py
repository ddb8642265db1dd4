"""What a study is: something to measure that gives rows, a few at a time."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from specstream.benchmark.rows import Row


class Study(ABC):
    """A frozen record of what to measure and how."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong before anything is loaded."""

    @abstractmethod
    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        """Measure, and yield finished rows as they come; `arguments` are those of the command.

        After Ctrl-C what is whole is still yielded, then KeyboardInterrupt is raised.
        """


def say(line: str) -> None:
    """Print one line about progress on stderr."""
    print(line, file=sys.stderr, flush=True)
