"""What a diffusion model in training is told of its rows: classes or texts, some of them hidden."""

import torch

from specstream.models import PatchTransformer
from specstream.training import DenoisingModule


def loss(class_dropout: float, text: torch.Tensor) -> float:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (2, 2), 16, 1, 2, text_size=8)
    for layer in (network.write, network.last_scale):
        torch.nn.init.normal_(layer.weight, std=0.5)
    module = DenoisingModule(network, class_dropout=class_dropout).train()
    rows = len(text)
    batch = {
        "states": torch.ones(rows, 1, 4, 4),
        "keys": torch.arange(rows),
        "real": torch.ones(rows, dtype=torch.bool),
        "text": text,
    }
    return float(module.loss(batch).total.detach())


def test_a_text_is_heard_unless_it_is_hidden() -> None:
    nothing, text = torch.zeros(6, 8), torch.ones(6, 8)
    assert loss(0.0, text) != loss(0.0, nothing)
    assert loss(1.0, text) == loss(1.0, nothing) == loss(0.0, nothing)
    assert loss(0.0, text) != loss(0.5, text) != loss(1.0, text)
