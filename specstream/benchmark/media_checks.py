"""What makes numbers of a study of media meaningless, said in a line before or where it is met."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

MOST = 100_000  # of whatever is counted


def check_counts(options: object, names: Sequence[str], where: str = "") -> None:
    """Raise ValueError for numbers so large that they are slips of the pen."""
    for name in names:
        value = getattr(options, name)
        if value > MOST:
            raise ValueError(f"{where}{name} must be at most {MOST}, got {value}")


def check_finite(samples: Tensor, task: str, method: str) -> None:
    """Raise ValueError for samples that are no numbers: they have no law to compare."""
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{task}: the samples of {method} hold numbers that are not finite")
