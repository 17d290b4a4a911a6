"""AdaLoRA as a whole: the layer against its formula, a run against PEFT's, pruning for good, resuming, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alpaca_lora.adapters.adalora import AdaLora
from alpaca_lora.adapters.adalora_linear import AdaLoRALinear, initial_triplets
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from alpaca_lora.models.attention import Packed
from alpaca_lora.training.checkpoint import verify
from alpaca_lora.training.optimizer import FlatAdamW
from tests.adapters.conftest import IDS, Twins, our_logits
from tests.tiny import tiny_model
from tests.training.tiny_run import digest, log_of, tiny_trainer

Make = Callable[..., Any]
PEFT_ON_TRANSFORMERS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
PEFT_ON_RANK_ZERO = "ignore:Initializing zero-element tensors:UserWarning"
ADALORA = {"method": "adalora", "lora_r": 2, "adalora_init_r": 5, "lora_target_modules": ["all-linear"]}
TOTAL = 12


def our_loss(model: Any) -> torch.Tensor:
    hidden_TD = model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
    return F.cross_entropy(model.logits(hidden_TD)[:-1], IDS[1:])


class Run:
    """What the trainer does with an adapter, without the rest of it."""

    def __init__(self, options: Any, total: int = TOTAL, seed: int = 0) -> None:
        self.model = tiny_model()
        self.adapter = AdaLora.attach(self.model, options, seed=seed)
        self.adapter.begin(total)
        self.optimizer = FlatAdamW(self.adapter.trained_parameters())
        self.records: list[dict[str, Any]] = []
        self.kept: dict[int, Any] = {}

    def steps(self, first: int, last: int) -> Run:
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.adapter.set_rows(None)
            our_loss(self.model).backward()
            penalty = self.adapter.penalty()
            assert penalty is not None
            penalty.backward()
            del penalty
            self.optimizer.step(1e-2)
            if kept := self.adapter.after_step(step):
                self.before = our_logits(self.model)
                self.optimizer.select(kept)
                self.kept[step] = kept
            self.adapter.set_rows(None)
            self.records.append(self.adapter.log_record())
        return self

    def saved(self) -> tuple[dict[str, torch.Tensor], int, dict[str, torch.Tensor]]:
        state = {name: tensor.clone() for name, tensor in self.optimizer.state_tensors().items()}
        return state, self.optimizer.updates, self.adapter.extra_state()

    def resume(self, state: dict[str, torch.Tensor], updates: int, extra: dict[str, torch.Tensor]) -> Run:
        if kept := self.adapter.load_extra_state(extra):
            self.optimizer.select(kept)
        self.optimizer.load_state(state, updates=updates, file="x")
        return self


@pytest.fixture
def adalora(options: Make) -> Make:
    def make(**changes: Any) -> Any:
        return options(**{**ADALORA, "adalora_tinit": 2, "adalora_tfinal": 3, **changes})

    return make


# --- the start


def test_start_is_seeded_by_name_and_leaves_the_model_as_it_was(adalora: Make) -> None:
    model, before = tiny_model(), our_logits(tiny_model())
    adapter = AdaLora.attach(model, adalora(), seed=1)
    assert torch.equal(our_logits(model), before)  # lora_E is zero
    assert not any(adapter.moved().values()) and len(adapter.moved()) == 14
    fewer = AdaLora.attach(tiny_model(), adalora(lora_target_modules=["q_proj"]), seed=1).state_tensors()
    other = AdaLora.attach(tiny_model(), adalora(), seed=2).state_tensors()
    first = adapter.state_tensors()
    assert all(torch.equal(first[key], tensor) for key, tensor in fewer.items()) and len(fewer) == 6
    assert not any(torch.equal(first[key], other[key]) for key in first if "lora_E" not in key)
    a, b, e = initial_triplets(0, "x", 64, 300, 400)
    assert not e.any() and abs(float(a.std()) / 0.02 - 1) < 0.03 and abs(float(b.std()) / 0.02 - 1) < 0.03


def test_initial_rank_is_half_as_much_again_unless_given(adalora: Make) -> None:
    for rank, initial in ((1, 2), (2, 3), (3, 5), (8, 12)):
        adapter = AdaLora.attach(tiny_model(), adalora(lora_r=rank, adalora_init_r=None), seed=0)
        assert adapter.config["init_r"] == initial and adapter.config["target_r"] == rank
        assert {layer.rank for layer in adapter.layers.values()} == {initial}
        assert {layer.scale for layer in adapter.layers.values()} == {8 / (initial + 1e-5)}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"adalora_init_r": 2}, "adalora_init_r"), ({"adalora_init_r": 1}, "adalora_init_r"),
        ({"use_rslora": True}, "use_rslora"), ({"lora_plus_ratio": 16.0}, "lora_plus_ratio"),
        ({"rank_pattern": ["q_proj=3"]}, "rank_pattern"), ({"alpha_pattern": ["q_proj=3"]}, "alpha_pattern"),
    ],
)  # fmt: skip
def test_impossible_options_leave_the_model_alone(adalora: Make, changes: dict[str, Any], field: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=f"^{field}: "):
        AdaLora.attach(model, adalora(**changes), seed=0)
    assert not any(isinstance(module, AdaLoRALinear) for module in model.modules())


# --- a run


@pytest.mark.parametrize("delta", [1, 3])
@pytest.mark.parametrize("tfinal", [0, 3])
def test_a_run_reaches_its_budget_and_removes_what_it_pruned(adalora: Make, delta: int, tfinal: int) -> None:
    run = Run(adalora(adalora_delta_t=delta, adalora_tfinal=tfinal))
    adapter, final = run.adapter, TOTAL - tfinal - 1
    run.steps(0, final)
    assert {layer.rank for layer in adapter.layers.values()} == {5}
    with pytest.raises(NumericalError, match="not final"):
        adapter.check_acted()
    run.steps(final, TOTAL)
    assert list(run.kept) == [final] and sum(adapter.ranks().values()) == 2 * 14
    assert {name: layer.rank for name, layer in adapter.layers.items()} == adapter.ranks()
    for layer in adapter.layers.values():
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == layer.lora_E.shape[0]
        assert layer.lora_E.grad is not None and layer.lora_E.grad.shape == layer.lora_E.shape
    assert len(set(adapter.ranks().values())) > 1  # not the same everywhere, which would be LoRA
    adapter.check_acted()
    assert ("budget", "28 triplets left of 70, 28 planned") in adapter.facts()
    moved = adapter.moved()
    assert moved.keys() == {name for name, rank in adapter.ranks().items() if rank} and all(moved.values())
    if tfinal == 0:  # removing what is zero changes no output
        torch.testing.assert_close(our_logits(run.model), run.before, rtol=0, atol=1e-5)


def test_what_was_not_removed_is_noticed(adalora: Make) -> None:
    run = Run(adalora())
    run.steps(0, 8)
    run.optimizer.select = lambda kept: None  # a trainer that forgets
    run.steps(8, TOTAL)
    with pytest.raises(NumericalError, match="70 triplets are left, 28 by its masks"):
        run.adapter.check_acted()
    with pytest.raises(AdapterError, match="call begin"):
        AdaLora.attach(tiny_model(), adalora(), seed=0).after_step(0)


def test_the_log_tells_ranks_budget_and_penalty(adalora: Make) -> None:
    run = Run(adalora()).steps(0, TOTAL)
    assert [record["budget"] for record in run.records] == [70, 70, 54, 43, 35, 31, 28, 28, 28, 28, 28, 28]
    assert all(record["penalty"] > 0 for record in run.records)
    assert set(run.records[0]["ranks"].values()) == {5} and len(run.records[0]["ranks"]) == 14
    assert "ranks" not in run.records[1] and all("ranks" not in record for record in run.records[9:])
    ranks: dict[str, int] = {}
    for record in run.records:
        ranks |= record.get("ranks", {})
    assert ranks == run.adapter.ranks() and json.loads(json.dumps(run.records)) == run.records


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
def test_training_goes_as_in_peft_to_the_final_budget(adalora: Make, twins: Twins) -> None:
    """The same model, start, loss and steps of SGD: the same losses, weights and masks, step by step."""
    from peft import AdaLoraConfig, get_peft_model

    options = adalora(adalora_orth_weight=0.3, adalora_delta_t=2)
    adapter = AdaLora.attach(twins.ours, options, seed=0)
    adapter.begin(TOTAL)
    config = AdaLoraConfig(
        init_r=5, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=TOTAL, lora_alpha=8, orth_reg_weight=0.3,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",  # else PEFT leaves the penalty out
    )  # fmt: skip
    theirs: Any = get_peft_model(twins.theirs, config)
    own = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    ours = dict(adapter.trained_parameters())
    assert own.keys() == ours.keys()
    for name, parameter in ours.items():
        own[name].data.copy_(parameter.data)
    for step in range(TOTAL - 3):
        loss = our_loss(twins.ours)
        penalty = adapter.penalty()
        assert penalty is not None
        loss = loss + penalty
        their_loss = theirs(input_ids=IDS[None], labels=IDS[None]).loss
        torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
        for total, parameters in ((loss, ours), (their_loss, own)):
            total.backward()
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.sub_(parameter.grad, alpha=0.5)  # pyright: ignore
        adapter.after_step(step)
        theirs.base_model.update_and_allocate(step + 1)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, own[name], rtol=1e-4, atol=1e-5)
            parameter.grad = own[name].grad = None
        pattern = theirs.peft_config["default"].rank_pattern or {}
        masks = {name.removesuffix(".lora_E.default"): mask for name, mask in pattern.items()}
        assert {name: mask_R.tolist() for name, mask_R in adapter.masks.items()} == masks
    assert adapter.config["rank_pattern"] == {f"{name}.lora_E": mask for name, mask in masks.items()}
    assert 0 < sum(map(sum, masks.values())) == 28


# --- resuming


@pytest.mark.parametrize("stop", range(1, TOTAL))
def test_resumed_at_any_step_is_as_if_never_stopped(adalora: Make, stop: int) -> None:
    """Before, inside and after pruning: weights, optimizer, log, masks; delta_t = 2 leaves steps between prunings."""
    options = adalora(adalora_delta_t=2)
    whole = Run(options).steps(0, TOTAL)
    first = Run(options).steps(0, stop)
    saved = first.saved()
    first.steps(stop, TOTAL)  # must not reach into what was saved
    again = Run(options, seed=9).resume(*saved).steps(stop, TOTAL)
    assert again.records == whole.records[stop:]
    (state, updates, extra), (wanted, wanted_updates, wanted_extra) = again.saved(), whole.saved()
    assert updates == wanted_updates and state.keys() == wanted.keys() and extra.keys() == wanted_extra.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    assert all(torch.equal(tensor, wanted_extra[name]) for name, tensor in extra.items())
    assert again.adapter.config == whole.adapter.config
    assert ("adalora.sensitivity.model.layers.0.mlp.up_proj.lora_A" in saved[2]) == (stop < TOTAL - 3)


def test_resuming_without_the_averages_would_not_be_the_same(adalora: Make) -> None:
    """Negative control."""
    whole = Run(adalora()).steps(0, TOTAL)
    state, updates, extra = Run(adalora()).steps(0, 5).saved()
    wrong = {name: 100 * t.roll(1, 0) if "sensitivity" in name else t for name, t in extra.items()}
    again = Run(adalora()).resume(state, updates, wrong).steps(5, TOTAL)
    assert again.records != whole.records[5:]


@pytest.mark.parametrize("harm", ["schedule", "shape", "missing", "mask", "extra"])
def test_state_of_another_run_is_refused(adalora: Make, harm: str) -> None:
    extra = Run(adalora()).steps(0, 5).saved()[2]
    key = "adalora.uncertainty.model.layers.1.mlp.up_proj.lora_B"
    if harm == "schedule":
        extra["adalora.schedule"][2] += 1
    elif harm == "shape":
        extra[key] = extra[key][:, :3]
    elif harm == "missing":
        del extra[key]
    elif harm == "mask":
        del extra["adalora.mask.model.layers.1.mlp.up_proj"]
    else:
        extra["adalora.mask.model.layers.7.mlp.up_proj"] = torch.ones(5)
    with pytest.raises(AdapterError, match=r"adalora\.(schedule|uncertainty|mask)"):
        Run(adalora()).adapter.load_extra_state(extra)


def test_the_trainer_resumes_a_run_in_which_modules_have_no_rank_left(tmp_path: Path) -> None:
    """Parameters without an element get no gradient, which the trainer must not take for a defect."""
    adapter = {
        "method": "adalora", "lora_r": 1, "adalora_init_r": 4, "adalora_tinit": 1, "adalora_tfinal": 4,
        "lora_target_modules": ["all-linear"],
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "a", adapter=adapter, max_steps=8, save_total_limit=9)
    whole.train()
    assert isinstance(whole.adapter, AdaLora) and 0 in whole.adapter.ranks().values()
    for step in (2, 4, 6):
        again = tiny_trainer(
            tmp_path / str(step), adapter=adapter, max_steps=8, resume=verify(tmp_path / "a" / f"checkpoint-{step}")
        )
        again.train()
        assert digest(again) == digest(whole) and log_of(again) == log_of(whole)
