"""generate.py on pipelines of diffusers, spelled out in a config: tiny ones, made here."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from specstream.cli import generate
from specstream.generation.command.preview import Preview
from specstream.generation.media_loading import SamplerOptions, media_of_target
from specstream.models import PretrainedDenoiser
from tests.diffusers_toys import fresh, save_pipeline

CHAIN = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
CHAIN |= {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    save_pipeline(folder / "unet", "DDPMPipeline", CHAIN, unet=fresh("UNet2DModel"))
    block = {"path": str(folder / "unet"), "dtype": "float32", "device": "cpu"}
    target = {"class_path": "specstream.models.PretrainedDenoiser", "init_args": block}
    path = folder / "unet.yaml"
    path.write_text(yaml.safe_dump({"target": target}))
    return path


def test_a_pipeline_of_diffusers_is_drafted_and_verified(config: Path, tmp_path: Path) -> None:
    output, stats = tmp_path / "x.png", tmp_path / "x.json"
    given = ["--config", str(config), "--prompt", "", "--output", str(output)]
    given += ["--media.steps", "6", "--media.free_draft", "estimate", "--media.window", "3"]
    assert generate([*given, "--stats", str(stats)]) == 0
    assert Image.open(output).size[0] > 1
    found = json.loads(stats.read_text())
    assert (found["modality"], found["guarantee"]) == ("image", "exact law")
    assert found["elements"] == 6 and found["draft_calls"] > 0


def test_a_preview_of_latents_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specstream.generation.command.preview.SHARE", 1e9)
    parts = {"transformer": fresh("DiTTransformer2DModel"), "vae": fresh("AutoencoderKL")}
    save_pipeline(tmp_path / "dit", "DiTPipeline", CHAIN, **parts)
    target = PretrainedDenoiser(str(tmp_path / "dit"), dtype="float32", device="cpu")
    run = media_of_target(target, SamplerOptions(4))
    preview = Preview(run, tmp_path / "x.png", 1, 1e-9)
    for step in run.pipeline.generate(1, run.condition("3", 1), seed=0):
        preview.show(step)
    height, width = run.media_shape[1:]
    assert height > target.shape[1] and Image.open(tmp_path / "x.png").size == (width, height)


@pytest.mark.parametrize("sampler", ["adams-bashforth", "dpm-solver++", "by-error", "picard"])
def test_every_sampler_can_be_asked_for(sampler: str, config: Path, tmp_path: Path) -> None:
    output, stats = tmp_path / "x.png", tmp_path / "x.json"
    given = ["--config", str(config), "--prompt", "", "--output", str(output)]
    given += ["--media.steps", "5", "--media.sampler", sampler, "--stats", str(stats)]
    assert generate(given) == 0 and output.is_file()
    bounded = sampler in ("by-error", "picard")
    promised = "bounded error" if bounded else "exact law"
    assert json.loads(stats.read_text())["guarantee"] == promised


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--prompt", "", "--media.tolerance", "1"], "for the samplers by-error, picard"),
        (["--prompt", "", "--media.sampler", "picard", "--media.free_draft", "estimate"], "ddim's"),
        (["--prompt", "", "--media.sampler", "by-error", "--media.eta", "1"], "eta must be 0"),
        (["--prompt", "", "--media.window", "3"], "nothing drafts here: give a free_draft"),
        (
            ["--prompt", "", "--media.free_draft", "first-block"],
            "first-block: diffusers caches no blocks of a UNet2DModel",
        ),
        (
            ["--prompt", "", "--media.sampler", "step-cache"],
            "first-block: diffusers caches no blocks of a UNet2DModel",
        ),
        (
            ["--prompt", "", "--media.sampler", "step-cache", "--media.window", "auto"],
            "window auto is for drafted steps; that of step-cache is a number",
        ),
        (
            ["--prompt", "", "--media.guidance", "3"],
            "weight of a prompt, and this target takes none",
        ),
        (["--prompt", "", "--top_k", "3"], "top_k: is for text"),
    ],
)
def test_wrong_options_are_one_line(
    flags: list[str], line: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.png"
    assert generate(["--config", str(config), *flags, "--output", str(output)]) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1 and not output.exists()


def test_a_file_of_prompts_is_for_text(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "many.jsonl"
    prompts.write_text('{"prompt": ""}\n')
    given = ["--config", str(config), "--prompts", str(prompts)]
    assert generate([*given, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "media are made one --prompt at a time" in capsys.readouterr().err
