"""Self-speculation from prompts: what it fills, counts and refuses."""

from __future__ import annotations

import pytest
import torch

from specstream.data.tokenizer import train_character_tokenizer
from specstream.generation import Limits, Sampler, SelfSpeculativePipeline
from specstream.models import SelfSpeculativeHead, UntrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.structures import Guarantee

PROCESSOR = TextProcessor(train_character_tokenizer(["abcdefghijkl"]))


@pytest.fixture(scope="module")
def target() -> UntrainedMaskedLM:
    return UntrainedMaskedLM(16, 32, 48, 2, 2, max_positions=64, mask_id=1).eval()


def pipeline(target: UntrainedMaskedLM, **options: object) -> SelfSpeculativePipeline:
    head = SelfSpeculativeHead(target)
    with torch.no_grad():  # not p = q, so that some drafts are rejected
        generator = torch.Generator().manual_seed(0)
        head.out.weight.normal_(std=0.5, generator=generator)
    sampler = Sampler(sampling=Sampling(1.0), limits=Limits(12, ignore_eos=True))
    return SelfSpeculativePipeline(target, head, PROCESSOR, sampler=sampler, **options)  # type: ignore[arg-type]


def test_a_batch_says_what_its_prompts_say_alone(target: UntrainedMaskedLM) -> None:
    prompts = ["abc", "a[MASK]c[MASK:5]", "abcdefgh"]
    together = pipeline(target, batch_size=3).complete(prompts, seed=3)
    alone = pipeline(target, batch_size=1).complete(prompts, seed=3)
    assert together == alone
    assert [len(found.tokens) for found in together] == [12, 6, 12]


def test_the_counts_are_those_of_the_rounds(target: UntrainedMaskedLM) -> None:
    made = pipeline(target, num_windows=3)
    steps = list(made.generate(["abc", "abcd"], seed=1))
    stats = made.stats
    assert made.guarantee is Guarantee.EXACT_LAW
    assert stats.elements == 24 == sum(len(step.filled) for step in steps)
    assert stats.target_calls == 6  # a window each, for two prompts
    assert stats.draft_calls == len(steps)
    assert sum(stats.accepted) == sum(len(step.drafted) for step in steps)
    assert 0 < sum(stats.accepted) < sum(stats.tested)
    assert 6 < made.full_passes < 6 + len(steps)
    plain = pipeline(target, num_windows=3, speculate=False)
    plain.complete(["abc", "abcd"], seed=1)
    assert plain.stats.draft_calls == 0
    assert plain.full_passes > made.full_passes


def test_what_an_order_at_random_cannot_have_is_refused(target: UntrainedMaskedLM) -> None:
    head = SelfSpeculativeHead(target)
    for sampler in (Sampler(guidance=1.0), Sampler(block_tokens=16)):
        with pytest.raises(ValueError, match="neither guidance nor block_tokens"):
            SelfSpeculativePipeline(target, head, PROCESSOR, sampler=sampler)
    with pytest.raises(ValueError, match="num_windows"):
        SelfSpeculativePipeline(target, head, PROCESSOR, num_windows=0)
