"""What a config says of its models before anything is prepared: sizes, folders, room for rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from specstream.files import read_table
from specstream.models.fresh import fresh_config
from specstream.models.lora import base_of
from specstream.training.run_folder import check_apart

FRESH = {"UntrainedLM", "UntrainedMaskedLM"}
LOADED = {"PretrainedLM", "PretrainedMaskedLM", "MaskedFromCausal"}
MASKED = {"UntrainedMaskedLM", "PretrainedMaskedLM", "MaskedFromCausal"}
ROOM = ("max_position_embeddings", "n_positions", "max_sequence_length")  # in a config.json


@dataclass(frozen=True, slots=True)
class ModelBlock:
    """A model of a config: its `role` (target, drafter or model), class and arguments."""

    role: str
    class_name: str
    arguments: dict[str, Any]


def check_model_blocks(model: Namespace, sequence_length: int | None, run: Path) -> None:
    """Raise ValueError for models that cannot be made, or have less room than the data's rows.

    Of fresh models all is known, of those in folders what their config.json says.  A masked target
    needs a name for the model beside it to be loaded with, and no target lies in the run's way.
    """
    for path in target_folders(model):
        check_apart(path, run)
    blocks = list(model_blocks(model))
    drafts = any(block.role == "model" and block.class_name in MASKED for block in blocks)
    for block in blocks:
        path = str(block.arguments.get("path", ""))
        if block.role == "target" and block.class_name in MASKED and drafts:
            check_named(block.class_name, path)
        room = fresh_room(block) if block.class_name in FRESH else stored_room(block)
        if room is not None and sequence_length is not None and sequence_length > room:
            raise ValueError(
                f"data: sequence_length {sequence_length} is longer than the {room} positions of "
                f"the {block.role}"
            )


def check_named(class_name: str, path: str) -> None:
    """Raise ValueError for a masked target of no folder: the exported drafter could not name it."""
    if not path or class_name == "MaskedFromCausal":
        raise ValueError(
            "the target must be a PretrainedMaskedLM of a folder or the hub, which the drafter is "
            f"to be loaded with, not {class_name}"
        )


def model_blocks(node: Any, role: str = "model") -> Iterator[ModelBlock]:
    """Find the models of specstream in a config."""
    if isinstance(node, list):
        for part in node:
            yield from model_blocks(part, role)
    if not isinstance(node, Namespace):
        return
    module, _, name = str(node.get("class_path", "")).rpartition(".")
    if module.startswith("specstream.models") and name in FRESH | LOADED:
        yield ModelBlock(role, name, vars(node.get("init_args", Namespace())))
        return
    for key, part in vars(node).items():
        yield from model_blocks(part, key if key in ("target", "drafter") else role)


def target_folders(node: Any, key: str = "") -> Iterator[str]:
    """Find the folders of targets in a config: of a block with a path, or named alone."""
    if key == "target" and isinstance(node, str):
        yield node
    if not isinstance(node, Namespace):
        return
    inner = node.get("init_args")
    if key == "target" and isinstance(inner, Namespace) and inner.get("path"):
        yield str(inner["path"])
    for name, part in vars(node).items():
        yield from target_folders(part, name)


def fresh_room(block: ModelBlock) -> int:
    """Return the positions of a model with fresh weights, once it is sure that it can be made."""
    names = inspect.signature(fresh_config).parameters
    sizes = {name: value for name, value in block.arguments.items() if name in names}
    config = fresh_config(**sizes)
    return int(sizes.get("max_positions", config.max_position_embeddings))


def stored_room(block: ModelBlock) -> int | None:
    """Return the positions that a folder's config.json names; None where it does not say."""
    folder = Path(block.arguments["path"])
    base = base_of(folder)
    file = (folder if base is None else Path(base)) / "config.json"
    if not file.is_file():
        return None  # whoever loads it says why
    found = read_table(file)
    return next((found[name] for name in ROOM if type(found.get(name)) is int), None)
