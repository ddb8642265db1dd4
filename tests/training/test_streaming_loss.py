"""What the streams' loss says of which token: against the same sums taken place by place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from specstream.divergences import CrossEntropy, Divergence, ForwardKL
from specstream.drafters import SpeculativeStreaming
from specstream.models import UntrainedLM
from specstream.training import StreamingModule
from specstream.training.streaming import stream_states

STREAMS, WORDS, LENGTH = 3, 30, 12


def module(mode: str, divergence: Divergence, weight: float = 0.25) -> StreamingModule:
    built = StreamingModule(
        lambda target: SpeculativeStreaming(target, STREAMS, mode=mode, rank=2),  # type: ignore[arg-type]
        lambda: UntrainedLM(WORDS, 16, 32, 2, 2, max_positions=64),
        weight,
        divergence,
        chunk_tokens=4,
    )
    built._device_mesh = None
    built.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if trained: no two streams alike
        for weights in built.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn(weights.shape, generator=noise) * 0.1)
    return built


def batch() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, :3] = mask[0, 7] = mask[1, 8] = False
    documents = torch.zeros(2, LENGTH, dtype=torch.long)
    documents[1, 6:] = 1
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1, 6:] -= 6
    tokens = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": tokens, "loss_mask": mask, "documents": documents, "positions": positions,
    }  # fmt: skip


def naive(trained: StreamingModule, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums, a place at a time: stream j of place t says token t + 1 + j."""
    target, drafter = trained.target, trained.drafter
    assert target is not None and isinstance(drafter, SpeculativeStreaming)
    found = stream_states(target, drafter, data)
    tokens, mask, documents = data["input_ids"], data["loss_mask"], data["documents"]
    sums = {name: torch.zeros(()) for name in ("next_token", "early_exit")}
    for row in range(2):
        for said in range(1, LENGTH):
            if not mask[row, said]:
                continue
            label = tokens[row, said]
            before = found.main[row, said - 1]
            early = target.decoder.norm(drafter.early_exit(found.joining[row, said - 1]))
            sums["next_token"] = sums["next_token"] + cross_entropy(target.head(before), label)
            sums["early_exit"] = sums["early_exit"] + cross_entropy(target.head(early), label)
            for stream in range(1, STREAMS + 1):
                place = said - 1 - stream
                if place < 0 or documents[row, place] != documents[row, said]:
                    continue
                column = int((found.places[row] == place).nonzero()[0])
                q = target.head(found.riders[row, column, stream - 1])[None]
                p = target.head(before)[None]
                value = trained.divergence(p, q, label[None]).sum()
                name = f"stream_{stream}"
                sums[name] = sums.get(name, torch.zeros(())) + value
    return sums


@pytest.mark.parametrize("divergence", [CrossEntropy(), ForwardKL()])
@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_each_stream_learns_the_token_it_speaks_of(mode: str, divergence: Divergence) -> None:
    trained, data = module(mode, divergence), batch()
    found, expected = trained.loss(data), naive(trained, data)
    total = expected["early_exit"] + 0.25 * sum(
        expected[f"stream_{stream + 1}"] for stream in range(STREAMS)
    )
    if mode == "shared":
        total = total + expected["next_token"]
    else:
        del expected["next_token"]
    assert found.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.metrics[name], value.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.total, total, atol=1e-4, rtol=1e-4)
    assert found.count == data["loss_mask"][:, 1:].sum()


def test_without_a_weight_the_adapters_alone_are_trained() -> None:
    trained, data = module("shared", CrossEntropy(), weight=0.0), batch()
    found, expected = trained.loss(data), naive(trained, data)
    assert found.metrics.keys() == {"next_token", "early_exit"}
    total = expected["next_token"] + expected["early_exit"]
    torch.testing.assert_close(found.total, total, atol=1e-4, rtol=1e-4)
    found.total.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="leaves nothing to train in mode lossless"):
        module("lossless", CrossEntropy(), weight=0.0)
