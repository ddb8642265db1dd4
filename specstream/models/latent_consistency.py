"""Students of few steps of the diffusion models of `diffusers`, in their latents.

Latent consistency models (Luo et al. 2023, arXiv 2310.04378).  A student is its target's network
with other weights, or with adapters on the target's own (LCM-LoRA, arXiv 2311.05556), and lives
beside the target, which tells it what prompts say.  It predicts what its target predicts.  Where
nothing is noise it returns the state itself and elsewhere its estimate of the data alone: the
boundary of their c_skip and c_out, which change between these two within the last few of a
thousand levels.

Shapes: R rows, S the shape of a state.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from specstream.files import read_table
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import STUDENT, Evaluation, Reads
from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.lora import adapter_parameters
from specstream.models.network_adapters import (
    FILE,
    LowRankAdapters,
    adapted_copy,
    load_adapters,
    save_adapters,
)
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.pretrained_parts import load_part, quiet_diffusers
from specstream.transitions import Prediction, StepGrid, wide


class LatentConsistencyModel(ConsistencyModel):
    """A `ConsistencyModel` whose network is one of `diffusers`, of the states of its target.

    Its estimates are not cut where its target's are: what is cut teaches nothing.

    Args:
        network: the student's own.
        target: what it was, or is to be, distilled from.
        num_steps, guidance: as for `ConsistencyModel`.
    """

    predictions = tuple(Prediction)

    def __init__(
        self,
        network: DiffusersNetwork,
        target: PretrainedDenoiser,
        num_steps: int = 50,
        guidance: float = 1.0,
    ) -> None:
        form = (target.schedule, target.shape, target.prediction)
        super().__init__(network, *form, num_steps, guidance)
        self.folders = [part.folder for part in target.parts.networks]  # "transformer" or "unet"

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.network.model.dtype  # its first parameter may be one that stays in float32
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def adapted(self) -> bool:
        """Whether its weights are the target's, and adapters all that is its own."""
        return bool(adapter_parameters(self.network))

    def output(
        self, states: Tensor, times: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        self.network.check(condition or {})
        return super().output(states, times, condition)

    def evaluate(
        self,
        states: Tensor,
        steps: Tensor,
        grid: StepGrid,
        condition: Mapping[str, Tensor] | None = None,
        guidance: float = 1.0,
        reads: Reads | None = None,
        rest: Tensor | None = None,
    ) -> Evaluation:
        found = super().evaluate(states, steps, grid, condition, guidance, reads, rest)
        clean = wide(grid.sigmas[steps], states) == 0
        return replace(found, estimates=torch.where(clean, states.float(), found.estimates))

    def save(self, folder: Path) -> None:
        """Write adapters, or the network as `diffusers` loads it, and what the student learned."""
        network = self.network
        assert isinstance(network, DiffusersNetwork)
        models = dict(zip(self.folders, network.models, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapted:
            save_adapters(folder, models)
        else:
            with quiet_diffusers():
                for name, model in models.items():
                    model.save_pretrained(folder / name)
        said = {"num_steps": self.num_steps, "guidance": self.guidance}
        (folder / STUDENT).write_text(json.dumps(said, indent=2) + "\n")


def own_network(
    target: PretrainedDenoiser, adapters: LowRankAdapters | None = None
) -> DiffusersNetwork:
    """Return a trainable copy of a target's network: all of it in float32, or adapters alone.

    Adapters act on the very weights of the target, which is left as it is.  Raises ValueError in
    one line for layers that it does not have.
    """
    network = target.network
    assert isinstance(network, DiffusersNetwork)
    if adapters is None:
        return copy.deepcopy(network).float().requires_grad_(True)
    return with_models(network, [adapted_copy(model, adapters) for model in network.models])


def load_latent_student(folder: Path, target: PretrainedDenoiser) -> LatentConsistencyModel:
    """Load what `LatentConsistencyModel.save` wrote, for the target that it was distilled from."""
    network, parts = target.network, target.parts.networks
    assert isinstance(network, DiffusersNetwork)
    said = read_table(folder / STUDENT)
    models: list[nn.Module]
    if (folder / FILE).is_file():
        folders = [part.folder for part in parts]
        models = load_adapters(folder, dict(zip(folders, network.models, strict=True)))
    else:
        models = [load_part(str(folder), part, target.dtype) for part in parts]
    own = with_models(network, [model.to(target.device) for model in models])
    return LatentConsistencyModel(own, target, int(said["num_steps"]), float(said["guidance"]))


def with_models(network: DiffusersNetwork, models: Sequence[nn.Module]) -> DiffusersNetwork:
    """Return a network that asks `models` as `network` asks its own."""
    own: dict[int, object] = {
        id(model): other for model, other in zip(network.models, models, strict=True)
    }
    return copy.deepcopy(network, own)
