"""From a folder or a hub id to a `transformers` causal LM in memory, or to one line of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specstream.models.lora import base_of, fold_in
from specstream.models.supported import refuse_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager")  # those that take a mask of our own


def resolve_dtype(name: str, device: str = "auto") -> torch.dtype:
    """Turn a dtype's name into the dtype; `auto` is bfloat16 where `device` computes in it."""
    if name == "auto":
        fast = runs_on_gpu(device) or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def runs_on_gpu(device: str) -> bool:
    """Whether a model for `device` (auto or a torch device) runs on a GPU."""
    return device != "cpu" and torch.cuda.is_available()


def check_attention(name: str) -> None:
    """Raise ValueError for an implementation of attention that takes no mask of our own."""
    if name not in ATTENTIONS:
        raise ValueError(f"attn_implementation {name!r} is not one of {', '.join(ATTENTIONS)}")


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder may name a model of the hub."""
    return not path.startswith((".", "/")) and path.count("/") == 1


def load_model(path: str, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Load a causal LM from a folder or hub id; one ValueError line for whatever goes wrong.

    A folder may hold an adapter alone (see lora): it is added into the base that it names.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_attention(attn_implementation)
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(path):
        raise ValueError(f"no model folder at {path!r}")
    base = base_of(folder)
    if base is not None:
        return _load_adapted(folder, base, dtype, attn_implementation)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{path!r} holds no config.json, so it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"cannot load a model from {path!r}: {first_line(error)}") from error
    refuse_unsupported(config)
    try:
        with _without_progress_bars(folder.is_dir()):
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
            )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load a model from {path!r}: {first_line(error)}") from error
    if report["missing_keys"]:  # transformers would draw them at random and warn
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{path!r} lacks {len(missing)} of its model's weights, {missing[0]} for one"
        )
    return model


def _load_adapted(
    folder: Path, base: str, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    if Path(base).resolve() == folder.resolve():
        raise ValueError(f"the adapter in {str(folder)!r} names itself as its base")
    try:
        model = load_model(base, torch.float32, attn_implementation)
    except ValueError as error:
        raise ValueError(f"the base of the adapter in {str(folder)!r}: {error}") from error
    fold_in(folder, model)
    for parameter in model.parameters():  # the frequencies of far places stay in float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@contextlib.contextmanager
def _without_progress_bars(quiet: bool) -> Iterator[None]:
    """Spare the screen a bar for every local load; downloads keep theirs."""
    from transformers.utils import logging

    shown = quiet and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return what an error says, without the advice that follows it."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
