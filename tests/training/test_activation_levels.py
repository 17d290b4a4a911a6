import itertools
from typing import Any

import pytest
import torch

from alpaca_lora.models.attention import Packed
from alpaca_lora.models.recompute import LEVELS
from alpaca_lora.training.activation_levels import Kept, choose, count_kept, describe, set_levels
from tests.tiny import tiny_model
from tests.training.tiny_run import tiny_trainer

T = 64
X, INNER = 4 * 32, 4 * 48  # bytes per token: of x and the other width, and of the feed-forward's inner one
QKV, RSTD, U = 4 * (32 + 16 + 16), 4, 4 * 4  # rotated queries, keys and values; of a norm; of LoRA's rank 4


def counted(adapter: dict[str, Any], per: float = 1.0) -> Kept:
    model = tiny_trainer(adapter=adapter, model=tiny_model()).model
    ids_T = torch.arange(T)
    kept = count_kept(model, lambda: model(ids_T, ids_T, Packed((T,))), per)
    assert "run_layer" not in vars(model)
    return {level: [size // T for size in kept[level]] for level in LEVELS}


def test_what_lora_on_queries_and_values_keeps() -> None:
    kept = counted({"lora_target_modules": ["q_proj", "v_proj"]})
    # the upper layer: norms keep their input and rstd, LoRA the normed input and U; attention q, k, v; gate and up
    every = 2 * (X + RSTD) + X + 2 * U + QKV + 2 * INNER
    assert kept["none"][1] == every
    assert kept["norms"][1] == every - X
    assert kept["mlp"][1] == every - X - 2 * INNER - RSTD
    assert kept["layer"] == [X, X]
    # nothing is trained below the lowest layer: its first norm keeps nothing, and its output cannot be made again
    assert kept["none"][0] == kept["norms"][0] == every - X - RSTD


def test_targets_in_the_feed_forward_keep_what_can_be_made_again() -> None:
    few, all_linear = counted({"lora_target_modules": ["q_proj", "v_proj"]}), counted(
        {"lora_target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
    )  # fmt: skip
    assert all_linear["none"][1] - few["none"][1] == X + INNER + 3 * U
    assert all_linear["norms"][1] - few["norms"][1] == 3 * U
    assert all_linear["mlp"] == few["mlp"]


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    kept = counted({"layers_to_transform": [1]})
    assert all(kept[level][0] == 0 < kept[level][1] for level in LEVELS[:-1])
    assert kept["disk"] == [0, 0]


@pytest.mark.parametrize("adapter", [{"method": "prefix", "num_virtual_tokens": 5}, {"method": "full"}, {}], ids=str)
def test_no_level_keeps_more_than_the_one_before(adapter: dict[str, Any]) -> None:
    kept = counted(adapter)
    for before, after in itertools.pairwise(LEVELS):
        assert all(a >= b for a, b in zip(kept[before], kept[after], strict=True))
    assert kept["none"][1] > kept["mlp"][1] > kept["layer"][1]


def test_counts_are_scaled_to_the_batch_they_stand_for() -> None:
    one, three = counted({}), counted({}, per=3.0)
    assert all(three[level][i] == 3 * one[level][i] for level in LEVELS for i in range(2))


def test_counting_keeps_nothing_and_cannot_be_gone_back_through() -> None:
    model = tiny_trainer().model
    ids_T, results = torch.arange(T), []
    count_kept(model, lambda: results.append(model(ids_T, ids_T, Packed((T,)))))
    with pytest.raises(AssertionError, match="nothing was kept"):
        results[0].sum().backward()


KEPT: Kept = {"none": [0, 40, 50], "norms": [0, 35, 45], "mlp": [0, 20, 25], "layer": [0, 10, 10]}


@pytest.mark.parametrize(
    ("room", "levels"),
    [
        (0, ("none", "layer", "layer")), (9, ("none", "layer", "layer")), (14, ("none", "mlp", "layer")),
        (15, ("none", "layer", "mlp")), (25, ("none", "mlp", "mlp")), (45, ("none", "mlp", "norms")),
        (60, ("none", "norms", "norms")), (65, ("none", "norms", "none")), (70, ("none", "none", "none")),
    ],
)  # fmt: skip
def test_the_room_is_filled_and_never_exceeded(room: int, levels: tuple[str, ...]) -> None:
    chosen = choose(KEPT, room)
    assert chosen == levels
    assert sum(KEPT[level][i] for i, level in enumerate(chosen)) <= 20 + room


def test_levels_in_words() -> None:
    assert describe(("none",) * 2) == "nothing in 2 layers"
    words = "everything in 1 layer, norms and feed-forward in 2, nothing in 1"
    assert describe(("layer", "mlp", "mlp", "none")) == words


@pytest.mark.parametrize(
    ("asked", "levels"),
    [
        (False, ("none", "none")), (True, ("layer", "layer")), ("norms", ("norms", "norms")), ("mlp", ("mlp", "mlp")),
        ("auto", ("mlp", "layer")),
    ],
)  # fmt: skip
def test_what_the_key_says_and_what_the_preflight_has_chosen(asked: bool | str, levels: tuple[str, ...]) -> None:
    model = tiny_model()
    model.gradient_checkpointing = ("mlp", "layer")
    set_levels(model, asked)
    assert tuple(model.levels()) == levels
