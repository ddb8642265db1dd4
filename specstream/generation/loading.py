"""From a run folder, or from models spelled out, to a pipeline that decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from specstream.drafters import (
    CutDraftModel,
    Drafter,
    LookupFirst,
    PromptLookup,
    StoredDrafter,
)
from specstream.drafters.loading import load_drafter, read_record
from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import TextPipeline
from specstream.generation.batch import Limits
from specstream.generation.lengths import DraftLength
from specstream.generation.speculative import SpeculativePipeline
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.quantization import USUAL, quantize
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.verification import TokenVerifier

if TYPE_CHECKING:
    import torch

Quantized = Literal["none", "target", "drafter", "both"]
QUANTIZED = get_args(Quantized)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


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
    quantize_method: str = USUAL,
) -> TextPipeline:
    """Load a run folder for generation: its drafter with its target, or a trained model alone.

    `dtype` and `attn_implementation` are those of `PretrainedLM`, for both models, and auto is
    that of `device`; everything else is explained in `build_pipeline`.  Raises
    ValueError in one line for a folder that is not a run, and for whatever in it is missing or
    damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"no run folder at {str(folder)!r}")
    alone = _model_folder(folder)
    draft = folder / "draft"
    if alone is None and not draft.is_dir():
        raise ValueError(
            f"{str(folder)!r} holds neither draft/ nor model/: nothing to generate with"
        )
    path = str(alone) if alone is not None else str(read_record(draft)["target"]["path"])
    return build_pipeline(
        PretrainedLM(path, dtype, attn_implementation, device),
        None
        if alone is not None
        else lambda target: load_drafter(draft, target, dtype, attn_implementation, device),
        sampling=sampling,
        limits=limits,
        verifier=verifier,
        lengths=lengths,
        lookup=lookup,
        batch_size=batch_size,
        compile=compile,
        chat=chat,
        device=device,
        quantize_models=quantize_models,
        quantize_method=quantize_method,
    )


def build_pipeline(
    target: nn.Module,
    drafter: Callable[[nn.Module], StoredDrafter] | None = None,
    *,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    verifier: TokenVerifier | None = None,
    lengths: DraftLength | None = None,
    lookup: bool = False,
    batch_size: int = 1,
    compile: bool = False,
    chat: bool = False,
    device: str = "auto",
    quantize_models: str = "none",
    quantize_method: str = USUAL,
) -> TextPipeline:
    """Put models together for decoding: speculative with a drafter, plain without one.

    `drafter` builds the drafter from the target.  `lookup` lets it copy from the text where a long
    n-gram recurs; without a drafter, looking up is the drafter.  `device` is auto (the first GPU,
    else the CPU) or a torch device; `quantize_models` is none, target, drafter or both and
    `quantize_method` that of `quantize`.  Raises ValueError for models that do not fit together,
    and for an option that would have no effect.
    """
    if quantize_models not in QUANTIZED:
        raise ValueError(
            f"quantize_models {quantize_models!r} is not one of {', '.join(QUANTIZED)}"
        )
    if not isinstance(target, PretrainedLM) or not target.path:
        raise ValueError(
            f"the target must be a PretrainedLM of a folder or the hub, not {type(target).__name__}"
        )
    place = find_device(device)
    if quantize_models != "none":
        check_compilable(quantize_method, compile, place)
    target = target.eval().requires_grad_(False).to(place)
    processor = TextProcessor.from_pretrained(target.path)
    if drafter is None and not lookup:
        if verifier is not None or lengths is not None or quantize_models in ("drafter", "both"):
            raise ValueError("there is no drafter: verifier, draft length and its int8 have no use")
        if quantize_models == "target":
            quantize(target, quantize_method)
        return AutoregressivePipeline(
            target, processor, sampling, limits, batch_size, compile, chat
        )
    guesser = _build_drafter(target, drafter, lookup).eval().requires_grad_(False).to(place)
    check_tokenizers(target, processor, guesser)
    if quantize_models != "none":
        check_shares_nothing(guesser)
    for model, name in ((target, "target"), (guesser, "drafter")):
        if quantize_models in (name, "both"):
            quantize(model, quantize_method)
    return SpeculativePipeline(
        target,
        guesser,
        processor,
        verifier,
        lengths,
        sampling,
        limits,
        batch_size,
        compile,
        chat,
    )


def _build_drafter(
    target: PretrainedLM, drafter: Callable[[nn.Module], StoredDrafter] | None, lookup: bool
) -> Drafter:
    if drafter is None:
        return PromptLookup(target)
    built = drafter(target)
    if not isinstance(built, Drafter):
        raise ValueError(f"{type(built).__name__} drafts canvases, and the target is a causal LM")
    if isinstance(built, CutDraftModel):  # cut for training, in float32
        built.to(target.dtype)
    return LookupFirst(target, lambda _: built) if lookup else built


def check_compilable(method: str, compiled: bool, place: str) -> None:
    """Raise ValueError for layers in int8 that come out wrong once they are compiled.

    Of torch 2.13 and torchao 0.18: a single row in bfloat16, of int8_dynamic on a CPU.
    """
    if method == "int8_dynamic" and compiled and place == "cpu":
        raise ValueError(
            "int8_dynamic is not computed right when it is compiled for a CPU: leave out compile, "
            "or take int8_weight_only"
        )


def check_shares_nothing(drafter: Drafter) -> None:
    """Raise ValueError for a drafter that would compute with weights of its target as they were."""
    if drafter.attach() is not None:
        raise ValueError(
            f"{type(drafter).__name__} shares the target's weights, which int8 would replace on "
            "one side only"
        )


def check_tokenizers(target: PretrainedLM, processor: TextProcessor, drafter: Drafter) -> None:
    """Raise ValueError where a model of `drafter` means another text by one of the token ids.

    Vocabularies of one size may still differ.  Ids that only one of the two knows do no harm: a
    draft of them is rejected.  A draft model that carries no tokenizer is taken at its word.
    """
    for model in drafter.modules():
        if not isinstance(model, PretrainedLM) or model.path in ("", target.path):
            continue
        if not _has_tokenizer(model.path) or _same_tokenizer_file(model.path, target.path):
            continue
        conflict = _first_conflict(model.path, processor)
        if conflict is not None:
            index, name, other = conflict
            raise ValueError(
                f"drafter {model.path!r} and target {target.path!r} have different tokenizers: "
                f"token {index} is {other!r} for the drafter and {name!r} for the target"
            )


def check_data_tokenizer(
    model: PretrainedLM | PretrainedMaskedLM, processor: TextProcessor, role: str = "target"
) -> None:
    """Raise ValueError where the data's tokenizer means another text by one of the model's ids.

    A model that carries no tokenizer is taken at its word.
    """
    if not model.path or not _has_tokenizer(model.path):
        return
    conflict = _first_conflict(model.path, processor)
    if conflict is not None:
        index, name, other = conflict
        raise ValueError(
            f"the data's tokenizer is not that of {role} {model.path!r}: token {index} is "
            f"{name!r} in the data and {other!r} for the {role}"
        )


def _first_conflict(path: str, processor: TextProcessor) -> tuple[int, str, str] | None:
    """Return the lowest id that differs, its text for `processor` and for the model at `path`."""
    own = TextProcessor.from_pretrained(path).tokenizer.get_vocab()
    names = {index: name for name, index in own.items()}
    shared = [
        (index, name, names[index])
        for name, index in processor.tokenizer.get_vocab().items()
        if names.get(index, name) != name
    ]
    return min(shared, default=None)


def _has_tokenizer(path: str) -> bool:
    """Whether a model's folder holds a tokenizer; of a hub model it is taken for granted."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def _same_tokenizer_file(path: str, other: str) -> bool:
    files = [Path(folder) / "tokenizer.json" for folder in (path, other)]
    return all(file.is_file() for file in files) and len({f.read_bytes() for f in files}) == 1


def _model_folder(folder: Path) -> Path | None:
    """Return where a trained model stands alone: the folder itself, or its model/."""
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
    return None


def find_device(name: str) -> str:
    """Return a torch device that exists, `auto` the first GPU or else the CPU; else ValueError."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type == "mps" and torch.backends.mps.is_available():
        return name
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: {torch.cuda.device_count()} GPUs found")
    return name


def spread_devices(first: torch.device, count: int) -> list[torch.device]:
    """Return `first` and others of its kind, `count` in all; ValueError for more than there are."""
    import torch

    if count > 1 and first.type != "cuda":
        raise ValueError(
            f"media.devices: {count} asked for, but {first.type} is one device, all of which "
            "works on every call"
        )
    found = torch.cuda.device_count() if first.type == "cuda" else 1
    if count > found:
        raise ValueError(f"media.devices: {count} asked for, {found} GPUs found")
    others = [number for number in range(found) if number != (first.index or 0)]
    return [first, *(torch.device(first.type, number) for number in others[: count - 1])]
