"""Pipelines of diffusers behind `Denoiser`: the same samples, the same law, one-line refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specstream.drafters import FrozenEstimate
from specstream.drafters.state_loading import check_shapes
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.media_loading import SamplerOptions, media_of_target
from specstream.models import PretrainedDenoiser
from specstream.sampling import Noise, Role
from tests.diffusers_toys import OPTIONS, fresh, save_pipeline, save_video_pipeline

FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "shift_terminal": 0.1,
}
PIXELS = {"_class_name": "DDPMScheduler", "prediction_type": "sample", "clip_sample": True}
SIZE = {"height": 8, "width": 8, "num_frames": 5}
STEPS = 6


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


PROMPT = {
    "prompt_embeds": drawn(1, 5, 12),
    "prompt_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    "negative_prompt_embeds": drawn(1, 5, 12) / 2,
    "negative_prompt_mask": torch.tensor([[1, 0, 0, 0, 0]]),
}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ltx")
    network, vae = fresh("LTXVideoTransformer3DModel"), fresh("AutoencoderKLLTXVideo")
    save_pipeline(folder, "LTXPipeline", FLOW, transformer=network, vae=vae)
    save_file(PROMPT, folder / "conditions.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pixels")
    network = fresh("UNet2DModel")
    network.conv_out.weight.mul_(0.1)  # a smooth network, whose estimates can be drafted
    return str(save_pipeline(folder, "DDPMPipeline", PIXELS, unet=network))


def loaded(path: str, **options: Any) -> PretrainedDenoiser:
    return PretrainedDenoiser(path, dtype="float32", device="cpu", **options)


def told(path: str, **options: Any) -> PretrainedDenoiser:
    return loaded(path, **({"conditions": f"{path}/conditions.safetensors"} | SIZE | options))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_plain_samples_are_those_of_the_pipeline_of_diffusers(video: str, guidance: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    size = SIZE | {"height": 32, "width": 64}
    target = told(video, frame_rate=24.0, **size)
    assert target.shape == (8, 2, 8, 16) and target.kind == "video"
    pipeline = DenoisingPipeline(target, STEPS, eta=0.0, guidance=guidance)
    media = target.decode(pipeline.complete(2, target.condition(["", ""]), seed=3))
    noise, first = Noise(3, torch.device("cpu")), torch.zeros(2, dtype=torch.int64)
    pure = noise.normal(torch.arange(2), first, target.shape, Role.START).float()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    parts = {"vae": target.codec.model, "transformer": target.network.model}
    theirs = LTXPipeline(scheduler, text_encoder=None, tokenizer=None, **parts)
    theirs.set_progress_bar_config(disable=True)
    frames = theirs(
        **size,
        **{
            name.replace("prompt_mask", "prompt_attention_mask"): torch.cat([value] * 2)
            for name, value in PROMPT.items()
        },
        frame_rate=24,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=LTXPipeline._pack_latents(pure),
        output_type="pt",
    ).frames  # (B, F, 3, H, W) in 0..1
    assert media.shape == (2, 3, 5, 32, 64)
    assert torch.allclose(media, frames.transpose(1, 2) * 2 - 1, atol=1e-4)


def check_law(target: PretrainedDenoiser, condition: dict[str, Tensor], rows: int) -> None:
    """Compare a direction's mean and spread in plain and in drafted samples."""
    given = {name: value.expand(rows, *value.shape[1:]) for name, value in condition.items()}
    plain = DenoisingPipeline(target, STEPS, batch_size=rows).complete(rows, given, seed=1)
    lengths = FixedLength(4)
    drafting = DenoisingPipeline(
        target, STEPS, drafter=FrozenEstimate(), lengths=lengths, batch_size=rows
    )
    drafted = drafting.complete(rows, given, seed=2)
    assert drafting.stats.guarantee.value == "exact law"
    assert drafting.stats.acceptance, "no drafted step ever stood"
    for direction in (torch.ones(target.shape), drawn(*target.shape)):
        one, other = ((x * direction).flatten(1).sum(1).double() for x in (plain, drafted))
        width = one.std()
        assert (one.mean() - other.mean()).abs() < 4 * width * (2 / rows) ** 0.5
        assert (one.std() / other.std()).log().abs() < 4 * (1 / rows) ** 0.5


def test_drafted_pixels_have_the_law_of_the_plain_ones(image: str) -> None:
    target = loaded(image)
    assert target.shape == (3, 8, 8) and target.kind == "image" and target.clip == 1.0
    assert target.condition(["", ""]) == {}
    check_law(target, {}, 192)
    assert target.decode(torch.full((2, 3, 8, 8), 3.0)).max() == 1


def test_drafted_latents_have_the_law_of_the_plain_ones(video: str) -> None:
    target = told(video, height=4, width=4, num_frames=1)
    check_law(target, target.condition([""]), 192)


def test_what_was_converted_is_reported_and_what_could_not_be(image: str, video: str) -> None:
    target = loaded(image, quantize="int8_weight_only", quantize_codec="int8_dynamic")
    assert target.memory["target"]["method"] == "int8_weight_only"
    assert target.memory["target"]["linear_layers"] > 0
    assert target.memory["codec"]["linear_layers"] == 0
    assert list(target.quantized) == ["target"]
    assert target.memory["codec"]["not_converted"] == {}  # pixels need no weights
    assert "PixelCodec has no linear layer" in target.memory["codec"]["reason"]
    DenoisingPipeline(target, 2).complete(1, seed=0)
    target = told(video, quantize="int8_dynamic", tile=True)
    assert target.memory["target"]["method"] == "int8_dynamic"
    assert target.memory["codec"]["tile"] is True
    assert DenoisingPipeline(target, 2).complete(1, target.condition([""])).isfinite().all()


def test_a_network_that_is_loaded_can_become_int8_once(image: str) -> None:
    target = loaded(image)
    options = SamplerOptions(num_steps=2, quantize_models="target", free_draft="estimate")
    run = media_of_target(target, options)
    run.pipeline.complete(1)
    assert run.pipeline.stats.law == "the target's (target in int8)"
    made = target.memory["target"]
    assert made == run.pipeline.stats.quantized["target"] | {"offload": "none"}
    assert made["not_converted"]["convolutions"] > 0.5
    with pytest.raises(ValueError, match="already int8"):
        media_of_target(target, options)
    with pytest.raises(ValueError, match="already int8"):
        media_of_target(loaded(image, quantize="int8_weight_only"), options)


def test_prompts_are_encoded_by_the_text_encoder_of_the_pipeline(
    video: str, tmp_path: Path
) -> None:
    folder = save_video_pipeline(tmp_path / "ltx", FLOW)
    target = loaded(str(folder), **SIZE)
    condition = target.condition(["a cat", "cat"], negative="a")
    assert condition["prompt_embeds"].shape == (2, 128, 12)
    assert condition["prompt_mask"].sum(1).tolist() == [2, 1]
    assert target.free["prompt_mask"].sum().item() == 1
    samples = DenoisingPipeline(target, 2, guidance=2.0).complete(2, condition)
    assert not torch.equal(samples[0], samples[1])


def test_prompts_of_a_pipeline_without_a_text_encoder_are_refused(video: str) -> None:
    with pytest.raises(ValueError, match="has no text encoder; give the embeddings of prompts"):
        loaded(video, **SIZE).condition(["a cat"])


def test_a_unet_of_classes_says_how_many_it_knows(tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel(**OPTIONS["UNet2DModel"], num_class_embeds=3)
    folder = save_pipeline(tmp_path / "few", "DDPMPipeline", PIXELS, unet=unet)
    target = loaded(str(folder))
    assert target.num_classes == 3
    assert target.condition(["2", "0"])["classes"].tolist() == [2, 0]
    with pytest.raises(ValueError, match="no class 3: this model knows 3, counted from 0"):
        target.condition(["2", "3"])


def test_guidance_without_an_empty_prompt_is_refused(video: str, tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    save_file({name: PROMPT[name] for name in ("prompt_embeds", "prompt_mask")}, path)
    target = loaded(video, conditions=str(path), **SIZE)
    with pytest.raises(ValueError, match=r"guidance needs the prompt_[a-z]+ of an empty prompt"):
        DenoisingPipeline(target, 2, guidance=2.0).complete(1, target.condition([""]))


def test_stored_conditions_that_do_not_fit_are_refused(video: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    with pytest.raises(ValueError, match="no file of conditions"):
        loaded(video, conditions=str(path), **SIZE)
    save_file(PROMPT | {"negative_prompt_mask": torch.ones(1, 4)}, path)
    with pytest.raises(ValueError, match="negative_prompt_mask must be one row"):
        loaded(video, conditions=str(path), **SIZE)
    save_file(
        {name: torch.cat([value] * 2) for name, value in PROMPT.items() if "neg" not in name}, path
    )
    with pytest.raises(ValueError, match="2 conditions are stored, but 3 samples"):
        loaded(video, conditions=str(path), **SIZE).condition(["", "", ""])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_frames": 7}, r"4 k \+ 1 frames, not 7; 5 or 9 would do"),
        ({"num_frames": 0}, r"4 k \+ 1 frames, not 0; 1 would do"),
        ({"height": 10}, "height 10 is not a multiple of 4, as this model wants; 8 or 12 would do"),
        ({"height": None}, "give height and width"),
        ({"num_frames": None}, "give num_frames"),
        ({"seconds": 1.0}, "seconds are for sounds"),
        ({"quantize": "int4"}, "quantize 'int4' is not one of none, int8_weight_only"),
        ({"offload": "disk"}, "offload 'disk' is not one of none, block, leaf"),
        ({"offload": "leaf"}, "offload 'leaf' needs a GPU"),
    ],
)
def test_what_a_model_cannot_do_is_refused(video: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        loaded(video, **(SIZE | options))


def test_what_makes_no_sense_for_a_picture_is_refused(image: str) -> None:
    for options, line in (
        ({"num_frames": 5}, "which have no num_frames"),
        ({"shift": 2.0}, "shift is for flows; this model has a DiscreteSchedule"),
        ({"tile": True}, "no autoencoder that could work in tiles"),
    ):
        with pytest.raises(ValueError, match=line):
            loaded(image, **options)


def test_a_sound_has_one_length_and_is_cut_to_its_seconds(tmp_path: Path) -> None:
    folder = save_pipeline(
        tmp_path / "sound",
        "StableAudioPipeline",
        {"_class_name": "CosineDPMSolverMultistepScheduler"},
        transformer=fresh("StableAudioDiTModel"),
        vae=fresh("AutoencoderOobleck"),
    )
    with pytest.raises(ValueError, match=r"seconds must be in \(0, 1.00\], got 2"):
        loaded(str(folder), seconds=2.0)
    with pytest.raises(ValueError, match="sounds, which have no height"):
        loaded(str(folder), height=8)
    target = loaded(str(folder), seconds=0.5)
    assert (target.shape, target.kind) == ((4, 8), "audio")
    condition = {"prompt_embeds": drawn(2, 5, 12), "duration_embeds": drawn(2, 1, 24)}
    states = DenoisingPipeline(target, 3, guidance=2.0).complete(2, condition)
    assert target.decode(states).shape == (2, 2, 32)


def test_an_even_state_of_cogvideox_is_decoded_without_its_first_frame(tmp_path: Path) -> None:
    folder = save_pipeline(
        tmp_path / "cogvideox",
        "CogVideoXPipeline",
        {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"},
        transformer=fresh("CogVideoXTransformer3DModel:1.5"),
        vae=fresh("AutoencoderKLCogVideoX"),
    )
    size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match=r"8 k \+ 1 frames, not 13; 9 or 17 would do"):
        loaded(str(folder), num_frames=13, **size)
    target = loaded(str(folder), num_frames=9, **size)
    assert target.shape == (4, 4, 4, 4)
    states = DenoisingPipeline(target, 2).complete(1, {"prompt_embeds": drawn(1, 5, 12)})
    media = target.decode(states)
    assert media.shape == (1, 3, 9, 32, 32)
    assert torch.allclose(media, target.codec.decode(states[:, :, 1:]))


def test_a_folder_that_is_no_pipeline_is_refused(video: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder at 'nowhere'"):
        loaded("nowhere")
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        loaded(str(tmp_path))
    index = json.loads((Path(video) / "model_index.json").read_text())
    for change, line in (
        ({"_class_name": "LTXConditionPipeline"}, "is a LTXConditionPipeline; supported are: DDPM"),
        ({"boundary_ratio": 0.9}, "has a boundary_ratio, and two Wan networks it has not"),
        ({"requires_aesthetics_score": True}, "is told a score of beauty"),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "is no supported network"),
        ({"transformer": [None, None]}, "names neither a transformer nor a unet"),
        ({"scheduler": [None, None]}, "names no scheduler"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=line):
            loaded(str(tmp_path))


def test_a_drafter_of_other_states_is_refused(video: str) -> None:
    target, other = told(video), loaded(video, **(SIZE | {"num_frames": 9}))
    with pytest.raises(ValueError, match="the drafter's states are"):
        check_shapes(other, target)
    with pytest.raises(ValueError, match="the drafter's noise levels are"):
        check_shapes(told(video, shift=2.0), target)


def test_rows_of_a_pipelines_network_may_be_spread_and_offloaded_weights_not(video: str) -> None:
    found = []
    for devices in (1, 2):
        target = told(video)
        if devices > 1:
            target.spread([target.device] * devices)
        condition = target.condition([""] * 3)
        pipeline = DenoisingPipeline(
            target, 4, guidance=2.0, drafter=FrozenEstimate(), lengths=FixedLength(2)
        )
        found.append(pipeline.complete(3, condition, seed=1))
    assert torch.allclose(*found, atol=1e-5)
    target.offloaded = True
    with pytest.raises(ValueError, match="offload and several devices do not go together"):
        target.spread([target.device] * 2)
