"""The models of one task: the target and its drafters, each loaded once and shared by all methods.

`transformers` is timed with the very modules that our pipelines run, so weights, dtype, attention
and device are the same by construction.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from specstream.benchmark.prompts import PromptSource
from specstream.drafters import Drafter, DraftModel
from specstream.drafters.loading import RECORD, load_drafter
from specstream.files import is_hub_id
from specstream.generation.loading import check_shares_nothing, find_device
from specstream.models import PretrainedLM
from specstream.models.quantization import quantize
from specstream.processors import TextProcessor

M = TypeVar("M", bound=nn.Module)
DraftKind = Literal["trained", "data_only", "untrained"]


@dataclass(frozen=True)
class Task:
    """A pair of models and the prompts they are measured on.

    Args:
        name: what the table calls it.
        target: folder or hub id of the target.
        prompts: held-out prompts; of several sources the same number each.
        draft: a run folder, its draft/, or the folder or hub id of any causal LM.
        data_only_draft: the same, trained on the data alone.
    """

    name: str
    target: str
    prompts: list[PromptSource]
    draft: str | None = None
    data_only_draft: str | None = None

    def check(self, kinds: Collection[DraftKind] = ()) -> None:
        """Raise ValueError for what can be seen to be wrong before anything is loaded.

        `kinds` are the drafters that will be asked for.
        """
        if not self.prompts:
            raise ValueError(f"task '{self.name}' names no prompts")
        for path in (self.target, *(self.draft_path(kind) for kind in sorted(kinds))):
            if not is_model(path):
                raise ValueError(f"task '{self.name}': there is no folder '{path}'")
        for source in self.prompts:
            source.check()

    def draft_path(self, kind: DraftKind) -> str:
        """Return where a drafter lies; ValueError when the task has none of this kind."""
        key = "data_only_draft" if kind == "data_only" else "draft"
        path: str | None = getattr(self, key)
        if path is None:
            raise ValueError(f"task '{self.name}' has no {key}, which a method asks for")
        return path


def is_model(path: str) -> bool:
    """Whether a path is a folder, or may name a model of the hub."""
    return Path(path).is_dir() or is_hub_id(path)


def draft_folder(run: str) -> Path:
    """Return the draft/ of a run folder, or the folder itself."""
    return Path(run, "draft") if Path(run, "draft").is_dir() else Path(run)


class Pair:
    """The loaded models of a task on one device."""

    def __init__(self, task: Task, dtype: str, device: str, attn_implementation: str) -> None:
        from transformers import GenerationConfig

        self.task = task
        self.dtype, self.attention = dtype, attn_implementation
        self.place = find_device(device)
        self.target = self._ready(PretrainedLM(task.target, dtype, attn_implementation, self.place))
        self.processor = TextProcessor.from_pretrained(task.target)
        # `generate` fills what a call leaves open from here: nothing, not even an end of sequence
        self.target.model.generation_config = GenerationConfig()
        self._drafters: dict[tuple[DraftKind, str], Drafter] = {}

    def drafter(self, kind: DraftKind, quantized: str = "none") -> Drafter:
        """Return one of the task's drafters, `quantized` by a method of `quantize` or not.

        Raises ValueError when the task has none of this kind, or none that can be converted.
        """
        if (kind, quantized) not in self._drafters:
            path = self.task.draft_path(kind)
            drafter = self._fresh() if kind == "untrained" else self.load_drafter(path)
            if quantized != "none":
                check_shares_nothing(drafter)
                quantize(drafter, quantized)
            self._drafters[kind, quantized] = drafter
        return self._drafters[kind, quantized]

    def draft_lm(self, kind: DraftKind) -> PretrainedLM:
        """Return the drafter's language model; ValueError when it is not one."""
        drafter = self.drafter(kind)
        if not isinstance(drafter, DraftModel):
            raise ValueError(f"task '{self.task.name}': {type(drafter).__name__} is no draft LM")
        return drafter.model

    def load_drafter(self, path: str) -> Drafter:
        """Load a drafter from a run folder, its draft/, or the folder or hub id of a causal LM."""
        folder = draft_folder(path)
        if (folder / RECORD).is_file():
            return self._ready(load_drafter(folder, self.target, self.dtype, device=self.place))
        lm = PretrainedLM(path, self.dtype, self.attention, self.place)
        return self._ready(DraftModel(self.target, lambda: lm))

    def _fresh(self) -> Drafter:
        """Return a drafter of the trained one's architecture and dtype with fresh weights."""
        from transformers import AutoModelForCausalLM

        trained = self.draft_lm("trained")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                trained.config, dtype=torch.float32, attn_implementation=self.attention
            )
        lm = PretrainedLM.of(model.to(trained.dtype))
        return self._ready(DraftModel(self.target, lambda: lm))

    def _ready(self, model: M) -> M:
        return model.eval().requires_grad_(False).to(self.place)
