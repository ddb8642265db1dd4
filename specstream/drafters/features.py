"""The target's features that a drafter has been shown, by row and place.

Shapes: B rows, C capacity, W tokens a round, F features of one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specstream.structures import Observation


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers to read; ValueError for such that the target lacks."""
    if not layers or sorted({*layers}) != list(layers) or layers[0] < 0 or layers[-1] > num_layers:
        raise ValueError(
            f"feature_layers must be ascending numbers in 0..{num_layers}, not {list(layers)}"
        )
    return tuple(layers)


class FeatureBuffer:
    """Features of every place a row has committed, written as passes show them.

    The pass that commits token i shows the features of the places up to i - 1, so of n committed
    tokens the first n - 1 have features.
    """

    def __init__(self, batch_size: int, capacity: int, size: int, like: Tensor) -> None:
        self.values = like.new_zeros(batch_size, capacity, size)  # (B, C, F)

    def read_prompt(self, features: Tensor, first: int) -> None:
        """Write the features (B, T, F) of the places first..first+T-1 of every row."""
        self.values[:, first : first + features.shape[1]] = features.to(self.values.dtype)

    def observe(self, observation: Observation) -> None:
        """Write what a round showed; beyond what stood lie places that are written anew later."""
        features = observation.features
        assert features is not None
        steps = torch.arange(features.shape[1], device=features.device)
        places = (observation.start[:, None] + steps).clamp(max=self.values.shape[1] - 1)
        index = places[:, :, None].expand_as(features)
        self.values.scatter_(1, index, features.to(self.values.dtype))

    def window(self, start: Tensor, width: int) -> Tensor:
        """Return the features (B, width, F) from each row's place `start` (B,) on."""
        steps = torch.arange(width, device=start.device)
        places = (start[:, None] + steps).clamp(0, self.values.shape[1] - 1)
        return self.values.gather(1, places[:, :, None].expand(-1, -1, self.values.shape[2]))
