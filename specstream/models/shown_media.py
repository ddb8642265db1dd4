"""What a network that was trained for it is shown of a medium, beside the prompt.

Shapes: C' channels beside a state, A the axes of a state, T tokens, D width; media in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specstream.files import one_line
from specstream.models.diffusers_network import BESIDE, IMAGE_EMBEDS
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.pretrained_parts import quiet_diffusers

IMAGE_ENCODER = "image_encoder"  # folders of a pipeline
IMAGE_PROCESSOR = "image_processor"


def shown(target: PretrainedDenoiser, media: Tensor, made: Tensor) -> dict[str, Tensor]:
    """Return what the network sees of a medium (1, 3, ...) in -1..1, as one row by name.

    What is to be `made`, (1, 1, ...) bool, is grey to it.  `beside` is (1, C', *A), `image_embeds`
    (1, T, D) what the pipeline's image encoder says of a video's first frame.  Raises ValueError in
    one line where that encoder cannot be loaded.
    """
    network, latents = target.network, target.encode(media.masked_fill(made, 0))
    told = {BESIDE: network.beside(latents, made)}
    if IMAGE_EMBEDS in network.needs:
        told[IMAGE_EMBEDS] = read_by_encoder(target, media[0, :, 0])
    return told


def read_by_encoder(target: PretrainedDenoiser, picture: Tensor) -> Tensor:
    """Return the last hidden states but one (1, T, D) of a picture (3, H, W) in -1..1.

    The encoder is loaded for one picture and dropped again, and computes in float32.
    """
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPVisionModel

    path = target.path
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    with one_line(f"cannot read a picture with {path!r}"), quiet_diffusers():
        processor = AutoImageProcessor.from_pretrained(
            path, subfolder=IMAGE_PROCESSOR, backend="pil"
        )
        encoder = CLIPVisionModel.from_pretrained(
            path, subfolder=IMAGE_ENCODER, dtype=torch.float32
        )
        seen = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
        encoder = encoder.eval().to(target.device)
        with torch.inference_mode():
            said = encoder(seen.to(target.device), output_hidden_states=True)
    hidden = said.hidden_states[-2]
    assert isinstance(hidden, Tensor)
    return hidden
