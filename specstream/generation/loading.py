"""From a run folder to a pipeline: what training wrote is all that decoding needs."""

from __future__ import annotations

from pathlib import Path

from specstream.drafters import LookupFirst
from specstream.drafters.loading import load_drafter, read_record
from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import TextPipeline
from specstream.generation.batch import Limits
from specstream.generation.lengths import DraftLength
from specstream.generation.speculative import SpeculativePipeline
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.quantization import quantize
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.verification import TokenVerifier

QUANTIZED = ("none", "target", "drafter", "both")


def load_run(
    run: str | Path,
    *,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    verifier: TokenVerifier | None = None,
    lengths: DraftLength | None = None,
    lookup: bool = False,
    batch_size: int = 1,
    compile: bool = False,
    chat: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    quantize_models: str = "none",
) -> TextPipeline:
    """Load a run folder for generation: its drafter with its target, or a trained model alone.

    `lookup` lets the drafter copy from the text where a long n-gram recurs; `device` is auto (the
    first GPU, else the CPU) or a torch device; `quantize_models` is none, target, drafter or both
    (int8 weight-only).  Raises ValueError in one line for a folder that is not a run, and for
    whatever in it is missing or damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"no run folder at {str(folder)!r}")
    if quantize_models not in QUANTIZED:
        raise ValueError(
            f"quantize_models {quantize_models!r} is not one of {', '.join(QUANTIZED)}"
        )
    place = _device(device)
    alone = _model_folder(folder)
    draft = folder / "draft"
    if alone is None and not draft.is_dir():
        raise ValueError(
            f"{str(folder)!r} holds neither draft/ nor model/: nothing to generate with"
        )
    path = str(alone) if alone is not None else str(read_record(draft)["target"]["path"])
    target = PretrainedLM(path, dtype, attn_implementation).eval().requires_grad_(False).to(place)
    processor = TextProcessor.from_pretrained(path)
    if quantize_models in ("target", "both"):
        quantize(target, "int8_weight_only")
    if alone is not None:
        return AutoregressivePipeline(
            target, processor, sampling, limits, batch_size, compile, chat
        )
    drafter = load_drafter(draft, target, dtype).to(place)
    if quantize_models in ("drafter", "both"):
        quantize(drafter, "int8_weight_only")
    if lookup:
        inner = drafter
        drafter = LookupFirst(target, lambda _: inner)
    return SpeculativePipeline(
        target,
        drafter,
        processor,
        verifier,
        lengths,
        sampling,
        limits,
        batch_size,
        compile,
        chat,
    )


def _model_folder(folder: Path) -> Path | None:
    """Return where a trained model stands alone: the folder itself, or its model/."""
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
    return None


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
