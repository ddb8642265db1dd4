"""The command lines: one parser each, and every mistake of the user is one line and exit code 2."""

import logging
import sys
import warnings
from collections.abc import Sequence


def train(arguments: Sequence[str] | None = None) -> int:
    """`python train.py --config X.yaml [--any.key value] [--ckpt_path last] [--overwrite true]`.

    Returns the exit code: 0 done, 1 the run failed in one explained line, 2 the configuration is
    wrong, 130 after Ctrl-C and 143 after SIGTERM, both with `last.ckpt` saved.
    """
    quiet_known_noise()
    try:
        from specstream.training.command import run_training

        return run_training(list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted before anything was trained", file=sys.stderr)
        return 130


def generate(arguments: Sequence[str] | None = None) -> int:
    """`python generate.py --run checkpoints/NAME --prompt "..."`, or `--config X.yaml` for `--run`.

    Returns the exit code: 0 done, 2 something that was asked for cannot be, in one line, and 130
    after Ctrl-C, with what was finished kept.
    """
    quiet_known_noise()
    try:
        from specstream.generation.command import run_generation

        return run_generation(list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted before anything was generated", file=sys.stderr)
        return 130


def report(error: Exception) -> int:
    """Print a user's mistake as one line on stderr; returns the exit code 2."""
    text = " ".join(str(error).split())
    print(text if text.startswith("config error") else f"error: {text}", file=sys.stderr)
    return 2


def quiet_known_noise() -> None:
    """Silence exactly the library lines that no user can act on; all other warnings stay.

    Called by the entry points before those libraries are imported, never on import.
    """
    # torchao tries CUDA libraries at import and reports each that a CPU build lacks
    logging.getLogger("torchao").setLevel(logging.ERROR)
    # lightning: tips for its own products, and a table of devices that the run names anyway
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # tests and notebooks call train() with arguments while sys.argv has its own
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended.*")
    # torchao registers its enums in a way that newer torch no longer needs
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # the frozen target is meant to be in eval mode
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode.*")
    # lightning's own leftovers of older torch and jsonargparse
    warnings.filterwarnings(
        "ignore", message=r"[\s\S]*(Jsona|instantiate_classes`` was deprec)[\s\S]*"
    )
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    # its guess about loader processes: ours are set in the data module
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # its guess about epochs shorter than the logging interval: steps are counted over all epochs
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller.*")
    # whether a run folder may be written is decided by our own rules
    warnings.filterwarnings(
        "ignore", message=r".*Checkpoint directory .* exists and is not empty.*"
    )
