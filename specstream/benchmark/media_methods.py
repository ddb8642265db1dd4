"""Who draws samples of a diffusion model: one row of the table each, as records of their options.

A further method is a frozen dataclass that makes a `DenoisingSampler`; nothing else is asked of it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from specstream.benchmark.pair import draft_folder
from specstream.benchmark.runners import Runner
from specstream.drafters import StateDrafter, WindowDenoiser
from specstream.drafters.state_loading import RECORD, load_own_processor, load_state_drafter
from specstream.generation import DraftLength
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.loading import Quantized, find_device
from specstream.generation.media_loading import Free, Window, drafted_lengths, free_drafter
from specstream.generation.media_quantization import quantize_denoisers
from specstream.generation.solvers import Solver, SolverPipeline
from specstream.models.denoiser import Denoiser, load_denoiser
from specstream.models.quantization import USUAL, Method
from specstream.sampling import Noise, Role
from specstream.structures import Stats


@dataclass(frozen=True, slots=True)
class MediaSetting:
    """What every method of a task draws alike.

    Args:
        num_steps: of the plain sampler, N.
        eta: of the plain sampler.
        guidance: weight of the condition; 1 is none.
        batch_size: samples drawn together.
        rounds: of a sample, by the names of the methods that were counted before; of a student that
            samples alone its own calls.
        shares: of the plain sampler's seconds, by the same names: its steps that take as long over
            all of them.
    """

    num_steps: int
    eta: float
    guidance: float = 1.0
    batch_size: int = 1
    rounds: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the table calls it."""
        guided = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"{self.num_steps} steps, eta {self.eta:g}{guided}"

    def alone(self) -> MediaSetting:
        """Return the same for samples that are drawn one by one."""
        return replace(self, batch_size=1)


class MediaModels:
    """A target and the drafters of its task, each loaded once, on one device.

    A prompt is the number of a class, or of one of the `texts` (m, text_size) of held-out data.
    """

    def __init__(self, target: str, device: str, texts: Tensor | None = None) -> None:
        self.path, self.place = target, find_device(device)
        self.target = load_denoiser(target, self.place).eval().requires_grad_(False)
        self.processor = load_own_processor(self.target)
        found, wanted = 0 if texts is None else texts.shape[1], self.processor.text_size
        if wanted and found != wanted:
            has = f"vectors of {found} numbers" if found else "none"
            raise ValueError(
                f"'{target}' is asked by texts of {wanted} numbers; the data has {has}"
            )
        self.texts = texts if wanted else None
        self._drafters: dict[str, StateDrafter] = {}

    def condition(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """Return what the target is told of samples of these prompts; of some models nothing."""
        numbers = torch.tensor(list(prompts))
        if self.texts is not None:
            return {"text": self.texts[numbers]}
        return {"classes": numbers} if self.processor.classes else {}

    def names(self, prompts: Sequence[int]) -> list[str]:
        """Return the names of the classes of prompts; of a model without classes nothing."""
        classes = self.processor.classes
        return [classes[number] for number in prompts] if classes else []

    def prompts(self, num_samples: int, seed: int) -> list[int]:
        """Return a prompt for each sample, each as likely as any other.

        Equal counts would make samples depend on one another: two sets of them lie nearer together
        than independent ones, and tests of their laws would find too little.
        """
        samples = torch.arange(num_samples)
        uniforms = Noise(seed).uniform(samples, torch.zeros_like(samples), Role.ORDER)
        known = len(self.processor.classes) if self.texts is None else len(self.texts)
        return (uniforms * max(known, 1)).long().tolist()

    def plain(self, setting: MediaSetting, num_steps: int, eta: float) -> DenoisingPipeline:
        """Return the plain sampler."""
        return DenoisingPipeline(
            self.target,
            num_steps,
            eta,
            guidance=setting.guidance,
            batch_size=setting.batch_size,
        )

    def drafted(
        self,
        setting: MediaSetting,
        drafter: StateDrafter,
        lengths: DraftLength,
        target: Denoiser | None = None,
    ) -> DenoisingPipeline:
        """Return the sampler that verifies drafted steps exactly; a `target` replaces the own."""
        return DenoisingPipeline(
            target or self.target,
            setting.num_steps,
            setting.eta,
            guidance=setting.guidance,
            drafter=drafter,
            lengths=lengths,
            batch_size=setting.batch_size,
        )

    def drafter(self, run: str, guidance: float) -> StateDrafter:
        """Return the drafter of a run folder; a diffusion model is guided as its target is."""
        if run not in self._drafters:
            self._drafters[run] = load_state_drafter(draft_folder(run), self.target, guidance)
        return self._drafters[run]


class SamplingRunner(Runner):
    """A sampler as the alternating runs know it: a prompt is that of a sample."""

    variant = "only"

    def __init__(self, models: MediaModels, pipeline: DenoisingSampler) -> None:
        self.models, self.pipeline = models, pipeline

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        condition = self.models.condition([number for (number,) in prompts])
        self.pipeline.complete(len(prompts), condition, seed=seed, indices=indices)
        return [[] for _ in prompts]  # samples are no tokens

    def take_stats(self) -> Stats:
        return replace(self.pipeline.stats)


class SamplingMethod(ABC):
    """A way to draw samples; subclasses are frozen dataclasses of their options.

    `tasks` are the names of the tasks it is for, None for all.
    """

    name: str
    tasks: list[str] | None
    kind: ClassVar[str]

    @abstractmethod
    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        """Build it; ValueError when the models do not fit together."""

    def missing(self) -> str | None:
        """Say what this method needs and is not there yet; None when all is."""
        return None

    def refusal(self, setting: MediaSetting) -> str | None:
        """Say why this method cannot draw what is asked for; None when it can."""
        return None

    def beside(self) -> list[SamplingMethod]:
        """Return what is always measured after this method, because it has to beat it."""
        return []


@dataclass(frozen=True)
class PlainSteps(SamplingMethod):
    """The target alone; without options the reference, which the others are compared with.

    Args:
        name: what the table calls it.
        num_steps: null for those of the setting.
        eta: null for that of the setting; 0 is the deterministic sampler.
        tasks: names of the tasks it is for; null for all.
    """

    name: str = "plain"
    num_steps: int | None = None
    eta: float | None = None
    tasks: list[str] | None = None
    kind = "plain"

    @property
    def is_reference(self) -> bool:
        """Whether it is the plain sampler that a setting speaks of."""
        return self.num_steps is None and self.eta is None

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        num_steps = setting.num_steps if self.num_steps is None else self.num_steps
        return models.plain(setting, num_steps, setting.eta if self.eta is None else self.eta)


@dataclass(frozen=True)
class EqualRounds(SamplingMethod):
    """The target alone with as many steps as a drafted method took rounds: what that has to beat.

    Args:
        name: what the table calls it.
        method: name of the drafted one, which stands before this one.
        eta: null for that of the setting; 0 is the deterministic sampler.
        solver: a better one of the deterministic sampler; eta is then 0.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    method: str
    eta: float | None = None
    solver: Solver | None = None
    tasks: list[str] | None = None
    kind = "equal rounds"

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"method '{self.name}': eta must be in [0, 1], got {self.eta}")
        if self.solver is not None and self.eta != 0:
            raise ValueError(f"method '{self.name}': a solver is of the sampler with eta 0")

    def refusal(self, setting: MediaSetting) -> str | None:
        if self.method in setting.rounds:
            return None
        return f"method '{self.name}': '{self.method}' was not measured before it"

    def num_steps(self, setting: MediaSetting) -> int:
        """Return how many steps cost as much as the other method."""
        return max(round(setting.rounds[self.method]), 1)

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        num_steps = self.num_steps(setting)
        if self.solver is None:
            return models.plain(setting, num_steps, setting.eta if self.eta is None else self.eta)
        return SolverPipeline(
            models.target,
            num_steps,
            self.solver,
            guidance=setting.guidance,
            batch_size=setting.batch_size,
        )


@dataclass(frozen=True)
class EqualSeconds(EqualRounds):
    """The target alone with as many steps as fit into the other method's seconds.

    Seconds are those of a batch, of both in turns; options as for `EqualRounds`.  The row says how
    equal they are when all methods are timed.
    """

    kind = "equal seconds"

    def num_steps(self, setting: MediaSetting) -> int:
        return max(round(setting.num_steps * setting.shares[self.method]), 1)


class DraftedSteps(SamplingMethod):
    """Steps that something cheaper guesses and the target verifies: the plain sampler's law."""

    def refusal(self, setting: MediaSetting) -> str | None:
        if setting.eta > 0:
            return None
        return f"method '{self.name}': with eta 0 steps have no law that a draft could keep"


@dataclass(frozen=True)
class FreeDraft(DraftedSteps):
    """Drafts that need no training: what the target said last goes on.

    Args:
        name: what the table calls it.
        draft: the target's last "estimate" of the data, its last "velocity", or its "first-block"
            with what the others added last.
        window: steps that are drafted in a round, at most; auto: measured costs choose.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    draft: Free = "estimate"
    window: Window = 8
    tasks: list[str] | None = None
    kind = "free draft"

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        drafter = free_drafter(self.draft, models.target, setting.guidance)
        assert drafter is not None
        return models.drafted(setting, drafter, drafted_lengths(drafter, self.window))


@dataclass(frozen=True)
class TrainedDraft(DraftedSteps):
    """Drafts of a trained drafter: residual, of a whole window, or a smaller diffusion model.

    Args:
        name: what the table calls it.
        run: a run folder, or its draft/.
        window: steps that are drafted in a round, at most; auto: measured costs choose.
        quantize: what is int8 here, "drafter", "target" or "both"; what is not keeps the dtype it
            has in the other rows.  The law of a target in int8 is not the plain sampler's, which
            the row says.
        quantize_method: int8_weight_only or int8_dynamic.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str
    window: Window = 8
    quantize: Quantized = "none"
    quantize_method: Method = USUAL
    tasks: list[str] | None = None
    kind = "trained draft"

    def __post_init__(self) -> None:
        if self.quantize == "none" and self.quantize_method != USUAL:
            raise ValueError(
                f"method '{self.name}': quantize_method says how quantize converts, and nothing is "
                "to be converted"
            )

    def missing(self) -> str | None:
        return missing_drafter(self.name, self.run)

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        drafter = models.drafter(self.run, setting.guidance)
        given = 0 if self.window == "auto" else self.window
        if isinstance(drafter, WindowDenoiser) and given > drafter.num_steps:
            raise ValueError(
                f"method '{self.name}': the drafter of '{self.run}' guesses {drafter.num_steps} "
                f"steps at once, not {given}"
            )
        target = models.target
        if self.quantize != "none":  # copies: the other rows draw with the models as they are
            target, drafter = copy.deepcopy((target, drafter))
            quantize_denoisers(target, drafter, self.quantize, self.quantize_method)
        return models.drafted(setting, drafter, drafted_lengths(drafter, self.window), target)


def missing_drafter(method: str, run: str) -> str | None:
    """Say what the run folder of a method's drafter lacks; None when all is there."""
    if not Path(run).is_dir():
        return f"method '{method}': there is no folder '{run}'"
    if not (draft_folder(run) / RECORD).is_file():
        return f"method '{method}': '{run}' holds no finished drafter"
    return None
