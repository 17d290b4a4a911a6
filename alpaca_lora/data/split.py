"""Which examples validate: decided by the hash of the normalised row, so that neither the order of the rows nor the
seed nor a few more rows move an example to the other side, and equal rows are always on the same side.
"""

from __future__ import annotations

import re
from hashlib import blake2b

import numpy as np

from alpaca_lora.text.messages import Conversation

_NOT_WORDS = re.compile(r"[\W_]+")
_ASCII_NOT_WORDS = bytes(i for i in range(128) if not chr(i).isalnum())


def row_hash(conversation: Conversation) -> int:
    """64 bits of the row's kind, roles and texts, as they are: equal means an exact duplicate. Of a labelled row
    without its label: equal means the same text.
    """
    return _hash("\x1e".join(_parts(conversation)))


def normalised_hash(conversation: Conversation) -> int:
    """64 bits of the same without case, punctuation and white space: equal means an exact or a near duplicate."""
    return _hash("\x1e".join([_words(part) or part for part in _parts(conversation)]))


def _words(text: str) -> str:
    if text.isascii():  # ten times as fast as the expression, with the same result
        return text.lower().encode().translate(None, _ASCII_NOT_WORDS).decode()
    return _NOT_WORDS.sub("", text.casefold())


def piece_hash(hash_of_row: int, piece: int) -> int:
    """The hash of the n-th piece of a long text; of the row itself for the first."""
    return hash_of_row if piece == 0 else _hash(f"{hash_of_row}:{piece}")


def _parts(conversation: Conversation) -> list[str]:
    parts: list[str] = [conversation.kind]
    # a text must not train under one label and validate under another
    messages = conversation.messages[:1] if conversation.kind == "labelled" else conversation.messages
    for message in messages:
        parts += (message.role, message.content, message.context)
    return parts


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def choose_validation(hash_N: np.ndarray, size: int | float) -> tuple[np.ndarray, str | None]:
    """(bool mask of the examples that validate, what to tell the user or None).

    hash_N: uint64, `normalised_hash` of each example. size: a count, or below 1 a share. Examples of equal hash stay
    together; the groups with the smallest hashes are taken, whole, while they fit. A count or share of half of the
    examples or more becomes 10 %, at least one; a single example, or one single group, is not split.
    """
    num_examples = len(hash_N)
    is_val_N = np.zeros(num_examples, dtype=bool)
    if size == 0:
        return is_val_N, None
    if num_examples < 2:
        return is_val_N, "validation is off: there is one example only"
    told = None
    target = max(1, round(num_examples * size)) if size < 1 else int(size)
    if size >= 0.5 if size < 1 else 2 * target >= num_examples:
        target = max(1, num_examples // 10)
        told = (
            f"val_set_size {size if size < 1 else int(size):,} is half of the {num_examples:,} examples or more: "
            f"{target:,} (10 %) validate instead"
        )
    groups, group_N, counts = np.unique(hash_N, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        return is_val_N, "validation is off: all examples are the same"
    target = min(target, num_examples - 1)
    num_whole = int(np.searchsorted(np.cumsum(counts), target, side="right"))
    chosen = np.zeros(len(groups), dtype=bool)
    chosen[:num_whole] = True
    missing = target - int(counts[:num_whole].sum())
    if missing:  # the next group is too large: fill up with single examples behind it
        singles = np.flatnonzero(counts[num_whole:] == 1)[:missing] + num_whole
        chosen[singles] = True
    if not chosen.any():
        chosen[int(np.argmin(counts))] = True
    return chosen[group_N], told
