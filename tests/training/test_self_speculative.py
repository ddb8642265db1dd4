"""Training the causal layer of self-speculation: what is masked, summed and learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from specstream.cli import train
from specstream.drafters.self_speculative import load_head
from specstream.generation import SelfSpeculativeSampler
from specstream.models import PretrainedLM, SelfSpeculativeHead, UntrainedLM, UntrainedMaskedLM
from specstream.sampling import Noise, Role
from specstream.structures import TokenDraft, Verdict
from specstream.training import SelfSpeculativeModule
from specstream.training.self_speculative import OrderedMasks, sample_masks
from specstream.verification import TokenRejection
from tests.training.conftest import VOCABULARY

WORDS, MASK, EOS = 9, 8, 7


def small(seed: int = 0, **options: object) -> UntrainedMaskedLM:
    sizes = {"max_positions": 32, "tie_embeddings": False, "mask_id": MASK} | options
    return UntrainedMaskedLM(WORDS, 16, 24, 1, 2, seed=seed, **sizes)  # type: ignore[arg-type]


def module(stir: float = 0.2, **options: object) -> SelfSpeculativeModule:
    """A module whose head is as if trained, and the trunk's laws are not flat."""
    built = SelfSpeculativeModule(small, chunk_tokens=3, **options)  # type: ignore[arg-type]
    built.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.head.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * stir)
        built.target.model.get_output_embeddings().weight.mul_(20)
    return built


def batch(rows: int = 3, length: int = 10, prompt: int = 2) -> dict[str, Tensor]:
    tokens = torch.randint(EOS, (rows, length))
    scored = torch.ones_like(tokens).bool()
    scored[:, :prompt] = False
    return {
        "input_ids": tokens,
        "loss_mask": scored,
        "positions": torch.arange(length).repeat(rows, 1),
        "documents": torch.zeros_like(tokens),
    }


def packed() -> dict[str, Tensor]:
    """One row of two documents and padding, one row of a short document."""
    data = batch(2, 12, 1)
    data["documents"] = torch.tensor([[0] * 5 + [1] * 6 + [-1], [0] * 4 + [-1] * 8])
    data["positions"] = torch.tensor([[*range(5), *range(6), 0], [*range(4), *[0] * 8]])
    data["loss_mask"] &= data["documents"] >= 0
    data["loss_mask"][0, 5] = False  # first of its document
    return data


def noise_of(trained: SelfSpeculativeModule) -> Noise:
    return trained.epoch_noise()


def by_hand(
    trained: SelfSpeculativeModule, data: dict[str, Tensor]
) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Return (n, m, k, logits of p, token) of every masked place, each document by itself."""
    masks = sample_masks(data, noise_of(trained))
    found = []
    for g in range(len(masks.scored)):
        m, n = int(masks.real[g].sum()), int(masks.scored[g])
        row, columns = int(masks.rows[g, 0]), masks.columns[g, :m]
        own = data["documents"][row] == data["documents"][row, columns[0]]
        first = int(own.nonzero()[0, 0])
        tokens = data["input_ids"][row : row + 1, own]
        order = columns[None] - first
        canvas = tokens.clone()
        canvas[0, order[0]] = MASK
        hidden = trained.target.hidden(canvas, torch.ones(1, 1, *canvas.shape[1:] * 2).bool())
        said = tokens[:, order[0]]
        states = trained.head(hidden, order, said, torch.ones_like(order).bool())
        logits = trained.target.head(states)[0]
        found += [(n, m, k, logits[k], said[0, k]) for k in range(m)]
    return found


@pytest.mark.parametrize("build", [batch, packed])
def test_the_loss_is_the_sum_over_documents_of_n_times_their_mean(build: Callable) -> None:
    trained, data = module(), build()
    total = sum(
        n / m * cross_entropy(logits, said) for n, m, _, logits, said in by_hand(trained, data)
    )
    loss = trained.loss(data)
    torch.testing.assert_close(loss.total, total)
    assert loss.count == data["loss_mask"].sum() and not loss.metrics


def test_validation_measures_acceptance_and_a_bound() -> None:
    trained, data = module().eval(), packed()
    masks = sample_masks(data, noise_of(trained))
    places = by_hand(trained, data)
    hidden = trained.target.hidden(
        masks.hide(data["input_ids"], MASK),
        trained.target.mask(data["documents"], data["positions"]),
        data["positions"],
    )[masks.places][masks.real]
    q = trained.target.head(hidden).softmax(-1)
    acceptance = bound = drafted = 0.0
    for (n, m, k, logits, said), law in zip(places, q, strict=True):
        acceptance += n / m * torch.minimum(logits.softmax(-1), law).sum()
        drafted -= n / m * law[said].log()
        bound += n / (n - m + k + 1) * cross_entropy(logits, said)
    metrics = trained.loss(data).metrics
    expected = {"acceptance": acceptance, "draft_loss": drafted, "nll_bound": bound}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value)
    share = metrics["acceptance"] / data["loss_mask"].sum()
    assert 0.2 < share < 0.99


def test_a_fresh_head_has_the_loss_of_the_trunk() -> None:
    trained, data = module(stir=0.0).eval(), packed()
    loss = trained.loss(data)
    torch.testing.assert_close(loss.total.detach(), loss.metrics["draft_loss"])
    torch.testing.assert_close(loss.metrics["acceptance"], loss.count.float())


def test_the_bound_counts_every_token_of_an_order_once() -> None:
    """Averaged over the number of masks; the published weights count late tokens more."""
    n = 6
    once, published = torch.zeros(n), torch.zeros(n)
    for m in range(1, n + 1):
        masks = OrderedMasks(
            torch.zeros(1, m), torch.zeros(1, m), torch.ones(1, m).bool(), torch.tensor([n])
        )
        once[n - m :] += masks.bound_weights()[0] / n
        published[n - m :] += masks.weights()[0] / n
    torch.testing.assert_close(once, torch.ones(n))
    torch.testing.assert_close(published.sum(), torch.tensor(float(n)))
    assert (published.diff() > 0).all()


def test_the_number_of_masks_is_uniform_and_so_are_masks_and_order() -> None:
    data = batch(3000, 6, 2)
    data["input_ids"] = torch.randint(100_000, (3000, 6))  # no two rows alike
    masks = sample_masks(data, Noise(1))
    num = masks.real.sum(1)
    assert (num.bincount(minlength=5)[1:] / 3000 - 1 / 4).abs().max() < 0.03
    for k in (0, 1):  # the first and the second of an order, where there is one
        columns = masks.columns[:, k][masks.real[:, k]]
        shares = columns.bincount(minlength=6) / len(columns)
        assert shares[:2].sum() == 0 and (shares[2:] - 1 / 4).abs().max() < 0.03
    hidden = masks.hide(data["input_ids"], -1) == -1
    assert torch.equal(hidden.sum(1), num) and not hidden[:, :2].any()
    orders = masks.columns[masks.real.all(1)].tolist()
    assert all(sorted(row) == [2, 3, 4, 5] for row in orders)


def test_a_row_is_masked_alike_whichever_batch_it_is_in_and_anew_in_each_epoch() -> None:
    data = packed()
    whole = sample_masks(data, Noise(5))
    rows = [{name: value[i : i + 1] for name, value in data.items()} for i in range(2)]
    shown = [sample_masks(row, Noise(5)).hide(row["input_ids"], MASK) for row in rows]
    assert torch.equal(whole.hide(data["input_ids"], MASK), torch.cat(shown))
    many = batch(20)
    first, second = (sample_masks(many, Noise(seed)).real.sum(1) for seed in (5, 6))
    assert not torch.equal(first, second)


def test_nothing_scored_is_a_loss_of_zero_with_gradients() -> None:
    trained, data = module(), batch(1, 4, 4)
    loss = trained.loss(data)
    loss.total.backward()
    assert loss.count == 0 and float(loss.total.detach()) == 0
    assert all(p.grad is not None for p in trained.head.parameters())


def test_only_the_head_is_trained() -> None:
    trained = module()
    trained.loss(batch()).total.backward()
    assert all(p.grad is None for p in trained.target.parameters())
    names = trained.trained_names()
    assert names and all(name.startswith("head.") for name in names)
    assert all(p.grad.any() for p in trained.head.parameters())


def test_training_learns_what_the_trunk_cannot_say() -> None:
    """Rows of one repeated token: any token is likely first, and only that one after it."""
    trained = module(stir=0.0)
    optimizer = torch.optim.Adam(trained.head.parameters(), lr=0.01)
    data = batch(32, 8, 1)
    data["input_ids"][:, 1:] = torch.randint(4, (32, 1))
    data["input_ids"][:, 0] = torch.arange(32) % EOS  # so that rows have coins of their own
    before = trained.eval().loss(data)
    for step in range(60):
        trained.run_seed = step
        optimizer.zero_grad()
        loss = trained.train().loss(data)
        (loss.total / loss.count).backward()
        optimizer.step()
    trained.run_seed = 0
    after = trained.eval().loss(data)
    assert after.total < 0.6 * before.total
    assert after.metrics["nll_bound"] < 0.7 * before.metrics["nll_bound"]


class Watched(TokenRejection):
    """Token-wise rejection that keeps the first draft and the laws it was held against."""

    def __call__(self, draft: TokenDraft, p: Tensor, *coins: Tensor) -> Verdict:
        if not seen:
            seen.append((draft, p))
        return super().__call__(draft, p, *coins)


seen: list[tuple[TokenDraft, Tensor]] = []


def test_training_and_decoding_compute_the_same_laws() -> None:
    trained = module().eval()
    data = batch(4, 9, 0)
    tokens, noise = data["input_ids"], Noise(3)
    masked = torch.rand(4, 9) < 0.6
    masked[0, :2], masked[1] = True, True
    seen.clear()
    sampler = SelfSpeculativeSampler(trained.target, trained.head, verifier=Watched())
    prompts, lengths = torch.arange(4), torch.full((4,), 9)
    next(iter(sampler.fill(tokens, masked, lengths, prompts, noise)))
    ((draft, p),) = seen
    coins = noise.uniform(prompts, data["positions"], Role.ORDER).masked_fill(~masked, 2.0)
    columns = coins.argsort(1)[:, : draft.tokens.shape[1]]
    real = torch.arange(columns.shape[1]) < masked.sum(1, keepdim=True)
    rows = prompts[:, None].expand_as(columns)
    masks = OrderedMasks(rows, columns, real, masked.sum(1))
    drafted = tokens.scatter(1, columns, torch.where(real, draft.tokens, tokens.gather(1, columns)))
    hidden = trained.target.hidden(
        masks.hide(drafted, MASK), trained.target.mask(data["documents"], data["positions"])
    )[masks.places]
    states = trained.head.read(hidden, columns, drafted[masks.places])
    laws = trained.target.head(states).softmax(-1)
    torch.testing.assert_close(laws[real], p[:, :-1][real])
    torch.testing.assert_close(trained.target.head(hidden).softmax(-1)[real], draft.probs[real])


# The module in a run


def fit(trained: SelfSpeculativeModule, monkeypatch: pytest.MonkeyPatch, **data: object) -> None:
    """Check `trained` against data, as a trainer does before the first step."""

    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return WORDS

    layout = SimpleNamespace(sequence_length=data.pop("length", 16), pack=data.pop("pack", False))
    tokenizer = Tokenizer(mask_token_id=data.pop("mask", MASK), eos_token_id=EOS)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=tokenizer, layout=layout), default_root_dir="run"
    )
    monkeypatch.setattr(SelfSpeculativeModule, "trainer", trainer)
    trained.on_fit_start()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"mask": None}, "no mask token; set data.init_args.mask_token true"),
        ({"mask": 3}, "mask token is 8"),
        ({"length": 33}, "sequence_length 33 is longer than the 32 positions of the target"),
        ({"pack": True}, "pad_canvas needs one document a row"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        fit(module(pad_canvas="pack" in data), monkeypatch, **data)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: small(block_length=4), "the target must be bidirectional"),
        (lambda: UntrainedLM(WORDS, 16, 24, 1, 2), "must be a masked diffusion language model"),
    ],
)
def test_other_targets_are_refused(target: Callable[[], PretrainedLM], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SelfSpeculativeModule(target).configure_model()  # type: ignore[arg-type]


def test_a_padded_canvas_learns_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, data = module(pad_canvas=True), packed()
    for name in data:
        data[name] = data[name][1:]  # one document of four tokens, three of them scored
    fit(trained, monkeypatch)
    monkeypatch.setattr(SelfSpeculativeModule, "current_epoch", 0)
    assert trained.loss(data).count == 3 + 8


def test_a_run_trains_the_head_and_writes_what_loads_again(
    tmp_path: Path, write_config: Callable[..., str]
) -> None:
    arguments = {"vocab_size": VOCABULARY + 1, "hidden_size": 16, "intermediate_size": 32}
    arguments |= {"num_layers": 1, "num_heads": 2, "max_positions": 64}
    model = {
        "class_path": "specstream.training.SelfSpeculativeModule",
        "init_args": {
            "target": {"class_path": "specstream.models.UntrainedMaskedLM", "init_args": arguments}
        },
    }
    path = Path(write_config("head", model))
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"] |= {"mask_token": True}
    path.write_text(yaml.safe_dump(config))
    assert train(["--config", str(path)]) == 0
    run = tmp_path / "head"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (*_, last) = [row for row in rows if "val/acceptance" in row]
    assert 0 < last["val/acceptance"] <= 1 and last["val/nll_bound"] > 0
    names = set(torch.load(run / "last.ckpt", weights_only=False)["state_dict"])
    assert names and all(name.startswith("head.") for name in names)
    trunk = UntrainedMaskedLM(**arguments)  # type: ignore[arg-type]
    loaded = load_head(run / "draft", trunk)
    assert isinstance(loaded, SelfSpeculativeHead) and loaded.out.weight.any()
    with pytest.raises(ValueError, match="was trained on the trunk"):
        load_head(run / "draft", UntrainedMaskedLM(**arguments, seed=1))  # type: ignore[arg-type]
