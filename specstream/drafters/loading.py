"""`draft/`: a drafter on disk, and the name of the target it was trained for.

The folder of a draft LM is an ordinary `transformers` folder, so other runtimes take it as it is;
`specstream.json` beside the weights adds what they do not know: the drafter's class tree in the
grammar of the config files, and its target.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from specstream import unmasking
from specstream.config_errors import not_accepted
from specstream.drafters.base import CanvasDrafter, Drafter, StoredDrafter
from specstream.files import first_line, replaced_folder
from specstream.models.fingerprint import fingerprint, rounding
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.unmasking import Unmasking

RECORD = "specstream.json"
WEIGHTS_HERE = "."  # an init_arg `weights` of this value means the folder of the record
CACHED_BYTES = 4 * 2**20  # bfloat16 weights up to this stay in a core's cache, also as float32


def save_drafter(
    folder: Path,
    drafter: StoredDrafter,
    processor: TextProcessor,
    target_path: str,
    target_fingerprint: str | None = None,
) -> None:
    """Write `drafter` into `folder`, replacing one that is there only once the new one is whole.

    A drafter that lives on its target's states is loaded for the target of that fingerprint only.
    """
    target: dict[str, Any] = {"path": target_path}
    if target_fingerprint is not None:
        target["fingerprint"] = target_fingerprint
    with replaced_folder(folder) as new:
        record = {"drafter": drafter.save(new, processor), "target": target}
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a drafter's folder; ValueError in one line when it is not one."""
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no trained drafter ({RECORD} is missing)")
    try:
        record = json.loads(path.read_text())
        for part, key in (("drafter", "class_path"), ("target", "path")):  # every reader needs them
            if not isinstance(record[part][key], str):
                raise ValueError(f"{part}.{key} must be a text, not {record[part][key]!r}")
        record["drafter"] |= {"init_args": {**record["drafter"].get("init_args", {})}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    return dict(record)


def load_drafter(
    folder: Path,
    target: nn.Module,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    device: str = "auto",
) -> Drafter:
    """Build the drafter of `folder` for `target`, its weights in the `dtype` that suits `device`.

    A drafter that is no model of its own lives on its target's states: it takes the target's dtype
    and raises ValueError for another target than the one it was trained for.  With `auto`, a draft
    LM whose weights fit a core's cache computes in float32 on a CPU: products of one row by so
    small a matrix take a fourth of what their bfloat16 kernels spend on set-up.
    """
    drafter = _load(folder, target, PretrainedLM, dtype, attn_implementation, device)
    if not isinstance(drafter, Drafter):
        raise ValueError(f"{str(folder)!r} holds a drafter of masked diffusion, not of causal text")
    return drafter


def load_canvas_drafter(
    folder: Path,
    target: nn.Module,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    device: str = "auto",
) -> CanvasDrafter:
    """Build the masked drafter of `folder` for `target`; the arguments of `load_drafter`."""
    drafter = _load(folder, target, PretrainedMaskedLM, dtype, attn_implementation, device)
    if not isinstance(drafter, CanvasDrafter):
        raise ValueError(f"{str(folder)!r} holds a drafter of causal text, not of masked diffusion")
    return drafter


def _load(
    folder: Path,
    target: nn.Module,
    network: type[PretrainedLM] | type[PretrainedMaskedLM],
    dtype: str,
    attn_implementation: str,
    device: str,
) -> StoredDrafter:
    record = read_record(folder)
    build = drafter_class(folder, str(record["drafter"]["class_path"]))
    arguments = _arguments(
        folder,
        record["drafter"],
        lambda: _network(
            network, folder, _draft_dtype(folder, dtype, device), attn_implementation, device
        ),
    )
    attached = arguments.get("weights") == WEIGHTS_HERE
    if attached:
        arguments["weights"] = str(folder)
        _check_fingerprint(folder, record["target"], target)
    drafter = _build(folder, build, target, arguments)
    if attached and isinstance(target, PretrainedLM):
        drafter.to(target.dtype)
    return drafter.eval().requires_grad_(False)


def _arguments(
    folder: Path, block: dict[str, Any], model: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Return the arguments of a block of the record, with what they name in place of names."""
    arguments = dict(block.get("init_args", {}))
    if "model" in arguments:
        arguments["model"] = model
    try:
        if "unmasking" in arguments:
            arguments["unmasking"] = _rule(**arguments["unmasking"])
        if "drafter" in arguments:
            inner = drafter_class(folder, str(arguments["drafter"]["class_path"]))
            own = _arguments(folder, arguments["drafter"], model)
            arguments["drafter"] = lambda target: _build(folder, inner, target, own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: {error}") from error
    return arguments


def _rule(class_path: str, init_args: dict[str, Any]) -> Unmasking:
    """Return a rule of `specstream.unmasking`."""
    module, _, name = class_path.rpartition(".")
    build = getattr(unmasking, name, None) if module == unmasking.__name__ else None
    if not isinstance(build, type) or not issubclass(build, Unmasking):
        raise TypeError(f"{class_path} is no rule of {unmasking.__name__}")
    return build(**init_args)


def drafter_class(folder: Path, class_path: str) -> type[StoredDrafter]:
    """Return the class that a record names; ValueError where it is no drafter of ours."""
    module, _, name = class_path.rpartition(".")
    known = importlib.import_module("specstream.drafters")
    build = getattr(known, name) if module == known.__name__ and name in known.__all__ else None
    kind = build if isinstance(build, type) and issubclass(build, StoredDrafter) else None
    if kind is None or inspect.isabstract(kind):
        raise ValueError(f"{str(folder)!r} names {class_path}, not a specstream drafter")
    return kind


def _network(
    kind: type[PretrainedLM] | type[PretrainedMaskedLM],
    folder: Path,
    dtype: str,
    attn_implementation: str,
    device: str,
) -> PretrainedLM | PretrainedMaskedLM:
    """Return the network of `folder`; ValueError for a masked one that names no mask token."""
    network = kind(str(folder), dtype, attn_implementation, device)
    if isinstance(network, PretrainedMaskedLM) and network.form.mask_id is None:
        raise ValueError(f"{str(folder)!r} names no mask token: its config.json has mask_id null")
    return network


def _build(
    folder: Path, build: type[StoredDrafter], target: nn.Module, arguments: dict[str, Any]
) -> StoredDrafter:
    """Build a drafter; ValueError for options that its class lacks."""
    name = build.__name__
    options = list(inspect.signature(build).parameters)[1:]  # without the target
    for option in arguments:
        if option not in options:
            reason = not_accepted(option, name, options)[1]
            raise ValueError(f"{str(folder / RECORD)!r} is damaged: {reason}")
    try:
        return build(target, **arguments)
    except ValueError:
        raise
    except Exception as error:  # a value of another type, or one that is missing or impossible
        reason = first_line(error)
        raise ValueError(f"{str(folder / RECORD)!r} makes no {name}: {reason}") from error


def _check_fingerprint(folder: Path, named: dict[str, Any], target: nn.Module) -> None:
    assert isinstance(target, PretrainedLM)
    found, expected = fingerprint(target.model), named.get("fingerprint")
    if expected is not None and found != expected:
        raise ValueError(
            f"{str(folder)!r} was trained for the target {named['path']!r} as it was then "
            f"(fingerprint {expected}), not for {target.path or 'this one'!r} (fingerprint {found})"
            + rounding(target.model)
        )


def _draft_dtype(folder: Path, dtype: str, device: str) -> str:
    from specstream.models.weights import runs_on_gpu

    weights = folder / "model.safetensors"  # two bytes a number
    small = weights.is_file() and weights.stat().st_size <= CACHED_BYTES
    return "float32" if dtype == "auto" and small and not runs_on_gpu(device) else dtype
