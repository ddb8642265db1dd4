"""A toy study of media: videos of noise, models of untrained weights, configs in a few words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specstream.benchmark.command import main
from specstream.data.media_sources import MediaSource, Samples
from specstream.drafters import IndependentDenoiser, ResidualDenoiser, WindowDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser

STEPS, SAMPLES, SOLVED = 8, 12, 4
SHAPE = (1, 2, 4, 4)  # two frames of 4 by 4


@dataclass(frozen=True)
class Flickers(MediaSource):
    """Thirty videos of noise."""

    size: int = 4

    def check(self) -> None:
        pass

    def samples(self) -> Samples:
        noise = torch.Generator().manual_seed(0)
        return Samples(torch.randn(30, 1, 2, self.size, self.size, generator=noise), None)

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor("video", classes=("a", "b"))


def network(in_channels: int = 1, out_channels: int = 1, times: int = 1) -> PatchTransformer:
    torch.manual_seed(0)
    net = PatchTransformer(in_channels, out_channels, (1, 2, 2), 8, 1, 2, times, num_classes=2)
    torch.nn.init.normal_(net.write.weight, std=0.3)
    return net


def save_models(folder: Path) -> Path:
    """Write a target of untrained weights, and a drafter of each kind for it."""
    Denoiser(network(), FlowSchedule(), SHAPE).save(folder / "target")
    MediaProcessor("video", classes=("a", "b")).save(folder / "target")
    target = load_denoiser(folder / "target")
    for name, drafter in {
        "residual": ResidualDenoiser(network(2, times=2)),
        "window": WindowDenoiser(network(2, 4, 2), 4),
        "small": IndependentDenoiser(Denoiser(network(), FlowSchedule(), SHAPE)),
    }.items():
        save_state_drafter(folder / name / "draft", drafter, target)
    return folder


def block(place: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": f"specstream.{place}", "init_args": options}


def method(kind: str, name: str, /, **options: Any) -> dict[str, Any]:
    return block(f"benchmark.{kind}", name=name, **options)


PLAIN = method("PlainSteps", "plain")
FREE = method("FreeDraft", "free", draft="estimate", window=4)


def toy(models: Path, **options: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "target": str(models / "target"),
        "data": {"class_path": "tests.media_toys.Flickers"},
        "num_steps": [STEPS],
        "num_samples": SAMPLES,
        "num_solved": SOLVED,
        "batch_size": 8,
        "validation_fraction": 0.5,
    } | options


def write_study(
    folder: Path, task: dict[str, Any], methods: Sequence[dict[str, Any]], **options: Any
) -> str:
    study = {
        "tasks": [task], "methods": list(methods), "timed_samples": 2, "repeats": 1,
        "num_permutations": 19, "device": "cpu",
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"study": block("benchmark.MediaStudy", **study | options)}))
    return str(path)


def measure(
    config: str, output: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> list[dict[str, Any]]:
    code = main(["--config", config, "--output", str(output), *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    rows = json.loads(shown.out.splitlines()[-1])
    assert rows == json.loads(output.read_text())
    return rows
