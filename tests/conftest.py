"""What every test stands on: one thread, no network, a cache of its own, a fixed global seed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# Set before torch, Hugging Face or matplotlib are imported, here and in child processes.
_CACHE = tempfile.TemporaryDirectory(prefix="specstream-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DIR=_CACHE.name,
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    XDG_CACHE_HOME=_CACHE.name,
)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed torch's global generator and keep it to one thread; our own noise is keyed anyway."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield 0
