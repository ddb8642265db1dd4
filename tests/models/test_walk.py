"""A target taken apart is still the target, and one that is not is refused."""

from __future__ import annotations

import pytest
import torch

from specstream.models import PretrainedLM
from specstream.models.cache import NodeTree
from specstream.models.walk import read, walk
from tests.toys import toy_lm

VOCABULARY = 24
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def lm(request: pytest.FixtureRequest) -> PretrainedLM:
    model = toy_lm(VOCABULARY, num_layers=3, architecture=request.param, sharpness=5.0)
    return model.eval().requires_grad_(False)


def test_a_watched_pass_gives_the_logits_of_a_plain_one(lm: PretrainedLM) -> None:
    lengths = torch.tensor([0, 0])
    plain = lm.extend(TOKENS, lengths, lm.new_cache(2, 256), 256)
    seen = walk(lm, TOKENS, lengths, lm.new_cache(2, 256), 256, None, (0, 3))
    torch.testing.assert_close(seen.logits, plain)
    assert seen.features is not None and seen.features.shape == (2, 8, 32)
    tree = NodeTree(torch.arange(8).expand(2, 8), torch.ones(2, 8, 8).tril().bool())
    if not any(lm.windows.values()):
        chain = walk(lm, TOKENS, lengths, lm.new_cache(2, 256), 256, tree, (0,))
        torch.testing.assert_close(chain.logits, plain)


def test_features_are_what_transformers_calls_hidden_states(lm: PretrainedLM) -> None:
    hidden = lm.model(TOKENS, output_hidden_states=True).hidden_states
    positions = torch.arange(8).expand(2, 8)
    last, features = read(lm, TOKENS, positions, None, (0, 1, 3))
    first, second, final = features.chunk(3, -1)
    torch.testing.assert_close(first, hidden[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, hidden[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, hidden[3], atol=1e-5, rtol=1e-5)
    assert torch.equal(final, last)


def test_reading_with_a_cache_and_without_shows_the_same(lm: PretrainedLM) -> None:
    positions = torch.arange(8).expand(2, 8)
    _, whole = read(lm, TOKENS, positions, None, (1,))
    cache = lm.new_cache(2, 256)
    walk(lm, TOKENS[:, :5], torch.tensor([0, 0]), cache, 256, None, (1,))
    rest = walk(lm, TOKENS[:, 5:], torch.tensor([5, 5]), cache, 256, None, (1,))
    torch.testing.assert_close(rest.features, whole[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_model_that_does_more_between_its_parts_is_refused() -> None:
    lm = toy_lm(VOCABULARY, num_layers=2)
    lm.model.base_model.register_forward_hook(
        lambda module, inputs, output: output.__class__(last_hidden_state=2 * output[0])
    )
    with pytest.raises(ValueError, match="does more than pass hidden states"):
        assert lm.decoder


def test_a_model_that_rescales_its_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_scale in its config"):
        assert toy_lm(VOCABULARY, num_layers=2, architecture="cohere").decoder


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("gpt_bigcode", "'gpt_bigcode' does not come apart: its layers take no past_key_values"),
        ("gemma3_text", "'gemma3_text' does not come apart: .* missing .* 'layer_type'"),
    ],
)
def test_a_model_whose_parts_are_called_in_another_way_is_refused(
    architecture: str, line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        assert toy_lm(VOCABULARY, num_layers=2, architecture=architecture).decoder
