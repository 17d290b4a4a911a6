"""Layer by layer: the numbers of the whole model, rows that do not mix, layers that are there only in their turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alpaca_lora.errors import ConfigError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.load import open_source
from alpaca_lora.quantization.layer_walk import STREAM_TOKENS, LayerWalk, check_rows
from tests.quantization.calibration_models import ARCHITECTURES, load, rows, save
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_same_activations_and_loss_as_the_whole_model(name: str, tmp_path: Path) -> None:
    base = load(save(name, tmp_path / "base"))
    walk = LayerWalk(base.model)
    layers = list(base.model.layers)
    (stream,) = walk.streams(rows())
    assert all(one is two for one, two in zip(base.model.layers, layers, strict=True))
    for index in range(len(walk)):
        walk.advance(index, [stream])
    expected_loss, start = 0.0, 0
    for row in rows():
        hidden_TD = base.model(row, torch.arange(len(row)), Packed([len(row)]))
        torch.testing.assert_close(base.model.final_norm(stream.x_TD)[start : start + len(row)], hidden_TD)
        logits = base.model.logits(hidden_TD)
        expected_loss += float(F.cross_entropy(logits[:-1], row[1:], reduction="sum"))
        start += len(row)
    assert float(walk.loss(stream, stream.x_TD)) == pytest.approx(expected_loss, rel=1e-5)


def test_rows_are_cut_into_streams() -> None:
    walk = LayerWalk(tiny_model(max_position_embeddings=4096))
    lengths = (STREAM_TOKENS + 5, 1, 100, STREAM_TOKENS - 1, 7)
    streams = walk.streams([torch.arange(length) % 256 for length in lengths])
    assert [[len(row) for row in stream.rows] for stream in streams] == [[2053], [1, 100, 2047], [7]]
    places_N, ids_N = streams[1].next_tokens()
    assert places_N.tolist() == [*range(1, 100), *range(101, 2147)]  # neither the row of one nor any row's last
    assert ids_N.tolist() == [i % 256 for i in (*range(1, 100), *range(1, 2047))]


@torch.no_grad()
def test_inputs_are_collected_once_for_linears_that_share_them() -> None:
    model = tiny_model()
    walk = LayerWalk(model)
    streams = walk.streams(rows())
    names = [f"model.layers.0.{one}" for one in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")]
    seen = walk.inputs(0, names, streams)
    layer: Any = model.layers[0]
    expected = layer.input_layernorm(streams[0].x_TD)
    assert seen[names[0]][0] is seen[names[1]][0] and seen[names[0]][0] is not seen[names[2]][0]
    assert torch.equal(seen[names[0]][0], expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_a_file_come_and_go(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "base")
    loaded = load(folder).model
    source, model = open_source(folder), load(folder).model.to("meta")
    walk = LayerWalk(model, source, torch.float32, torch.device("cpu"))
    empty = [n for n, parameter in model.named_parameters() if parameter.is_meta]
    assert empty == [n for n, _ in model.named_parameters() if n.startswith(tuple(walk.prefixes))]
    walk.fill(1)
    layer = {n: p for n, p in model.named_parameters() if not p.is_meta and n.startswith(tuple(walk.prefixes))}
    assert layer and all(n.startswith(walk.prefixes[1]) for n in layer)
    assert all(torch.equal(parameter, loaded.get_parameter(n)) for n, parameter in layer.items())
    linear = next(n for n in layer if n.endswith("q_proj.weight")).removesuffix(".weight")
    assert torch.equal(walk.weight(linear), layer[f"{linear}.weight"])
    walk.empty(1)
    assert [n for n, parameter in model.named_parameters() if parameter.is_meta] == empty
    source.close()


@torch.no_grad()
def test_drawn_tokens_follow_the_model() -> None:
    model = tiny_model()
    walk = LayerWalk(model)
    (stream,) = walk.streams([torch.arange(40)])
    for index in range(len(walk)):
        walk.advance(index, [stream])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([walk.draw(stream, stream.x_TD, generator) for _ in range(400)])
    assert draws.shape == (400, 39)
    p_NV = model.logits(model(torch.arange(40), torch.arange(40), Packed([40])))[:-1].softmax(-1)
    # the mean of log p of what is drawn is the entropy, within four deviations of such a mean
    log_p = p_NV.log().gather(1, draws.t())
    entropy_N = -(p_NV * p_NV.log()).sum(-1)
    spread = float(log_p.std()) / (400 * 39) ** 0.5
    assert abs(float(log_p.mean() + entropy_N.mean())) < 4 * spread
    assert abs(float(p_NV.log().mean() + entropy_N.mean())) > 40 * spread  # uniform draws would not


def test_too_few_tokens_are_refused() -> None:
    check_rows([torch.arange(100), torch.arange(28)])
    for few in ([], [torch.arange(100), torch.arange(27)]):
        with pytest.raises(ConfigError, match=r"^calibration_data: (0|127) tokens .*at least 128"):
            check_rows(few)
