"""What all sources share: the finite check and the fingerprint."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.weights.source import check_finite, fingerprint_of, middle


@pytest.mark.parametrize("place", [0, 1, 4999, 9999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bad_weight_anywhere_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.linspace(-3, 3, 10_000).to(dtype)
    check_finite(weight, "w", "file")
    weight[place] = value
    with pytest.raises(NumericalError, match="file: w: "):
        check_finite(weight, "w", "file")


def test_large_values_and_integers_are_finite() -> None:
    check_finite(torch.full((3,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16), "w", "file")
    check_finite(torch.full((3,), torch.finfo(torch.float32).min), "w", "file")
    check_finite(torch.arange(3), "w", "file")
    check_finite(torch.tensor([True]), "w", "file")
    check_finite(torch.empty(0), "w", "file")


def test_fingerprint_depends_on_everything_but_order_and_volatile_keys() -> None:
    tensors = [("a", "F32", (2, 3), b"123"), ("b", "F32", (3,), b"456")]
    base = fingerprint_of({"x": 1, "y": 2}, tensors)
    assert fingerprint_of({"y": 2, "x": 1, "_name_or_path": "z", "torch_dtype": "q"}, reversed(tensors)) == base
    others = [
        fingerprint_of({"x": 1, "y": 3}, tensors),
        fingerprint_of({"x": 1, "y": 2}, tensors[:1]),
        *(
            fingerprint_of({"x": 1, "y": 2}, [changed, tensors[1]])
            for changed in (("c", "F32", (2, 3), b"123"), ("a", "F16", (2, 3), b"123"), ("a", "F32", (3, 2), b"123"))
        ),
        fingerprint_of({"x": 1, "y": 2}, [("a", "F32", (2, 3), b"124"), tensors[1]]),
    ]
    assert len({base, *others}) == len(others) + 1


def test_middle_lies_inside() -> None:
    assert middle(100, 110) == (100, 10)
    assert middle(0, 10_000) == (2952, 4096)
    assert middle(5, 5) == (5, 0)
