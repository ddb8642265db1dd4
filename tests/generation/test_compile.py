"""Compiled passes decode as eager ones do; on a GPU too, where greedy identity is tested again."""

from __future__ import annotations

import shutil

import pytest
import torch

from specstream.drafters import DraftModel, LookupFirst
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.verification import BlockRejection, TokenRejection
from tests.toys import letters, nearby, toy_lm

VOCABULARY = 16
PROMPTS = ([1, 2, 3, 4], [7])
SAMPLED = Sampling(0.8, top_k=12, top_p=0.95, repetition_penalty=1.1)
NEW = 12


def texts(
    target: PretrainedLM,
    draft: PretrainedLM,
    compile: bool,
    sampling: Sampling,
    lengths: DraftLength | None = None,
    lookup: bool = False,
) -> list[list[int]]:
    drafter = DraftModel(target, lambda: draft)
    pipeline = SpeculativePipeline(
        target, LookupFirst(target, lambda _: drafter, 2) if lookup else drafter, letters(),
        BlockRejection(), lengths or FixedLength(2), sampling, Limits(NEW), 2, compile,
        costs=StepCosts(1.0, (0, 1.1, 1.2), (0, 0.1, 0.2)),
    )  # fmt: skip
    return [completion.tokens for completion in pipeline.complete(PROMPTS, seed=1)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_pipeline_decodes_what_an_eager_one_does() -> None:
    """Sampled with all warpers, so coins and laws are compared; near the limit K is cut."""
    target = toy_lm(VOCABULARY)
    draft = nearby(target, 0.3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = texts(target, draft, True, SAMPLED)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == texts(target, draft, False, SAMPLED)
    assert graphs <= 3, "one each for drafting, verifying and a plain pass, near the limit too"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [TokenRejection(), BlockRejection()], ids=["token", "block"])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, NEW + 3])
def test_greedy_text_on_a_gpu_is_plain_greedy_text(num_tokens: int, rule) -> None:
    target = toy_lm(VOCABULARY, num_layers=2)
    draft = nearby(target, 0.3).to("cuda")
    target = target.to("cuda")
    greedy = Sampling(temperature=0.0)
    plain = AutoregressivePipeline(target, letters(), greedy, Limits(NEW), 2).complete(PROMPTS)
    pipeline = SpeculativePipeline(
        target, DraftModel(target, lambda: draft), letters(), rule, FixedLength(num_tokens),
        greedy, Limits(NEW), 2,
    )  # fmt: skip
    assert [c.tokens for c in pipeline.complete(PROMPTS)] == [c.tokens for c in plain]


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", [False, True], ids=["draft model", "lookup first"])
def test_a_gpu_decodes_what_a_cpu_does(lookup: bool) -> None:
    def run(device: str) -> list[list[int]]:
        target = toy_lm(VOCABULARY)
        draft = nearby(target, 0.3).to(device)
        return texts(target.to(device), draft, False, SAMPLED, CostModelLength(2), lookup)

    assert run("cuda") == run("cpu")


@pytest.mark.gpu
@pytest.mark.slow
def test_a_compiled_pipeline_on_a_gpu_decodes_what_an_eager_one_does() -> None:
    target = toy_lm(VOCABULARY)
    draft = nearby(target, 0.3).to("cuda")
    target = target.to("cuda")
    torch._dynamo.reset()
    assert texts(target, draft, True, SAMPLED) == texts(target, draft, False, SAMPLED)
