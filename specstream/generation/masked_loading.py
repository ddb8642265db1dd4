"""From a run folder, or from models spelled out, to a pipeline that fills canvases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from specstream.drafters import CanvasDrafter, MaskedDraftModel, TranslatedDrafter
from specstream.drafters.loading import (
    RECORD,
    drafter_class,
    load_canvas_drafter,
    read_record,
)
from specstream.drafters.self_speculative import holds_head, load_head
from specstream.files import read_table
from specstream.generation.dual_diffusion import DualDiffusionPipeline
from specstream.generation.free_dave import FreeDavePipeline
from specstream.generation.lengths import DraftLength, FixedLength
from specstream.generation.loading import (
    QUANTIZED,
    TOKENIZER_FILES,
    check_compilable,
    find_device,
)
from specstream.generation.masked import MaskedPipeline, Sampler
from specstream.generation.self_speculative_pipeline import SelfSpeculativePipeline
from specstream.models.masked_weights import HUB_NETWORKS
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.quantization import USUAL, quantize
from specstream.models.supported import FORM
from specstream.processors import TextProcessor
from specstream.unmasking import StaticSchedule
from specstream.verification import CanvasVerifier, TokenVerifier

WINDOWS = 4  # unless said
SELF_VERIFYING = "a self-speculative head fills positions in random order and verifies itself"


def is_masked_run(run: str | Path) -> bool:
    """Whether a run folder holds a masked diffusion model, or a drafter of one."""
    folder = Path(run)
    if (folder / "draft" / RECORD).is_file():
        if holds_head(folder / "draft"):
            return True
        named = read_record(folder / "draft")["drafter"]["class_path"]
        return issubclass(drafter_class(folder / "draft", named), CanvasDrafter)
    for config in (folder / "config.json", folder / "model" / "config.json"):
        if config.is_file():
            try:
                found = read_table(config)
                return FORM in found or str(found.get("model_type")) in HUB_NETWORKS
            except ValueError:
                return False  # damaged: whoever loads it says so
    return False


def load_masked_run(
    run: str | Path,
    *,
    sampler: Sampler | None = None,
    nested_steps: int = 0,
    verifier: CanvasVerifier | TokenVerifier | None = None,
    lengths: DraftLength | None = None,
    copies: int | None = None,
    max_target_calls: int | None = None,
    sure: float | None = None,
    windows: int = WINDOWS,
    batch_size: int = 1,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    quantize_models: str = "none",
    quantize_method: str = USUAL,
) -> MaskedPipeline:
    """Load a run folder: its drafter or head with its target, or a trained model alone.

    `windows` is how many trunk passes fill a canvas by self-speculation, whose `verifier` judges
    chains of tokens; everything else is explained in `build_masked_pipeline`.
    """
    folder = Path(run)
    draft = folder / "draft"
    alone = not draft.is_dir()
    path = str(folder / "model") if alone else str(read_record(draft)["target"]["path"])
    if alone and not (folder / "model").is_dir():
        path = str(folder)
    if not alone and holds_head(draft):
        given = {
            "nested_steps": nested_steps != 0,
            "a draft length": lengths is not None,
            "copies": copies is not None,
            "max_target_calls": max_target_calls is not None,
            "sure": sure is not None,
            "compile": compile,
            "quantize": quantize_models != "none",
        }
        refuse_unused(SELF_VERIFYING, given | schedule_options(sampler))
        if isinstance(verifier, CanvasVerifier):
            raise ValueError(
                f"{type(verifier).__name__} judges canvases, a self-speculative head needs a "
                "verifier of chains, such as TokenRejection"
            )
        target = PretrainedMaskedLM(path, dtype, attn_implementation, device)
        return _self_speculative(draft, target, windows, verifier, sampler, batch_size, device)
    refuse_unused("the run has no self-speculative head", {"windows": windows != WINDOWS})
    return build_masked_pipeline(
        PretrainedMaskedLM(path, dtype, attn_implementation, device),
        None
        if alone
        else lambda target: load_canvas_drafter(draft, target, dtype, attn_implementation, device),
        sampler=sampler,
        nested_steps=nested_steps,
        verifier=verifier,
        lengths=lengths,
        copies=copies,
        max_target_calls=max_target_calls,
        sure=sure,
        batch_size=batch_size,
        compile=compile,
        device=device,
        quantize_models=quantize_models,
        quantize_method=quantize_method,
    )


def refuse_unused(reason: str, given: Mapping[str, bool]) -> None:
    """Raise ValueError that names what is `given` and would have no effect, and the reason."""
    names = [name for name, is_given in given.items() if is_given]
    if names:
        has = "has" if len(names) == 1 else "have"
        raise ValueError(f"{reason}: {', '.join(names)} {has} no use")


def schedule_options(sampler: Sampler | None) -> dict[str, bool]:
    """Return which of the options that say what a step fills differ from their defaults."""
    usual = Sampler().unmasking
    rule = usual if sampler is None else sampler.unmasking
    assert isinstance(usual, StaticSchedule)
    if not isinstance(rule, StaticSchedule):
        return {"unmasking": True}
    return {"steps": rule.num_steps != usual.num_steps, "order": rule.order != usual.order}


def _self_speculative(
    draft: Path,
    target: PretrainedMaskedLM,
    windows: int,
    verifier: TokenVerifier | None,
    sampler: Sampler | None,
    batch_size: int,
    device: str,
) -> SelfSpeculativePipeline:
    place = find_device(device)
    head = load_head(draft, target).to(place)
    target = target.eval().requires_grad_(False).to(place)
    processor = TextProcessor.from_pretrained(target.path)
    return SelfSpeculativePipeline(
        target, head, processor, windows, verifier, sampler=sampler, batch_size=batch_size
    )


def build_masked_pipeline(
    target: nn.Module,
    drafter: Callable[[nn.Module], nn.Module] | None = None,
    *,
    sampler: Sampler | None = None,
    nested_steps: int = 0,
    verifier: CanvasVerifier | TokenVerifier | None = None,
    lengths: DraftLength | None = None,
    copies: int | None = None,
    max_target_calls: int | None = None,
    sure: float | None = None,
    batch_size: int = 1,
    compile: bool = False,
    device: str = "auto",
    quantize_models: str = "none",
    quantize_method: str = USUAL,
) -> MaskedPipeline:
    """Put models together: dual diffusion with a drafter, else nested steps or plain sampling.

    `lengths` counts drafted denoising steps; of `nested_steps` it says how many of them, if it
    chooses.  `sure` replaces that of a `MaskedDraftModel`.  Raises ValueError for models that do
    not fit together, for a value that no model takes, and for an option that would have no effect.
    """
    if not isinstance(target, PretrainedMaskedLM) or not target.path:
        raise ValueError(
            "the target must be a PretrainedMaskedLM of a folder or the hub, not "
            f"{type(target).__name__}"
        )
    if isinstance(verifier, TokenVerifier):
        raise ValueError(f"verifier: {type(verifier).__name__} judges causal text, not canvases")
    assert quantize_models in QUANTIZED
    if drafter is None:
        given = {
            "verifier": verifier is not None,
            "copies": copies is not None,
            "max_target_calls": max_target_calls is not None,
            "sure": sure is not None,
            "a draft length": lengths is not None and not nested_steps,
            "quantizing it": quantize_models in ("drafter", "both"),
        }
        refuse_unused("there is no drafter", given)
    elif nested_steps:
        raise ValueError("nested steps are the target's own: they have no use beside a drafter")
    place = find_device(device)
    if quantize_models != "none":
        check_compilable(quantize_method, compile, place)
    target = target.eval().requires_grad_(False).to(place)
    processor = TextProcessor.from_pretrained(target.path)
    if quantize_models in ("target", "both"):
        quantize(target, quantize_method)
    if drafter is None and nested_steps:
        steps = nested_length(nested_steps, lengths)
        return FreeDavePipeline(target, processor, steps, sampler, batch_size, compile)
    if drafter is None:
        return MaskedPipeline(target, processor, sampler, batch_size, compile)
    guesser = make_canvas_drafter(target, processor, drafter, sure).to(place)
    if quantize_models in ("drafter", "both"):
        quantize(guesser, quantize_method)
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


def nested_length(nested_steps: int, lengths: DraftLength | None) -> DraftLength:
    """Return how many nested steps a round drafts; ValueError where the two contradict."""
    if lengths is not None and lengths.max_tokens != nested_steps:
        raise ValueError(
            f"nested_steps {nested_steps} and a draft length of {lengths.max_tokens} contradict "
            "each other: give one of the two"
        )
    return lengths if lengths is not None else FixedLength(nested_steps)


def make_canvas_drafter(
    target: PretrainedMaskedLM,
    processor: TextProcessor,
    drafter: Callable[[nn.Module], nn.Module],
    sure: float | None = None,
) -> CanvasDrafter:
    """Build what drafts for `target`; ValueError where it does not fit, or knows no `sure`."""
    if sure is not None and not 0 <= sure <= 1:
        raise ValueError(f"sure must be in [0, 1], got {sure}")
    guesser = drafter(target)
    if not isinstance(guesser, CanvasDrafter):
        raise ValueError(
            f"{type(guesser).__name__} drafts causal text; a masked target needs a CanvasDrafter"
        )
    if sure is not None:
        if not isinstance(guesser, MaskedDraftModel):
            raise ValueError(f"sure is for a MaskedDraftModel, not for {type(guesser).__name__}")
        guesser.sure = sure
    check_canvas_tokenizers(target, processor, guesser)
    return guesser.eval().requires_grad_(False)


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
