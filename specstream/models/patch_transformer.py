"""A small transformer over patches of images, videos or spectrograms: DiT's block, any grid.

Scalable Diffusion Models with Transformers (Peebles and Xie 2023): times and classes scale and
shift each block (adaLN-Zero).  Positions are sine waves of the coordinates along each axis, so one
network serves several sizes.

Shapes: R rows, C channels, A axes of a grid (1 to 3), P patches, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from specstream.models.fresh import check_memory

LARGEST = 100_000  # of any size of a network: more is a slip of the pen
DEEPEST = 1000  # blocks of a network
BLOCK_MATRICES = 18  # of hidden_size by hidden_size: what the layers of a block come to
LONGEST = 10_000.0  # wavelength of the slowest sine


def waves(values: Tensor, size: int) -> Tensor:
    """Return sines and cosines (..., size) of values (...), from fast to slow."""
    half = size // 2
    rates = torch.exp(
        torch.arange(half, device=values.device) * (-math.log(LONGEST) / max(half - 1, 1))
    )
    angles = values[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(*values.shape, size % 2)], -1)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a network returns, the last of its hidden states, and how it came to them."""

    output: Tensor  # (R, out_channels, *A)
    hidden: Tensor  # (R, P, D)
    read: Tensor  # (R, P, D) what the first block read
    begun: Tensor  # (R, P, D) what the first block made of it


class PatchTransformer(nn.Module):
    """Maps a grid to a grid of the same size, given times and perhaps a class.

    Its last layer is 0 at first, and so is what it returns.

    Args:
        in_channels, out_channels: of the grid.
        patch: size of a patch along each axis; one number for each axis.
        hidden_size, num_layers, num_heads: of the transformer.
        num_times: how many times a row is given (a drafter is told two).
        num_classes: how many classes a row may have, "none" not counted; 0: rows have none.
        text_size: width of a text's vector that a row may be given; 0: none.
        feature_size: width of another network's hidden states that a row is given, one for each
            patch; 0: none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch: Sequence[int],
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_times: int = 1,
        num_classes: int = 0,
        text_size: int = 0,
        feature_size: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "num_times": num_times}
        sizes |= {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        check_sizes(sizes, patch)
        told = {"num_classes": num_classes, "text_size": text_size, "feature_size": feature_size}
        for name, size in told.items():
            if not 0 <= size <= LARGEST:
                raise ValueError(f"{name} must be in 0..{LARGEST}, got {size}")
        self.options = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "patch": list(patch),
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_times": num_times,
            "num_classes": num_classes,
            "text_size": text_size,
            "feature_size": feature_size,
        }
        self.patch = tuple(patch)
        self.hidden_size = hidden_size
        volume = math.prod(patch)
        self.read = nn.Linear(in_channels * volume, hidden_size)
        self.time_layers = nn.Sequential(
            nn.Linear(num_times * hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.classes = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.text = nn.Linear(text_size, hidden_size) if text_size else None
        self.feature_size = feature_size
        self.features = nn.Linear(feature_size, hidden_size) if feature_size else None
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_layers))
        self.last_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.last_scale = nn.Linear(hidden_size, 2 * hidden_size)
        self.write = nn.Linear(hidden_size, out_channels * volume)
        for layer in (self.last_scale, self.write):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        classes: Tensor | None = None,
        text: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return a grid (R, out_channels, *A) for `states` (R, in_channels, *A).

        times (R, num_times), of about 0 to 1000; classes (R,) int64, -1 for none; text (R,
        text_size); features (R, P, feature_size).  Raises ValueError for a grid that patches do not
        divide.
        """
        return self.spoken(states, times, classes, text, features).output

    def spoken(
        self,
        states: Tensor,
        times: Tensor,
        classes: Tensor | None = None,
        text: Tensor | None = None,
        features: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> Spoken:
        """Return what `forward` does, and the hidden states that it was read from.

        rest (R, P, D): added in place of what the blocks after the first would add, which then do
        not run.
        """
        patches, counts = self.cut(states)
        hidden = self.read(patches) + self.positions(counts, states.device).to(patches)
        if self.features is not None:
            assert features is not None, "this network reads another's hidden states"
            normed = nn.functional.layer_norm(features.float(), features.shape[-1:])
            hidden = hidden + self.features(normed.to(patches))
        told = self.time_layers(waves(times, self.hidden_size).flatten(1).to(patches))
        if self.classes is not None:
            none = self.classes.num_embeddings - 1
            given = torch.full_like(times[:, 0], -1).long() if classes is None else classes
            told = told + self.classes(torch.where(given < 0, none, given))
        if self.text is not None:
            nothing = patches.new_zeros(len(patches), self.text.in_features)
            told = told + self.text(nothing if text is None else text.to(patches))
        read = hidden
        hidden = begun = self.blocks[0](read, told)
        if rest is None:
            for block in self.blocks[1:]:
                hidden = block(hidden, told)
        else:
            hidden = hidden + rest.to(hidden)
        shift, scale = self.last_scale(nn.functional.silu(told))[:, None].chunk(2, -1)
        written = self.write(self.last_norm(hidden) * (1 + scale) + shift)
        return Spoken(self.join(written, counts), hidden, read, begun)

    def cut(self, states: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return patches (R, P, C * volume) and how many lie along each axis."""
        sizes = states.shape[2:]
        self.check_grid(sizes)
        counts = tuple(size // side for size, side in zip(sizes, self.patch, strict=True))
        axes = len(sizes)
        split = [part for pair in zip(counts, self.patch, strict=True) for part in pair]
        folded = states.reshape(*states.shape[:2], *split)
        outer = [2 + 2 * axis for axis in range(axes)]
        inner = [3 + 2 * axis for axis in range(axes)]
        ordered = folded.permute(0, *outer, 1, *inner)
        return ordered.reshape(len(states), math.prod(counts), -1), counts

    def check_grid(self, sizes: Sequence[int]) -> None:
        """Raise ValueError for a grid that patches do not divide."""
        if len(sizes) != len(self.patch) or any(
            size % side for size, side in zip(sizes, self.patch, strict=True)
        ):
            raise ValueError(f"a grid of {list(sizes)} is not cut by patches of {list(self.patch)}")

    def join(self, patches: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return the grid (R, C, *A) of patches (R, P, C * volume): `cut` undone."""
        axes = len(counts)
        folded = patches.reshape(len(patches), *counts, -1, *self.patch)
        order = [1 + axes]
        for axis in range(axes):
            order += [1 + axis, 2 + axes + axis]
        sizes = [count * side for count, side in zip(counts, self.patch, strict=True)]
        return folded.permute(0, *order).reshape(len(patches), -1, *sizes)

    def positions(self, counts: tuple[int, ...], device: torch.device) -> Tensor:
        """Return waves of each patch's coordinates, (P, D), a share of D for each axis."""
        axes = len(counts)
        share = self.hidden_size // axes
        sizes = [share] * (axes - 1) + [self.hidden_size - share * (axes - 1)]
        grids = torch.meshgrid(*[torch.arange(n, device=device) for n in counts], indexing="ij")
        parts = [waves(g.flatten(), size) for g, size in zip(grids, sizes, strict=True)]
        return torch.cat(parts, -1)


def check_sizes(sizes: dict[str, int], patch: Sequence[int]) -> None:
    """Raise ValueError for sizes of a network that it cannot have."""
    if not 1 <= len(patch) <= 3 or min(patch) < 1:
        raise ValueError(f"patch must be 1 to 3 sizes of at least 1, got {list(patch)}")
    for name, size in sizes.items():
        largest = DEEPEST if name == "num_layers" else LARGEST
        if not 1 <= size <= largest:
            raise ValueError(f"{name} must be in 1..{largest}, got {size}")
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
    check_memory(sizes["num_layers"] * BLOCK_MATRICES * hidden_size**2)


class Block(nn.Module):
    """Attention and a feed-forward layer, scaled, shifted and gated by what the row is told."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.second_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attention = nn.Linear(hidden_size, 3 * hidden_size)
        self.attended = nn.Linear(hidden_size, hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.scales = nn.Linear(hidden_size, 6 * hidden_size)
        nn.init.zeros_(self.scales.weight)
        nn.init.zeros_(self.scales.bias)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        """Return hidden states (R, P, D); told (R, D)."""
        parts = self.scales(nn.functional.silu(told))[:, None].chunk(6, -1)
        shift, scale, gate, shift_2, scale_2, gate_2 = parts
        normed = self.first_norm(hidden) * (1 + scale) + shift
        heads = self.attention(normed).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (R, H, P, D / H) each
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + gate * self.attended(mixed)
        normed = self.second_norm(hidden) * (1 + scale_2) + shift_2
        return hidden + gate_2 * self.feed_forward(normed)
