import pytest
import torch

from alpaca_lora.kernels import long_attention as file
from alpaca_lora.kernels import reference
from alpaca_lora.kernels.long_attention import long_attention
from tests.kernels.compare import assert_same, randn


def packed(function, lengths):
    """`long_attention` on the layout of a stream: N sequences of one length."""
    count, length = len(lengths), lengths[0]

    def run(q, k, v):
        q_NHSE, k_NKSE, v_NKSE = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return function(q_NHSE, k_NKSE, v_NKSE).transpose(1, 2).flatten(0, 1)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (7, 7), (16,), (17, 17, 17), (61,)])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("queries", [4, 16, 256])
@pytest.mark.parametrize("scores", [1, 2**19])
def test_equals_the_definition(monkeypatch, scores, queries, window, lengths, dtype):
    """In blocks of every kind: one query block or many, a key head at a time or all."""
    monkeypatch.setattr(file, "QUERIES", queries)
    monkeypatch.setattr(file, "SCORES", scores)
    tokens = sum(lengths)
    inputs = (
        randn(tokens, 6, 8, dtype=dtype), randn(tokens, 2, 8, dtype=dtype), randn(tokens, 2, 8, dtype=dtype, seed=1)
    )  # fmt: skip
    assert_same(
        packed(lambda q, k, v: long_attention(q, k, v, 0.3, window), lengths),
        lambda q, k, v: reference.attend_packed(q, k, v, lengths, 0.3, window),
        inputs, dtype,
    )  # fmt: skip


def test_a_real_length_in_bfloat16_is_as_near_to_float32_as_the_format_allows():
    q, k, v, dout = (randn(1, 4, 700, 64, seed=seed) for seed in range(4))
    errors = {}
    for name, function in (
        ("ours", long_attention),
        ("torch", lambda q, k, v, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype).float().to(dtype).requires_grad_() for x in (q, k, v)]
            out = function(*inputs, 0.125)
            found.append([out, *torch.autograd.grad(out, inputs, dout.to(dtype))])
        errors[name] = [float(((b.float() - a).norm() / a.norm()).detach()) for a, b in zip(*found, strict=True)]
    assert all(ours <= 2.5 * torchs for ours, torchs in zip(errors["ours"], errors["torch"], strict=True))
    assert max(errors["ours"]) < 2 * torch.finfo(torch.bfloat16).eps


def test_nothing_but_the_inputs_is_kept():
    q, k, v = (randn(1, 2, 300, 16, seed=seed).requires_grad_() for seed in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        long_attention(q, k, v, 0.25)
    assert sorted(kept) == sorted(x.data_ptr() for x in (q, k, v))


def test_the_output_lies_as_a_stream_does():
    q, k, v = (randn(1, 2, 300, 16, seed=seed) for seed in range(3))
    assert long_attention(q, k, v, 0.25).squeeze(0).transpose(0, 1).is_contiguous()


def test_a_token_does_not_see_what_comes_after_it():
    q, k, v = (randn(1, 2, 600, 16, seed=seed) for seed in range(3))
    before = long_attention(q, k, v, 0.25)
    k[:, :, 400:] += 1
    v[:, :, 400:] += 1
    after = long_attention(q, k, v, 0.25)
    assert torch.equal(before[:, :, :400], after[:, :, :400])
    assert not torch.equal(before[:, :, 400:], after[:, :, 400:])
