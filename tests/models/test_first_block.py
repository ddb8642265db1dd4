"""A transformer by its first block: what is remembered, and that the network stays what it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import Reads
from specstream.models.diffusers_image import FluxTransformer, UNet
from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.diffusers_video import CogVideoXTransformer, LTXTransformer
from specstream.models.diffusers_wan import WanExperts, WanTransformer
from specstream.models.first_block import first_block
from tests.diffusers_toys import OPTIONS, fresh

ROWS = 3


def deep(name: str, layers: int = 3) -> Any:
    """Return a tiny network of `diffusers` of several blocks."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**OPTIONS[name] | {"num_layers": layers})
    for weight in model.parameters():
        if weight.abs().max() == 0:
            nn.init.normal_(weight, std=0.1)
    return model.eval().requires_grad_(False)


def patches(layers: int = 3) -> PatchTransformer:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (2, 2), 16, layers, 2, num_classes=3)
    for weight in network.parameters():
        if weight.abs().max() == 0:
            nn.init.normal_(weight, std=0.1)
    return network.eval().requires_grad_(False)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Tensor]]]:
    """Return networks, the shape of their states and what they are told of `ROWS` rows."""
    torch.manual_seed(1)
    text = torch.randn(ROWS, 5, 12)
    flux = {"prompt_embeds": text, "pooled_prompt_embeds": torch.randn(ROWS, 6)}
    ltx = {"prompt_embeds": text, "prompt_mask": torch.ones(ROWS, 5)}
    told = {"prompt_embeds": text}
    return {
        "patches": (patches(), (1, 4, 4), {"classes": torch.tensor([0, 1, 2])}),
        "Wan": (WanTransformer(deep("WanTransformer3DModel")), (4, 3, 4, 4), told),
        "LTX": (LTXTransformer(deep("LTXVideoTransformer3DModel")), (8, 2, 4, 4), ltx),
        "CogVideoX": (
            CogVideoXTransformer(deep("CogVideoXTransformer3DModel")),
            (4, 3, 8, 8),
            told,
        ),
        "Flux": (FluxTransformer(deep("FluxTransformer2DModel", 1)), (4, 4, 4), flux),
    }


@pytest.mark.parametrize("name", ["patches", "Wan", "LTX", "CogVideoX", "Flux"])
def test_the_first_block_with_the_rest_of_the_same_state_says_what_all_blocks_say(
    name: str,
) -> None:
    network, shape, told = networks()[name]
    states, times = torch.randn(ROWS, *shape), torch.full((ROWS, 1), 400.0)
    plain = network(states, times, **told)
    block = first_block(network)
    whole = block(states, times, told)
    assert torch.equal(whole.output, plain)
    again = block(states, times, told, whole.rest)
    assert torch.allclose(again.output, plain, atol=1e-5)
    assert torch.allclose(again.first, whole.first, atol=1e-6)
    # of another state the first block is asked, and the rest is the old one
    other = block(states + 1, times, told, whole.rest)
    assert not torch.allclose(other.output, plain, atol=1e-3)
    assert not torch.allclose(other.output, network(states + 1, times, **told), atol=1e-4)
    assert torch.equal(other.first, block(states + 1, times, told).first)
    # rows are their own, and nothing is left behind in the network
    swapped = torch.tensor([2, 0])
    part = {key: value[swapped] for key, value in told.items()}
    alone = block(states[swapped], times[swapped], part, whole.rest[swapped])
    assert torch.allclose(alone.output, plain[swapped], atol=1e-5)
    assert torch.equal(network(states, times, **told), plain)


@pytest.mark.parametrize("name", ["patches", "Wan"])
def test_only_the_first_block_runs_with_the_rest_of_another_call(name: str) -> None:
    network, shape, told = networks()[name]
    calls: list[int] = []
    blocks = network.blocks if name == "patches" else network.model.blocks  # type: ignore[union-attr]
    for place, block in enumerate(blocks):  # type: ignore[arg-type]
        attention = block.attention if name == "patches" else block.attn1
        attention.register_forward_pre_hook(lambda *_, place=place: calls.append(place))
    times = torch.full((ROWS, 1), 400.0)
    run = first_block(network)
    word = run(torch.randn(ROWS, *shape), times, told)
    assert calls == [0, 1, 2]
    calls.clear()
    run(torch.randn(ROWS, *shape), times, told, word.rest)
    assert calls == [0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["patches", "Flux"])
def test_a_guided_target_remembers_both_of_its_answers(name: str, guidance: float) -> None:
    network, shape, told = networks()[name]
    denoiser = Denoiser(network, FlowSchedule(), shape)
    grid, states = denoiser.schedule.grid(8), torch.randn(ROWS, *shape)
    steps = torch.tensor([1, 4, 2])
    plain = denoiser(states, steps, grid, told, guidance)
    said = denoiser.evaluate(states, steps, grid, told, guidance, Reads.REST)
    assert said.features is not None and said.first is not None
    assert torch.allclose(said.estimates, plain, atol=1e-5)
    assert said.features.shape[1] % (1 if guidance == 1 else 2) == 0
    rest = said.features
    again = denoiser.evaluate(states, steps, grid, told, guidance, Reads.REST, rest)
    assert torch.allclose(again.estimates, plain, atol=1e-5)
    assert again.first is not None and torch.allclose(again.first, said.first, atol=1e-6)


def test_networks_without_a_first_block_are_one_line() -> None:
    wan = deep("WanTransformer3DModel")
    for network, message in (
        (patches(1), "first-block: the network has one block"),
        (UNet(fresh("UNet2DModel")), "diffusers caches no blocks of a UNet2DModel"),
        (WanTransformer(deep("WanTransformer3DModel", 1)), "caches no blocks of a Wan"),
        (WanExperts(wan, wan, 500.0), "a pair of networks has no first block"),
        (nn.Linear(2, 2), "a Linear is no transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            first_block(network)
    assert isinstance(WanTransformer(wan), DiffusersNetwork)


def test_a_target_spread_over_devices_is_not_cached() -> None:
    denoiser = Denoiser(patches(), FlowSchedule(), (1, 4, 4))
    denoiser.spread([torch.device("cpu")] * 2)
    with pytest.raises(ValueError, match="first-block: a target that is cached is on one device"):
        denoiser.first_block  # noqa: B018


def test_a_call_that_fails_leaves_the_network_what_it_was() -> None:
    network, shape, told = networks()["Wan"]
    states, times = torch.randn(ROWS, *shape), torch.full((ROWS, 1), 400.0)
    plain, block = network(states, times, **told), first_block(network)
    with pytest.raises(RuntimeError):
        block(states[:, :2], times, told)
    with pytest.raises(ValueError, match="needs prompt_embeds; prompt_embeds is missing"):
        block(states, times, {})
    assert torch.equal(network(states, times, **told), plain)
    assert torch.equal(block(states, times, told).output, plain)
