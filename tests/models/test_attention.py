"""The plan of training against the definition of attention, written out."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.kernels import reference
from alpaca_lora.models.attention import Packed


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_packed_is_causal_softmax_within_each_segment(key_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, heads, width, scale = (5, 1, 11), 6, 4, 0.3
    q_THE, k_TKE, v_TKE = (torch.randn(17, n, width, generator=generator) for n in (heads, key_heads, key_heads))
    out_THE = Packed(lengths).attend(0, q_THE, k_TKE, v_TKE, scale, window)
    segment_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).tolist()
    for t in range(17):
        seen = [s for s in range(t + 1) if segment_T[s] == segment_T[t] and (window is None or t - s < window)]
        for h in range(heads):
            kv = h // (heads // key_heads)
            weights = torch.softmax(scale * (k_TKE[seen, kv] @ q_THE[t, h]), dim=0)
            torch.testing.assert_close(out_THE[t, h], weights @ v_TKE[seen, kv], atol=1e-5, rtol=0)


class CountedPrefix:
    """Two layers' random keys and values, and how often they were asked for."""

    length = 3

    def __init__(self) -> None:
        self.asked = 0
        self.layers = [(torch.randn(3, 2, 4), torch.randn(3, 2, 4)) for _ in range(2)]

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.asked += 1
        return self.layers


@pytest.mark.parametrize("window", [None, 4])
def test_every_layer_reads_its_own_part_of_the_prefix(window: int | None) -> None:
    torch.manual_seed(0)
    prefix, lengths, q_THE, k_TKE = CountedPrefix(), (5, 2), torch.randn(7, 2, 4), torch.randn(7, 2, 4)
    plain = Packed(lengths)
    plan = plain.with_prefix(prefix)
    for layer in range(2):
        out_THE = plan.attend(layer, q_THE, k_TKE, k_TKE, 0.5, window)
        want_THE = reference.attend_packed(q_THE, k_TKE, k_TKE, lengths, 0.5, window, prefix.layers[layer])
        torch.testing.assert_close(out_THE, want_THE)
        assert not torch.allclose(out_THE, plain.attend(layer, q_THE, k_TKE, k_TKE, 0.5, window))
    assert prefix.asked == 1


def test_one_plan_serves_all_layers() -> None:
    plan, q_THE = Packed((3, 2)), torch.randn(5, 2, 4)
    assert torch.equal(plan.attend(0, q_THE, q_THE, q_THE, 1.0, None), plan.attend(9, q_THE, q_THE, q_THE, 1.0, None))
