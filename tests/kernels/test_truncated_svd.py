"""The truncated decomposition: exact, approximate, and a function of its arguments alone."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.kernels import truncated_svd as room
from alpaca_lora.kernels.truncated_svd import truncated_svd


def falling_spectrum() -> torch.Tensor:
    """120 x 90 of rank 80 with singular values that fall slowly, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(120, 80, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(90, 80, generator=generator))
    return (u * torch.arange(1, 81).float() ** -0.5) @ v.t()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 7)])
def test_what_is_left_is_as_small_as_it_can_be(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vt = truncated_svd(matrix, 5, "x")
    all_values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, all_values[:5])
    torch.testing.assert_close((matrix - (u * s) @ vt).norm(), all_values[5:].norm())
    torch.testing.assert_close(u.t() @ u, torch.eye(5), rtol=0, atol=1e-5)
    assert bool((vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all())


def test_wide_matrices_are_approximated_closely_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own generator is neither asked nor moved."""
    matrix = falling_spectrum()
    u, s, vt = truncated_svd(matrix, 8, "x")
    monkeypatch.setattr(room, "EXACT_WIDTH", 10)
    state = torch.get_rng_state()
    first, second = truncated_svd(matrix, 8, "x"), truncated_svd(matrix, 8, "x")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    exact, near = (u * s) @ vt, (first[0] * first[1]) @ first[2]
    assert (near - exact).norm() < 1e-3 * exact.norm()
    torch.manual_seed(5)
    assert torch.equal(truncated_svd(matrix, 8, "x")[0], first[0])
    assert not torch.equal(truncated_svd(matrix, 8, "y")[0], first[0])


def test_a_rank_above_the_matrix_gives_what_there_is() -> None:
    u, s, vt = truncated_svd(torch.eye(3), 5, "x")
    assert (u.shape, s.shape, vt.shape) == ((3, 3), (3,), (3, 3))
