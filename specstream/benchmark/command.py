"""The command line of the benchmark.

    python -m specstream.benchmark --config configs/benchmark/X.yaml [--overwrite true]
    python -m specstream.benchmark --report      # docs/results/*.json into its page and the README

Tables go to stdout, and its last line is the JSON list of all rows; progress goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from specstream.benchmark.readme import update
from specstream.benchmark.rows import Row, as_json, flat, write_rows
from specstream.benchmark.study import Study, say
from specstream.config_errors import ConfigError, OneLineErrors

RESULTS = "docs/results"
CONFIGS = "configs/benchmark"
INTERRUPTED = 130


def make_parser() -> OneLineErrors:
    """Return the parser of the benchmark."""
    parser = OneLineErrors(
        prog="python -m specstream.benchmark",
        description="Measure decoding; configs/benchmark holds complete examples.",
    )
    parser.add_argument("--config", action="config", help="a file of these options")
    parser.add_argument("--study", type=Study | None, default=None, help="what to measure")
    parser.add_argument("--output", type=str | None, default=None, help="docs/results/NAME.json")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace a results file")
    parser.add_argument(
        "--report", action="store_true", help="write docs/results/README.md and its summary"
    )
    parser.add_argument("--readme", type=str, default="README.md", help="which holds the summary")
    parser.built_class = None
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the config names; returns the exit code, 2 for a mistake, 130 after Ctrl-C."""
    quiet_known_noise()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(words)
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        say(text if text.startswith("config error") else f"error: {text}")
        return 2


def quiet_known_noise() -> None:
    """Silence exactly the library lines that no user can act on; all other warnings stay."""
    # torchao tries CUDA libraries at import, and registers enums in a way torch no longer needs
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers warns of how its own assisted generation calls the assistant
    logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)


def run(arguments: list[str]) -> int:
    """Do what the arguments say; ValueError for a user's mistake."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.report:
        changed = update(Path(parsed.readme), Path(RESULTS), Path(CONFIGS))
        say(f"the results pages were {'brought' if changed else 'already'} up to date")
        return 0
    if parsed.study is None:
        raise ConfigError("config error: study: give a --config, configs/benchmark holds examples")
    output = _output(parsed.output, arguments)
    check_place(output)
    if output.exists() and not parsed.overwrite:
        raise ConfigError(
            f"config error: output: '{output}' exists; give --overwrite true to replace it, or "
            "another --output"
        )
    try:
        study: Study = parser.instantiate(parsed).study
    except ValueError as error:
        raise ConfigError(f"config error: study: {_root_cause(error)}") from error
    study.check()
    return measure(study, output, arguments)


def measure(study: Study, output: Path, arguments: Sequence[str]) -> int:
    """Run a study; what is finished is in the results file at any time, after Ctrl-C too."""
    rows: list[Row] = []
    code = 0
    try:
        for finished in study.run(arguments):
            rows += finished
            write_rows(output, rows)
    except KeyboardInterrupt:
        say(f"interrupted: {len(rows)} finished rows are kept")
        code = INTERRUPTED
    if rows:
        publish(output, rows)
    print(as_json(rows), flush=True)
    return code


def publish(output: Path, rows: Sequence[Row]) -> None:
    """Draw the plots and print the tables."""
    from specstream.benchmark.plots import write_plots
    from specstream.benchmark.tables import print_tables

    plain = json.loads(as_json([flat(row) for row in rows]))
    plots = write_plots(output, plain)
    print_tables(plain)
    say(f"wrote {output}" + "".join(f", {path.name}" for path in plots))


def check_place(output: Path) -> None:
    """Raise ConfigError for results that could not be written once they are measured."""
    if output.suffix != ".json":
        raise ConfigError(f"config error: output: '{output}' is not named as a .json file")
    present = next(path for path in output.absolute().parents if path.exists())
    if not present.is_dir():
        raise ConfigError(f"config error: output: '{present}' is no folder")
    if output.is_dir():
        raise ConfigError(f"config error: output: '{output}' is a folder, not a file")
    if not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError(f"config error: output: no permission to write in '{present}'")


def _output(given: str | None, arguments: Sequence[str]) -> Path:
    """Return the results file: as given, or named after the config."""
    if given is not None:
        return Path(given)
    configs = [b for a, b in pairwise(arguments) if a == "--config"]
    configs += [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not configs:
        raise ConfigError("config error: output: needed where there is no --config to name it")
    return Path(RESULTS, f"{Path(configs[-1]).stem}.json")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
