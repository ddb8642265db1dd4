"""Tiny networks and autoencoders of `diffusers` with fresh weights, built without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def fresh(name: str) -> nn.Module:
    """Return a tiny model of a class of `diffusers`, the same each time."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, name.partition(":")[0])(**OPTIONS[name])
        for parameter in model.parameters():  # some are zero at first: nothing would be seen
            if parameter.abs().max() == 0:
                nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}
COGVIDEOX_CODEC = {
    "block_out_channels": (4, 4, 4, 4),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
    "scaling_factor": 0.7,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (2, 2, 4),
}
CONDITIONED_UNET = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
FILLS = {"in_channels": 9, "out_channels": 4}
TOLD_SIZE = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}
CODEC = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
OPTIONS: dict[str, dict[str, object]] = {
    "UNet2DModel": UNET
    | {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    },
    "UNet2DConditionModel": CONDITIONED_UNET,
    "UNet2DConditionModel:fills": CONDITIONED_UNET | FILLS,
    "UNet2DConditionModel:fills-xl": CONDITIONED_UNET | FILLS | TOLD_SIZE,
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    },
    "FluxTransformer2DModel": FLUX,
    "FluxTransformer2DModel:distilled": FLUX | {"guidance_embeds": True},
    "FluxTransformer2DModel:fills": FLUX
    | {"guidance_embeds": True, "in_channels": 48, "out_channels": 16},
    "LTXVideoTransformer3DModel": {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": 12,
    },
    "WanTransformer3DModel": WAN,
    "WanTransformer3DModel:continues": WAN | {"in_channels": 12},
    "WanTransformer3DModel:reads": WAN
    | {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24},
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "CogVideoXTransformer3DModel:rotary": COGVIDEOX | {"use_rotary_positional_embeddings": True},
    "CogVideoXTransformer3DModel:1.5": COGVIDEOX
    | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "CogVideoXTransformer3DModel:continues": COGVIDEOX
    | {"use_rotary_positional_embeddings": True, "in_channels": 8},
    "CogVideoXTransformer3DModel:1.5-continues": COGVIDEOX
    | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
    | {"in_channels": 8, "ofs_embed_dim": 8},
    "StableAudioDiTModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 12,
        "time_proj_dim": 8,
        "global_states_input_dim": 24,
        "cross_attention_input_dim": 12,
    },
    "AutoencoderKL": CODEC | {"shift_factor": 0.1},
    "AutoencoderKL:unmoved": CODEC,
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLWan": {
        "base_dim": 3,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 3.0, 4.0],
    },
    "AutoencoderKLCogVideoX": COGVIDEOX_CODEC,
    "AutoencoderKLCogVideoX:inverted": COGVIDEOX_CODEC | {"invert_scale_latents": True},
    "AutoencoderOobleck": {
        "encoder_hidden_size": 8,  # two numbers for each latent
        "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2],
        "decoder_channels": 4,
        "decoder_input_channels": 4,
        "audio_channels": 2,
        "sampling_rate": 64,
    },
}


def other(name: str) -> nn.Module:
    """Return a model of the same class that says something else."""
    model = fresh(name)
    for parameter in model.parameters():
        parameter.mul_(0.7)
    return model


def save_image_encoder(folder: Path) -> None:
    """Write an encoder of pictures of 8 x 8 pixels, 16 wide, into a pipeline's folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}}
    processor |= {"crop_size": {"height": 8, "width": 8}}
    (folder / "image_processor").mkdir()
    (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(processor))


def save_pipeline(
    folder: Path,
    pipeline: str,
    scheduler: dict[str, object],
    options: dict[str, object] | None = None,
    **parts: nn.Module,
) -> Path:
    """Write a pipeline's folder as `diffusers` does: an index, configs and weights."""
    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": "0.42.0"}
    index |= options or {}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def word_tokenizer() -> Any:
    """Return a tokenizer that knows the words "a" and "cat"."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=128
    )


def save_video_pipeline(folder: Path, scheduler: dict[str, object]) -> Path:
    """Write an LTX pipeline whose text encoder knows the words "a" and "cat", of width 12."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return save_pipeline(
        folder,
        "LTXPipeline",
        scheduler,
        transformer=fresh("LTXVideoTransformer3DModel"),
        vae=fresh("AutoencoderKLLTXVideo"),
        text_encoder=T5EncoderModel(config),
        tokenizer=word_tokenizer(),
    )
