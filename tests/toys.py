"""Tiny models, a letter tokenizer, exact laws and a chi-square test, for tests that decode."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specstream.drafters import Drafter
from specstream.drafters.static_tree import StaticTree, product_paths
from specstream.models import PretrainedLM, SlotCache, UntrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Completion, Context, Law, Observation, TokenDraft
from specstream.verification import TokenRejection
from specstream.verification.rejection import ChainTests

VOCABULARY = 5


@dataclass
class Letters:
    """A tokenizer whose token i is the i-th letter; `eos_token_id` ends a text and has none."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        return "".join(chr(ord("a") + token) for token in tokens if token != self.eos_token_id)

    def get_vocab(self) -> dict[str, int]:
        return {chr(ord("a") + token): token for token in range(26)}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to write."""


def letters(eos: int | None = None) -> TextProcessor:
    """Return a processor of letters."""
    return TextProcessor(Letters(eos))  # type: ignore[arg-type]


def toy_lm(
    vocab_size: int = VOCABULARY,
    seed: int = 0,
    num_layers: int = 1,
    sharpness: float = 20.0,
    max_positions: int = 512,
    architecture: str = "llama",
    hidden_size: int = 16,
    attn_implementation: str = "sdpa",
) -> PretrainedLM:
    """Return an untrained model whose laws are peaked and depend on all of the context."""
    lm = UntrainedLM(
        vocab_size, hidden_size, 24, num_layers, 2, 1, max_positions, False, architecture,
        attn_implementation, seed,
    )  # fmt: skip
    return sharpened(lm, sharpness)


@torch.no_grad()
def sharpened(lm: PretrainedLM, sharpness: float = 20.0) -> PretrainedLM:
    """Scale fresh weights up in place, so that attention chooses and the laws are peaked."""
    for weight in lm.parameters():
        if weight.dim() > 1:
            weight.mul_(15)
    lm.head.weight.mul_(sharpness / 15)
    return lm.eval().requires_grad_(False)


@torch.no_grad()
def nearby(lm: PretrainedLM, amount: float = 0.3, seed: int = 1) -> PretrainedLM:
    """Return a perturbed copy: a drafter that is right often, not always."""
    other = copy.deepcopy(lm)
    noise = torch.Generator().manual_seed(seed)
    for weight in other.parameters():
        if weight.dim() > 1:
            weight.add_(torch.randn(weight.shape, generator=noise) * weight.std() * amount)
    return other


@torch.no_grad()
def joint_law(lm: PretrainedLM, prompt: Sequence[int], sampling: Sampling, size: int) -> Tensor:
    """Return the exact law of `size` tokens after `prompt`, float64, one axis for each token.

    From forward passes without a cache over every possible continuation.
    """
    vocab = lm.vocab_size
    tails = list(itertools.product(range(vocab), repeat=size - 1))
    tokens = torch.tensor([[*prompt, *tail] for tail in tails])
    logits = lm(tokens)[:, len(prompt) - 1 :].double()  # (N, size, V)
    marks = torch.nn.functional.one_hot(tokens, vocab).cumsum(1)[:, len(prompt) - 1 :] > 0
    p = probabilities(logits, sampling, marks)
    law = p[:, -1]  # (N, V) the last token given the others
    for i in range(size - 1):
        chosen = torch.tensor([tail[i] for tail in tails])
        law = law * p[:, i].gather(1, chosen[:, None])
    return law.view([vocab] * size)


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Return the p-value of `counts` under `law`; cells expected under 5 times are pooled."""
    counts, law = counts.flatten().double(), law.flatten()
    if counts[law == 0].sum() > 0:
        return 0.0
    expected = law * counts.sum()
    large = expected >= 5
    rest = expected[~large].sum()
    expected = torch.cat([expected[large], rest[None]])
    counts = torch.cat([counts[large], counts[~large].sum()[None]])
    if rest < 5:  # too little even together: counted with the smallest cell
        smallest = int(expected[:-1].argmin())
        expected[smallest] += expected[-1]
        counts[smallest] += counts[-1]
        expected, counts = expected[:-1], counts[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(float(len(counts) - 1), dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


def count_tokens(completions: Sequence[Completion], places: slice, vocab_size: int) -> Tensor:
    """Return how often each combination of tokens stands at `places` of the completions."""
    rows = torch.tensor([completion.tokens[places] for completion in completions])
    counts = torch.zeros([vocab_size] * rows.shape[1])
    counts.index_put_(tuple(rows.T), torch.ones(len(rows)), accumulate=True)
    return counts


class LossyRule(TokenRejection):
    """The negative control: accept whatever the target finds likely enough."""

    threshold = 0.25

    def tests(self, draft: object, p: Tensor) -> ChainTests:
        right = super().tests(draft, p)  # type: ignore[arg-type]
        likely = (right.numerators > self.threshold).to(p.dtype)
        return ChainTests(likely, torch.ones_like(likely), None)


class ScriptedLM(PretrainedLM):
    """A fake whose next token depends on the place alone: after slot i it says script[i + 1].

    It has no weights and counts its passes; `calls` are the widths T of all of them.
    """

    def __init__(self, script: Sequence[int], vocab_size: int = 26) -> None:
        torch.nn.Module.__init__(self)
        self.script = torch.tensor([*script, 0])
        self.vocab_size = vocab_size
        self.max_positions = None
        self.path = ""
        self.calls: list[int] = []

    device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]

    def new_cache(self, batch_size: int, capacity: int) -> SlotCache:
        return SlotCache(0, batch_size, capacity)

    def extend(
        self,
        tokens: Tensor,
        lengths: Tensor,
        cache: SlotCache,
        view: int,
        num_logits: int = 0,
        tree: object = None,
    ) -> Tensor:
        assert tree is None, "a script is a chain"
        self.calls.append(tokens.shape[1])
        slots = lengths[:, None] + torch.arange(tokens.shape[1])
        following = self.script[(slots + 1).clamp(max=len(self.script) - 1)]
        logits = 50.0 * torch.nn.functional.one_hot(following, self.vocab_size)
        return logits[:, -num_logits:] if num_logits else logits


def spell(text: str) -> list[int]:
    """Return the tokens of letters."""
    return Letters()(text)["input_ids"]


def stood(accepted: Sequence[int]) -> Observation:
    """What a drafter is told when so many of each row's drafted tokens stood."""
    counts = torch.tensor(accepted)
    return Observation(torch.zeros_like(counts), counts, accepted, torch.ones_like(counts))


class TreeOfLM(Drafter):
    """Trees of a language model's guesses, made without a cache: slow, and plainly right.

    `branching` children hang on each node of a depth.  `drawn` siblings are drawn without
    replacement and carry the law they were drawn from; else they are the likeliest tokens.
    """

    trees = True
    law = Law.DRAWN

    def __init__(self, lm: PretrainedLM, branching: Sequence[int], drawn: bool) -> None:
        super().__init__()
        self.lm, self.branching, self.drawn = lm, branching, drawn
        self.max_tokens = len(branching)
        paths = StaticTree(product_paths(branching)).paths
        places = {path: i for i, path in enumerate(paths)} | {(): -1}
        self.paths, self.parents = paths, [places[path[:-1]] for path in paths]

    def new_cache(self, batch_size: int, capacity: int) -> None:
        return None

    @torch.inference_mode()
    def propose(
        self, context: Context, cache: None, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        paths = [path for path in self.paths if len(path) <= num_tokens]
        rows = len(context.history)
        coins = noise.uniform(context.prompts, context.elements(len(paths)), Role.DRAFT)
        tokens = torch.zeros(rows, len(paths), dtype=torch.long)
        probs = torch.zeros(rows, len(paths), self.lm.vocab_size)
        for row, history in enumerate(context.history):
            texts = {(): list(history)}
            for node, path in enumerate(paths):
                law = self._law(texts[path[:-1]], sampling)
                siblings = [i for i, other in enumerate(paths[:node]) if other[:-1] == path[:-1]]
                law[tokens[row, siblings]] = 0.0
                if law.sum() == 0:  # every token that it can say is drafted already
                    law = torch.ones_like(law)
                law = law / law.sum()
                token = (
                    draw(law[None], coins[row, node : node + 1])[0] if self.drawn else law.argmax()
                )
                tokens[row, node], probs[row, node] = token, law
                texts[path] = [*texts[path[:-1]], int(token)]
        lengths = torch.full((rows,), len(paths))
        parents = torch.tensor(self.parents[: len(paths)]).expand(rows, -1)
        return TokenDraft(tokens, probs if self.drawn else None, lengths, parents, num_tokens)

    def _law(self, text: list[int], sampling: Sampling) -> Tensor:
        seen = torch.zeros(1, self.lm.vocab_size, dtype=torch.bool)
        seen[0, text] = True
        logits = self.lm(torch.tensor([text]))[:, -1]
        return probabilities(logits, sampling, seen)[0].clone()

    def check_target(self, target: torch.nn.Module, processor: TextProcessor) -> None:
        """Any target will do."""

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        raise NotImplementedError
