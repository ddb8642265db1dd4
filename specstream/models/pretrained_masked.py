"""Masked diffusion language models: decoders of `transformers` under a full or a block mask.

The same layers as a causal LM, but a position sees every other of its text (a *bidirectional*
model), or all of its own and of earlier blocks (a *block* model, whose finished blocks have keys
and values that can be cached).  The network fills positions that hold the mask token; how they came
to be masked and which of them are filled next is not known here.

Shapes: B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from specstream.models.cache import SlotCache, as_attention_reads
from specstream.models.fresh import fresh_model
from specstream.models.masked_weights import load_masked_model
from specstream.models.saving import save_model
from specstream.models.supported import FORM, refuse_unsupported
from specstream.models.weights import load_model, resolve_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROBE = 4  # tokens on which a network is tried


@dataclass(frozen=True, slots=True)
class MaskedForm:
    """How a network is used as a masked model.

    Attributes:
        mask_id: the token that stands for what is not known yet; None: the data's tokenizer says.
        block_length: positions of a block; None: every position sees every other.
        shifted: the output at a position speaks of the next one, as in the causal LM that the
            weights come from (Dream, Fast-dLLM v2).
        corruption: the share of visible tokens that training replaced and asked about; above 0 the
            model can score a token that it sees.
    """

    mask_id: int | None = None
    block_length: int | None = None
    shifted: bool = False
    corruption: float = 0.0

    def __post_init__(self) -> None:
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, not {self.block_length}")
        if self.block_length is not None and self.shifted:
            raise ValueError("a block model cannot be shifted: a block has no place before it")
        if self.mask_id is not None and self.mask_id < 0:
            raise ValueError(f"mask_id must not be negative, got {self.mask_id}")
        if not 0 <= self.corruption < 1:
            raise ValueError(f"corruption must be in [0, 1), got {self.corruption}")


class PretrainedMaskedLM(nn.Module):
    """A masked diffusion LM from a folder or the model hub.

    Folders that this project wrote say in config.json how they are meant; LLaDA and Dream are
    loaded onto the classes of Llama and Qwen2.  `dtype` and `device` as for `PretrainedLM`.
    Raises ValueError in one line for a causal LM, a missing path or damaged weights.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        device: str = "auto",
    ) -> None:
        super().__init__()
        self.path = path
        model, form = load_masked_model(path, resolve_dtype(dtype, device), attn_implementation)
        self._adopt(model, MaskedForm(**form))

    @classmethod
    def of(cls, model: PreTrainedModel, form: MaskedForm, path: str = "") -> PretrainedMaskedLM:
        """Wrap a `transformers` model that is already in memory."""
        lm = cls.__new__(cls)
        nn.Module.__init__(lm)
        lm.path = path
        lm._adopt(model, form)
        return lm

    def _adopt(self, model: PreTrainedModel, form: MaskedForm) -> None:
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise ValueError(f"a masked model has full attention only, not {sorted(kinds)[0]}")
        self.model = model
        self.form = form
        self.config: PretrainedConfig = model.config
        self.vocab_size: int = model.config.vocab_size
        self.num_layers: int = model.config.num_hidden_layers
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        room = self.max_positions
        if room is not None and form.block_length is not None and form.block_length > room:
            raise ValueError(f"block_length {form.block_length} is more than the {room} positions")

    @torch.no_grad()
    def _check(self) -> None:
        """Raise ValueError where the network cannot be run under a mask of our own."""
        refuse_unsupported(self.config)
        kind = self.config.model_type
        tokens = torch.zeros(2, PROBE, dtype=torch.long, device=self.device)
        tokens[1, -1] = 1 % self.vocab_size
        seen = torch.ones(2, 1, PROBE, PROBE, dtype=torch.bool, device=self.device)
        places = torch.arange(PROBE, device=self.device).expand(2, -1)
        training = self.training
        try:
            first, other = self.eval().hidden(tokens, seen, places)[:, 0]
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"model type {kind!r} cannot be run under a mask that is not causal"
            ) from error
        self.train(training)
        if self.vocab_size > 1 and torch.equal(first, other):
            raise ValueError(f"model type {kind!r} does not look to the right under any mask")

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""
        assert self.form.mask_id is not None, "the training module takes it from the tokenizer"
        return self.form.mask_id

    @property
    def block_length(self) -> int | None:
        """Positions of a block, None for a bidirectional model."""
        return self.form.block_length

    @property
    def device(self) -> torch.device:
        """The device the weights are on."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are in."""
        return self.model.dtype

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The output projection (..., D) -> (..., V); the mask token is never predicted (SUBS)."""
        return lambda hidden: self.without_mask(self.model.get_output_embeddings()(hidden))

    def without_mask(self, logits: Tensor) -> Tensor:
        """Return logits (..., V) under which the mask token has probability 0."""
        hidden = torch.arange(self.vocab_size, device=logits.device) == self.mask_id
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)

    def hidden(self, tokens: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the states (B, T, D) that `head` reads, for tokens (B, T), without a cache.

        `mask` (B, 1, T, T) bool says which position sees which; see `full_mask`, `block_mask`.
        """
        output = self.model.base_model(
            input_ids=tokens,
            attention_mask=self._as_attention_reads(mask),
            position_ids=positions,
            use_cache=False,
        )
        return self._spoken(output.last_hidden_state, positions)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of canvases (B, T); beyond `lengths` (B,) a row is padding."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        real = steps >= 0 if lengths is None else steps < lengths[:, None]  # (T,) or (B, T)
        documents = torch.where(real, 0, -1).expand(tokens.shape)
        places = steps.expand(tokens.shape)  # said, because some models read them off the mask
        return self.head(self.hidden(tokens, self.mask(documents, places), places))

    def mask(self, documents: Tensor, positions: Tensor) -> Tensor:
        """Return which position sees which, (B, 1, T, T), as this model is meant."""
        if self.block_length is None:
            return full_mask(documents)
        return block_mask(documents, positions, self.block_length)

    def new_cache(self, batch_size: int, capacity: int) -> SlotCache:
        """Return an empty static cache for `batch_size` rows of `capacity` slots."""
        return SlotCache(self.num_layers, batch_size, capacity)

    def extend(
        self,
        tokens: Tensor,
        starts: Tensor,
        lengths: Tensor,
        cache: SlotCache,
        view: int,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Read whole blocks `tokens` (B, T) at slots starts + i over `cache`; return (B, T, V).

        `starts` (B,) are first slots of blocks, up to which the cache is to hold each row;
        `lengths` (B,) are those of the canvases: what lies beyond is seen by nobody.  `view` is how
        many slots the pass reads.  Reading a block again replaces its keys and values.  Of `asked`
        (B, N), indices into T, the logits are wanted, (B, N, V); None: of all.
        """
        assert self.block_length is not None, "a bidirectional model has no keys that stay valid"
        slots = starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        places = torch.arange(view, device=tokens.device)
        blocks = slots[:, :, None] // self.block_length
        seen = (places // self.block_length <= blocks) & (places < lengths[:, None, None])
        cache.open(slots, view)
        output = self.model.base_model(
            input_ids=tokens,
            attention_mask=self._as_attention_reads(seen[:, None]),
            position_ids=slots
            if self.max_positions is None
            else slots.clamp(max=self.max_positions - 1),
            past_key_values=cache,
            use_cache=True,
        )
        cache.close()
        states = output.last_hidden_state  # (B, T, D); a block model is never shifted
        if asked is not None:
            states = states.take_along_dim(asked[:, :, None], 1)  # (B, N, D)
        return self.head(states)

    def _spoken(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Move each state to the position that it speaks of; a document's first keeps its own."""
        if not self.form.shifted:
            return hidden
        before = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)
        return before if positions is None else hidden.where((positions == 0)[..., None], before)

    def _as_attention_reads(self, mask: Tensor) -> Tensor:
        return as_attention_reads(mask, self.config._attn_implementation, self.dtype)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a `transformers` folder in bfloat16 whose config.json says how it is meant."""
        save_model(self.model, folder, tokenizer, {FORM: asdict(self.form)})


class UntrainedMaskedLM(PretrainedMaskedLM):
    """A masked diffusion LM with fresh weights, from the numbers that size it.

    The arguments of `UntrainedLM`, and `block_length` for a block model.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        max_positions: int = 1024,
        tie_embeddings: bool = True,
        architecture: str = "llama",
        attn_implementation: str = "sdpa",
        seed: int = 0,
        block_length: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.path = ""
        model = fresh_model(
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            max_positions,
            tie_embeddings,
            architecture,
            attn_implementation,
            seed,
        )
        self._adopt(model, MaskedForm(mask_id, block_length))
        self._check()


class MaskedFromCausal(PretrainedMaskedLM):
    """A masked diffusion LM that begins with the weights of a causal LM.

    The embedding grows by one token where the vocabulary has no room for a mask.  `shifted` keeps
    what the weights know, that an output speaks of the next position (Gong et al. 2025); a block
    model cannot.
    """

    def __init__(
        self,
        path: str,
        block_length: int | None = None,
        shifted: bool = False,
        attn_implementation: str = "sdpa",
    ) -> None:
        nn.Module.__init__(self)
        self.path = path
        model = load_model(path, torch.float32, attn_implementation)
        self._adopt(model, MaskedForm(None, block_length, shifted))
        self._check()

    def grow(self, vocab_size: int) -> None:
        """Make room for `vocab_size` tokens at least; the new rows are drawn as fresh ones are."""
        if self.vocab_size < vocab_size:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.model.resize_token_embeddings(vocab_size, mean_resizing=False)
            self.vocab_size = vocab_size


def full_mask(documents: Tensor) -> Tensor:
    """Return (B, 1, T, T) bool: a position sees all of its own document, padding only padding."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def block_mask(documents: Tensor, positions: Tensor, block_length: int) -> Tensor:
    """Return (B, 1, T, T) bool: of its own document, what lies in its own block or an earlier one.

    Blocks are counted from each document's first position.
    """
    blocks = positions // block_length
    return full_mask(documents) & (blocks[:, :, None] >= blocks[:, None, :])[:, None]


def noised_and_clean_mask(documents: Tensor, positions: Tensor, block_length: int) -> Tensor:
    """Return (B, 1, 2T, 2T) bool for a noised copy of a row, followed by the clean one (BD3-LM).

    A noised position sees its own noised block and the clean blocks before it; a clean one sees the
    clean blocks up to its own.  So every block is noised beside clean predecessors in one pass.
    """
    blocks = positions // block_length
    same = documents[:, :, None] == documents[:, None, :]
    equal = same & (blocks[:, :, None] == blocks[:, None, :])
    before = same & (blocks[:, :, None] > blocks[:, None, :])
    noised = torch.cat([equal, before], 2)
    clean = torch.cat([torch.zeros_like(equal), before | equal], 2)
    return torch.cat([noised, clean], 1)[:, None]
