"""Rows as people see them: which tokens are learned, how long they are. Knows tables and ids; draws with rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alpaca_lora.data.example import TokenizedExample

LEARNED, SEEN = "bold green", "dim"
BAR_WIDTH = 40
MAX_CLASSES = 40


class Decoder(Protocol):
    """The part of `text.tokenizer.Tokenizer` that is needed to show ids."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...


def runs(example: TokenizedExample) -> Iterable[tuple[bool, list[int]]]:
    """(supervised, ids) of each run of tokens of one kind, in order. The first token is never supervised; of a text to
    classify the last one, which is classified, takes that place.
    """
    supervised_T = example.supervised_T.copy()
    supervised_T[:1] = example.label is not None and len(supervised_T) == 1
    borders = [0, *(np.flatnonzero(np.diff(supervised_T)) + 1).tolist(), len(supervised_T)]
    for start, end in pairwise(borders):
        if end > start:
            yield bool(supervised_T[start]), example.ids_T[start:end].tolist()


def coloured(example: TokenizedExample, tokenizer: Decoder) -> Text:
    """The row's text as the model reads it, special tokens spelled out; what it learns to say stands out."""
    text = Text()
    for supervised, ids in runs(example):
        text.append(tokenizer.decode(ids, skip_special=False), style=LEARNED if supervised else SEEN)
    return text


def row_panel(example: TokenizedExample, tokenizer: Decoder, *, number: int, labels: Sequence[str] = ()) -> Panel:
    """One row in a box, with its counts; of a text to classify with its label, one of ``labels``."""
    title = f"row {number}: {example.num_tokens} tokens, "
    if example.label is None:
        title += f"{example.num_supervised} learned (green)"
    else:
        title += f"label {escape(repr(labels[example.label]))}, read at the last token (green)"
    return Panel(coloured(example, tokenizer), title=title, title_align="left", border_style="dim")


def spread_rows(lengths: np.ndarray, count: int) -> list[int]:
    """Positions of up to ``count`` rows from short to long: these say more than as many alike."""
    order = np.argsort(lengths, kind="stable")
    places = np.linspace(0.1, 0.9, min(count, len(order)))
    return list(dict.fromkeys(int(order[int(place * (len(order) - 1))]) for place in places))


def class_counts_table(labels: Sequence[str], counts: Sequence[int], val_counts: Sequence[int] = ()) -> Table:
    """How many rows of each class train and validate; of many classes the first MAX_CLASSES."""
    table = Table(title=f"{len(labels)} classes", title_justify="left", box=None, pad_edge=False)
    table.add_column("label", overflow="fold")
    table.add_column("train", justify="right")
    table.add_column("validate", justify="right")
    for number, label in enumerate(labels[:MAX_CLASSES]):
        table.add_row(escape(label), f"{counts[number]:,}", f"{val_counts[number]:,}" if val_counts else "")
    if len(labels) > MAX_CLASSES:
        rest = [f"{sum(some[MAX_CLASSES:]):,}" if some else "" for some in (counts, val_counts)]
        table.add_row(f"{len(labels) - MAX_CLASSES:,} more", *rest)
    return table


def length_histogram(lengths: np.ndarray, cutoff_len: int, *, bins: int = 8) -> Table:
    """How many rows have how many tokens, with the percentiles that choose a cutoff."""
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99]).astype(int)
    title = (
        f"tokens per row: median {p50:,}, 95 % up to {p95:,}, 99 % up to {p99:,}, longest {lengths.max():,} "
        f"(cutoff_len {cutoff_len:,})"
    )
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right", style="dim")
    table.add_column()
    table.add_column(justify="right")
    edges = np.unique(np.linspace(0, lengths.max(), bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        table.add_row(f"{start + 1:,}-{end:,}", "█" * round(BAR_WIDTH * count / max(1, counts.max())), f"{count:,}")
    return table
