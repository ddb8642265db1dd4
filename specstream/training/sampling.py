"""Validation of diffusion models that really samples: a picture to look at, and rounds counted.

A sheet of samples goes to `samples/step-N` in the run folder and, where the logger is W&B, there;
of a drafter val/round_ratio is logged (steps of the plain sampler over rounds of the drafted one)
and val/drafts_stand (accepted over tested drafted steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from specstream.drafters.denoising import StateDrafter
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import MAX_DRAFT, FixedLength
from specstream.media_processor import MediaProcessor
from specstream.models.denoiser import Denoiser
from specstream.models.noise_schedule import check_steps
from specstream.models.pretrained_denoiser import PretrainedDenoiser

FOLDER = "samples"
MOST_SAMPLES = 10_000  # on one sheet: more is a slip of the pen


@dataclass(frozen=True)
class HeldOutSampling:
    """What validation samples: so many samples, evenly over the classes, the same noise each time.

    `num_steps`, `eta` and `guidance` are the sampler's, `window` is how many steps a drafter drafts
    at most.
    """

    num_samples: int = 16
    num_steps: int = 50
    eta: float = 1.0
    guidance: float = 1.0
    window: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= MOST_SAMPLES:
            raise ValueError(f"num_samples must be in 1..{MOST_SAMPLES}, got {self.num_samples}")
        check_steps(self.num_steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if not 0 <= self.window <= MAX_DRAFT:
            raise ValueError(f"window must be in 0..{MAX_DRAFT}, got {self.window}")

    def check(self, processor: MediaProcessor) -> None:
        """Raise ValueError for media that cannot be written, or a guidance that has no class."""
        processor.check_writer()
        if self.guidance != 1 and not processor.classes:
            raise ValueError(
                "decoding.guidance is the weight of a class, and validation samples without one"
            )

    def check_drafts(self, num_steps: int, eta: float, guidance: float) -> None:
        """Raise ValueError for another sampler than the one that drafts are trained for."""
        found = (self.num_steps, self.eta, self.guidance)
        if found != (num_steps, eta, guidance):
            raise ValueError(
                "decoding samples with num_steps {}, eta {} and guidance {}, but drafts are "
                "trained for {}, {} and {}".format(*found, num_steps, eta, guidance)
            )

    def run(
        self,
        module: L.LightningModule,
        target: Denoiser,
        drafter: StateDrafter | None,
        processor: MediaProcessor,
        condition: dict[str, Tensor] | None = None,
        shown: DenoisingSampler | None = None,
    ) -> dict[str, float]:
        """Sample in the first process, show it, and return what is to be logged.

        `condition` holds what the target is told of each sample, None: the classes in turn; `shown`
        draws the samples on the sheet, where it is not the target's sampler.
        """
        if not module.trainer.is_global_zero or module.trainer.sanity_checking:
            return {}
        pipeline = DenoisingPipeline(
            target,
            self.num_steps,
            self.eta,
            self.guidance,
            drafter,
            lengths=None if drafter is None else FixedLength(self.window),
            batch_size=self.num_samples,
        )
        if condition is None and processor.classes:
            numbers = torch.arange(self.num_samples) % len(processor.classes)
            condition = {"classes": numbers.to(module.device)}
        samples = pipeline.complete(self.num_samples, condition, seed=self.seed)
        if shown is not None:
            samples = shown.complete(self.num_samples, condition, seed=self.seed)
        media = target.decode(samples) if isinstance(target, PretrainedDenoiser) else samples
        self._show(module, media, processor)
        stats = pipeline.stats
        if drafter is None:
            return {}
        ratio = self.num_samples * self.num_steps / stats.full_rounds
        return {"val/round_ratio": ratio, "val/drafts_stand": stats.acceptance or 0.0}

    def _show(
        self, module: L.LightningModule, samples: torch.Tensor, processor: MediaProcessor
    ) -> None:
        step = module.global_step
        path = Path(module.trainer.default_root_dir) / FOLDER / f"step-{step:06d}{processor.suffix}"
        processor.write(samples, path)
        for logger in module.trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                kind = {"image": wandb.Image, "video": wandb.Video, "audio": wandb.Audio}
                made = kind[processor.kind](str(path))
                logger.experiment.log({"val/samples": made, "trainer/global_step": step})
