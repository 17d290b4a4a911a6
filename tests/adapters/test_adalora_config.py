"""Phases that fit into a run and those that do not, what a file may say, and PEFT as the oracle of files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alpaca_lora.adapters.adalora import AdaLora
from alpaca_lora.adapters.adalora_config import check_config, masks_of, phases, settings
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.errors import AdapterError, ConfigError
from tests.adapters.conftest import IDS, Twins, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
# PEFT about its own use of transformers and torch, and about the patterns and empty tensors that it writes itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("tinit", "tfinal", "delta", "total", "planned"),
    [
        (0.1, 0.3, 1, 100, (10, 30)), (0.1, 0.3, 1, 1, (0, 0)), (0.1, 0.3, 1, 2, (0, 1)), (5, 0, 3, 20, (5, 0)),
        (0, 0.5, 10, 20, (0, 10)), (2.0, 1, 1, 4, (2, 1)),
    ],
)  # fmt: skip
def test_phases(tinit: float, tfinal: float, delta: int, total: int, planned: tuple[int, int]) -> None:
    assert phases(tinit, tfinal, delta, total) == planned


@pytest.mark.parametrize(
    ("tinit", "tfinal", "delta", "total", "field"),
    [
        (0.5, 0.5, 1, 10, "adalora_tinit"), (3, 8, 1, 10, "adalora_tfinal"), (10, 0, 1, 10, "adalora_tinit"),
        (2.5, 0, 1, 10, "adalora_tinit"), (2, 2, 7, 10, "adalora_delta_t"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_are_refused(tinit: float, tfinal: float, delta: int, total: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        phases(tinit, tfinal, delta, total)


def trained(model: Any, options: Any, *, final: bool) -> AdaLora:
    """An adapter as a run leaves it; with final ranks there is a module without any."""
    adapter = AdaLora.attach(model, options(method="adalora", lora_r=2, lora_target_modules=["all-linear"]), seed=0)
    adapter.begin(2)
    train_a_little(adapter)
    if final:
        generator = torch.Generator().manual_seed(5)
        names = list(adapter.layers)
        for name, layer in adapter.layers.items():
            mask_R = torch.rand(layer.rank, generator=generator) < 0.6
            mask_R[:] = mask_R & (name != names[3])
            adapter.masks[name] = mask_R
        adapter._fix_ranks()
        for key, kept in adapter._kept().items():
            parameter = dict(adapter.trained_parameters())[key]
            parameter.data = parameter.data.index_select(kept.dim, kept.index)
    return adapter


@pytest.mark.parametrize("final", [False, True])
def test_peft_loads_ours_and_says_the_same(twins: Twins, options: Make, tmp_path: Path, final: bool) -> None:
    from peft import AdaLoraConfig, PeftModel, get_peft_model_state_dict

    adapter = trained(twins.ours, options, final=final)
    assert (0 in adapter.ranks().values()) == final
    save_adapter(tmp_path / "a", adapter)
    model = PeftModel.from_pretrained(twins.theirs, str(tmp_path / "a"))
    assert isinstance(model.peft_config["default"], AdaLoraConfig)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[key], ours[key]) for key in ours)
    assert (twins.their_logits(model) - twins.our_logits()).abs().max() < 1e-5
    assert (twins.our_logits() - our_logits(tiny_model())).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("final", [False, True])
def test_ours_is_read_back_as_it_was(options: Make, tmp_path: Path, final: bool) -> None:
    model, fresh = tiny_model(), tiny_model()
    adapter = trained(model, options, final=final)
    save_adapter(tmp_path / "a", adapter)
    again, _ = load_adapter(tmp_path / "a", fresh)
    assert isinstance(again, AdaLora) and torch.equal(our_logits(fresh), our_logits(model))
    assert again.ranks() == adapter.ranks() and again.moved() == adapter.moved() and not again.messages
    save_adapter(tmp_path / "b", again)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    if final:  # its ranks are what they are, whatever run it is taken into
        again.begin(1)
        assert again.after_step(0) == {} and again.extra_state() == {}
        again.check_acted()


def peft_run(twins: Twins, steps: int, **more: Any) -> Any:
    """PEFT's AdaLoRA on the other twin after some steps of training."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        **{
            "init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": 9, "lora_alpha": 8,
            "target_modules": LINEARS, "task_type": "CAUSAL_LM", **more,
        }
    )  # fmt: skip
    torch.manual_seed(1)
    model: Any = get_peft_model(twins.theirs, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, steps + 1):
        model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (1, {}),
        (4, {}),
        (9, {}),
        (9, {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}),
        (6, {"init_r": 3}),
    ],
)
def test_we_load_peft_s_and_say_the_same(twins: Twins, tmp_path: Path, steps: int, more: dict[str, Any]) -> None:
    model = peft_run(twins, steps, **more).eval()
    wanted = twins.their_logits(model)  # before saving, which rewrites PEFT's rank_pattern
    model.save_pretrained(str(tmp_path))
    adapter, _ = load_adapter(tmp_path, twins.ours)
    assert isinstance(adapter, AdaLora) and not adapter.messages
    assert (twins.our_logits() - wanted).abs().max() < 1e-5
    assert (wanted - our_logits(tiny_model())).abs().max() > 0.05
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"] is None) == (steps == 1)
    assert steps < 6 or sum(adapter.ranks().values()) == 2 * len(adapter.layers)
    before = twins.our_logits()
    merged = dict(adapter.merged_tensors())
    adapter.merge()
    assert len(merged) == len(masks_of(config)) or steps == 1
    torch.testing.assert_close(twins.our_logits(), before, rtol=0, atol=1e-4)


GOOD = {
    "peft_type": "ADALORA", "r": 8, "init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "beta1": 0.85,
    "beta2": 0.85, "orth_reg_weight": 0.5, "total_step": 9, "lora_alpha": 8, "lora_dropout": 0.0,
    "target_modules": ["q_proj"], "rank_pattern": {"a.q_proj.lora_E": [True, False, True]},
}  # fmt: skip


def test_settings_follow_the_pattern_and_the_scale_does_not() -> None:
    assert check_config(GOOD, file="x") == []
    found = settings(GOOD, ["a.q_proj", "b.q_proj"])
    assert [found[name].rank for name in ("a.q_proj", "b.q_proj")] == [2, 3]
    assert {setting.scale for setting in found.values()} == {8 / (3 + 1e-5)}
    with pytest.raises(AdapterError, match=r"rank_pattern: a\.q_proj is no target"):
        settings(GOOD, ["b.q_proj"])
    assert settings({**GOOD, "init_r": 12, "rank_pattern": None}, ["b"])["b"].rank == 12
    assert check_config({**GOOD, "alpha_pattern": {"q": 2}}, file="x") == [
        "x: alpha_pattern: not used by AdaLoRA, as in PEFT"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_r", 0), ("init_r", True), ("init_r", 2.5), ("target_r", "2"), ("tinit", -1), ("tfinal", 0.5),
        ("deltaT", 0), ("beta1", 1.0), ("beta2", 0.0), ("orth_reg_weight", -1), ("rank_pattern", [True]),
        ("rank_pattern", {"a.q_proj.lora_E": [True]}), ("rank_pattern", {"a.q_proj.lora_E": [1, 0, 1]}),
        ("rank_pattern", {"q_proj": 4}), ("lora_alpha", 0), ("lora_dropout", 1.0), ("bias", "all"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_right_is_refused(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"^x: {key}: "):
        check_config({**GOOD, key: value}, file="x")


def test_tensors_must_have_the_ranks_of_the_pattern(options: Make, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", trained(tiny_model(), options, final=True))
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    key = next(iter(config["rank_pattern"]))
    config["rank_pattern"][key] = [not bit for bit in config["rank_pattern"][key]]
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"lora_A has shape \(1, 48\), expected \(2, 48\)"):
        load_adapter(tmp_path / "a", tiny_model())
