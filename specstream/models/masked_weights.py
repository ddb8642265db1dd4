"""From a folder or a hub id to the network of a masked diffusion LM, or to one line of error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specstream.files import is_hub_id, one_line, read_table
from specstream.models.lora import base_of
from specstream.models.masked_hub import (
    HubNetwork,
    dream_network,
    llada_network,
    load_network,
)
from specstream.models.supported import FORM
from specstream.models.weights import check_attention, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_NETWORKS: dict[str, Callable[[Mapping[str, Any]], HubNetwork]] = {
    "llada": llada_network,
    "Dream": dream_network,
}
FORM_FIELDS = {
    "mask_id": (int, type(None)),
    "block_length": (int, type(None)),
    "shifted": (bool,),
    "corruption": (float, int),
}
LATER_FIELDS = {"corruption": 0.0}  # what older folders do not hold, and what is meant


def load_masked_model(
    path: str, dtype: torch.dtype, attn_implementation: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the network and the fields of its `MaskedForm`.

    A folder that this project wrote says in config.json how its network is meant; LLaDA and Dream
    are loaded from theirs (see masked_hub).  Raises ValueError in one line, before any weight is
    read where the config shows it.
    """
    check_attention(attn_implementation)
    found = _config_of(path)
    if found is None:  # there is no model, and this says why
        return load_model(path, dtype, attn_implementation), {}
    describe = HUB_NETWORKS.get(str(found.get("model_type")))
    if describe is None:
        form = _form_of(found, path)
        return load_model(path, dtype, attn_implementation), form
    if base_of(Path(path)) is not None:
        raise ValueError(
            f"the adapter in {path!r} is for a {found['model_type']} model; only one for a folder "
            "that this project wrote can be added"
        )
    with one_line(f"cannot load a model from {path!r}"):
        network = describe(found)
    return load_network(path, network, dtype, attn_implementation), network.form


def _config_of(path: str) -> dict[str, Any] | None:
    """Return the config.json of a model, or of an adapter's base; None where there is none."""
    from transformers.utils import cached_file

    folder = Path(path)
    base = base_of(folder)
    if base is not None:
        return None if Path(base).resolve() == folder.resolve() else _config_of(base)
    if not (folder / "config.json").is_file() and (folder.is_dir() or not is_hub_id(path)):
        return None
    with one_line(f"cannot load a model from {path!r}"):
        return read_table(Path(cached_file(path, "config.json")))


def _form_of(found: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the fields that a folder of this project holds; ValueError for any other model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if FORM not in found:
        kind = found.get("model_type")
        if str(kind) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"{path!r} is of model type {kind!r}, not a masked diffusion model that can be "
                f"loaded ({', '.join(HUB_NETWORKS)}, or a folder that this project wrote)"
            )
        raise ValueError(
            f"{path!r} is a causal language model, not a masked diffusion one (its config.json has "
            "no masked_diffusion)"
        )
    form = found[FORM]
    if isinstance(form, dict):
        form = LATER_FIELDS | form
    if (
        not isinstance(form, dict)
        or form.keys() != FORM_FIELDS.keys()
        or any(type(form[name]) not in kinds for name, kinds in FORM_FIELDS.items())
    ):
        raise ValueError(
            f"masked_diffusion in the config.json of {path!r} must hold mask_id and block_length "
            f"(a number or null), shifted (true or false) and corruption (a number), not "
            f"{found[FORM]!r}"
        )
    mask_id, vocab_size = form["mask_id"], found.get("vocab_size")
    if mask_id is not None and isinstance(vocab_size, int) and not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_id {mask_id} in the config.json of {path!r} is none of its {vocab_size} tokens"
        )
    return dict(form)
