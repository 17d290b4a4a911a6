import pytest
import torch

from alpaca_lora.kernels import attention, reference
from tests.kernels.compare import assert_same, randn


@pytest.fixture(autouse=True, params=[0, attention.SLACK], ids=["many blocks", "few blocks"])
def slack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SLACK", request.param)


LENGTHS = [(1,), (7,), (5, 1, 13, 12, 3, 3), (31, 30, 29, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("longest_plain", [0, 6, 1000])
def test_equals_the_definition(monkeypatch, longest_plain, window, lengths, dtype):
    """By plain products, by flash, and with both in one stream."""
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    tokens = sum(lengths)
    inputs = (
        randn(tokens, 6, 8, dtype=dtype),
        randn(tokens, 2, 8, dtype=dtype),
        randn(tokens, 2, 8, dtype=dtype, seed=1),
    )
    assert_same(
        lambda q, k, v: attention.attend_packed(q, k, v, lengths, 0.3, window),
        lambda q, k, v: reference.attend_packed(q, k, v, lengths, 0.3, window),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("num_virtual", [1, 5])
@pytest.mark.parametrize("window", [None, 3, 9, 1000])
@pytest.mark.parametrize("longest_plain", [0, 6, 1000])
def test_equals_the_definition_behind_a_prefix(monkeypatch, longest_plain, window, num_virtual, lengths, dtype):
    """Outputs and all five gradients, those of the prefix summed over the segments."""
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    tokens = sum(lengths)
    inputs = (
        randn(tokens, 6, 8, dtype=dtype),
        randn(tokens, 2, 8, dtype=dtype),
        randn(tokens, 2, 8, dtype=dtype, seed=1),
        randn(num_virtual, 2, 8, dtype=dtype, seed=2),
        randn(num_virtual, 2, 8, dtype=dtype, seed=3),
    )
    assert_same(
        lambda q, k, v, *prefix: attention.attend_packed(q, k, v, lengths, 0.3, window, prefix),
        lambda q, k, v, *prefix: reference.attend_packed(q, k, v, lengths, 0.3, window, prefix),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("window", [None, 4])
def test_a_prefix_is_what_stands_in_front_of_every_segment(window):
    """The definition itself: the prefix as the first tokens of each segment gives the same rows."""
    lengths, before = (4, 9), 3
    q, k, v = randn(13, 6, 8), randn(13, 2, 8, seed=1), randn(13, 2, 8, seed=2)
    first = randn(before, 6, 8), randn(before, 2, 8), randn(before, 2, 8, seed=5)
    joined = [torch.cat((p, x[:4], p, x[4:])) for p, x in zip(first, (q, k, v), strict=True)]
    whole = reference.attend_packed(*joined, [length + before for length in lengths], 0.3, window)
    out = reference.attend_packed(q, k, v, lengths, 0.3, window, first[1:])
    torch.testing.assert_close(out, torch.cat((whole[3:7], whole[10:])))
    assert (out - reference.attend_packed(q, k, v, lengths, 0.3, window)).abs().max() > 0.1


@pytest.mark.parametrize("longest_plain", [0, 1000])
def test_segments_do_not_see_each_other(monkeypatch, longest_plain):
    """Changing one segment leaves every other segment's output bit-equal."""
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    lengths = (4, 9, 8)
    q, k, v = randn(21, 2, 8), randn(21, 2, 8, seed=1), randn(21, 2, 8, seed=2)
    before = attention.attend_packed(q, k, v, lengths, 0.3)
    for x in (q, k, v):
        x[4:13] += 1
    after = attention.attend_packed(q, k, v, lengths, 0.3)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[13:], after[13:])
    assert not torch.equal(before[4:13], after[4:13])


def test_layout_holds_every_token_once():
    layout = attention.SegmentLayout((50, 3, 49, 48, 2, 1, 10))
    rows = torch.cat([block.rows for block in layout.blocks])
    assert torch.equal(rows.sort().values, torch.arange(163))
    for block in layout.blocks:
        lost = block.count * block.length - len(block.rows)
        assert lost <= max(attention.WASTE * block.length, attention.SLACK) * (block.count - 1)
    assert len(layout.blocks) == (1 if attention.SLACK else 5)
