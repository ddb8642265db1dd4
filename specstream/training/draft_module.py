"""What every module that trains a drafter shares: a frozen target, a drafter, a pipeline."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import AdamW

from specstream.divergences import Divergence, DPace, EndToEndTV
from specstream.drafters import Drafter
from specstream.drafters.loading import save_drafter
from specstream.generation import DraftLength, Limits, SpeculativePipeline
from specstream.generation.loading import check_data_tokenizer, check_tokenizers
from specstream.models.fingerprint import fingerprint
from specstream.models.pretrained_lm import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.training.base import SummedLossModule
from specstream.training.decoding import HeldOutDecoding
from specstream.training.language_modeling import check_row_length
from specstream.training.optimization import Schedule
from specstream.training.run_folder import check_apart
from specstream.training.sharding import shard_layers, train_in_float32


class DraftModule(SummedLossModule, ABC):
    """Trains a drafter beside its frozen target, and decodes with both.

    `target` and `drafter` are factories: `configure_model` builds the frozen target on its own
    device and then calls the drafter's factory with it, so a drafter may be cut from the target.
    `decoding` says what validation decodes; None decodes nothing.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, chunk_tokens)
        self.build_drafter = drafter
        self.build_target = target
        self.decoding = decoding
        self.gradient_checkpointing = gradient_checkpointing
        self.target: PretrainedLM | None = None
        self.drafter: Drafter | None = None

    def configure_model(self) -> None:
        if self.drafter is not None:
            return
        target = self.build_target()
        if not isinstance(target, PretrainedLM):
            raise ValueError(f"target must be a causal language model, not {type(target).__name__}")
        target.eval().requires_grad_(False)
        drafter = self.build_drafter(target)
        if not isinstance(drafter, Drafter):
            raise ValueError(f"drafter must be a Drafter, not {type(drafter).__name__}")
        train_in_float32(drafter)
        drafter.train()
        network = getattr(drafter, "model", None)
        if isinstance(network, PretrainedLM):
            if self.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            shard_layers(network, self.device_mesh)
        shard_layers(target, self.device_mesh)
        self.target, self.drafter = target, drafter
        if not self.trained_names():
            raise ValueError(f"{type(drafter).__name__} has no parameters to train")

    @property
    def processor(self) -> TextProcessor:
        """The text boundary of the trainer's data: one tokenizer for target and drafter."""
        return TextProcessor(self.trainer.datamodule.tokenizer)  # type: ignore[attr-defined]

    def pipeline(
        self,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        lengths: DraftLength | None = None,
        batch_size: int = 1,
    ) -> SpeculativePipeline:
        """Return the pipeline that decodes with the drafter as it is trained now."""
        assert self.target is not None and self.drafter is not None
        return SpeculativePipeline(
            self.target,
            self.drafter,
            self.processor,
            lengths=lengths,
            sampling=sampling,
            limits=limits,
            batch_size=batch_size,
        )

    def on_fit_start(self) -> None:
        assert self.target is not None and self.drafter is not None
        size = len(self.processor.tokenizer)
        if size > self.target.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {size} tokens, the target a vocabulary of "
                f"{self.target.vocab_size}: use the target's own tokenizer"
            )
        check_data_tokenizer(self.target, self.processor)
        models = {"target": self.target}
        network = getattr(self.drafter, "model", None)
        if isinstance(network, PretrainedLM):
            models["drafter"] = network
        check_row_length(self.trainer.datamodule, models)  # type: ignore[attr-defined]
        check_apart(self.target.path, Path(self.trainer.default_root_dir))
        self.pipeline()  # what could not decode is refused before it is trained
        check_tokenizers(self.target, self.processor, self.drafter)
        if self.decoding is not None:
            self.decoding.check(self)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is not None and not self.trainer.sanity_checking:
            self.decoding.run(self)

    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write `draft/`: the drafter and the name of its target."""
        assert self.target is not None and self.drafter is not None
        named = fingerprint(self.target.model)
        save_drafter(run / "draft", self.drafter, processor, self.target.path, named)
        return run / "draft"


def check_single_places(divergence: Divergence, instead: str) -> None:
    """Raise ValueError for a divergence that weighs consecutive places, where `instead` holds."""
    if isinstance(divergence, DPace | EndToEndTV):
        raise ValueError(
            f"{type(divergence).__name__} weighs consecutive places of one drafter; {instead}"
        )
