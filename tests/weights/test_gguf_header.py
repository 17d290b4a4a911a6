"""The header parser: equal to the stock reader on honest files, short with all others."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.gguf_header import MAX_ARRAY_ITEMS, read_gguf_header
from tests.weights.tiny_gguf import finish, write_model


def same_value(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, np.ndarray | list) and len(ours) == len(theirs) == 0:
        return True
    return type(ours) is type(theirs) and ours == theirs


def compare_with_stock_reader(path: Path) -> None:
    ours, theirs = read_gguf_header(path), GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields.keys() == fields.keys()
    for key, field in fields.items():
        expected = field.contents() if field.types[0] != gguf.GGUFValueType.ARRAY or field.data else []
        assert same_value(ours.fields[key], expected), key
    assert list(ours.blocks) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        block = ours.blocks[tensor.name]
        assert block.type == tensor.tensor_type
        assert block.shape == tuple(reversed(tensor.shape.tolist()))
        assert (block.start, block.end - block.start) == (tensor.data_offset, tensor.n_bytes)


def small_file(path: Path) -> Path:
    """All value types, several block types, odd names."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70_000)
    writer.add_uint64("u64", 2**60)
    writer.add_int64("i64", -(2**60))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "héllo 你好 \U0001f600")
    writer.add_string("nothing", " ")
    writer.add_array("strings", ["a", "", "你好"] * 100)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.1, -2.5])
    writer.add_array("bools", [True, False, True])
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(6, dtype=np.float16).reshape(2, 3))
    q = gguf.quants.quantize(np.ones((3, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("three", q, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("four", np.ones((2, 2, 2, 2), dtype=np.float32))
    finish(writer)
    return path


def test_equal_to_the_stock_reader(tmp_path: Path) -> None:
    compare_with_stock_reader(small_file(tmp_path / "a.gguf"))
    compare_with_stock_reader(write_model(tmp_path / "b.gguf", {"model.embed_tokens.weight": torch.ones(10, 32)}))


@pytest.mark.slow
def test_equal_to_the_stock_reader_on_the_real_model(smollm2: Path) -> None:
    compare_with_stock_reader(smollm2)


def test_real_model_is_parsed_fast(smollm2: Path) -> None:
    start = time.process_time()
    header = read_gguf_header(smollm2)
    assert time.process_time() - start < 0.6  # the stock reader needs about 2.7
    assert len(header.fields["tokenizer.ggml.tokens"]) == 49_152 and len(header.blocks) == 272


# --- files that lie --------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(pairs: list[bytes] | None = None, infos: list[bytes] | None = None, data: int = 16, **change: Any) -> bytes:
    """A little-endian version 3 file of hand-made parts; ``change``: magic, version, num_tensors, num_keys."""
    pairs, infos = pairs or [], infos if infos is not None else [info("w")]
    head = change.get("magic", b"GGUF") + struct.pack(
        "<IQQ", change.get("version", 3), change.get("num_tensors", len(infos)), change.get("num_keys", len(pairs))
    )
    head += b"".join(pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32 + data)


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a GGUF file"),
    "magic": (lambda: build(magic=b"GGML"), "not a GGUF file"),
    "magic alone": (lambda: b"GGUF", "wanted at byte 4"),
    "version 1": (lambda: build(version=1), "GGUF version 1"),
    "version 99": (lambda: build(version=99), "GGUF version 99"),
    "big-endian": (lambda: build(version=3 << 24), "big-endian"),
    "tensor count": (lambda: build(num_tensors=2**50), "says it holds 1125899906842624 tensors"),
    "tensors too many by one": (lambda: build(num_tensors=2, data=0), "wanted at byte"),
    "key count": (lambda: build(num_keys=2**60), "says it holds 1152921504606846976 keys"),
    "key length": (lambda: build([struct.pack("<Q", 2**62) + b"abc"]), "4611686018427387904 bytes wanted"),
    "key is not UTF-8": (lambda: build([pair(b"\xff\xfe", 4, b"\0" * 4)]), "not UTF-8"),
    "value type": (lambda: build([pair("k", 77, b"")]), "k: unknown value type 77"),
    "string length": (lambda: build([pair("k", 8, struct.pack("<Q", 2**40))]), "k: 1099511627776 bytes wanted"),
    "string is not UTF-8": (lambda: build([pair("k", 8, text(b"\xff"))]), "k: text that is not UTF-8"),
    "array count": (lambda: build([pair("k", 9, array(4, 2**61))]), "k: an array of 2305843009213693952 items"),
    "array beyond the file": (lambda: build([pair("k", 9, array(4, 1000))]), "k: 4000 bytes wanted"),
    "string array beyond the file": (
        lambda: build([pair("k", 9, array(8, MAX_ARRAY_ITEMS))]),
        "k: an array of .* strings in a file",
    ),
    "string in array beyond the file": (
        lambda: build([pair("k", 9, array(8, 2, text("a") + struct.pack("<Q", 60_000)))]),
        "k: ends inside of item 1",
    ),
    "long string in array": (
        lambda: build([pair("k", 9, array(8, 1, struct.pack("<Q", 2**63)))]),
        "k: .* bytes wanted",
    ),
    "string array cut": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("k", 9, array(8, 3, text("a" * 20) + text("b"))),
        "k: ends after 2 of 3 items",
    ),
    "array item is not UTF-8": (lambda: build([pair("k", 9, array(8, 1, text(b"\xff")))]), "k: item 0 is not UTF-8"),
    "array of arrays": (lambda: build([pair("k", 9, array(9, 1, array(4, 0)))]), "k: an array of value type 9"),
    "key twice": (lambda: build([pair("k", 4, b"\0" * 4)] * 2), "k: stands twice"),
    "tensor twice": (lambda: build(infos=[info("w"), info("w", offset=32)], data=64), "w: stands twice"),
    "no dimensions": (lambda: build(infos=[info("w", ())]), "w: 0 dimensions"),
    "many dimensions": (lambda: build(infos=[text("w") + struct.pack("<I", 10**9)]), "w: 1000000000 dimensions"),
    "dimension of zero": (lambda: build(infos=[info("w", (0,))]), r"w: F32 of shape \(0,\)"),
    "dimensions overflow": (lambda: build(infos=[info("w", (2**40, 2**40))]), "w: F32 of shape .* reaches to"),
    "block type": (lambda: build(infos=[info("w", kind=99)]), "w: unknown block type 99"),
    "rows that are no blocks": (lambda: build(infos=[info("w", (33,), 8)]), "w: Q8_0 of shape .* multiple of 32"),
    "offset beyond the file": (lambda: build(infos=[info("w", offset=2**40)]), "w: F32 of shape .* reaches to"),
    "offset overflows": (lambda: build(infos=[info("w", offset=2**64 - 32)]), "w: F32 of shape .* reaches to"),
    "offset not aligned": (lambda: build(infos=[info("w", offset=4)], data=64), "w: offset 4 is not aligned"),
    "overlap": (lambda: build(infos=[info("v", (16,)), info("w", (4,), 0, 32)], data=64), "w: its bytes begin at"),
    "one byte short": (lambda: build(data=15), "w: F32 of shape"),
    "alignment 0": (lambda: build([pair("general.alignment", 4, struct.pack("<I", 0))]), "alignment 0"),
    "alignment 3": (lambda: build([pair("general.alignment", 4, struct.pack("<I", 3))]), "alignment 3"),
    "alignment is text": (lambda: build([pair("general.alignment", 8, text("32"))]), "alignment '32'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    make, message = LIES[lie]
    path = tmp_path / "w.gguf"
    path.write_bytes(make())
    start = time.process_time()
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf_header(path)
    assert time.process_time() - start < 1
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_a_true_header_is_not_refused(tmp_path: Path) -> None:
    """The control of the lies: the same hand-made parts, told truly."""
    path = tmp_path / "w.gguf"
    pairs = [pair("k", 9, array(8, 2, text("a") + text("b"))), pair("general.alignment", 4, struct.pack("<I", 32))]
    path.write_bytes(build(pairs, [info("v", (8,)), info("w", offset=32)], data=48))
    header = read_gguf_header(path)
    assert header.fields["k"] == ["a", "b"] and header.blocks["w"].shape == (4,)
    compare_with_stock_reader(path)


def test_truncated_anywhere_in_the_header(tmp_path: Path) -> None:
    raw = small_file(tmp_path / "a.gguf").read_bytes()
    end = read_gguf_header(tmp_path / "a.gguf").blocks["one"].start
    cut = tmp_path / "cut.gguf"
    for kept in range(0, end, 37):
        cut.write_bytes(raw[:kept])
        with pytest.raises(ModelFileError):
            read_gguf_header(cut)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Any damage is a ModelFileError or goes unseen in a value; no other exception, no long wait."""
    raw = small_file(tmp_path / "a.gguf").read_bytes()
    choose, path, refused = random.Random(0), tmp_path / "b.gguf", 0
    start = time.process_time()
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(choose.randint(1, 3)):
            damaged[choose.randrange(2200)] = choose.choice((0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)))
        path.write_bytes(damaged)
        try:
            read_gguf_header(path)
        except ModelFileError:
            refused += 1
    assert refused > 50
    assert time.process_time() - start < 10
