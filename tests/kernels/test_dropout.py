import pytest
import torch

from alpaca_lora.kernels.dropout import DropoutKey, keep_mask, mask_bits, row_keys
from alpaca_lora.kernels.dropout import keep_bits as bits_of

ROWS, WIDTH = 2000, 576


def keys(seed=1, step=2, rows=ROWS):
    return row_keys(seed, step, torch.arange(rows) // 50, torch.arange(rows) % 50)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_drops_the_share_it_is_told(p):
    """Over all, and along every row and column: spread no larger than independent draws have (4 standard errors)."""
    dropped = 1 - keep_mask(DropoutKey(keys(), p, 7), WIDTH).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean().item() - p) < 4 * spread / (ROWS * WIDTH) ** 0.5 + 2**-15
    assert dropped.mean(1).std().item() == pytest.approx(spread / WIDTH**0.5, rel=0.1)
    assert dropped.mean(0).std().item() == pytest.approx(spread / ROWS**0.5, rel=0.15)


@pytest.mark.parametrize("other", [dict(seed=2), dict(step=3), dict(salt=8)])
def test_other_seed_step_or_input_draws_anew(other):
    salt = other.pop("salt", 7)
    a = keep_mask(DropoutKey(keys(), 0.5, 7), WIDTH)
    b = keep_mask(DropoutKey(keys(**other), 0.5, salt), WIDTH)
    assert (a == b).double().mean().item() == pytest.approx(0.5, abs=0.005)


def test_rows_and_neighbouring_columns_are_not_alike():
    x = keep_mask(DropoutKey(keys(rows=500), 0.5, 7), WIDTH).double() - 0.5
    between_rows = (x @ x.t()) / (0.25 * WIDTH)
    between_rows.fill_diagonal_(0)
    assert between_rows.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)
    assert between_rows.abs().max().item() < 6 * WIDTH**-0.5
    for shift in (1, 2, 3):  # 1: the two draws of one word
        assert abs((x[:, shift:] * x[:, :-shift]).mean().item()) < 0.25 * 5 / (500 * WIDTH) ** 0.5


def test_depends_on_the_row_not_on_its_place_in_the_stream():
    """The promise that micro-batches may be cut anywhere."""
    example, position = torch.tensor([3, 3, 9, 9, 9]), torch.tensor([0, 1, 0, 1, 2])
    whole = keep_mask(DropoutKey(row_keys(1, 4, example, position), 0.3, 5), 33)
    turned = keep_mask(DropoutKey(row_keys(1, 4, example.flip(0), position.flip(0)), 0.3, 5), 33)
    assert torch.equal(whole, turned.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [7, 8])
def test_masking_bits_is_multiplying_by_the_mask(width, dtype):
    key = DropoutKey(keys(rows=20), 0.4, 3)
    x = torch.randn(20, width).to(dtype)
    assert torch.equal(mask_bits(x, bits_of(key, width)), x * keep_mask(key, width))
