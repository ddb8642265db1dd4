"""Cells of the tables of media that older result files have nothing for: empty there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

EQUAL = (0.9, 1.1)  # seconds that are called equal


def known_seconds_as_ms(key: str) -> Callable[[dict[str, Any]], str]:
    """Return a cell of seconds in milliseconds, empty where they were not taken."""
    return lambda row: "" if row.get(key) is None else f"{1000 * row[key]:.2f}"


def known_batch(row: dict[str, Any]) -> str:
    """Say in the title of a table of solvers how many samples were timed together."""
    return f"; batch {row['batch_size']}" if row.get("batch_size") else ""


def over_equal_seconds(row: dict[str, Any]) -> str:
    """Return the seconds over those that a row was to take, and say where they came out unequal."""
    ratio = row.get("seconds_ratio")
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if EQUAL[0] <= ratio <= EQUAL[1] else f"{ratio:.2f}x (unequal)"


def kernel_distance(row: dict[str, Any]) -> str:
    """Return a KID with its deviation over subsets, in thousandths."""
    if row.get("kernel_distance") is None:
        return ""
    return f"{1000 * row['kernel_distance']:+.2f} (spread {1000 * row['kernel_spread']:.2f})"
