"""One safetensors file: equal to the official format, deterministic, durable, and never believed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from alpaca_lora.errors import MachineError, ModelFileError, NumericalError
from alpaca_lora.weights.safetensors_file import (
    DTYPES,
    READ_ELEMENTS,
    file_sha256,
    read_entry,
    read_header,
    read_metadata,
    read_safetensors,
    write_safetensors,
)


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"of.{name}": torch.arange(7).to(dtype) for name, (_, dtype) in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(12.0).view(3, 4).T}
    tensors["half"] = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    return tensors


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int = 0, end: int = 16, shape: object = (4,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_bytes_are_those_of_the_official_writer(tmp_path: Path) -> None:
    tensors = some_tensors()
    digest = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    written = (tmp_path / "a.safetensors").read_bytes()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert written == safetensors.torch.save(contiguous, {"format": "pt"})
    assert digest == hashlib.sha256(written).hexdigest() == file_sha256(tmp_path / "a.safetensors")


def test_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    tensors, metadata = some_tensors(), {key: key for key in "format step seed method rank".split()}
    first = write_safetensors(tmp_path / "a", tensors, metadata)
    second = write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert first == second
    assert read_metadata(tmp_path / "a") == metadata


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors)
    read = read_safetensors(tmp_path / "a")
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    header = read_header(tmp_path / "a")
    with open(tmp_path / "a", "rb") as file:
        for name, tensor in tensors.items():
            assert same(read_entry(file, name, header.tensors[name]), tensor)
        converted = read_entry(file, "half", header.tensors["half"], dtype=torch.float32)
    assert same(converted, tensors["half"].float())


def test_tensor_of_several_slices(tmp_path: Path) -> None:
    weight = torch.arange(READ_ELEMENTS + 12_345).float()
    for dtype in (torch.float32, torch.bfloat16):
        write_safetensors(tmp_path / "a", {"w": weight.to(dtype)})
        one = read_header(tmp_path / "a").tensors["w"]
        with open(tmp_path / "a", "rb", buffering=0) as file:
            for wanted in (torch.float32, torch.bfloat16):
                assert torch.equal(read_entry(file, "w", one, dtype=wanted), weight.to(dtype).to(wanted))
    weight[-1] = float("nan")
    write_safetensors(tmp_path / "a", {"w": weight})
    with open(tmp_path / "a", "rb") as file, pytest.raises(NumericalError):
        read_entry(file, "w", read_header(tmp_path / "a").tensors["w"])


def test_tensors_that_share_memory_are_both_written(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    write_safetensors(tmp_path / "a", {"embed": weight, "head": weight, "part": weight[1:]})
    read = read_safetensors(tmp_path / "a")
    assert torch.equal(read["embed"], weight) and torch.equal(read["head"], weight)
    assert torch.equal(read["part"], weight[1:])


def test_what_was_read_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_safetensors(path, {"w": torch.ones(1000)})
    read = read_safetensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(read["w"], torch.ones(1000))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_safetensors(path, {"w": torch.ones(3)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpaca_lora.weights.safetensors_file.os.fsync", full)
    with pytest.raises(MachineError, match=r"No space left on device.* bytes are needed, \d+ are free"):
        write_safetensors(path, {"w": torch.zeros(3)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_missing_folder_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        write_safetensors(tmp_path / "no" / "a", {"w": torch.ones(3)})


# --- files that lie --------------------------------------------------------------------------------------------------

LIES: dict[str, tuple[object, bytes, int | None, str]] = {
    "no header": (b"", b"", None, "not JSON"),
    "header longer than the file": (b"{}", b"", 1000, "header says it is 1000 bytes"),
    "header over the limit": (b"{}", b"", 2**40, "header of 1099511627776 bytes"),
    "flipped length": ({"w": entry()}, b"\0" * 16, 5, "not JSON"),
    "no JSON": (b"[[[[", b"", None, "not JSON"),
    "deep JSON": (b'{"a":' + b"[" * 200_000, b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "not a table"),
    "no table of metadata": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "entry without dtype": ({"w": {"shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16, None, "w: bad entry"),
    "entry is a number": ({"w": 3}, b"", None, "w: bad entry"),
    "unknown dtype": ({"w": entry(dtype="F31")}, b"\0" * 16, None, "w: dtype 'F31'"),
    "dtype is a list": ({"w": entry(dtype=["F32"])}, b"\0" * 16, None, "w: dtype"),
    "negative shape": ({"w": entry(shape=[-4])}, b"\0" * 16, None, "w: bad shape"),
    "fractional shape": ({"w": entry(shape=[4.0])}, b"\0" * 16, None, "w: bad shape"),
    "shape too large": ({"w": entry(shape=[2**62, 2**62])}, b"\0" * 16, None, "w: 16 bytes do not hold F32"),
    "nine dimensions": ({"w": entry(shape=[1] * 9)}, b"\0" * 16, None, "w: bad shape"),
    "offsets backwards": ({"w": entry(16, 0)}, b"\0" * 16, None, "w: bad data_offsets"),
    "one offset": ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16]}}, b"\0" * 16, None, "w: bad data_off"),
    "beyond the end": ({"w": entry(0, 32, [8])}, b"\0" * 16, None, r"w: its bytes reach to \d+ but the file ends"),
    "far beyond the end": ({"w": entry(0, 2**60, [2**58])}, b"\0" * 16, None, "w: its bytes reach"),
    "overlap": ({"v": entry(0, 16), "w": entry(8, 24)}, b"\0" * 24, None, "w: overlaps"),
    "hole": ({"v": entry(0, 16), "w": entry(24, 40)}, b"\0" * 40, None, "w: leaves a hole"),
    "data after the last": ({"w": entry()}, b"\0" * 20, None, "4 bytes after the last tensor"),
    "twice": (
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"\0\0",
        None,
        "w: stands twice",
    ),
    "number of 5000 digits": (b'{"w":' + b"9" * 5000 + b"}", b"", None, "not JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    header, data, length, message = LIES[lie]
    path = write_raw(tmp_path / "w.safetensors", header, data, length=length)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ModelFileError):
        read_safetensors(path)


def test_a_true_header_is_not_refused(tmp_path: Path) -> None:
    """The control of the lies: the same pieces, told truly."""
    header = {"__metadata__": {"a": "b"}, "v": entry(0, 16), "w": entry(16, 32, [2, 2])}
    assert read_header(write_raw(tmp_path / "w", header, b"\0" * 32)).tensors["w"].shape == (2, 2)


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -17, -1])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"v": torch.ones(4), "w": torch.ones(4)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=r"too few|but the file ends|not JSON"):
        read_header(path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write_safetensors(path, {"w": torch.ones(1000)})
    header = read_header(path)
    with open(path, "rb+") as file:
        file.truncate(1000)
    with open(path, "rb") as file, pytest.raises(ModelFileError, match="w: the file ends inside of this tensor"):
        read_entry(file, "w", header.tensors["w"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(5, 5, dtype=dtype)
    weight[3, 2] = value
    write_safetensors(tmp_path / "w", {"some.weight": weight})
    header = read_header(tmp_path / "w")
    with open(tmp_path / "w", "rb") as file, pytest.raises(NumericalError, match=r"some\.weight: weights that are NaN"):
        read_entry(file, "some.weight", header.tensors["some.weight"])


BOMBS: dict[str, Callable[[], bytes]] = {
    "many tensors": lambda: b"{" + b",".join(b'"%d":{}' % i for i in range(1_500_000)) + b"}",
    "many numbers": lambda: b'{"w":[' + b"1000," * 3_000_000 + b"1]}",
    "many lists": lambda: b'{"w":[' + b"[]," * 5_000_000 + b"[]]}",
    "long name": lambda: b'{"' + b"a" * 15_000_000 + b'":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}',
    "spaces": lambda: b"{" + b" " * 16_000_000 + b"]",
    "too many for the limit": lambda: b'{"a":{}' + b" " * 17_000_000 + b"}",
}

MEASURE = """
import resource, sys, time
from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.safetensors_file import read_header
for path in sys.argv[1:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_header(path)
        print("accepted")
    except ModelFileError:
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(time.process_time() - start, (after - before) * 1024)
"""


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    paths = [str(write_raw(tmp_path / bomb, make())) for bomb, make in BOMBS.items()]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line in lines:
        seconds, num_bytes = map(float, line.split())
        assert seconds < 1 and num_bytes < 100e6


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_is_refused_fast_with_a_short_message(tmp_path: Path, bomb: str) -> None:
    path = write_raw(tmp_path / "w", BOMBS[bomb]())
    start = time.process_time()
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_integers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": torch.ones(4, dtype=dtype)})
    entry = read_header(path).tensors["w"]
    with open(path, "rb") as file:
        assert read_entry(file, "w", entry).dtype == dtype
        with pytest.raises(ModelFileError, match=r"w\.safetensors: w: is stored as .*expected floating point"):
            read_entry(file, "w", entry, dtype=torch.float32)
