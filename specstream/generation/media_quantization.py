"""int8 weights for diffusion models of media: the target, its drafter or both."""

from __future__ import annotations

from specstream.drafters.denoising import IndependentDenoiser, StateDrafter
from specstream.drafters.residual import CorrectingDrafter
from specstream.generation.loading import Quantized
from specstream.models.denoiser import Denoiser
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.quantization import quantize


def quantize_denoisers(
    target: Denoiser, drafter: StateDrafter | None, models: Quantized, method: str
) -> None:
    """Convert what `models` names, in place, by a `method` of `quantize`.

    A drafter is loaded before: it knows its target by the weights as they are stored.  Raises
    ValueError where the drafter that is named has no weights, and for a target that cannot be
    converted.
    """
    if models in ("drafter", "both"):
        if isinstance(drafter, IndependentDenoiser):
            quantize(drafter.denoiser.network, method)
        elif isinstance(drafter, CorrectingDrafter):
            quantize(drafter.network, method)
        else:
            raise ValueError(f"quantize {models}: there is no drafter with weights of its own")
    if models not in ("target", "both"):
        return
    if isinstance(target, PretrainedDenoiser):
        target.quantize(method)
    else:
        quantize(target.network, method)
