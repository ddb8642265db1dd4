"""`draft/` of a self-speculative head: its weights, and the name of the trunk it was trained for.

The record is that of every drafter (see `loading`), but what it names is no `Drafter`: the head
proposes nothing, it judges what its own trunk proposes.
"""

from __future__ import annotations

import json
from pathlib import Path

from specstream.drafters.loading import RECORD, read_record
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.files import replaced_folder
from specstream.models.fingerprint import fingerprint, rounding
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.self_speculative import SelfSpeculativeHead

CLASS_PATH = "specstream.models.SelfSpeculativeHead"
WEIGHTS = "self_speculative.safetensors"


def save_head(
    folder: Path, head: SelfSpeculativeHead, trunk_path: str, trunk_fingerprint: str
) -> None:
    """Write `head` into `folder`, replacing one that is there only once the new one is whole."""
    record = {
        "drafter": {"class_path": CLASS_PATH, "init_args": {}},
        "target": {"path": trunk_path, "fingerprint": trunk_fingerprint},
    }
    with replaced_folder(folder) as new:
        write_tensors(new / WEIGHTS, head.state_dict())
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def holds_head(folder: Path) -> bool:
    """Return whether the record of `folder` names a self-speculative head."""
    return bool(read_record(folder)["drafter"]["class_path"] == CLASS_PATH)


def load_head(folder: Path, trunk: PretrainedMaskedLM) -> SelfSpeculativeHead:
    """Build the head of `folder` on `trunk`, in the trunk's dtype.

    Raises ValueError in one line for a folder that holds something else, for damaged weights, and
    for another trunk than the one that the head was trained on.
    """
    record = read_record(folder)
    named = record["drafter"]["class_path"]
    if named != CLASS_PATH:
        raise ValueError(f"{str(folder)!r} holds {named}, not a self-speculative head")
    if record["drafter"]["init_args"]:
        option = min(record["drafter"]["init_args"])
        raise ValueError(
            f"{str(folder / RECORD)!r} is damaged: option {option!r} is not accepted by "
            "SelfSpeculativeHead"
        )
    found, expected = fingerprint(trunk.model), record["target"].get("fingerprint")
    if found != expected:
        raise ValueError(
            f"{str(folder)!r} was trained on the trunk {record['target']['path']!r} as it was then "
            f"(fingerprint {expected}), not on {trunk.path or 'this one'!r} (fingerprint {found})"
            + rounding(trunk.model)
        )
    head = SelfSpeculativeHead(trunk)
    read_tensors(folder / WEIGHTS, head.state_dict())
    return head.to(trunk.dtype).eval().requires_grad_(False)
