"""From a folder or a hub id to a `transformers` causal LM in memory, or to one line of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specstream.files import is_hub_id, one_line, read_table
from specstream.models.lora import base_of, fold_in
from specstream.models.supported import refuse_unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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


def load_model(path: str, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Load a causal LM from a folder or hub id; one ValueError line for whatever goes wrong.

    A folder may hold an adapter alone (see lora): it is added into the base that it names.
    """
    from transformers import AutoModelForCausalLM

    check_attention(attn_implementation)
    folder = Path(path)
    base = base_of(folder)
    if base is not None:
        return _load_adapted(folder, base, dtype, attn_implementation)
    read_config(path)
    with one_line(f"cannot load a model from {path!r}"), quiet_transformers(folder.is_dir()):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    if report["missing_keys"]:  # transformers would draw them at random and warn
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{path!r} lacks {len(missing)} of its model's weights, {missing[0]} for one"
        )
    if report["unexpected_keys"]:  # and leave these out: it would be another model
        extra = sorted(report["unexpected_keys"])
        raise ValueError(
            f"{path!r} holds {len(extra)} weights that its config.json has no place for, "
            f"{extra[0]} for one"
        )
    return model


def read_config(path: str) -> PretrainedConfig:
    """Return the config of a causal LM, of a folder or hub id, before any weight is read.

    Raises ValueError in one line where there is none, and for a model that is not supported.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(path):
        raise ValueError(f"no model folder at {path!r}")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path!r} holds no config.json, so it is not a model folder")
        with one_line(f"cannot load a model from {path!r}"):
            read_table(folder / "config.json")
    with one_line(f"cannot load a model from {path!r}"), quiet_transformers(folder.is_dir()):
        config = AutoConfig.from_pretrained(path)
        refuse_unsupported(config)
    return config


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
def quiet_transformers(local: bool = True) -> Iterator[None]:
    """Spare the screen the reports of `transformers`: what matters of them is raised.

    Of a local load its bar too; downloads keep theirs.
    """
    from transformers.utils import logging

    shown, verbosity = local and logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
