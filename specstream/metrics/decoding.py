"""What a run of speculative decoding is measured by, summed over batches and processes.

The numbers are defined once, here and in `structures.Stats`, which holds the counts of one run:

    metric.update(torch.tensor(stats.tested), torch.tensor(stats.accepted))

All states are sums, so several processes agree and the order of batches does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Acceptance(Metric):
    """Acceptance, alpha_i and prefix_i for the positions 1..`positions` of a draft.

    acceptance is accepted over tested; alpha_i the same of position i, so conditional on all
    before it; prefix_i = alpha_1 .. alpha_i the probability that the first i all stand (a product,
    so that rounds of different draft lengths can be pooled).  `compute` returns a dict of scalars
    to log, without the positions that were never tested.
    """

    full_state_update = False
    higher_is_better = True
    num_tested: Tensor  # (positions,)
    num_accepted: Tensor  # (positions,)

    def __init__(self, positions: int) -> None:
        super().__init__()
        if positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}")
        self.positions = positions
        zeros = torch.zeros(positions, dtype=torch.long)
        self.add_state("num_tested", zeros, dist_reduce_fx="sum")
        self.add_state("num_accepted", zeros.clone(), dist_reduce_fx="sum")

    def update(self, num_tested: Tensor, num_accepted: Tensor) -> None:
        """Add counts by position, (K,) each, K at most `positions`."""
        size = num_tested.shape[0]
        assert size == num_accepted.shape[0] <= self.positions
        self.num_tested[:size] += num_tested.to(self.num_tested)
        self.num_accepted[:size] += num_accepted.to(self.num_accepted)

    def compute(self) -> dict[str, Tensor]:
        """Return acceptance, alpha_1, prefix_1, alpha_2, .. as far as drafts have reached."""
        total = self.num_tested.sum()
        if total == 0:
            return {}
        result = {"acceptance": self.num_accepted.sum() / total}
        alphas = self.num_accepted / self.num_tested
        prefixes = alphas.cumprod(0)
        for i in range(int((self.num_tested > 0).sum())):
            result[f"alpha_{i + 1}"] = alphas[i]
            result[f"prefix_{i + 1}"] = prefixes[i]
        return result


class _Ratio(Metric):
    """A sum over a sum; NaN while the lower one is 0."""

    full_state_update = False
    higher_is_better = True
    upper: Tensor
    lower: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("upper", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lower", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the ratio as a float32 scalar."""
        return (self.upper / self.lower).float()


class AcceptedLength(_Ratio):
    """tau: tokens committed for each target pass after the prefill, over complete rounds.

    The correction or bonus token counts.  A round cut by EOS, a stop string or the limit is left
    out of both sums.
    """

    def update(self, num_committed: Tensor | int, num_rounds: Tensor | int) -> None:
        """Add the tokens committed in complete rounds and the number of those rounds."""
        self.upper += num_committed
        self.lower += num_rounds


class Speedup(_Ratio):
    """Seconds of plain decoding over seconds of speculative decoding of the same prompts."""

    def update(self, plain_seconds: Tensor | float, seconds: Tensor | float) -> None:
        """Add the wall-clock seconds of both runs, each with its prefill."""
        self.upper += plain_seconds
        self.lower += seconds
