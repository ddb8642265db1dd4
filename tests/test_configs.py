"""Every shipped YAML says what it is and parses against the real signatures, without running."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from specstream.config_errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.parts[2] == "overlays"]  # laid over a recipe
TRAIN = [path for path in CONFIGS if path.parts[1] == "train" and path not in OVERLAYS]
MEDIA = [path for path in OVERLAYS if Path(ROOT, "configs/train", path.name).is_file()]
RESIDUAL = Path("configs/train/digits-residual.yaml")  # the recipe below those
RECIPES = [path for path in TRAIN if path.name.endswith("-e2e-wikisql.yaml")]
DRAFTERS = [path for path in RECIPES if not path.name.startswith("target-")]


class Parsed(Exception):
    """Raised, with the whole config, in place of building anything."""


def _head(path: Path) -> str:
    lines = (ROOT / path).read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def _blocks(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every class_path/init_args block of a parsed YAML, outermost first."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node
        for value in node.values():
            yield from _blocks(value)
    elif isinstance(node, list):
        for value in node:
            yield from _blocks(value)


def _class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_opens_with_its_command_and_hardware(path: Path) -> None:
    head = _head(path)
    assert f"--config {path.as_posix()}" in head
    assert re.search(r"\b(CPU|GPU)s?\b", head), "say on what hardware"
    assert re.search(r"\b(second|minute|hour)s?\b", head), "say how long it takes"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_block_names_a_class_and_its_own_arguments(path: Path) -> None:
    for block in _blocks(yaml.safe_load((ROOT / path).read_text())):
        accepted = inspect.signature(_class(block["class_path"])).parameters
        assert set(block) <= {"class_path", "init_args"}
        unknown = set(block.get("init_args") or {}) - set(accepted)
        assert not unknown, f"{block['class_path']} does not accept {unknown}"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_reads_nothing_outside_the_repository(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert not re.findall(r"(?:^|[\s\"'])(?:/|~/|\.\./)[\w.]", text)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Parse a command line as train.py does; return the whole config."""
    command = pytest.importorskip("specstream.training.command")

    class ParseOnly(command.TrainCLI):  # type: ignore[name-defined]
        def before_instantiate_classes(self) -> None:
            raise Parsed(self.config.as_dict())

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(command, "TrainCLI", ParseOnly)

    def parsed(*words: str) -> dict[str, Any]:
        with pytest.raises(Parsed) as found:
            command.run_training(list(words))
        return found.value.args[0]

    return parsed


@pytest.mark.parametrize("path", TRAIN, ids=str)
def test_a_training_config_parses_as_train_py_parses_it(
    path: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    assert parse("--config", str(path))["run"]


@pytest.mark.parametrize("overlay", [path for path in OVERLAYS if path not in MEDIA], ids=str)
@pytest.mark.parametrize("recipe", DRAFTERS, ids=str)
def test_an_overlay_leaves_nothing_of_the_recipes_data(
    recipe: Path, overlay: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    words = ["--config", str(recipe), "--config", str(overlay)]
    config = parse(*words, "--run", "checkpoints/own")
    assert config["run"] == "checkpoints/own"
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    name = overlay.stem
    assert model["target"]["init_args"]["path"] == f"checkpoints/{name}-target/model"
    assert data["tokenizer"] == model["target"]["init_args"]["path"]
    _, expected = _recipe(Path(f"configs/train/{name}-target.yaml"))
    for key in ("sources", "validation_sources"):
        shown = [_given(source["init_args"]) for source in data[key]]
        assert shown == [source["init_args"] for source in expected[key]]
    for key in ("sequence_length", "batch_size"):
        assert data[key] == expected[key]
    assert not re.findall("e2e|wikisql", yaml.safe_dump(config["model"]))


def _given(source: dict[str, Any]) -> dict[str, Any]:
    return {key: source[key] for key in ("path", "prompt", "completion")}


@pytest.mark.parametrize("overlay", MEDIA, ids=str)
def test_an_overlay_of_media_fits_its_target_and_leaves_nothing_of_the_digits(
    overlay: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    assert yaml.safe_load((ROOT / overlay).read_text())["run"] is None  # it is asked for, see below
    words = ["--config", str(RESIDUAL), "--config", str(overlay), "--run", "checkpoints/own"]
    config = parse(*words)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    target, expected = _recipe(Path(f"configs/train/{overlay.stem}.yaml"))
    assert model["target"] == f"checkpoints/{overlay.stem}/model"
    assert _as_given(data["source"], expected["source"]) == expected["source"]
    network, wanted = model["network"]["init_args"], target["network"]["init_args"]
    assert network["in_channels"] == 3 * network["out_channels"] == 3 * wanted["out_channels"]
    assert len(network["patch"]) == len(wanted["patch"]) and network["num_times"] == 2
    for told in ("num_classes", "text_size"):
        assert network[told] == wanted.get(told, 0)
    assert model["decoding"]["window"] == model["window"]
    assert not re.findall("digits", yaml.safe_dump(config["model"]))


def _as_given(found: Any, given: Any) -> Any:
    """Return what is found without what is not given, which are defaults."""
    if not isinstance(given, dict):
        return found
    return {key: _as_given(found[key], value) for key, value in given.items()}


@pytest.mark.parametrize("overlay", [path for path in OVERLAYS if path not in MEDIA[1:]], ids=str)
def test_an_overlay_asks_for_a_run_of_its_own(
    overlay: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    recipe = RESIDUAL if overlay in MEDIA else DRAFTERS[0]
    with pytest.raises(ConfigError, match="config error: run: expected str, got null"):
        parse("--config", str(recipe), "--config", str(overlay))


def _recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a training config's model and data."""
    config = yaml.safe_load((ROOT / path).read_text())
    return config["model"]["init_args"], config["data"]["init_args"]


OWN_TOKENIZER = [
    path
    for path in TRAIN
    if "sequence_length" in _recipe(path)[1] and _recipe(path)[1].get("tokenizer") is None
]


@pytest.mark.parametrize("path", OWN_TOKENIZER, ids=str)
def test_a_recipe_that_trains_its_tokenizer_has_a_model_of_that_size(path: Path) -> None:
    module, data = _recipe(path)
    if not data.get("characters"):  # those are as many as the text has
        assert data["vocab_size"] == module["model"]["init_args"]["vocab_size"]
    assert data["sequence_length"] <= module["model"]["init_args"]["max_positions"]
