"""From a run folder, or from models spelled out, to a pipeline that fills canvases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from specstream.drafters import CanvasDrafter, TranslatedDrafter
from specstream.drafters.loading import RECORD, load_canvas_drafter, read_record
from specstream.drafters.self_speculative import holds_head, load_head
from specstream.generation.dual_diffusion import DualDiffusionPipeline
from specstream.generation.free_dave import FreeDavePipeline
from specstream.generation.lengths import DraftLength, FixedLength
from specstream.generation.loading import QUANTIZED, TOKENIZER_FILES, find_device
from specstream.generation.masked import MaskedPipeline, Sampler
from specstream.generation.self_speculative_pipeline import SelfSpeculativePipeline
from specstream.models.pretrained_masked import FORM, PretrainedMaskedLM
from specstream.models.quantization import quantize
from specstream.processors import TextProcessor
from specstream.verification import CanvasVerifier


def is_masked_run(run: str | Path) -> bool:
    """Whether a run folder holds a masked diffusion model, or a drafter of one."""
    folder = Path(run)
    if (folder / "draft" / RECORD).is_file():
        if holds_head(folder / "draft"):
            return True
        named = str(read_record(folder / "draft")["drafter"]["class_path"]).rpartition(".")[2]
        import specstream.drafters as known

        kind = getattr(known, named, None)
        return isinstance(kind, type) and issubclass(kind, CanvasDrafter)
    for config in (folder / "config.json", folder / "model" / "config.json"):
        if config.is_file():
            try:
                return FORM in json.loads(config.read_text())
            except ValueError:
                return False  # damaged: whoever loads it says so
    return False


def load_masked_run(
    run: str | Path,
    *,
    sampler: Sampler | None = None,
    nested_steps: int = 0,
    verifier: CanvasVerifier | None = None,
    lengths: DraftLength | None = None,
    copies: int = 2,
    max_target_calls: int | None = None,
    windows: int = 4,
    batch_size: int = 1,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    quantize_models: str = "none",
) -> MaskedPipeline:
    """Load a run folder: its drafter or head with its target, or a trained model alone.

    `windows` is how many trunk passes fill a canvas by self-speculation; everything else is
    explained in `build_masked_pipeline`.
    """
    folder = Path(run)
    draft = folder / "draft"
    alone = not draft.is_dir()
    path = str(folder / "model") if alone else str(read_record(draft)["target"]["path"])
    if alone and not (folder / "model").is_dir():
        path = str(folder)
    target = PretrainedMaskedLM(path, dtype, attn_implementation, device)
    if not alone and holds_head(draft):
        if nested_steps or verifier is not None or lengths is not None or quantize_models != "none":
            raise ValueError(f"{str(draft)!r} holds a self-speculative head, which verifies itself")
        head = load_head(draft, target).to(find_device(device))
        target = target.eval().requires_grad_(False).to(find_device(device))
        processor = TextProcessor.from_pretrained(path)
        return SelfSpeculativePipeline(
            target, head, processor, windows, sampler=sampler, batch_size=batch_size
        )
    return build_masked_pipeline(
        target,
        None
        if alone
        else lambda target: load_canvas_drafter(draft, target, dtype, attn_implementation, device),
        sampler=sampler,
        nested_steps=nested_steps,
        verifier=verifier,
        lengths=lengths,
        copies=copies,
        max_target_calls=max_target_calls,
        batch_size=batch_size,
        compile=compile,
        device=device,
        quantize_models=quantize_models,
    )


def build_masked_pipeline(
    target: nn.Module,
    drafter: Callable[[nn.Module], nn.Module] | None = None,
    *,
    sampler: Sampler | None = None,
    nested_steps: int = 0,
    verifier: CanvasVerifier | None = None,
    lengths: DraftLength | None = None,
    copies: int = 2,
    max_target_calls: int | None = None,
    batch_size: int = 1,
    compile: bool = False,
    device: str = "auto",
    quantize_models: str = "none",
) -> MaskedPipeline:
    """Put models together: dual diffusion with a drafter, else nested steps or plain sampling.

    `lengths` counts drafted denoising steps.  Raises ValueError for models that do not fit together
    and for an option that would have no effect.
    """
    if not isinstance(target, PretrainedMaskedLM) or not target.path:
        raise ValueError(
            "the target must be a PretrainedMaskedLM of a folder or the hub, not "
            f"{type(target).__name__}"
        )
    assert quantize_models in QUANTIZED
    place = find_device(device)
    target = target.eval().requires_grad_(False).to(place)
    processor = TextProcessor.from_pretrained(target.path)
    if quantize_models in ("target", "both"):
        quantize(target, "int8_weight_only")
    if drafter is None:
        if verifier is not None or max_target_calls is not None or copies != 2:
            raise ValueError(
                "there is no drafter: verifier, copies and max_target_calls have no use"
            )
        if quantize_models in ("drafter", "both"):
            raise ValueError("there is no drafter to quantize")
        if nested_steps:
            steps = lengths if lengths is not None else FixedLength(nested_steps)
            return FreeDavePipeline(target, processor, steps, sampler, batch_size, compile)
        if lengths is not None:
            raise ValueError("there is no drafter: a draft length has no use")
        return MaskedPipeline(target, processor, sampler, batch_size, compile)
    if nested_steps:
        raise ValueError("nested steps are the target's own: they have no use beside a drafter")
    guesser = drafter(target)
    if not isinstance(guesser, CanvasDrafter):
        raise ValueError(
            f"{type(guesser).__name__} drafts causal text; a masked target needs a CanvasDrafter"
        )
    check_canvas_tokenizers(target, processor, guesser)
    guesser = guesser.eval().requires_grad_(False).to(place)
    if quantize_models in ("drafter", "both"):
        quantize(guesser, "int8_weight_only")
    return DualDiffusionPipeline(
        target,
        guesser,
        processor,
        verifier,
        lengths,
        copies,
        max_target_calls,
        sampler,
        batch_size,
        compile,
    )


def check_canvas_tokenizers(
    target: PretrainedMaskedLM, processor: TextProcessor, drafter: CanvasDrafter
) -> None:
    """Raise ValueError where a model of `drafter` means another text by one of the token ids.

    A translated one may.  A model that carries no tokenizer is taken at its word.
    """
    if isinstance(drafter, TranslatedDrafter):
        return
    names = {index: name for name, index in processor.tokenizer.get_vocab().items()}
    for model in drafter.modules():
        if not isinstance(model, PretrainedMaskedLM) or model.path in ("", target.path):
            continue
        folder = Path(model.path)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            continue
        own = TextProcessor.from_pretrained(model.path).tokenizer.get_vocab()
        if any(names.get(index, name) != name for name, index in own.items()):
            raise ValueError(
                f"drafter {model.path!r} and target {target.path!r} have different tokenizers: "
                "let a TranslatedDrafter draft"
            )
