"""Warpers against those of transformers, draws at their edges, noise against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from specstream.sampling import Noise, Role, Sampling, draw, probabilities

OPTIONS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=3.0),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(top_p=0.01),
    Sampling(min_p=0.1),
    Sampling(temperature=0.7, top_k=12, top_p=0.9),
    Sampling(temperature=1.4, top_k=12, top_p=0.7, min_p=0.05),
    Sampling(top_p=0.9, min_p=0.2),
    Sampling(temperature=0.8, repetition_penalty=1.7),
    Sampling(temperature=0.8, top_k=7, top_p=0.6, min_p=0.1, repetition_penalty=0.8),
]
ALMOST_ONE = 1 - 2.0**-53


def logits(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=noise) * 2


def warped_by_transformers(scores: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    from transformers.generation import logits_process as reference

    chain = []
    if sampling.repetition_penalty != 1:
        chain.append(reference.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        chain.append(reference.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(reference.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(reference.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(reference.MinPLogitsWarper(sampling.min_p))
    for warp in chain:
        scores = warp(tokens, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("sampling", OPTIONS, ids=repr)
def test_the_law_is_the_one_transformers_makes_of_the_same_options(sampling: Sampling) -> None:
    scores = logits(16, 50)
    tokens = torch.arange(16 * 6).view(16, 6) % 50
    seen = torch.zeros(16, 50, dtype=torch.bool).scatter(-1, tokens, True)
    made = probabilities(scores, sampling, seen)
    torch.testing.assert_close(made, warped_by_transformers(scores, tokens, sampling))


@pytest.mark.parametrize("sampling", [*OPTIONS, Sampling(temperature=0.0)], ids=repr)
def test_a_law_does_not_depend_on_the_rows_around_it(sampling: Sampling) -> None:
    scores = logits(2, 3, 40)
    seen = scores > 1
    together = probabilities(scores, sampling, seen)
    for b in range(2):
        for i in range(3):
            alone = probabilities(scores[b, i], sampling, seen[b, i])
            torch.testing.assert_close(together[b, i], alone, rtol=1e-6, atol=0)


def test_temperature_zero_is_a_one_hot_law_and_the_lowest_id_wins_a_tie() -> None:
    law = probabilities(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), Sampling(temperature=0.0))
    assert law.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    cold = Sampling(temperature=0.0, top_k=2, top_p=0.5, min_p=0.5)
    assert torch.equal(probabilities(logits(9, 30), cold).argmax(-1), logits(9, 30).argmax(-1))


def test_a_penalty_can_change_the_greedy_token() -> None:
    scores, seen = torch.tensor([2.0, 1.9, -1.0]), torch.tensor([True, False, True])
    law = probabilities(scores, Sampling(temperature=0.0, repetition_penalty=1.5), seen)
    assert law.tolist() == [0.0, 1.0, 0.0]


def test_tokens_that_tie_with_the_last_one_kept_stay() -> None:
    scores = torch.tensor([1.0, 0.0, 1.0, 2.0])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        assert (probabilities(scores, sampling) > 0).tolist() == [True, False, True, True]


def test_top_p_keeps_the_best_token_however_small_it_is() -> None:
    law = probabilities(logits(64, 3000), Sampling(top_p=1e-9))
    assert torch.equal(law.amax(-1), torch.ones(64))


def test_the_result_is_float32_or_float64() -> None:
    for sampling in OPTIONS[:-2]:
        assert probabilities(logits(2, 9).bfloat16(), sampling).dtype == torch.float32
        assert probabilities(logits(2, 9).double(), sampling).dtype == torch.float64


def test_the_arguments_are_left_alone() -> None:
    scores = logits(4, 9)
    for sampling in OPTIONS:
        probabilities(scores, sampling, scores > 0)
    assert torch.equal(scores, logits(4, 9))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("temperature", -0.5, "temperature must be 0 .* got -0.5"),
        ("temperature", 1e-9, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("top_k", -1, "top_k must be 0 .* got -1"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_p", 1.5, "top_p"),
        ("min_p", -0.1, r"min_p must be in \[0, 1\], got -0.1"),
        ("repetition_penalty", 0.0, "repetition_penalty must be positive, got 0.0"),
    ],
)
def test_an_option_outside_its_range_is_one_clear_line(
    option: str, value: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**{option: value})  # type: ignore[arg-type]


def test_a_penalty_without_history_is_an_error() -> None:
    with pytest.raises(ValueError, match="repetition penalty needs `seen`"):
        probabilities(logits(2, 9), Sampling(repetition_penalty=1.1))


def test_draw_inverts_the_cdf() -> None:
    law = torch.tensor([0.25, 0.0, 0.5, 0.25])
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.74, 0.75, ALMOST_ONE], dtype=torch.float64)
    assert draw(law.expand(7, 4), uniforms).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_draw_never_returns_a_token_of_probability_zero() -> None:
    edges = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-52, ALMOST_ONE], dtype=torch.float64)
    for token in (0, 4, 8):
        one_hot = torch.zeros(5, 9).index_fill(1, torch.tensor(token), 1.0)
        assert draw(one_hot, edges).tolist() == [token] * 5
    holes = (logits(500, 97).softmax(-1) * (logits(500, 97, seed=1) > 1.5)).clamp(min=0)
    holes = holes[holes.sum(-1) > 0]
    for edge in edges:
        tokens = draw(holes * 0.37, edge.expand(len(holes)))
        assert (holes.gather(-1, tokens[:, None]) > 0).all()


def test_draw_takes_laws_that_are_not_normalised_and_any_leading_shape() -> None:
    law = logits(2, 3, 11).softmax(-1)
    uniforms = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert draw(law, uniforms).shape == (2, 3)
    assert torch.equal(draw(law, uniforms), draw(law * 2.0**-40, uniforms))
    assert draw(law[:, :0], uniforms[:, :0]).shape == (2, 0)


def test_both_ways_to_invert_a_cdf_agree() -> None:
    class Elsewhere(torch.Tensor):  # a CPU tensor that takes the path of other devices
        device = torch.device("meta")  # type: ignore[assignment]

    law = logits(400, 33).softmax(-1)
    uniforms = Noise(5).uniform(torch.zeros(400).long(), torch.arange(400), Role.DRAFT)
    other = draw(law.as_subclass(Elsewhere), uniforms)
    assert other.tolist() == draw(law, uniforms).tolist()


def test_drawn_tokens_follow_their_law() -> None:
    law = logits(20).softmax(-1)
    rows = 40_000
    uniforms = Noise(3).uniform(torch.zeros(1).long(), torch.arange(rows)[None], Role.CORRECT)[0]
    counts = draw(law.expand(rows, -1), uniforms).bincount(minlength=20)
    assert chi_square_p_value(counts, law * rows) > 0.01


def chi_square_p_value(counts: Tensor, expected: Tensor) -> float:
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    degrees = torch.tensor(float(counts.numel() - 1), dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


def splitmix64(word: int) -> int:
    """The finaliser as published, in Python integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def test_noise_is_splitmix64_of_its_key() -> None:
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(golden) == 0xE220A8397B1DCDAF  # the generator's first number for seed 0
    noise = Noise(seed=42)
    made = noise.uniform(torch.tensor([0, 7]), torch.tensor([[0, 1], [5, 2**31 - 1]]), Role.ACCEPT)
    key = noise.keys[Role.ACCEPT].item() % 2**64
    for (b, prompt), elements in zip([(0, 0), (1, 7)], [[0, 1], [5, 2**31 - 1]], strict=True):
        for i, element in enumerate(elements):
            word = splitmix64(((prompt << 32) + element) * golden + key & (2**64 - 1))
            assert made[b, i].item() == (word >> 11) / 2**53


def test_noise_depends_on_its_key_alone() -> None:
    noise, elements = Noise(1), torch.arange(12).view(4, 3)
    prompts = torch.tensor([5, 0, 9, 2])
    whole = noise.uniform(prompts, elements, Role.DRAFT)
    assert whole.dtype == torch.float64 and whole.shape == (4, 3)
    for b in (3, 1):
        row = noise.uniform(prompts[b : b + 1], elements[b : b + 1], Role.DRAFT)
        assert torch.equal(row[0], whole[b])
    assert torch.equal(Noise(1).uniform(prompts, elements, Role.DRAFT), whole)
    assert torch.equal(noise.uniform(prompts, elements[:, 0], Role.DRAFT), whole[:, 0])


def every_role(noise: Noise, prompts: Tensor, elements: Tensor) -> Tensor:
    return torch.stack([noise.uniform(prompts, elements, role) for role in Role])


def test_noise_is_uniform_and_independent_across_seeds_prompts_elements_and_roles() -> None:
    prompts, elements = torch.arange(64), torch.arange(300).expand(64, -1)
    grid = torch.stack([every_role(Noise(seed), prompts, elements) for seed in (0, 1, 2**40)])
    assert grid.min() >= 0 and grid.max() < 1
    assert len(grid.flatten().unique()) == grid.numel()
    for cells in grid.flatten(2).flatten(0, 1):  # one stream for each seed and role
        counts = (cells * 50).long().bincount(minlength=50)
        assert chi_square_p_value(counts, torch.full((50,), len(cells) / 50)) > 1e-3
    centred = grid - 0.5
    pairs = {
        "seed": (centred[0], centred[1]),
        "role": (centred[:, 0], centred[:, 1]),
        "prompt": (centred[:, :, 1:], centred[:, :, :-1]),
        "element": (centred[..., 1:], centred[..., :-1]),
        "distant element": (centred[..., 256:], centred[..., :-256]),
    }
    for name, (one, other) in pairs.items():
        correlation = (one * other).mean() * 12 * one.numel() ** 0.5
        assert correlation.abs() < 4, name
        joint = ((one + 0.5) * 8).long() * 8 + ((other + 0.5) * 8).long()
        counts = joint.flatten().bincount(minlength=64)
        assert chi_square_p_value(counts, torch.full((64,), one.numel() / 64)) > 1e-3, name


def round_of(sampling: Sampling):  # type: ignore[no-untyped-def]
    def one(scores: Tensor, noise: Noise, prompts: Tensor, elements: Tensor) -> Tensor:
        law = probabilities(scores, sampling, scores > 1)
        return draw(law, noise.uniform(prompts, elements, Role.CORRECT))

    return one


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(0.7, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
        Sampling(0.7, top_p=0.9),
    ],
    ids=repr,
)
def test_a_compiled_round_is_one_graph_that_serves_every_seed(sampling: Sampling) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = round_of(sampling)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=counter)
    prompts, elements = torch.tensor([3, 1]), torch.arange(6).view(2, 3)
    with torch.inference_mode():
        for seed in range(4):
            scores = logits(2, 3, 64, seed=seed)
            made = compiled(scores, Noise(seed), prompts, elements)
            assert torch.equal(made, eager(scores, Noise(seed), prompts, elements))
    assert counter.frame_count == 1


def test_compiled_noise_is_the_same_noise() -> None:
    compiled = torch.compile(lambda *key: every_role(*key), fullgraph=True, dynamic=False)
    key = Noise(8), torch.tensor([3, 2**31 - 1]), torch.arange(1000).expand(2, -1) * 2_000_003
    assert torch.equal(compiled(*key), every_role(*key))  # C++ lets int64 products wrap
