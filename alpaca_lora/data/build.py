"""Files -> encoded rows: read, clean, encode and write in one pass, whose memory does not grow with the files.

Knows nothing of training and validation: what is decided over the whole set (duplicates, the split) is in `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_lora.data.cache import EntryWriter, entry_key
from alpaca_lora.data.classes import LabelNumbers
from alpaca_lora.data.cleaning import Cleaner, active_rules
from alpaca_lora.data.columns import LabelKeys, RunColumns
from alpaca_lora.data.encode import EncodedRow, EncodePolicy, Encoder
from alpaca_lora.data.encode_labelled import LabelledEncoder
from alpaca_lora.data.files import OnBytes, inner_suffix
from alpaca_lora.data.formats import BadRow, Keys, OnNote, read_rows
from alpaca_lora.data.labelled import read_labelled
from alpaca_lora.data.ledger import Ledger
from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.split import normalised_hash, piece_hash, row_hash
from alpaca_lora.data.table import ENDS, IS_TEXT, LABELLED, NO_LABEL, SPELLS_SPECIAL, TRUNCATED
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation, Message

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
RowEncoder = Encoder | LabelledEncoder
CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 20
NUM_SAMPLES = 16


@dataclass(frozen=True)
class Recipe:
    """All that decides what rows become, apart from the files, the tokenizer and the template."""

    keys: Keys | LabelKeys
    skip_cleaning: tuple[str, ...]
    skip_bad: int
    policy: EncodePolicy

    @classmethod
    def of(cls, options: DataOptions) -> Recipe:
        policy = EncodePolicy(
            options.cutoff_len,
            options.train_on_inputs,
            options.train_on_turns,
            options.add_eos_token,
            options.over_length,
            options.text_template,
        )
        if options.task == "classification":
            keys = LabelKeys(options.text_key, options.label_key)
        else:
            keys = Keys(options.prompt_key, options.input_key, options.response_key)
        return cls(keys, tuple(options.skip_cleaning), options.skip_bad, policy)

    def read(
        self, path: Path, on_bytes: OnBytes, on_note: OnNote, run_columns: RunColumns
    ) -> Iterator[Conversation | BadRow]:
        """The rows of a file, of the task's kind."""
        if isinstance(self.keys, LabelKeys):
            return read_labelled(path, self.keys, on_bytes, on_note, run_columns)
        return read_rows(path, self.keys, on_bytes, on_note)

    def key(self, hashes: dict[Path, str], encoder: RowEncoder, run_columns: RunColumns) -> str:
        """Name of the cache entry. Duplicates are dropped when it is read, so that rule is not in it."""
        rules = [rule for rule in active_rules(self.skip_cleaning) if rule != "duplicates"]
        return entry_key(
            {
                "files": [[digest, inner_suffix(path)] for path, digest in hashes.items()],
                "keys": asdict(self.keys),
                "columns": run_columns.first,
                "cleaning": rules,
                "skip_bad": self.skip_bad,
                **encoder.key_parts(),
            }
        )


class Builder:
    """Fills one cache entry from a set of files; use once. ``run_columns``: of the run's files before these."""

    def __init__(
        self, recipe: Recipe, encoder: RowEncoder, files: Sequence[Path], on_progress: Progress | None,
        run_columns: RunColumns,
    ) -> None:  # fmt: skip
        self.recipe, self.encoder, self.files = recipe, encoder, files
        self._run_columns = RunColumns(run_columns.first)  # a second try after a full disk begins where the first did
        self.ledger = Ledger(files=[str(path) for path in files])
        self.notes: list[tuple[int, str]] = []  # file number, what to tell
        self._cleaner = Cleaner(recipe.skip_cleaning)
        self._on_progress = on_progress
        self._done, self._total = 0, sum(path.stat().st_size for path in files)
        self._samples: dict[int, Conversation] = {}
        self._labels = LabelNumbers()
        self._num_bad = 0

    def write(self, writer: EntryWriter) -> None:
        """Every row of every file, to the entry's end. Raises DataError for a bad row above skip_bad."""
        waiting: list[tuple[int, int, Conversation]] = []
        num_characters = 0
        for number, path in enumerate(self.files):
            for row in self.recipe.read(path, self._on_bytes, partial(self._note, number), self._run_columns):
                self.ledger.rows_in += 1
                cleaned = self._accept(row, number)
                if cleaned is None:
                    continue
                waiting.append((number, self.ledger.rows_in - 1, cleaned))
                num_characters += sum(len(message.content) + len(message.context) for message in cleaned.messages)
                if len(waiting) == CHUNK_ROWS or num_characters > CHUNK_CHARACTERS:
                    self._encode(waiting, writer)
                    num_characters = 0
                    waiting.clear()
        self._encode(waiting, writer)
        samples = [_to_record(row) for _, row in sorted(self._samples.items())]
        meta = {
            "samples": samples, "notes": self.notes, "labels": self._labels.words, "columns": self._run_columns.first
        }  # fmt: skip
        writer.finish(self.ledger, meta)

    def _note(self, file: int, text: str) -> None:
        self.notes.append((file, text))

    def _on_bytes(self, count: int) -> None:
        self._done += count
        if self._on_progress:
            self._on_progress("reading rows", self._done, self._total)

    def _accept(self, row: Conversation | BadRow, file: int) -> Conversation | None:
        if isinstance(row, BadRow):
            self._pass_over(row.error, file, row.line, row.raw)
            return None
        cleaned = self._cleaner.clean(row)
        for rule in cleaned.repaired:
            self.ledger.repaired[rule] += 1
            self.ledger.note(file, row.line, "repaired", rule)
        if cleaned.dropped:
            self.ledger.drop(file, row.line, cleaned.dropped)
        return cleaned.conversation

    def _pass_over(self, error: DataError, file: int, line: int, raw: str) -> None:
        self._num_bad += 1
        if self._num_bad > self.recipe.skip_bad:
            told = (
                f"{error.what} ({self._num_bad:,} bad rows, skip_bad is {self.recipe.skip_bad:,})"
                if self._num_bad > 1
                else error.what
            )
            raise DataError(
                told,
                file=error.file,
                line=error.line,
                field=error.field,
                expected=error.expected,
                fix=error.fix or "mend the row, or pass over such rows with --skip_bad N",
            ) from error
        self.ledger.reject(file, line, str(error), raw)

    def _encode(self, waiting: Sequence[tuple[int, int, Conversation]], writer: EntryWriter) -> None:
        ids: list[np.ndarray] = []
        supervised: list[np.ndarray] = []
        columns: list[tuple[int, ...]] = []
        encoded = self.encoder.encode_many([conversation for _, _, conversation in waiting])
        for (file, row_number, conversation), row in zip(waiting, encoded, strict=True):
            if row.error is not None:
                self._pass_over(row.error, file, conversation.line, _text_of(conversation))
            elif row.outcome == "dropped":
                self.ledger.drop(file, conversation.line, row.reason)
            else:
                if row.outcome != "whole":
                    reason = "cutoff_len"
                    self.ledger.note(file, conversation.line, row.outcome, reason)
                columns += self._columns(file, row_number, conversation, row)
                ids += [piece[0] for piece in row.pieces]
                supervised += [piece[1] for piece in row.pieces]
        writer.append(ids, supervised, columns)

    def _columns(
        self, file: int, row_number: int, conversation: Conversation, row: EncodedRow
    ) -> list[tuple[int, ...]]:
        """The values of `table.COLUMNS` for each piece."""
        flags = TRUNCATED * (row.outcome == "truncated") + IS_TEXT * (conversation.kind == "text")
        flags += ENDS * bool(row.ends) + SPELLS_SPECIAL * row.spells_special
        label = NO_LABEL
        if conversation.kind == "labelled":
            flags += LABELLED
            label = self._labels.number(conversation)
        exact, normalised = row_hash(conversation), normalised_hash(conversation)
        if conversation.kind != "text":
            self._sample(normalised, conversation)
        return [
            (
                conversation.line,
                row_number,
                piece_hash(exact, i),
                piece_hash(normalised, i),
                len(ids_T),
                int(np.count_nonzero(supervised_T)),
                file,
                row.num_straddling,
                flags,
                label,
            )
            for i, (ids_T, supervised_T) in enumerate(row.pieces)
        ]

    def _sample(self, normalised: int, conversation: Conversation) -> None:
        """Keep the rows of the smallest hashes: those that validate first, when the set is split."""
        if len(self._samples) < NUM_SAMPLES:
            self._samples.setdefault(normalised, conversation)
        elif normalised < (largest := max(self._samples)) and normalised not in self._samples:
            del self._samples[largest]
            self._samples[normalised] = conversation


def _text_of(conversation: Conversation) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in conversation.messages)


def _to_record(row: Conversation) -> dict[str, Any]:
    messages = [[message.role, message.content, message.context] for message in row.messages]
    return {"kind": row.kind, "messages": messages, "line": row.line, "hash": normalised_hash(row)}


def sample_from_record(record: dict[str, Any]) -> tuple[int, Conversation]:
    """(normalised hash, the row) of what the entry kept; its file is not known any more."""
    messages = tuple(Message(role, content, context) for role, content, context in record["messages"])
    return int(record["hash"]), Conversation(messages, record["kind"], "", int(record["line"]))
