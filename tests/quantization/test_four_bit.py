"""What NF4 and FP4 share: tiles, the product, files, settings, bad input, memory while they are made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.kernels import four_bit as kernel
from alpaca_lora.kernels.cpu.library import Library
from alpaca_lora.quantization.four_bit import FourBit
from alpaca_lora.quantization.fp4 import FP4
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.scheme import scheme_from_json
from alpaca_lora.weights.safetensors_file import read_safetensors, write_safetensors
from tests.quantization import checks

SHAPES = [(1, 1), (5, 7), (31, 101), (64, 192), (300, 130), (9, 64)]
SHAPE = pytest.mark.parametrize("shape", SHAPES)
SCHEME = pytest.mark.parametrize("scheme", [NF4(), NF4(32, False), FP4(128)], ids=str)


@pytest.fixture(params=["c", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the ops in C, where there are any, and with their twins in torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernel, "library", lambda: Library(None, "off"))
    return request.param


@SHAPE
@SCHEME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(shape: tuple[int, int], scheme: FourBit, dtype: torch.dtype) -> None:
    weight_OI = checks.matrix(*shape, dtype=dtype)
    parts = scheme.quantize(weight_OI, name="w")
    checks.assert_stored_as_promised(scheme, parts, shape)
    wrong_N = (checks.dense(scheme, parts, shape) - weight_OI.float()).abs().view(-1)
    gaps = torch.tensor(sorted(scheme.values)).diff()
    largest = weight_OI.float().abs().max()
    # half of the widest gap; the scale in eight bits is off by 1 % of the largest of 256 where they are alike
    assert bool((wrong_N <= (float(gaps.max()) / 2 + 0.02) * largest).all())


@SHAPE
@SCHEME
def test_tiles(shape: tuple[int, int], scheme: FourBit) -> None:
    checks.assert_tiles_agree(scheme, scheme.quantize(checks.matrix(*shape), name="w"), shape)


@SHAPE
@SCHEME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 4, 11])
def test_product_and_gradient(shape: tuple[int, int], scheme: FourBit, dtype: torch.dtype, num_tokens: int) -> None:
    parts = scheme.quantize(checks.matrix(*shape), name="w")
    if shape[0] * shape[1] > 1:
        checks.assert_linear(scheme, parts, shape, dtype, num_tokens)


@SCHEME
def test_a_block_of_zeros_stays_zero(scheme: FourBit) -> None:
    weight_OI = torch.zeros(8, 256)
    weight_OI[3] = 0.1
    parts = scheme.quantize(weight_OI, name="w")
    decoded_OI = checks.dense(scheme, parts, (8, 256))
    assert not decoded_OI[:3].any() and bool(decoded_OI[3].all())


@SCHEME
@pytest.mark.parametrize("scale", [1.0, 1e-39, 0.0])
def test_denormal_numbers_that_count_as_zero(scheme: FourBit, scale: float) -> None:
    """Commands switch them off for the whole process: nothing becomes NaN, and ordinary weights have the same codes."""
    weight_OI = checks.matrix(5, 77) * scale
    usual = scheme.quantize(weight_OI, name="w")
    torch.set_flush_denormal(True)
    parts = scheme.quantize(weight_OI, name="w")
    decoded_OI = checks.dense(scheme, parts, (5, 77))
    torch.set_flush_denormal(False)
    assert bool(torch.isfinite(decoded_OI).all())
    if scale == 1:
        assert all(torch.equal(parts[name], usual[name]) for name in usual)


@SCHEME
def test_what_is_not_finite(scheme: FourBit) -> None:
    checks.assert_refuses_what_is_not_finite(scheme, (3, 5))
    checks.assert_refuses_what_is_not_finite(scheme, (530, 2200))  # more than one piece


def test_scales_whose_mean_is_infinite() -> None:
    with pytest.raises(NumericalError, match=r"^w: weights too large"):
        NF4().quantize(torch.full((4, 64), 3e38), name="w")


@SCHEME
def test_file(scheme: FourBit, tmp_path: Path) -> None:
    parts, file = scheme.quantize(checks.matrix(9, 33), name="w"), tmp_path / "parts.safetensors"
    write_safetensors(file, parts)
    read = read_safetensors(file)
    assert set(read) == set(parts) and all(torch.equal(read[name], parts[name]) for name in parts)
    scheme.check_parts(read, name="model.q_proj", file=file)
    broken = next(name for name, tensor in read.items() if tensor.is_floating_point())
    read[broken][0] = float("nan")
    with pytest.raises(NumericalError, match=rf"parts\.safetensors: model\.q_proj\.{broken}: NaN or infinite"):
        scheme.check_parts(read, name="model.q_proj", file=file)


def test_linear_with_bias_and_batch() -> None:
    dense = torch.nn.Linear(96, 10)
    packed = QuantizedLinear.from_dense(dense, NF4(32), name="w")
    for x in (torch.randn(2, 3, 96), torch.randn(96, 5).t()):
        torch.testing.assert_close(packed(x), x @ packed.dense_weight().t() + dense.bias)


def test_settings() -> None:
    for scheme in (NF4(), NF4(128, False), FP4(4096)):
        assert scheme_from_json(scheme.to_json()) == scheme
    assert NF4() == NF4(block_size=64, double_quant=True)
    for size in (0, -64, 16, 48, 8192):
        with pytest.raises(ConfigError, match=f"block_size: is {size}, expected a power of two from 32 to 4096"):
            NF4.make({"block_size": size})
    with pytest.raises(ConfigError, match="double_quant: is 'yes', expected bool"):
        NF4.make({"double_quant": "yes"})
    with pytest.raises(ConfigError, match="group_size: unknown setting of fp4"):
        FP4.make({"group_size": 3})


MEASURE = """
import sys, torch
from pathlib import Path
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.kernels import four_bit
from alpaca_lora.kernels.cpu.library import Library
if sys.argv[1] == "torch":
    four_bit.library = lambda: Library(None, "off")
NF4().quantize(torch.ones(64, 64).bfloat16(), name="w")
weight = torch.ones(4096, 8192, dtype=torch.bfloat16)
def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = kilobytes("VmRSS")
NF4().quantize(weight, name="w")
print((kilobytes("VmHWM") - before) * 1024 / weight.numel())
"""


def test_a_weight_needs_little_memory_besides(path: str) -> None:
    """33 million weights in bfloat16: half a byte each for the codes, one for what comes and goes; float32 needs 4."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is measured as Linux gives it")
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.4 < float(done.stdout) < 1.6
