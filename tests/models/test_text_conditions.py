"""What a network is told where there is no prompt, as its own pipeline tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from specstream.models import PretrainedDenoiser
from specstream.models.pretrained_parts import read_parts
from tests.diffusers_toys import OPTIONS, fresh, other, save_pipeline, word_tokenizer

CHAIN: dict[str, object] = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "epsilon",
    "beta_schedule": "scaled_linear",
}


def encoder(width: int, projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=8,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def stable_xl(folder: Path, zeros: bool) -> str:
    """Write a tiny Stable Diffusion XL."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "c", "a", "t</w>", "ca"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 77
    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    size |= {"projection_class_embeddings_input_dim": 6 * 4 + 6}
    parts = {
        "unet": UNet2DConditionModel(**(OPTIONS["UNet2DConditionModel"] | size)),
        "vae": AutoencoderKL(**OPTIONS["AutoencoderKL"]),
        "text_encoder": encoder(8, False),
        "text_encoder_2": encoder(4, True),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }
    options = {"force_zeros_for_empty_prompt": zeros}
    return str(save_pipeline(folder / "xl", "StableDiffusionXLPipeline", CHAIN, options, **parts))


@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_it(zeros: bool, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    path = stable_xl(tmp_path / "made", zeros)
    target = PretrainedDenoiser(path, dtype="float32", device="cpu")
    told = target.condition(["a cat"])
    theirs = StableDiffusionXLPipeline.from_pretrained(path)
    right = theirs.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    found = (
        told["prompt_embeds"],
        target.free["prompt_embeds"],
        told["pooled_prompt_embeds"],
        target.free["pooled_prompt_embeds"],
    )
    for ours, expected in zip(found, right, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)
    assert bool(target.free["prompt_embeds"].any()) != zeros
    target.condition(["a cat"], negative="a")
    assert target.free["prompt_embeds"].any()


def test_a_prompt_is_read_without_what_reads_pictures(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    name = "WanTransformer3DModel:continues"
    folder = save_pipeline(
        tmp_path / "wan",
        "WanImageToVideoPipeline",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {  # neither of the first two has a folder that could be loaded
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
            "boundary_ratio": 0.9,
        },
        transformer=fresh(name),
        transformer_2=other(name),
        vae=fresh("AutoencoderKLWan"),
        text_encoder=UMT5EncoderModel(config).eval(),
        tokenizer=word_tokenizer(),
    )
    size = {"height": 16, "width": 16, "num_frames": 5}
    target = PretrainedDenoiser(str(folder), dtype="float32", device="cpu", **size)
    told = target.condition(["a cat", "a"])
    assert told["prompt_embeds"].shape == (2, 512, 12)
    assert told["prompt_embeds"][0, 1].any() and not told["prompt_embeds"][1, 1:].any()
    assert target.free["prompt_embeds"].shape == (1, 512, 12)


def test_two_experts_that_see_different_states_are_refused(tmp_path: Path) -> None:
    parts = {"transformer": fresh("WanTransformer3DModel"), "vae": fresh("AutoencoderKLWan")}
    parts["transformer_2"] = fresh("WanTransformer3DModel:continues")
    scheduler: dict[str, object] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    for ratio, line in (
        (0.5, "have in_channels 4 and 12"),
        (1.5, "1.5 is not between 0 and 1"),
    ):
        home = tmp_path / str(ratio)
        save_pipeline(home, "WanPipeline", scheduler, {"boundary_ratio": ratio}, **parts)
        with pytest.raises(ValueError, match=line):
            read_parts(str(home))
