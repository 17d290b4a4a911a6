"""The road from options to tables: find and hash the files, open or build their cache entries, drop duplicates, split.

Knows the order of the work; each step is a file of its own. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alpaca_lora.data.build import Builder, Progress, Recipe, RowEncoder, sample_from_record
from alpaca_lora.data.cache import DamagedEntry, EntryWriter, cache_folder, open_entry, remove_entry
from alpaca_lora.data.classes import (
    choose_classes,
    class_of_label,
    count_classes,
    count_contradictions,
    keep_rare_in_training,
    tell_classes,
)
from alpaca_lora.data.cleaning import DUPLICATES, active_rules
from alpaca_lora.data.columns import RunColumns
from alpaca_lora.data.encode import Encoder, RowTokenizer
from alpaca_lora.data.encode_labelled import LabelledEncoder
from alpaca_lora.data.files import find_files, hash_file
from alpaca_lora.data.ledger import Ledger
from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.row_set import RowSet
from alpaca_lora.data.split import choose_validation
from alpaca_lora.data.table import ExampleTable
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation
from alpaca_lora.text.rendered import Template

IN_VALIDATION = "in_val_data"


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data.

    fingerprint: of all that decides ids, masks, split and order: equal fingerprints give equal batches. data_hashes:
    sha256 of each file. samples: a few conversations of the validation rows (of the training rows without
    validation), always the same, cleaned. messages: what to tell the user. labels: of texts to classify, in the order
    of the class numbers. class_counts, val_class_counts: rows of each class.
    """

    train: ExampleTable
    val: ExampleTable | None
    ledger: Ledger
    fingerprint: str
    from_cache: bool
    data_hashes: dict[str, str]
    messages: list[str]
    samples: tuple[Conversation, ...] = ()
    labels: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    val_class_counts: tuple[int, ...] = ()


def prepare(
    options: DataOptions,
    tokenizer: RowTokenizer,
    template: Template | None,
    *,
    system_prompt: str | None = None,
    seed: int = 42,
    on_progress: Progress | None = None,
) -> Prepared:
    """Files -> tables of token ids. ``template`` may be None where the task is classification.

    The split does not depend on ``seed``, so that a row that validates does so in every run; the order of the rows
    does, and so the fingerprint. on_progress(what, bytes done, bytes in all) may raise to stop: nothing half-written
    stays. Raises UserError for paths, DataError for content, MachineError for a file that cannot be read.
    """
    train_files = find_files(options.data_path, field="data_path")
    val_files = find_files(options.val_data_path, field="val_data_path")
    hashes = _hash_all([*train_files, *val_files], on_progress)
    recipe = Recipe.of(options)
    encoder = _encoder(options, recipe, tokenizer, template, system_prompt)
    messages, run_columns = list[str](), RunColumns()
    opened = [
        _open_or_build(files, hashes, recipe, encoder, options.data_cache, on_progress, messages, run_columns)
        for files in (train_files, val_files)
        if files
    ]
    drop_duplicates = DUPLICATES in active_rules(options.skip_cleaning)
    for one in opened if drop_duplicates else ():
        one.drop(_repeated(one.identity_N()), DUPLICATES)
    train, val = opened[0], opened[1] if val_files else None
    if val is not None:
        _report_overlap(train, val, messages)
        is_val_N = np.zeros(len(train.rows), dtype=bool)
    else:
        is_val_N = _split(train, options.val_set_size, messages)
    for one in opened:
        count_contradictions(one, messages)
        one.ledger.settle(one.rows.columns_N[one.chosen_N])
        one.ledger.check()
        _refuse_empty(one, val)
    ledger = train.ledger.joined(val.ledger) if val is not None else train.ledger
    _add_messages(options, ledger, tokenizer, messages)
    labels = choose_classes(train, val, is_val_N, messages) if options.task == "classification" else ()
    train_table, val_table = _tables(train, val, is_val_N, labels)
    class_counts, val_class_counts = (count_classes(table, labels) for table in (train_table, val_table))
    tell_classes(labels, class_counts, val_class_counts, messages)
    identity = [[one.key for one in opened], None if val_files else options.val_set_size, drop_duplicates, seed]
    return Prepared(
        train=train_table,
        val=val_table,
        ledger=ledger,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        from_cache=all(one.from_cache for one in opened),
        data_hashes={str(path): digest for path, digest in hashes.items()},
        messages=messages,
        samples=_samples(val or train, is_val_N),
        labels=labels,
        class_counts=class_counts,
        val_class_counts=val_class_counts,
    )


def _encoder(
    options: DataOptions, recipe: Recipe, tokenizer: RowTokenizer, template: Template | None, system_prompt: str | None
) -> RowEncoder:
    if options.task == "classification":
        return LabelledEncoder(tokenizer, recipe.policy)
    assert template is not None
    return Encoder(tokenizer, template, recipe.policy, system_prompt=system_prompt)


def _tables(
    train: RowSet, val: RowSet | None, is_val_N: np.ndarray, labels: tuple[str, ...]
) -> tuple[ExampleTable, ExampleTable | None]:
    """(training rows, validation rows if there are any)."""

    def table(one: RowSet, chosen_N: np.ndarray) -> ExampleTable:
        return ExampleTable(one.rows, np.flatnonzero(chosen_N), class_of_label(one.labels, labels) if labels else None)

    train_table = table(train, train.chosen_N & ~is_val_N)
    if val is not None:
        return train_table, table(val, val.chosen_N)
    return train_table, table(train, is_val_N) if is_val_N.any() else None


def _hash_all(files: Sequence[Path], on_progress: Progress | None) -> dict[Path, str]:
    total = sum(path.stat().st_size for path in files)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress("hashing files", done, total)

    return {path: hash_file(path, on_bytes) for path in files}


def _open_or_build(
    files: Sequence[Path],
    hashes: dict[Path, str],
    recipe: Recipe,
    encoder: RowEncoder,
    use_cache: bool,
    on_progress: Progress | None,
    messages: list[str],
    run_columns: RunColumns,
) -> RowSet:
    key = recipe.key({path: hashes[path] for path in files}, encoder, run_columns)
    names = [str(path) for path in files]
    from_cache = False
    opened = None
    if use_cache:
        folder = cache_folder() / key
        try:
            opened = open_entry(folder, names)
            from_cache = True
        except FileNotFoundError:
            pass
        except DamagedEntry as error:
            messages.append(f"the data cache entry {folder} is damaged ({error}): the rows are prepared anew")
        if opened is None:
            try:
                if folder.exists():
                    remove_entry(folder)
                with EntryWriter(folder) as writer:
                    Builder(recipe, encoder, files, on_progress, run_columns).write(writer)
                opened = open_entry(folder, names)
            except OSError as error:
                messages.append(
                    f"the data cache cannot be written ({error}): the rows are prepared again in the next run"
                )
    if opened is None:
        with tempfile.TemporaryDirectory(prefix="alpaca-lora-") as temporary:
            folder = Path(temporary) / key
            with EntryWriter(folder) as writer:
                Builder(recipe, encoder, files, on_progress, run_columns).write(writer)
            opened = open_entry(folder, names, in_memory=True)
    rows, ledger, meta = opened
    run_columns.first = tuple(meta["columns"]) if meta["columns"] else None
    messages += [f"{names[file]}: {text}" for file, text in meta["notes"]]
    samples = dict(sample_from_record(record) for record in meta["samples"])
    return RowSet(rows, ledger, samples, key, from_cache, np.ones(len(rows), dtype=bool), meta["labels"])


def _repeated(hash_N: np.ndarray) -> np.ndarray:
    """bool: True for each value that stands earlier in the array already."""
    again_N = np.ones(len(hash_N), dtype=bool)
    again_N[np.unique(hash_N, return_index=True)[1]] = False
    return again_N


def _report_overlap(train: RowSet, val: RowSet, messages: list[str]) -> None:
    """Exact duplicates leave the training rows; near ones stay and are counted."""
    kept = val.chosen_N
    count = train.drop(np.isin(train.column("exact"), val.column("exact")[kept]), IN_VALIDATION)
    if count:
        messages.append(f"{count:,} training rows are in val_data_path too: they validate and are not trained on")
    near_N = np.isin(train.column("normalised"), val.column("normalised")[kept]) & train.chosen_N
    if num_near := int(np.count_nonzero(near_N)):
        messages.append(
            f"{num_near:,} training rows differ from a validation row by case, punctuation or white space only: "
            "the validation loss is too good"
        )


def _split(train: RowSet, size: int | float, messages: list[str]) -> np.ndarray:
    chosen_N = np.flatnonzero(train.chosen_N)
    is_val, told = choose_validation(train.column("normalised")[chosen_N], size)
    if told:
        messages.append(told)
    is_val_N = np.zeros(len(train.rows), dtype=bool)
    is_val_N[chosen_N[is_val]] = True
    if train.labels:
        keep_rare_in_training(train, is_val_N, messages)
    return is_val_N


def _refuse_empty(one: RowSet, val: RowSet | None) -> None:
    if one.chosen_N.any():
        return
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in one.ledger.dropped.most_common())
    field = "val_data_path" if one is val else "data_path"
    raise DataError(
        f"none of the {one.ledger.rows_in:,} rows can be used ({reasons})",
        file=one.ledger.files[0],
        field=field,
        expected="at least one row with something to learn",
        fix="look at the rows, cutoff_len and skip_cleaning",
    )


def _add_messages(options: DataOptions, ledger: Ledger, tokenizer: RowTokenizer, messages: list[str]) -> None:
    defaults = DataOptions.model_fields
    if options.task == "classification":
        for key in ("train_on_inputs", "train_on_turns"):
            if getattr(options, key) != defaults[key].default:
                messages.append(f"{key} does nothing in classification: the label alone is learned")
    elif options.train_on_turns == "last" and options.train_on_inputs:
        messages.append("train_on_turns last does nothing while train_on_inputs is true: all tokens are learned")
    if options.val_data_path and options.val_set_size != defaults["val_set_size"].default:
        messages.append(f"val_set_size {options.val_set_size:,} is not used: val_data_path says which rows validate")
    if tokenizer.eos_id is None and options.add_eos_token:
        end = "the model is not taught where an answer ends by add_eos_token"
        if options.task == "classification":
            end = "the last token of each text is classified"
        messages.append(f"the tokenizer has no EOS token: {end}")
    if options.task == "classification":
        _add_labelled_messages(options, ledger, tokenizer, messages)
    if ledger.end_share < 1:
        why = []
        if ledger.truncated:
            why.append(f"{ledger.truncated:,} are truncated at cutoff_len {options.cutoff_len}")
        if not options.add_eos_token:
            why.append("add_eos_token is false")
        tail = f" ({', '.join(why)})" if why else ""
        messages.append(f"{_percent(ledger.end_share)} of the rows end with EOS or an end-of-turn token{tail}")


def _add_labelled_messages(options: DataOptions, ledger: Ledger, tokenizer: RowTokenizer, messages: list[str]) -> None:
    if options.add_eos_token and tokenizer.eos_id is not None and tokenizer.eos_id == tokenizer.pad_id:
        messages.append(
            "EOS, which is classified, is the tokenizer's padding too: PEFT and transformers read the last token that "
            "is no padding, another one, until the model's config.pad_token_id is another id (merge writes one)"
        )
    if ledger.truncated:
        shown = f"{ledger.truncated:,} of the texts ({_percent(ledger.truncated / ledger.kept)})"
        messages.append(f"{shown} are above cutoff_len {options.cutoff_len:,}: only their beginning is read")


def _percent(share: float) -> str:
    return f"{int(1000 * share) / 10:.1f} %"  # rounded down: 100.0 % would be a lie


def _samples(source: RowSet, is_val_N: np.ndarray) -> tuple[Conversation, ...]:
    if is_val_N.any():
        validating = set(source.column("normalised")[is_val_N].tolist())
        return tuple(row for hashed, row in source.samples.items() if hashed in validating)
    left = set(source.column("normalised")[source.chosen_N].tolist())
    return tuple(row for hashed, row in source.samples.items() if hashed in left)
