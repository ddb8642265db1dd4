"""How many plain steps fit into another method's seconds: chosen from runs in turns.

The seconds in which two methods drew their samples one after the other say little: what else the
machine does meanwhile happens to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specstream.benchmark.media_methods import (
    EqualSeconds,
    MediaModels,
    MediaSetting,
    SamplingRunner,
)
from specstream.benchmark.timing import Plan, alternate
from specstream.generation.denoising_sampler import DenoisingSampler

REPEATS = 3  # at least, of a batch
ATTEMPTS = 3  # a run has a fixed cost, so that the seconds of a step depend on how many there are


def equal_seconds(
    method: EqualSeconds,
    other: DenoisingSampler,
    models: MediaModels,
    setting: MediaSetting,
    prompts: Sequence[int],
    seed: int,
    repeats: int,
) -> MediaSetting:
    """Return the setting with the share at which `method` takes as long as `other`.

    One batch of `prompts` is drawn by both in turns, by the plain target with the steps of the
    setting's share, and with those that its median seconds ask for until they stay.
    """
    batch = [[number] for number in prompts]
    plan = Plan(batch, [list(range(len(batch)))], max(repeats, REPEATS), 0, seed, models.place)
    for _ in range(ATTEMPTS):
        num_steps = method.num_steps(setting)
        runners = [SamplingRunner(models, p) for p in (other, method.pipeline(models, setting))]
        (asked, plain), complete = alternate(runners, plan)
        if not complete:
            raise KeyboardInterrupt
        share = num_steps / setting.num_steps * asked.total / plain.total
        setting = replace(setting, shares={**setting.shares, method.method: share})
        if method.num_steps(setting) == num_steps:
            break
    return setting
