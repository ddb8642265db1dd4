"""Rows of a call over copies of a network: the same answers in the same order, from all copies."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from specstream.drafters import FrozenEstimate
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.loading import spread_devices
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.fingerprint import fingerprint
from specstream.models.spread_network import SpreadNetwork

CPU = torch.device("cpu")


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (2, 2), 16, 1, 2, 1, num_classes=3)
    nn.init.normal_(network.write.weight, std=0.2)
    return Denoiser(network, FlowSchedule(), (1, 4, 4))


class Watched(nn.Module):
    """Says of a row its number and its class, and keeps the sizes of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, states: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        assert len(states) == len(times) == len(classes)
        self.sizes.append(len(states))
        return states + times + classes[:, None]


@pytest.mark.parametrize(
    ("rows", "sizes"), [(7, [[3], [2], [2]]), (3, [[1], [1], [1]]), (2, [[1], [1], []])]
)
def test_rows_are_split_evenly_and_come_back_in_order(rows: int, sizes: list[list[int]]) -> None:
    spread = SpreadNetwork(Watched(), [CPU] * 3)
    states, times = torch.arange(rows * 2.0).view(rows, 2), torch.rand(rows, 1)
    classes = torch.arange(rows) * 100
    said = spread(states, times, {"classes": classes})
    assert torch.equal(said, states + times + classes[:, None])
    assert [network.sizes for network in spread.copies] == sizes


def test_copies_work_at_once() -> None:
    class Meeting(nn.Module):
        def __deepcopy__(self, memo: object) -> Meeting:
            return Meeting()

        def forward(self, states: Tensor, times: Tensor) -> Tensor:
            barrier.wait(timeout=10)  # one after the other they would never meet
            assert torch.is_inference_mode_enabled()
            return states

    barrier = threading.Barrier(2)
    spread = SpreadNetwork(Meeting(), [CPU] * 2)
    with torch.inference_mode():
        assert torch.equal(spread(torch.ones(4, 1), torch.ones(4, 1), {}), torch.ones(4, 1))


def calls(target: Denoiser) -> Counter[int]:
    """Count the calls of each copy of the target's network from now on."""
    found: Counter[int] = Counter()
    copies = [target.network] if target._spread is None else target._spread.copies
    for number, network in enumerate(copies):
        network.register_forward_hook(lambda *_, number=number: found.update([number]))
    return found


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_are_those_of_a_single_device(guidance: float) -> None:
    told = {"classes": torch.tensor([0, 1, 2, 0, 1])}
    found = []
    for count in (1, 3):
        target = denoiser()
        before = fingerprint(target.network), len(list(target.parameters()))
        if count > 1:
            target.spread([CPU] * count)
        pipeline = DenoisingPipeline(
            target, 8, 1.0, guidance, FrozenEstimate(), FixedLength(4), batch_size=5
        )
        asked = calls(target)
        found.append(pipeline.complete(5, told, seed=1))
        assert before == (fingerprint(target.network), len(list(target.parameters())))
        assert len(target.devices) == len(asked) == count
        assert max(asked.values()) == pipeline.stats.target_calls
    assert torch.allclose(*found, atol=1e-6)


def test_more_devices_than_there_are_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert spread_devices(CPU, 1) == [CPU]
    with pytest.raises(ValueError, match=r"media\.devices: 2 asked for, but cpu is one device"):
        spread_devices(CPU, 2)
    with pytest.raises(ValueError, match=r"media\.devices: 4 asked for, 3 GPUs found"):
        spread_devices(torch.device("cuda"), 4)
    found = spread_devices(torch.device("cuda:1"), 3)
    assert [device.index for device in found] == [1, 0, 2]
    assert spread_devices(torch.device("cuda"), 2)[1] == torch.device("cuda:1")
