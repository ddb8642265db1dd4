"""Batches over several devices: one process each, through Lightning's predict loop.

The only file of `generation` that imports lightning; it is imported when `--devices` is above 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from specstream.generation.base import TextPipeline
from specstream.generation.command.many_prompts import Job, Progress, decode_batch
from specstream.generation.costs import stored_costs
from specstream.generation.masked import MaskedPipeline
from specstream.generation.speculative import SpeculativePipeline


@dataclass(frozen=True, slots=True)
class Outcome:
    """How decoding over devices ended, as one process sees it."""

    finished: bool
    is_main_process: bool


class DecodingModule(L.LightningModule):
    """Decodes every `world_size`-th batch of a job; Lightning moves the models and counts ranks.

    `threads` is the number that torch would use in a single process: at that number the main
    process measures the costs of drafting for all, so that lengths do not depend on the number of
    processes.
    """

    def __init__(self, pipeline: TextPipeline | MaskedPipeline, job: Job, threads: int) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.job = job
        self.threads = threads
        if isinstance(pipeline, MaskedPipeline):
            models = pipeline.models
            if getattr(getattr(pipeline, "lengths", None), "needs_costs", False):
                raise ValueError("over several devices give a fixed number of drafted steps")
        else:
            models = [pipeline.target]
            if isinstance(pipeline, SpeculativePipeline):
                models.append(pipeline.drafter)
        self.models = nn.ModuleList(models)
        self.progress: Progress | None = None

    def setup(self, stage: str) -> None:
        self.job.part(self.trainer.global_rank).unlink(missing_ok=True)
        pipeline = self.pipeline
        if not isinstance(pipeline, SpeculativePipeline) or not pipeline.lengths.needs_costs:
            return
        if self.trainer.is_global_zero:
            self.to(self.trainer.strategy.root_device)
            own = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            pipeline.costs = stored_costs(pipeline)
            torch.set_num_threads(own)
        pipeline.costs = self.trainer.strategy.broadcast(pipeline.costs)

    def predict_dataloader(self) -> DataLoader[list[int]]:
        own = self.job.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        self.progress = Progress(len(self.job.prompts), self.trainer.is_global_zero)
        self.progress.__enter__()

    def predict_step(self, batch: Sequence[int], batch_idx: int) -> Sequence[int]:
        decode_batch(self.pipeline, self.job, list(batch), self.job.part(self.trainer.global_rank))
        assert self.progress is not None
        self.progress.advance(len(batch) * self.trainer.world_size)  # the others run beside
        return batch

    def teardown(self, stage: str) -> None:
        if self.progress is not None:
            self.progress.__exit__()


def decode_over_devices(
    pipeline: TextPipeline | MaskedPipeline, job: Job, devices: int, device: str
) -> Outcome:
    """Decode all batches in `devices` processes, which run this very command line again."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they announce devices and ranks
        logging.getLogger(name).setLevel(logging.ERROR)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    module = DecodingModule(pipeline, job, torch.get_num_threads()).eval()
    trainer = L.Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=devices,
        strategy="ddp",
        use_distributed_sampler=False,  # the module takes its own share
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.predict(module, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
        return Outcome(False, trainer.is_global_zero)
    trainer.strategy.barrier("all parts are written")
    return Outcome(True, trainer.is_global_zero)
