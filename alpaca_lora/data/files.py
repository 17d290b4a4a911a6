"""Names on the command line -> files, and a file -> UTF-8 bytes: globs, hashes, gzip, zstandard, byte order marks.

Knows nothing of rows. Everything is read as a stream: memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from alpaca_lora.errors import DataError, MachineError, UserError, nearest

CHUNK_BYTES = 1 << 20
OnBytes = Callable[[int], None]  # bytes of the file (as stored) read since the last call

_MARKS = (  # longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
COMPRESSED_SUFFIXES = (".gz", ".zst")


def find_files(patterns: Sequence[str], *, field: str) -> list[Path]:
    """The files that ``patterns`` (paths or globs, ``**`` allowed) name, in that order, each glob sorted, none twice.

    Raises UserError, with ``field`` as the key to change, for a pattern that names no file and for a folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        path = Path(expanded)
        if os.path.isfile(path):
            found[path] = None
            continue
        if os.path.isdir(path):
            raise UserError("is a folder", file=path, field=field, fix=f"name its files, for example {path}/*.json")
        if os.path.exists(path):
            raise UserError(
                "is neither a file nor a folder", file=path, field=field, expected="a file that can be read twice"
            )
        matches = sorted(Path(name) for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
        if not matches:
            raise UserError(
                "no such file" if path.name == glob.escape(path.name) else "the pattern matches no file",
                file=pattern,
                field=field,
                fix=_hint(path),
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _hint(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    alike = nearest(path.name, names)
    if alike:
        return f"did you mean {folder / alike[0]}?"
    if not folder.is_dir():
        return "give the path of a file on this machine"
    return f"look into {folder.resolve()}"


def hash_file(path: Path, on_bytes: OnBytes | None = None) -> str:
    """sha256 of the file as it is stored, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror or error}", file=path) from error
    return digest.hexdigest()


def inner_suffix(path: Path) -> str:
    """The suffix of what is inside: ``rows.jsonl.gz`` -> ``.jsonl``; lower case."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return name.suffix.lower()


def read_chunks(path: Path, on_bytes: OnBytes | None = None) -> Iterator[bytes]:
    """The file's text as UTF-8, without its byte order mark, in chunks of about a megabyte.

    gzip and zstandard are told by their magic bytes; UTF-16 and UTF-32 by their mark, or UTF-16 by the zero bytes of
    its first characters. A file without a mark is taken as UTF-8 and not checked here: whoever decodes knows the
    line. Raises DataError for damaged compression and for UTF-16 or UTF-32 that does not decode, with the byte
    offset.
    """
    try:
        with open(path, "rb") as raw:
            stream = _decompressed(raw)
            counted = 0
            first = stream.read(CHUNK_BYTES)
            encoding, skip = _sniff(first)
            decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
            chunk, offset = first[skip:], skip
            while chunk:
                yield chunk if decoder is None else _transcode(decoder, chunk, offset, path, encoding)
                offset += len(chunk)
                if on_bytes:
                    position = raw.tell()
                    on_bytes(position - counted)
                    counted = position
                chunk = stream.read(CHUNK_BYTES)
            if decoder is not None:
                _transcode(decoder, b"", offset, path, encoding, final=True)
            if on_bytes:
                on_bytes(raw.tell() - counted)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"the compressed file is damaged ({error})", file=path, fix="copy or compress it again"
        ) from error
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror or error}", file=path) from error


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(4)
    raw.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if magic == b"\x28\xb5\x2f\xfd":
        return cast(BinaryIO, _WholeFrames(raw))
    return raw


class _WholeFrames:
    """A zstandard stream that, unlike the library's reader, does not take a file cut in the middle for its end."""

    PIECE = 2048  # four bytes can hold a block of 128 KiB, so a piece of this size grows to 64 MiB at the very worst

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
        self._waiting = b""

    def read(self, size: int) -> bytes:
        while True:
            data = self._waiting or self._raw.read(min(size, self.PIECE))
            self._waiting = b""
            if not data:
                if not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
            out = self._frame.decompress(data)
            self._waiting = self._frame.unused_data if self._frame.eof else b""
            if out:
                return out


def _sniff(first: bytes) -> tuple[str, int]:
    """(encoding, bytes of its mark)."""
    for mark, encoding in _MARKS:
        if first.startswith(mark):
            return encoding, len(mark)
    head = first[:4]
    if len(head) == 4 and head[1] == head[3] == 0 and head[0] and head[2]:
        return "utf-16-le", 0
    if len(head) == 4 and head[0] == head[2] == 0 and head[1] and head[3]:
        return "utf-16-be", 0
    return "utf-8", 0


def _transcode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, offset: int, path: Path, encoding: str, *, final: bool = False
) -> bytes:
    try:
        return decoder.decode(chunk, final).encode("utf-8")
    except UnicodeDecodeError as error:
        at = max(0, offset + len(chunk) - (len(error.object) - error.start))
        raise DataError(
            f"byte {at} is not {encoding.upper()} ({error.reason})", file=path, fix="save the file as UTF-8"
        ) from error
