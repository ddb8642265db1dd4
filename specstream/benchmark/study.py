"""What a study is: something to measure that gives rows, a few at a time."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

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


class Named(Protocol):
    """A task of a study."""

    @property
    def name(self) -> str: ...


class Asked(Named, Protocol):
    """A method of a study, and the names of the tasks it is for; None for all."""

    @property
    def tasks(self) -> list[str] | None: ...


def check_names(
    tasks: Sequence[Named],
    methods: Sequence[Asked],
    only_tasks: Sequence[str] | None,
    only_methods: Sequence[str] | None,
) -> None:
    """Raise ValueError for a task or method that is not there, and for two of one name."""
    known_tasks, known_methods = [t.name for t in tasks], [m.name for m in methods]
    asked = [*(only_tasks or []), *(task for m in methods for task in m.tasks or [])]
    for wanted, known, what in (
        (asked, known_tasks, "task"),
        (only_methods or [], known_methods, "method"),
    ):
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"there is no {what} '{unknown[0]}'; there are {', '.join(known)}")
    for task in tasks:
        if known_tasks.count(task.name) > 1:
            raise ValueError(f"there are two tasks named '{task.name}'")
        names = [m.name for m in methods if m.tasks is None or task.name in m.tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"task '{task.name}' has two methods named '{twice[0]}'")
