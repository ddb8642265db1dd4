"""Two processes with half the batch each train what one process with the whole batch trains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specstream.cli import train

ROOT = Path(__file__).resolve().parents[2]
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
        "process_group_backend": "gloo",
    },
}


def run_two(config: str) -> None:
    """Run train.py as a user would: the trainer starts the second process itself.

    If they wait for each other for ever, both are aborted and say where they stand.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "train.py", "--config", config],
        cwd=ROOT,
        env=os.environ | {"MASTER_PORT": str(port), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]


def halve_the_batch(config: str) -> None:
    """Give each of two processes half the rows of one."""
    path = Path(config)
    values = yaml.safe_load(path.read_text())
    values["data"]["init_args"]["batch_size"] //= 2
    path.write_text(yaml.safe_dump(values))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_same_global_batch(
    strategy: Any,
    tmp_path: Path,
    write_config: Callable[..., str],
    distillation: dict[str, Any],
) -> None:
    distillation["init_args"]["decoding"] = {"num_prompts": 3, "max_new_tokens": 3}
    more: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 3, "val_check_interval": 6}
    assert train(["--config", write_config("one", distillation, **more)]) == 0
    two = write_config("two", distillation, **more, devices=2, strategy=strategy)
    halve_the_batch(two)
    run_two(two)
    states = [
        torch.load(tmp_path / name / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)
    assert (tmp_path / "two" / "draft" / "model.safetensors").exists()
