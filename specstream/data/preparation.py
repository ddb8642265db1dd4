"""From sources to the packed rows and held-out prompts of each split, kept on disk.

`prepare` reads every source once, deals its documents out to the splits, tokenises and packs them,
checks the loss mask and writes numpy arrays, which `load_split` maps into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from specstream.data.encoding import EncodedDocument, encode_documents
from specstream.data.packing import PackedRows, one_per_row, pack_best_fit, pack_stream
from specstream.data.progress import SlowProgress
from specstream.data.sources import Document, Segment, TextSource, held_out_position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation", "test"]

FORMAT_VERSION = 2  # raise it when prepared data of older code must not be used
DOCUMENTS_AT_ONCE = 256
PROMPTS_KEPT = 1024  # of each source and split


@dataclass(frozen=True)
class HeldOut:
    """The shares of the documents that are held out; by key, so a document never moves."""

    validation: float
    test: float

    def split_of(self, key: str) -> Split:
        position = held_out_position(key)
        if position < self.validation:
            return "validation"
        return "test" if position < self.validation + self.test else "train"

    def deal(self, documents: Iterator[Document]) -> Iterator[tuple[Split, Document]]:
        """Give every document its split; a lone document is cut, its end held out."""
        first = list(islice(documents, 2))
        if len(first) == 1 and self.validation + self.test > 0:
            yield from self._cut(first[0])
            return
        for document in chain(first, documents):
            yield self.split_of(document.key), document

    def _cut(self, document: Document) -> Iterator[tuple[Split, Document]]:
        text = document.text
        shares = (1 - self.validation - self.test, 1 - self.test)
        borders = [text.find("\n", int(share * len(text))) + 1 or len(text) for share in shares]
        stretches = (text[: borders[0]], text[borders[0] : borders[1]], text[borders[1] :])
        names: tuple[Split, ...] = ("train", "validation", "test")
        for split, stretch in zip(names, stretches, strict=True):
            if stretch:
                yield split, Document(document.key, (Segment(stretch, scored=True),))


@dataclass(frozen=True)
class Layout:
    """How documents become rows.

    Attributes:
        sequence_length: tokens of a row.
        pack: several documents in a row.
        prompt_tokens: length of the prompts cut from held-out raw text.
    """

    sequence_length: int
    pack: bool
    prompt_tokens: int


@dataclass
class SourceReport:
    """What a source gave to a split.

    Attributes:
        documents, rows: how many.
        dropped: documents left out because they are longer than a row and may not be cut.
        tokens: without padding.
        scored: tokens that the loss counts.
        text_scored, text_tokens: of the text alone, without bos and eos: the mask's coverage.
    """

    name: str
    documents: int = 0
    dropped: int = 0
    rows: int = 0
    tokens: int = 0
    scored: int = 0
    text_scored: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class PreparedSplit:
    """The rows of a split, its prompts for each source, and a report for each source."""

    rows: PackedRows
    prompts: list[list[list[int]]]
    reports: list[SourceReport]


@dataclass
class _Gathered:
    """What one source has given to one split so far."""

    report: SourceReport
    documents: list[EncodedDocument] = field(default_factory=list)


def prepare(
    folder: Path,
    dealt: Sequence[tuple[TextSource, HeldOut | Split]],
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
) -> None:
    """Write every split into `folder`.

    `dealt` says, for each source, which shares are held out, or to which split all of it belongs.
    Raises ValueError for a source without documents and for a mask that covers nothing or all.
    """
    parts: dict[Split, list[tuple[PackedRows, list[list[int]], SourceReport]]] = {}
    with SlowProgress("Tokenising") as progress:
        for source, rule in dealt:
            gathered = _gather(source, rule, tokenizer, layout, progress)
            for split, found in gathered.items():
                if not found.documents:
                    continue
                rows = _pack(source, found.documents, tokenizer, layout)
                found.report.rows = len(rows)
                found.report.scored = int(rows.scored.sum())
                prompts = _prompts(source, found.documents, rows, layout)
                parts.setdefault(split, []).append((rows, prompts, found.report))
    for split, pieces in parts.items():
        rows = PackedRows.joined([piece[0] for piece in pieces]).shuffled()
        prepared = PreparedSplit(rows, [piece[1] for piece in pieces], [p[2] for p in pieces])
        _save_split(folder / split, prepared)


def load_split(folder: Path, split: Split) -> PreparedSplit | None:
    """Map a split into memory; None when no document belongs to it."""
    folder = folder / split
    if not folder.is_dir():
        return None
    rows = PackedRows(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        scored=np.load(folder / "scored.npy", mmap_mode="r"),
        documents=np.load(folder / "documents.npy", mmap_mode="r"),
    )
    described = json.loads((folder / "split.json").read_text())
    reports = [SourceReport(**report) for report in described["reports"]]
    return PreparedSplit(rows, described["prompts"], reports)


def _save_split(folder: Path, split: PreparedSplit) -> None:
    folder.mkdir()
    np.save(folder / "tokens.npy", split.rows.tokens)
    np.save(folder / "scored.npy", split.rows.scored)
    np.save(folder / "documents.npy", split.rows.documents)
    described = {"prompts": split.prompts, "reports": [asdict(r) for r in split.reports]}
    (folder / "split.json").write_text(json.dumps(described))


def _gather(
    source: TextSource,
    rule: HeldOut | Split,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    progress: SlowProgress,
) -> Mapping[Split, _Gathered]:
    """Tokenise every document of a source into its split."""
    documents = source.documents(tokenizer)
    labelled = rule.deal(documents) if isinstance(rule, HeldOut) else ((rule, d) for d in documents)
    gathered: dict[Split, _Gathered] = {}
    num_documents = 0
    while batch := list(islice(labelled, DOCUMENTS_AT_ONCE)):
        encoded = encode_documents(tokenizer, [document for _, document in batch])
        for (split, _), tokens in zip(batch, encoded, strict=True):
            found = gathered.setdefault(split, _Gathered(SourceReport(source.name)))
            _count(source, found, tokens, layout.sequence_length)
        num_documents += len(batch)
        progress.show(f"{source.name}: {num_documents:,} documents")
    if not num_documents:
        raise ValueError(f"{type(source).__name__} '{source.name}' holds no documents")
    for found in gathered.values():
        _check_coverage(source, found, tokenizer)
    return gathered


def _count(source: TextSource, found: _Gathered, document: EncodedDocument, room: int) -> None:
    if source.masked and len(document.tokens) > room:
        found.report.dropped += 1
        return
    found.documents.append(document)
    found.report.documents += 1
    found.report.tokens += len(document.tokens)
    found.report.text_scored += document.coverage[0]
    found.report.text_tokens += document.coverage[1]


def _check_coverage(
    source: TextSource, found: _Gathered, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise ValueError when a mask is expected and scores nothing, or everything."""
    if not source.masked:
        return
    report = found.report
    if not found.documents:
        raise ValueError(
            f"'{source.name}': all {report.dropped} documents are longer than the sequence_length "
            "and completions are never cut; raise sequence_length"
        )
    if 0 < report.text_scored < report.text_tokens:
        return
    coverage, what = (0, "nothing") if report.text_scored == 0 else (1, "everything")
    sample = tokenizer.decode(found.documents[0].tokens.tolist())
    raise ValueError(
        f"'{source.name}': the loss mask covers {what} (coverage {coverage}), where completions "
        f"should be scored and prompts not; the first sample is {sample!r}"
    )


def _pack(
    source: TextSource,
    documents: list[EncodedDocument],
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
) -> PackedRows:
    padding = tokenizer.pad_token_id
    padding = tokenizer.eos_token_id if padding is None else padding
    if not layout.pack:
        return one_per_row(documents, layout.sequence_length, padding)
    pack = pack_best_fit if source.masked else pack_stream
    return pack(documents, layout.sequence_length, padding)


def _prompts(
    source: TextSource, documents: list[EncodedDocument], rows: PackedRows, layout: Layout
) -> list[list[int]]:
    """Return prompts to decode: the given part of completions, or the first tokens of rows."""
    if source.masked:
        given = (d.tokens[: d.prompt_length].tolist() for d in documents if d.prompt_length)
        return _spread(list(dict.fromkeys(tuple(prompt) for prompt in given)))
    # A row's beginning lies in one document that goes on after it, so it holds no end of text
    length = layout.prompt_tokens
    whole = (rows.documents[:, : length + 1] == 0).all(axis=1)
    return _spread([tuple(window) for window in rows.tokens[whole, :length].tolist()])


def _spread(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    kept: NDArray[np.int64] = evenly(len(prompts), min(len(prompts), PROMPTS_KEPT))
    return [list(prompts[i]) for i in kept.tolist()]


def evenly(total: int, wanted: int) -> NDArray[np.int64]:
    """Return `wanted` different numbers below `total`, evenly spread."""
    return np.arange(wanted) * total // max(wanted, 1)
