"""Names -> files, files -> UTF-8 bytes."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest
import zstandard

from alpaca_lora.data.files import find_files, hash_file, inner_suffix, read_chunks
from alpaca_lora.errors import DataError, UserError

TEXT = '{"instruction": "dégustez", "output": "红茶"}\n'


def read(path: Path) -> bytes:
    return b"".join(read_chunks(path))


def test_globs_are_sorted_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "*.json"), str(tmp_path / "a.json"), str(tmp_path / "c.txt")], field="data_path")
    assert [path.name for path in found] == ["a.json", "b.json", "c.txt"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows[1].json").write_text("x")
    assert len(find_files([str(tmp_path / "rows[1].json")], field="data_path")) == 1


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "alpaca_data.json").write_text("x")
    with pytest.raises(UserError, match=r"alpaca_dta.json: data_path: no such file, did you mean .*alpaca_data.json"):
        find_files([str(tmp_path / "alpaca_dta.json")], field="data_path")


def test_a_folder_and_an_empty_pattern_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        find_files([str(tmp_path)], field="data_path")
    with pytest.raises(UserError, match="matches no file"):
        find_files([str(tmp_path / "*.json")], field="val_data_path")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings_are_read_with_and_without_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT.encode(encoding))
    assert read(path).decode("utf-8") == TEXT


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_files_are_told_by_their_magic(tmp_path: Path, pack) -> None:
    path = tmp_path / "rows.jsonl.packed"
    text = TEXT * 100_000  # several chunks
    path.write_bytes(pack(text.encode()))
    assert read(path).decode() == text


def test_zstandard_frames_may_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert read(path) == b"one\ntwo\n"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_compressed_file_cut_short_is_an_error(tmp_path: Path, pack) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(pack(hashlib.sha512(b"noise").digest() * 50)[:-6])
    with pytest.raises(DataError, match=r"rows.gz: the compressed file is damaged"):
        read(path)


def test_a_utf16_file_that_does_not_decode_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe" + "ab".encode("utf-16-le") + b"\x00\xd8" + "c".encode("utf-16-le"))  # half a pair
    with pytest.raises(DataError, match=r"byte 6 is not UTF-16-LE"):
        read(path)


def test_bytes_are_reported_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    seen: list[int] = []
    assert len(b"".join(read_chunks(path, seen.append))) == sum(seen) == 3_000_000


def test_hash_and_inner_suffix(tmp_path: Path) -> None:
    path = tmp_path / "rows.JSONL.gz"
    path.write_bytes(b"abc")
    assert hash_file(path) == hashlib.sha256(b"abc").hexdigest()
    assert inner_suffix(path) == ".jsonl"
    assert inner_suffix(Path("notes.txt")) == ".txt"


def test_what_is_no_file_and_what_no_file_can_be_called(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_files([str(tmp_path / "pipe")], field="data_path")
    with pytest.raises(UserError, match="no such file"):
        find_files(["a" * 300], field="data_path")
