"""A network on several devices: the rows of a call are split over copies of it.

Rows of a denoising network do not meet, so that a round which evaluates several states of a sample
can be about as quick as one that evaluates a single one, where there is a device for each.  A
thread for each copy has them all at work at once.  Autocast is the calling thread's own, and is not
passed on: the pipelines run without.

Shapes: R rows, S the shape of a state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of a call that one copy evaluates."""

    network: nn.Module
    device: torch.device
    states: Tensor  # (r, *S)
    times: Tensor  # (r, 1)
    condition: dict[str, Tensor]  # r rows each

    def evaluate(self, inference: bool) -> Tensor:
        """Return what the network says, (r, *S), on its own device."""
        on = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(inference), on:  # both are of a thread, not of the process
            told = {name: value.to(self.device) for name, value in self.condition.items()}
            said = self.network(self.states.to(self.device), self.times.to(self.device), **told)
        assert isinstance(said, Tensor)
        return said


class SpreadNetwork:
    """Copies of a network, one for each of `devices`; it is itself the copy of the first.

    It is no module: the copies are neither saved, trained nor counted.
    """

    def __init__(self, network: nn.Module, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)
        others = [copy.deepcopy(network).to(device) for device in self.devices[1:]]
        self.copies = [network, *others]
        self.threads = ThreadPoolExecutor(len(self.copies))

    def __call__(self, states: Tensor, times: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return what the network says of states (R, *S) at times (R, 1), in their order.

        Each copy takes as many rows as any other, or one less; `condition` holds R rows each.
        """
        parts = len(self.copies)
        split = {name: value.tensor_split(parts) for name, value in condition.items()}
        shares = [
            Share(*of, {name: value[number] for name, value in split.items()})
            for number, of in enumerate(
                zip(
                    self.copies,
                    self.devices,
                    states.tensor_split(parts),
                    times.tensor_split(parts),
                    strict=True,
                )
            )
            if len(of[2])
        ]
        inference = torch.is_inference_mode_enabled()
        said = self.threads.map(lambda share: share.evaluate(inference), shares)
        return torch.cat([each.to(states.device) for each in said])
