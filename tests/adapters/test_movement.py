"""What is told of parts that move, stand still, or have not had the time to move."""

from __future__ import annotations

import torch

from alpaca_lora.adapters.movement import PATIENCE, Movement

Values = dict[tuple[str, str], torch.Tensor]


def values() -> Values:
    return {(module, part): torch.arange(6.0).view(2, 3) + n for n, module in enumerate("xy") for part in "AB"}


def parts(tensors: Values) -> list[tuple[str, str, torch.Tensor]]:
    return [(module, part, tensor) for (module, part), tensor in tensors.items()]


def after(num_steps: int, moving: dict[tuple[str, str], int]) -> dict[str, list[str]]:
    """What is stuck after so many steps; ``moving``: (module, part) -> the first step, from 0, that moves it."""
    tensors = values()
    movement = Movement(parts(tensors))
    for step in range(num_steps):
        for key, first in moving.items():
            if step >= first:
                tensors[key] += 1e-6 * torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
        movement.note(parts(tensors))
    return movement.stuck(parts(tensors))


def test_a_part_that_stands_still_while_others_move_is_stuck() -> None:
    moving = {("x", "A"): 0, ("x", "B"): 0, ("y", "B"): 0}
    assert after(9, moving) == {"A": ["y"]}
    assert after(9, {**moving, ("y", "A"): 1}) == {}


def test_a_part_is_given_time_after_the_first_of_its_module() -> None:
    """lora_A has no gradient before lora_B has moved, and that may be late (a module that was not reached)."""
    assert after(PATIENCE, {("x", "B"): 0}) == {}
    assert after(PATIENCE + 1, {("x", "B"): 0}) == {"A": ["x"]}
    assert after(5 + PATIENCE, {("x", "B"): 5}) == {}
    assert after(6 + PATIENCE, {("x", "B"): 5}) == {"A": ["x"]}


def test_a_module_of_which_nothing_moved_is_not_for_here() -> None:
    assert after(9, {}) == {}


def test_a_change_is_seen_whatever_its_sum_and_its_norm() -> None:
    start = torch.tensor([3.0, 4.0])
    for change in (torch.tensor([4.0, 3.0]), torch.tensor([2.0, 5.0]), torch.tensor([5.0, 0.0])):
        movement = Movement([("x", "A", start), ("x", "B", start)])
        for value, stuck in ((start.clone(), {"A": ["x"]}), (change, {})):
            for _ in range(PATIENCE + 1):
                movement.note([("x", "A", value), ("x", "B", start + 1)])
            assert movement.stuck([("x", "A", value), ("x", "B", start + 1)]) == stuck


def test_going_back_to_the_start_is_having_moved() -> None:
    """The weights in the end may be those of an early step."""
    tensors = values()
    movement = Movement(parts(tensors))
    for step in range(4):
        tensors["x", "B"] += 1
        if step == 2:
            tensors["x", "A"] += 1
        movement.note(parts(tensors))
    assert movement.stuck(parts({**values(), ("x", "B"): tensors["x", "B"]})) == {}


def test_norms_and_what_has_no_elements() -> None:
    movement = Movement(
        [("x", "A", torch.tensor([3.0, 4.0])), ("x", "E", torch.zeros(0, 1)), ("x", "B", torch.ones(4))]
    )
    assert movement.norms == {("x", "A"): 5.0, ("x", "E"): 0.0, ("x", "B"): 2.0}
    now = [("x", "A", torch.zeros(2)), ("x", "E", torch.zeros(0, 1)), ("x", "B", torch.ones(4))]
    for _ in range(PATIENCE + 1):
        movement.note(now)
    assert movement.stuck(now) == {"B": ["x"]}
