"""How good generated images and videos are: beside a reference output, or beside a set of data.

    psnr(samples, reference)              # fidelity: the same noise, another sampler
    feature_distances(samples, data)      # law: FID and KID with the features that are given

Fidelity means something for deterministic samplers only; a coupling that keeps the law uses noise
in another way and is judged by its law.  Everything but `clip_score` and `lpips` needs no weights.

Shapes: B samples in -1..1, an image (C, H, W), a video (C, F, H, W).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

WIDTH = 2.0  # of the range of states, -1..1
CHUNK = 64  # samples whose features are computed together
SMALLEST_SSIM = 11  # pixels along the shorter side: the window of structural similarity
LPIPS_WEIGHTS = {"alex": "alexnet-*.pth", "vgg": "vgg16-*.pth", "squeeze": "squeezenet1_1-*.pth"}


@dataclass(frozen=True, slots=True)
class FeatureDistances:
    """Frechet and kernel distance of two sets of samples, in the features of one network."""

    features: str
    frechet: float  # FID (Heusel et al. 2017)
    kernel: float  # KID (Binkowski et al. 2018), unbiased
    kernel_spread: float  # its standard deviation over random subsets


class RandomFeatures(nn.Module):
    """A small convolutional network with fixed random weights, as features of images or videos.

    Random features see edges and textures and know of no objects: distances in them compare
    samplers of one model with one another, and no published FID.  Say "random-feature FID".

    Args:
        channels: of a sample, C.
        axes: of its grid; 2 for images, 3 for videos.
        num_features: how many.
        seed: of the weights.
    """

    label = "random-feature"

    def __init__(
        self, channels: int = 1, axes: int = 2, num_features: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        if axes not in (2, 3):
            raise ValueError(f"axes must be 2 (images) or 3 (videos), got {axes}")
        self.num_features = num_features
        convolution = nn.Conv2d if axes == 2 else nn.Conv3d
        widths = [channels, 32, num_features]
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for place, (before, after) in enumerate(pairwise(widths)):
            # skip_init: the usual initialisation would draw from the global generator
            layer = skip_init(convolution, before, after, 3, stride=1 + place, padding=1)
            nn.init.normal_(layer.weight, std=1.5 * (before * 3**axes) ** -0.5, generator=generator)
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
            layers.append(layer)
        self.layers = nn.ModuleList(layers).requires_grad_(False)

    def forward(self, samples: Tensor) -> Tensor:
        """Return features (B, num_features) of samples (B, C, ..., H, W) in -1..1."""
        found = samples.float()
        for layer in self.layers:
            found = torch.nn.functional.gelu(layer(found))
        return found.flatten(2).mean(2)


def feature_distances(
    samples: Tensor, data: Tensor, features: nn.Module | None = None, seed: int = 0
) -> FeatureDistances:
    """Return FID and KID of samples (B, *S) against data (n, *S), through torchmetrics.

    `features` maps samples to (B, N) and holds N as `num_features`; None takes `RandomFeatures`.
    KID is the mean over random subsets of half the smaller set, drawn by `seed`.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(samples), len(data))
    if fewest < 4:
        raise ValueError(f"FID and KID need at least 4 samples of each kind, got {fewest}")
    network = RandomFeatures(samples.shape[1], samples.dim() - 2) if features is None else features
    num_features = network.num_features
    assert isinstance(num_features, int)
    known = KnownFeatures(num_features)
    with warnings.catch_warnings():  # KID says that it keeps all features, at every call
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        kernel = KernelInceptionDistance(known, subsets=20, subset_size=fewest // 2)
    frechet = FrechetInceptionDistance(known)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the subsets, which torchmetrics draws globally
        for states, is_real in ((data, True), (samples, False)):
            found = torch.cat([network(part) for part in states.split(CHUNK)])
            for metric in (frechet, kernel):
                metric.update(found, real=is_real)
        label = str(getattr(network, "label", type(network).__name__))
        mean, spread = kernel.compute()
        return FeatureDistances(label, float(frechet.compute()), float(mean), float(spread))


class KnownFeatures(nn.Identity):
    """Features that were computed before, once for all metrics.

    Args:
        num_features: how many a sample has.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def psnr(samples: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of samples (B, *S) to their references (B, *S).

    Of the squared error of all samples together, so that one that is reached exactly does not make
    the mean infinite; infinite where all are.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(samples, reference, data_range=WIDTH))


def ssim(samples: Tensor, reference: Tensor) -> float:
    """Return the structural similarity of samples (B, *S) to references, 1 at most (Wang 2004).

    Videos are compared frame by frame.  Raises ValueError below 11 pixels a side: the window of the
    measure has as many.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(samples.shape[-2:]) < SMALLEST_SSIM:
        raise ValueError(
            f"SSIM needs {SMALLEST_SSIM} pixels a side, got {list(samples.shape[-2:])}: use PSNR"
        )
    found = structural_similarity_index_measure(
        frames(samples), frames(reference), data_range=(-1.0, 1.0)
    )
    assert isinstance(found, Tensor)
    return float(found)


def frames(states: Tensor) -> Tensor:
    """Return the images (B * F, C, H, W) of videos (B, C, F, H, W); images stay as they are."""
    return states if states.dim() == 4 else states.transpose(1, 2).flatten(0, 1)


def frame_change(videos: Tensor) -> Tensor:
    """Return the mean absolute change from each frame to the next, (B,); videos (B, C, F, H, W)."""
    return videos.diff(dim=2).abs().flatten(1).mean(1)


def temporal_consistency(videos: Tensor, data: Tensor) -> float:
    """Return how much videos change from frame to frame, as a multiple of what data do.

    1 is as lively as the data, less is frozen, more flickers.  videos (B, C, F, H, W) and data
    (n, C, F, H, W); raises ValueError where either has a single frame or data stand still.
    """
    if min(videos.shape[2], data.shape[2]) < 2:
        raise ValueError("temporal consistency needs videos of two frames or more")
    expected = float(frame_change(data).mean())
    if expected == 0:
        raise ValueError("temporal consistency needs data that move")
    return float(frame_change(videos).mean()) / expected


def clip_score(images: Tensor, texts: Sequence[str], model: str | Path) -> float:
    """Return the mean CLIP score of images (B, 3, H, W) and their texts, 0 to 100 (Hessel 2021).

    `model` is a folder of a CLIP model of `transformers`; nothing is downloaded.  Raises ValueError
    where it is not there.
    """
    reason = missing_clip(model)
    if reason is not None:
        raise ValueError(reason)
    from torchmetrics.functional.multimodal import clip_score as score

    bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.inference_mode():
        found = score(list(bytes_), list(texts), model_name_or_path=lambda: load_clip(model))
    return float(found)


def missing_clip(model: str | Path) -> str | None:
    """Say what the CLIP score lacks in the folder of its model; None when it is one."""
    if (Path(model) / "config.json").is_file():
        return None
    return f"the CLIP score needs a CLIP model: '{model}' is no folder of one"


class ClipFeatures(nn.Module):
    """A CLIP model that returns features, as torchmetrics expects; `transformers` 5 has records."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Any:
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.model.get_text_features(tokens, mask).pooler_output


def load_clip(folder: str | Path) -> tuple[Any, Any]:
    """Return the CLIP model of a folder and its processor; nothing is downloaded."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    return ClipFeatures(model), CLIPProcessor.from_pretrained(folder, local_files_only=True)


def lpips(samples: Tensor, reference: Tensor, network: str = "alex") -> float:
    """Return the mean learned perceptual distance of images (B, 3, H, W) to others (Zhang 2018).

    `network` is alex, vgg or squeeze; its weights are those in torch's hub folder, none are
    downloaded.  Raises ValueError where they, or torchvision, are not there.
    """
    reason = missing_lpips(network)
    if reason is not None:
        raise ValueError(reason)
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type=network)  # type: ignore[arg-type]
    with torch.inference_mode():
        metric.update(samples.clamp(-1, 1), reference.clamp(-1, 1))
        return float(metric.compute())


def missing_lpips(network: str = "alex") -> str | None:
    """Say what `lpips` needs and is not here; None when all is.  ValueError for other networks."""
    from importlib.util import find_spec

    if network not in LPIPS_WEIGHTS:
        raise ValueError(f"network must be one of {', '.join(LPIPS_WEIGHTS)}, got '{network}'")
    if find_spec("torchvision") is None:
        return "LPIPS needs the package torchvision, which is not installed"
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if not any(folder.glob(LPIPS_WEIGHTS[network])):
        return f"LPIPS needs {LPIPS_WEIGHTS[network]} in '{folder}': it is not there"
    return None
