"""What makes numbers of a study of media meaningless, said in a line before or where it is met."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specstream.benchmark.media_methods import EqualRounds, SamplingMethod

MOST = 100_000  # of whatever is counted


def check_counts(options: object, names: Sequence[str], where: str = "") -> None:
    """Raise ValueError for numbers so large that they are slips of the pen."""
    for name in names:
        value = getattr(options, name)
        if value > MOST:
            raise ValueError(f"{where}{name} must be at most {MOST}, got {value}")


def check_compared(methods: Sequence[SamplingMethod]) -> None:
    """Raise ValueError for a method that is given the rounds of one that does not go before it."""
    before: list[str] = []
    for method in methods:
        if isinstance(method, EqualRounds) and method.method not in before:
            raise ValueError(
                f"method '{method.name}': there is no method '{method.method}' before it; there "
                f"are {', '.join(before) or 'none'}"
            )
        before += [each.name for each in (method, *method.beside())]


def check_finite(samples: Tensor, task: str, method: str) -> None:
    """Raise ValueError for samples that are no numbers: they have no law to compare."""
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{task}: the samples of {method} hold numbers that are not finite")
