"""The networks of diffusers under one call: a row says what its own model says of it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.diffusers_wan import WanExperts
from specstream.models.pretrained_parts import network_class
from tests.diffusers_toys import OPTIONS, fresh, other

ROWS = 3
TIMES = torch.tensor([[999.0], [400.0], [20.0]])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CLASSES = {"classes": torch.tensor([1, -1, 9])}
PROMPTS = {"prompt_embeds": drawn(ROWS, 5, 12)}
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
CASES: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
    "UNet2DModel": ((3, 8, 4), {}),
    "UNet2DConditionModel": ((4, 8, 4), PROMPTS),
    "DiTTransformer2DModel": ((4, 8, 8), CLASSES),
    "FluxTransformer2DModel": ((4, 6, 4), PROMPTS | {"pooled_prompt_embeds": drawn(ROWS, 6)}),
    "FluxTransformer2DModel:distilled": (
        (4, 6, 4),
        PROMPTS | {"pooled_prompt_embeds": drawn(ROWS, 6)},
    ),
    "LTXVideoTransformer3DModel": ((8, 3, 2, 4), PROMPTS | {"prompt_mask": MASK}),
    "WanTransformer3DModel": ((4, 3, 4, 6), PROMPTS),
    "CogVideoXTransformer3DModel": ((4, 3, 8, 8), PROMPTS),
    "CogVideoXTransformer3DModel:rotary": ((4, 3, 8, 6), PROMPTS),
    "CogVideoXTransformer3DModel:1.5": ((4, 4, 8, 6), PROMPTS),
    "UNet2DConditionModel:fills": ((4, 8, 4), PROMPTS | {"beside": drawn(ROWS, 5, 8, 4)}),
    "FluxTransformer2DModel:fills": (
        (4, 6, 4),
        PROMPTS | {"pooled_prompt_embeds": drawn(ROWS, 6), "beside": drawn(ROWS, 8, 6, 4)},
    ),
    "WanTransformer3DModel:continues": (
        (4, 3, 4, 6),
        PROMPTS | {"beside": drawn(ROWS, 8, 3, 4, 6)},
    ),
    "WanTransformer3DModel:reads": (
        (4, 3, 4, 6),
        {"prompt_embeds": drawn(ROWS, 512, 12)}
        | {"beside": drawn(ROWS, 8, 3, 4, 6), "image_embeds": drawn(ROWS, 5, 16)},
    ),
    "CogVideoXTransformer3DModel:1.5-continues": (
        (4, 4, 8, 6),
        PROMPTS | {"first_frame": drawn(ROWS, 4, 1, 8, 6)},
    ),
    "StableAudioDiTModel": ((4, 8), PROMPTS | {"duration_embeds": drawn(ROWS, 1, 24)}),
}


def adapter(name: str) -> DiffusersNetwork:
    return network_class(name.partition(":")[0])(fresh(name), 8, 4, 24.0, 3.0)


def said_alone(
    name: str, network: DiffusersNetwork, state: Tensor, time: Tensor, told: dict[str, Tensor]
) -> Tensor:
    """Call the model of diffusers on one row, in the words of its own pipeline."""
    model, text = network.model, told.get("prompt_embeds")
    if "beside" in told:
        state = torch.cat([state, told["beside"]], 1)
    family = name.partition(":")[0]
    if family == "UNet2DModel":
        return model(state, time).sample
    if family == "UNet2DConditionModel":
        return model(state, time, text).sample
    if family == "DiTTransformer2DModel":
        label = told["classes"]
        return model(state, time, torch.where(label < 0, 10, label)).sample[:, :4]
    if family == "FluxTransformer2DModel":
        return said_by_flux(model, state, time, told)
    if family == "LTXVideoTransformer3DModel":
        return said_by_ltx(model, state, time, told)
    if family == "WanTransformer3DModel":
        return model(state, time, text, told.get("image_embeds")).sample
    if family == "CogVideoXTransformer3DModel":
        return said_by_cogvideox(model, state, time, told)
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(4, 9, use_real=True, repeat_interleave_real=False)
    return model(state, time / 1000, text, told["duration_embeds"], rotary).sample


def said_by_flux(model: object, state: Tensor, time: Tensor, told: dict[str, Tensor]) -> Tensor:
    from diffusers import FluxPipeline

    _, channels, height, width = state.shape
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", state.dtype)
    output = model(  # type: ignore[operator]
        FluxPipeline._pack_latents(state, 1, channels, height, width),
        told["prompt_embeds"],
        told["pooled_prompt_embeds"],
        time / 1000,
        ids,
        torch.zeros(5, 3),
        torch.tensor([3.0]) if model.config.guidance_embeds else None,  # type: ignore[attr-defined]
    ).sample
    return FluxPipeline._unpack_latents(output, height * 8, width * 8, 8)


def said_by_ltx(model: object, state: Tensor, time: Tensor, told: dict[str, Tensor]) -> Tensor:
    from diffusers import LTXPipeline

    sizes = state.shape[2:]
    output = model(  # type: ignore[operator]
        LTXPipeline._pack_latents(state),
        told["prompt_embeds"],
        time,
        told["prompt_mask"],
        *sizes,
        (4 / 24.0, 8, 8),
    ).sample
    return LTXPipeline._unpack_latents(output, *sizes)


def said_by_cogvideox(
    model: object, state: Tensor, time: Tensor, told: dict[str, Tensor]
) -> Tensor:
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    around = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    frames, height, width = state.shape[2:]
    rotary = None
    if model.config.use_rotary_positional_embeddings:  # type: ignore[attr-defined]
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            around, height * 8, width * 8, frames, "cpu"
        )
    ofs = None
    if "first_frame" in told:
        later = torch.zeros_like(state[:, :, 1:])
        state = torch.cat([state, torch.cat([told["first_frame"], later], 2)], 1)
        ofs = torch.tensor([2.0])
    moved, text = state.transpose(1, 2), told["prompt_embeds"]
    output = model(moved, text, time, ofs=ofs, image_rotary_emb=rotary)  # type: ignore[operator]
    return output.sample.transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_rows_at_their_own_times_say_what_the_model_says_of_each_alone(name: str) -> None:
    shape, told = CASES[name]
    network, states = adapter(name), drawn(ROWS, *shape)
    network.check(told)
    together = network(states, TIMES, **told)
    assert together.shape == states.shape
    for row in range(ROWS):
        one = {key: value[row : row + 1] for key, value in told.items()}
        alone = said_alone(name, network, states[row : row + 1], TIMES[row], one)
        assert torch.allclose(together[row], alone[0], atol=2e-5), row
    moved = network(states, TIMES.flip(0), **told)
    assert not torch.allclose(moved[0], together[0], atol=1e-3), "the time is not heard"


@pytest.mark.parametrize("name", CASES)
def test_a_form_describes_the_states_that_the_network_takes(name: str) -> None:
    shape, _ = CASES[name]
    form = adapter(name).form(fresh(name).config)
    assert form.channels == shape[0]
    assert len(form.patch) == len(shape) - 1
    assert not any(side % patch for side, patch in zip(shape[1:], form.patch, strict=True))


def test_the_picture_of_a_large_unet_is_told_its_size() -> None:
    from diffusers import UNet2DConditionModel

    options = OPTIONS["UNet2DConditionModel"] | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 6,
    }
    model = UNet2DConditionModel(**options).eval().requires_grad_(False)
    network = network_class("UNet2DConditionModel")(model, 8)
    with pytest.raises(ValueError, match="pooled_prompt_embeds is missing"):
        network.check(PROMPTS)
    told = PROMPTS | {"pooled_prompt_embeds": drawn(ROWS, 6)}
    network.check(told)
    states = drawn(ROWS, 4, 8, 4)
    size = torch.tensor([[64.0, 32, 0, 0, 64, 32]]).expand(ROWS, -1)
    added = {"text_embeds": told["pooled_prompt_embeds"], "time_ids": size}
    alone = model(states, TIMES[:, 0], told["prompt_embeds"], added_cond_kwargs=added).sample
    assert torch.equal(network(states, TIMES, **told), alone)


def test_a_unet_of_classes_needs_them() -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel(**OPTIONS["UNet2DModel"], num_class_embeds=10).eval().requires_grad_(False)
    network = network_class("UNet2DModel")(model)
    with pytest.raises(ValueError, match="needs classes; classes is missing"):
        network.check({})
    classes = torch.tensor([1, 0, 9])
    states = drawn(ROWS, 3, 8, 4)
    alone = model(states[2:], TIMES[2], classes[2:]).sample
    assert torch.allclose(network(states, TIMES, classes)[2:], alone, atol=1e-5)


def test_what_a_network_cannot_be_told_is_refused_in_one_line() -> None:
    network = adapter("LTXVideoTransformer3DModel")
    with pytest.raises(ValueError, match="needs prompt_embeds and prompt_mask; prompt_mask is mis"):
        network.check(PROMPTS)
    with pytest.raises(ValueError, match="takes prompt_embeds, not 'classes'"):
        adapter("WanTransformer3DModel").check(PROMPTS | CLASSES)


@pytest.mark.parametrize(
    ("name", "option", "value", "line"),
    [
        ("WanTransformer3DModel", "image_dim", 8, "image_dim without channels of a picture"),
        ("WanTransformer3DModel", "pos_embed_seq_len", 514, "shown two pictures"),
        ("WanTransformer3DModel", "in_channels", 9, "takes 9 channels and gives 4"),
        ("LTXVideoTransformer3DModel", "patch_size", 2, "only patches of size 1"),
        ("UNet2DConditionModel", "in_channels", 8, "takes 8 channels and gives 4"),
        ("FluxTransformer2DModel", "in_channels", 32, "takes 32 channels and gives 16"),
        ("UNet2DModel", "class_embed_type", "timestep", "class_embed_type is not supported"),
        ("UNet2DModel", "time_embedding_type", "fourier", "'fourier' is not supported"),
        ("UNet2DConditionModel", "class_embed_type", "timestep", "class_embed_type is not supp"),
        ("UNet2DConditionModel", "addition_embed_type", "image", "only text_time is"),
    ],
)
def test_a_network_that_wants_more_is_refused(
    name: str, option: str, value: object, line: str
) -> None:
    config = dict(fresh(name).config) | {option: value}
    config["out_channels"] = config["out_channels"] or fresh(name).config.in_channels
    with pytest.raises(ValueError, match=line):
        network_class(name).form(config)


def test_rows_of_one_call_fall_to_the_expert_of_their_own_times() -> None:
    name = "WanTransformer3DModel:continues"
    shape, told = CASES[name]
    high, low, states = fresh(name), other(name), drawn(ROWS, *shape)
    network = WanExperts(high, low, 400.0, 8, 4)
    network.check(told)
    together = network(states, TIMES, **told)
    seen = torch.cat([states, told["beside"]], 1)
    for row, model in enumerate((high, high, low)):  # the boundary is the noisy one's
        one = slice(row, row + 1)
        alone = model(seen[one], TIMES[row], told["prompt_embeds"][one]).sample
        assert torch.allclose(together[one], alone, atol=2e-5), row
    for boundary, model in ((1000.0, low), (0.0, high)):  # all to one of them
        alone = model(seen, TIMES[:, 0], told["prompt_embeds"]).sample
        said = WanExperts(high, low, boundary)(states, TIMES, **told)
        assert torch.allclose(said, alone, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as a student of two experts is trained
        assert torch.allclose(network(states, TIMES, **told), together, atol=0.1)


def test_a_network_that_reads_pictures_is_told_as_many_tokens_as_it_counts_on() -> None:
    told = CASES["WanTransformer3DModel:reads"][1] | PROMPTS
    with pytest.raises(ValueError, match="is told 512 tokens, not 5"):
        adapter("WanTransformer3DModel:reads").check(told)


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'SD3Transformer2DModel' is no supported.*UNet2DModel, "):
        network_class("SD3Transformer2DModel")
