"""PiSSA against PEFT's: the same start, the same steps, the same file; and a base that is never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.lora import Lora, effective_rank, possible_rank
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.adapters.pissa import Pissa, principal_factors
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from tests.adapters import peft_twin
from tests.adapters.conftest import IDS, Twins, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
# both factors are large from the start: longer steps amplify each side's own rounding beyond 1e-5
RATE = 0.01


def peft_pissa(twins: Twins, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(twins.theirs, LoraConfig(init_lora_weights="pissa", task_type="CAUSAL_LM", **settings))


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_as_peft_s_and_ends_where_peft_s_does(twins: Twins, options: Make, rslora: bool) -> None:
    """A and B are PEFT's up to the sign of each singular vector, and the same steps lead to the same function."""
    changes = {"lora_target_modules": peft_twin.PROJECTIONS, "use_rslora": rslora}
    adapter = Pissa.attach(twins.ours, options(**changes), seed=0)
    theirs = peft_pissa(twins, target_modules=peft_twin.PROJECTIONS, use_rslora=rslora)
    found = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    for name, layer in adapter.layers.items():
        a, b = (found[f"base_model.model.{name}.lora_{which}.default.weight"] for which in "AB")
        signs_R = (layer.lora_A * a).sum(1).sign()
        torch.testing.assert_close(layer.lora_A, a * signs_R[:, None], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_B, b * signs_R, rtol=1e-4, atol=1e-5)
    base = our_logits(tiny_model())
    assert torch.allclose(twins.our_logits(), base, atol=1e-5)
    peft_twin.their_steps(theirs, learning_rate=RATE)
    peft_twin.our_steps(twins.ours, adapter, learning_rate=RATE)
    difference = (twins.their_logits(theirs) - twins.our_logits()).abs().max()
    assert difference < 1e-5 and (twins.our_logits() - base).abs().max() > 0.01, difference
    # the negative control: from LoRA's own start the same steps end elsewhere
    other = tiny_model()
    peft_twin.our_steps(other, Lora.attach(other, options(**changes), seed=0), learning_rate=RATE)
    assert (twins.our_logits() - our_logits(other)).abs().max() > 0.01


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"use_rslora": True, "lora_alpha": 3}, {"lora_target_modules": ["all-linear"], "lora_r": 3},
        {"rank_pattern": ["q_proj=2"], "alpha_pattern": ["v_proj=5"]},
        {"rank_pattern": ["q_proj=2"], "alpha_pattern": ["v_proj=5"], "use_rslora": True},
    ],
)  # fmt: skip
def test_the_file_is_a_plain_lora_of_twice_the_rank(
    twins: Twins, options: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """On the base as it is: PEFT loads it, we load it as LoRA, all three say the same."""
    adapter = Pissa.attach(twins.ours, options(**changes), seed=0)
    peft_twin.our_steps(twins.ours, adapter, learning_rate=RATE)
    theirs = peft_twin.assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    config = theirs.peft_config["default"]
    assert config.r == 2 * options(**changes).lora_r and config.init_lora_weights is True
    again = tiny_model()
    loaded, _ = load_adapter(tmp_path / "a", again)
    assert type(loaded) is Lora
    torch.testing.assert_close(our_logits(again), twins.our_logits(), rtol=0, atol=1e-5)
    peft_twin.assert_merges_as_peft(twins, adapter, theirs)


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS, "ignore:PiSSA changes the base weights:UserWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_the_file_is_peft_s_own_conversion(twins: Twins, options: Make, tmp_path: Path, rslora: bool) -> None:
    adapter = Pissa.attach(twins.ours, options(use_rslora=rslora), seed=0)
    theirs = peft_pissa(twins, use_rslora=rslora)
    theirs.peft_config["default"].init_lora_weights = True  # how PEFT wants the start to be saved
    theirs.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    peft_twin.their_steps(theirs, learning_rate=RATE)
    peft_twin.our_steps(twins.ours, adapter, learning_rate=RATE)
    theirs.save_pretrained(
        str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        save_embedding_layers=False,
    )  # fmt: skip
    converted, _ = load_adapter(tmp_path / "a", model := tiny_model())
    assert {key: converted.config[key] for key in ("r", "use_rslora")} == {"r": 8, "use_rslora": rslora}
    assert adapter.config["lora_alpha"] == pytest.approx(converted.config["lora_alpha"])
    torch.testing.assert_close(our_logits(model), twins.our_logits(), rtol=0, atol=1e-5)
    theirs, ours = converted.state_tensors(), adapter.state_tensors()
    assert {key: t.shape for key, t in theirs.items()} == {key: t.shape for key, t in ours.items()}


def test_the_base_is_never_written_to_and_dropout_leaves_the_start_alone(options: Make) -> None:
    model = tiny_model().bfloat16()
    before, logits = {n: t.clone() for n, t in model.state_dict().items()}, our_logits(model)
    adapter = Pissa.attach(model, options(lora_target_modules=["all-linear"], lora_dropout=0.5), seed=0)
    assert torch.equal(our_logits(model), logits)  # in bfloat16: what cancels does so before it is rounded
    adapter.set_rows(torch.arange(len(IDS), dtype=torch.int32))
    assert torch.equal(our_logits(model), logits)
    train_a_little(adapter)
    assert not torch.equal(our_logits(model), logits)
    adapter.remove()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(our_logits(model), logits)


def test_a_and_b_are_the_principal_part(options: Make) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    a, b = principal_factors(weight, Setting(5, 2.0), 0, "x")
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * b @ a, (u[:, :5] * s[:5]) @ vt[:5], rtol=0, atol=1e-5)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_moved_is_the_norm_of_the_update_and_zero_at_the_start(options: Make) -> None:
    adapter = Pissa.attach(tiny_model(), options(lora_target_modules=["all-linear"]), seed=0)
    assert set(adapter.moved().values()) == {0.0}
    with pytest.raises(NumericalError, match="28 factors are still the principal ones"):
        adapter.check_acted()
    train_a_little(adapter)
    adapter.check_acted()
    for name, change in adapter.moved().items():
        layer = adapter.layers[name]
        assert layer.scale == 2.0
        update = layer.merged_weight() - layer.base.weight
        assert change == pytest.approx(float(update.norm()), rel=1e-4)
    adapter.layers["model.layers.0.mlp.up_proj"].lora_A.data.copy_(
        adapter.layers["model.layers.0.mlp.up_proj"].constant[0]
    )
    with pytest.raises(NumericalError, match=r"1 factors .* model\.layers\.0\.mlp\.up_proj\.lora_A"):
        adapter.check_acted()


def test_the_constant_half_is_state_of_the_run(options: Make) -> None:
    """Another machine's decomposition may differ; a resumed run takes up that of the run."""
    adapter = Pissa.attach(tiny_model(), options(), seed=0)
    train_a_little(adapter)
    other = Pissa.attach(model := tiny_model(seed=1), options(), seed=0)
    trained = {key: p.detach().clone() for key, p in adapter.trained_parameters()}
    with torch.no_grad():
        for key, parameter in other.trained_parameters():
            parameter.copy_(trained[key])
    assert any(not torch.equal(t, adapter.state_tensors()[key]) for key, t in other.state_tensors().items())
    assert other.load_extra_state(adapter.extra_state()) == {}
    assert all(torch.equal(t, adapter.state_tensors()[key]) for key, t in other.state_tensors().items())
    with pytest.raises(AdapterError, match="not the state of this adapter"):
        other.load_extra_state({})
    third = Pissa.attach(again := tiny_model(seed=1), options(), seed=3)
    third.load_state_tensors(adapter.state_tensors())
    assert torch.equal(our_logits(again), our_logits(model))
    with pytest.raises(AdapterError, match="shape"):
        third.load_state_tensors({key: t[:2] for key, t in adapter.state_tensors().items()})


def test_its_file_can_be_taken_up_again_as_what_it_was(options: Make, tmp_path: Path) -> None:
    adapter = Pissa.attach(model := tiny_model(), options(), seed=0)
    train_a_little(adapter)
    save_adapter(tmp_path / "a", adapter)
    tensors = adapter.state_tensors()
    again = Pissa.from_peft(other := tiny_model(), adapter.config, tensors, trainable=True, file="a")
    assert torch.equal(our_logits(other), our_logits(model)) and again.moved() == adapter.moved()
    assert [p.shape for _, p in again.trained_parameters()] == [p.shape for _, p in adapter.trained_parameters()]


def test_the_report_says_how_much_of_the_base_was_principal(options: Make) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False))
    nn.init.orthogonal_(net[0].weight)  # pyright: ignore[reportArgumentType]
    adapter = Pissa.attach(net, options(lora_target_modules=["0"], lora_r=3), seed=0)
    assert dict(adapter.facts())["principal part"].startswith("50.0 %")


@pytest.mark.parametrize("changes", [{"lora_alpha": 600_000}, {"alpha_pattern": ["v_proj=600000"]}])
def test_what_the_saved_lora_could_not_be_is_refused_before_the_run(options: Make, changes: dict[str, Any]) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"saved as a LoRA of twice the rank, whose .* at most 1e\+06"):
        Pissa.attach(model, options(**changes), seed=0)
    assert not list(model.named_buffers())
    Lora.attach(model, options(**changes), seed=0)  # which doubles nothing


def test_the_report_counts_the_directions_that_an_update_can_have(options: Make) -> None:
    adapter = Pissa.attach(tiny_model(), options(rank_pattern=["v_proj=2"]), seed=0)
    assert dict(adapter.facts())["effective rank"].startswith("0.0 of 4 to 8")
    train_a_little(adapter)
    assert all(1 < effective_rank(layer) <= possible_rank(layer) for layer in adapter.layers.values())


def test_a_rank_that_the_weight_does_not_have_is_refused(options: Make) -> None:
    """LoRA's spare directions merely idle; here they would start at zero on both sides and never move."""
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"lora_r: rank 20 is larger .*k_proj can have, 16"):
        Pissa.attach(model, options(lora_r=20, lora_target_modules=["q_proj", "k_proj"]), seed=0)
    assert our_logits(model) is not None and not list(model.named_buffers())
