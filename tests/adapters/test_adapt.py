"""Adapters on modules that know nothing of us: start, training, dropout, saving, PEFT, merging, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.adapt import METHODS, Adapted, adapt, load_adapted
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.errors import AdapterError, ConfigError
from tests.tiny import tiny_model

LINEARS = ["inner", "tower.0", "tower.2", "tower.3.1", "score"]
# exact arithmetic is the same; sums are in another order
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Network(nn.Module):
    """An embedding, five linears in nested modules, names that other parts of the program know (score)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 12, bias=False)
        self.tower = nn.Sequential(
            nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 10), nn.Sequential(nn.Identity(), nn.Linear(10, 8))
        )
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.5).to(dtype)
        self.norm.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.norm(self.tower(self.inner(self.embedding(ids)))))


IDS = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(1))


def adapt_small(model: nn.Module, method: str, **more: Any) -> Adapted:
    """Of a rank that every weight here has, which PiSSA asks for."""
    return adapt(model, method, **({} if method == "ia3" else {"r": 3}), **more)


def train(adapted: Adapted, steps: int = 4, ids: torch.Tensor = IDS) -> None:
    """A loop as anybody writes it."""
    adapted.model.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted.model(ids).float().square().mean().backward()
        optimizer.step()
    adapted.model.eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_trains_saves_loads_and_merges(method: str, tmp_path: Path) -> None:
    model, start = Network(), logits(Network())
    adapted = adapt_small(model, method)
    torch.testing.assert_close(logits(model), start, **CLOSE)
    assert list(adapted.adapter.layers) == LINEARS  # pyright: ignore[reportAttributeAccessIssue]
    trained = {id(parameter) for parameter in adapted.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    before = {name: value.clone() for name, value in model.state_dict().items() if "base" in name or "norm" in name}
    train(adapted)
    after = logits(model)
    assert (after - start).abs().max() > 0.01 and all(adapted.adapter.moved().values())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    adapted.save(tmp_path / "a")
    fresh = Network()
    loaded = load_adapted(fresh, tmp_path / "a")
    torch.testing.assert_close(logits(fresh), after, **CLOSE)
    assert loaded.parameters() == [] and not any(p.requires_grad for p in fresh.parameters())
    assert loaded.merge() is fresh and sorted(fresh.state_dict()) == sorted(Network().state_dict())
    torch.testing.assert_close(logits(fresh), after, **CLOSE)
    adapted.remove()
    assert torch.equal(logits(model), start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_peft_loads_it_on_the_same_module(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    adapted = adapt(Network(), method, **({} if method == "ia3" else {"r": 3, "use_rslora": True}))
    train(adapted)
    adapted.save(tmp_path / "a")
    theirs: Any = PeftModel.from_pretrained(Network(), str(tmp_path / "a"))
    wrapped = [name for name, module in theirs.named_modules() if hasattr(module, "base_layer")]
    assert wrapped == [f"base_model.model.{name}" for name in LINEARS]
    torch.testing.assert_close(logits(theirs), logits(adapted.model), **CLOSE)


def test_we_load_what_peft_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs: Any = get_peft_model(
        Network(), LoraConfig(r=3, target_modules=["inner", "score"], modules_to_save=["norm"])
    )
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    theirs.save_pretrained(str(tmp_path))
    model = Network()
    adapted = load_adapted(model, tmp_path, trainable=True)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert len(adapted.parameters()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (4, 7), (2, 3, 4)])
def test_any_leading_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Network(dtype)
    adapted = adapt(model, r=2, dropout=0.1)
    ids = torch.randint(20, shape, generator=torch.Generator().manual_seed(2))
    train(adapted, steps=2, ids=ids)
    out = logits(model, ids)
    assert out.shape == (*shape, 3) and out.dtype == dtype
    assert all(parameter.dtype == torch.float32 for parameter in adapted.parameters())
    assert all(adapted.adapter.moved().values())


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model = Network()
    adapted = adapt_small(model, method)
    plain = torch.autograd.grad(model(IDS).square().mean(), adapted.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS).float().square().mean()
    mixed = torch.autograd.grad(loss, adapted.parameters())
    total = sum(float(g.square().sum()) for g in plain) ** 0.5
    assert all(g.dtype == torch.float32 for g in mixed)
    # two roundings of 2^-8 in each of five layers
    assert sum(float((a - b).square().sum()) for a, b in zip(plain, mixed, strict=True)) ** 0.5 < 0.05 * total


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ia3"])
def test_dropout_follows_train_and_eval(method: str) -> None:
    model = Network()
    adapted = adapt_small(model, method, dropout=0.5)
    train(adapted)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first) and not torch.equal(first, second)
    model.tower.eval()
    model.inner.eval()
    model.score.eval()
    assert torch.equal(logits(model), logits(model))


def test_dropout_drops_that_share_and_keeps_the_expectation() -> None:
    model = nn.Sequential(nn.Linear(64, 1, bias=False)).requires_grad_(False)
    model[0].weight.data.zero_()
    adapted = adapt(model, r=1, alpha=1, dropout=0.25)
    assert isinstance(adapted.adapter, Lora)
    layer = adapted.adapter.layers["0"]
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1.0)
    kept = logits(model.train(), torch.ones(4000, 64)) * 0.75  # how many of 64 were kept, in each row
    torch.testing.assert_close(kept, kept.round())
    assert abs(float(kept.mean()) - 48) < 0.3  # five standard deviations of the mean of 4000 counts
    assert abs(float(kept.var()) - 12) < 2.5
    assert float(logits(adapted.model.eval(), torch.ones(1, 64))) == pytest.approx(64.0)


def test_a_checkpointed_block_draws_the_same_mask_again() -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for use in (False, True):
        model = Network()
        adapted = adapt(model, dropout=0.5)
        adapted.load_state({key: value + 0.1 for key, value in adapted.state().items()})
        torch.manual_seed(3)
        x = model.inner(model.embedding(IDS))
        x = checkpoint(model.tower, x, use_reentrant=False) if use else model.tower(x)
        gradients.append(torch.autograd.grad(model.score(x).square().mean(), adapted.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    adapted = adapt(Network(), dropout=0.2)
    train(adapted)
    adapted.save(tmp_path / "a")
    again = load_adapted(Network(), tmp_path / "a", trainable=True)
    assert len(again.parameters()) == len(adapted.parameters())
    before = logits(again.model)
    train(again)
    assert not torch.equal(logits(again.model), before)
    again.model.train()
    assert not torch.equal(logits(again.model), logits(again.model))  # its dropout too
    assert again.save(tmp_path / "b") != adapted.save(tmp_path / "c")
    quiet = load_adapted(Network(), tmp_path / "a").model.train()
    assert torch.equal(logits(quiet), logits(quiet))  # one that is only used drops nothing


def test_what_asked_for_gradients_does_so_again() -> None:
    asked = {name: p.requires_grad for name, p in Network().named_parameters()}
    for end in ("merge", "remove"):
        adapted = adapt(Network())
        model = getattr(adapted, end)()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_modules_to_save_train_wholly_and_travel(tmp_path: Path) -> None:
    adapted = adapt(Network(), modules_to_save=["score", "norm"])
    assert "score" not in adapted.adapter.layers  # pyright: ignore[reportAttributeAccessIssue]
    train(adapted)
    adapted.save(tmp_path / "a")
    fresh = Network()
    fresh.score.weight.data.normal_()  # a new head differs each time it is made: it is no part of the base
    load_adapted(fresh, tmp_path / "a")
    torch.testing.assert_close(logits(fresh), logits(adapted.model), **CLOSE)
    assert "norm.weight" in adapted.summary()


def test_the_summary_counts() -> None:
    lines = adapt(Network(), r=2, targets=["inner", "score"], rank_pattern={"score": 1}).summary().splitlines()
    assert [line.split()[0] for line in lines] == ["module", "inner", "score", "method"]
    assert lines[1].split()[1:] == ["12", "x", "8", "40"] and lines[2].split()[-1] == "11"
    assert "51 of" in lines[-1]


def test_names_that_end_other_names_are_told_apart(tmp_path: Path) -> None:
    """`0` is a linear and also the end of `1.0`, which is none: PEFT would take both for targets."""
    from peft import PeftModel

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))

    model, x = make(), torch.randn(3, 4)
    adapted = adapt(model)
    adapted.load_state({key: value + 0.1 for key, value in adapted.state().items()})
    adapted.save(tmp_path / "a")
    assert isinstance(json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"], str)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "a"))
    torch.testing.assert_close(logits(theirs, x), logits(model, x))
    torch.testing.assert_close(logits(load_adapted(make(), tmp_path / "a").model, x), logits(model, x))


def test_a_language_model_of_ours_in_a_loop_of_ones_own() -> None:
    adapted = adapt(tiny_model(), dropout=0.1)
    assert len(adapted.adapter.layers) == 14  # pyright: ignore[reportAttributeAccessIssue]
    assert any("lm_head" in message for message in adapted.messages)
    assert adapted.adapter.config["task_type"] == "CAUSAL_LM"
    assert adapt(Network()).adapter.config["task_type"] is None  # whatever its parts are called


# ---- torch's own modules that read weights


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize("method", METHODS)
def test_torchs_encoder_learns_and_its_fast_path_sees_the_adapter(method: str) -> None:
    model = encoder()
    adapted = adapt_small(model, method)
    assert len(adapted.adapter.layers) == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert any("out_proj" in message for message in adapted.messages)
    train(adapted)
    slow = model(IDS).detach()  # with gradients asked for, the layers are called
    torch.testing.assert_close(logits(model), slow, **CLOSE)
    assert (slow - logits(encoder().eval())).abs().max() > 0.01
    model(IDS).sum().backward()  # in eval mode too, the adapter learns
    assert all(parameter.grad is not None for parameter in adapted.parameters())


def test_learning_past_an_adapter_is_an_error() -> None:
    model = Network()
    adapt(model)
    with pytest.raises(AdapterError, match="its adapter would learn nothing"):
        torch.nn.functional.linear(torch.randn(2, 8), model.score.weight).sum().backward()


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "prefix"}, "'prefix' puts tokens before a text.*expected one of lora, dora, pissa, ia3"),
        ({"method": "adalora"}, "'adalora' changes ranks"),
        ({"method": "full"}, "'full' puts nothing on a model"),
        ({"method": "lroa"}, "did you mean 'lora'"),
        ({"r": 0}, "r: 0 is not possible"),
        ({"alpha": -1}, "alpha: -1"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"targets": "outer"}, "targets: 'outer' matches nothing"),
        ({"targets": "norm"}, "a LayerNorm and not a linear"),
        ({"modules_to_save": ["nrm"]}, "modules_to_save: 'nrm'.*nearest: norm"),
        ({"rank_pattern": {"outer": 2}}, "rank_pattern: 'outer' matches no target"),
        ({"method": "ia3", "r": 4}, "r: method ia3 has none"),
        ({"feedforward_modules": ["inner"]}, "feedforward_modules: method lora has none"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], says: str) -> None:
    model = Network()
    with pytest.raises(ConfigError, match=says):
        adapt(model, **arguments)
    assert sorted(model.state_dict()) == sorted(Network().state_dict())
    assert sum(p.requires_grad for p in model.parameters()) == sum(p.requires_grad for p in Network().parameters())


def test_models_that_cannot_carry_one() -> None:
    shared = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="0 and 1 are one linear"):
        adapt(nn.Sequential(shared, shared))
    with pytest.raises(ConfigError, match="has no shape yet"):
        adapt(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ConfigError, match=r"nn\.Sequential\(model\)"):
        adapt(shared)
    with pytest.raises(ConfigError, match=r"holds no nn\.Linear"):
        adapt(nn.Sequential(nn.GELU()))
    with pytest.raises(ConfigError, match="never calls it"):
        adapt(encoder(), targets=["out_proj"])
    model = Network()
    adapt(model)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        adapt(model, targets=["inner"])


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    adapted = adapt(Network())
    with pytest.raises(AdapterError, match="did not move"):
        adapted.save(tmp_path / "a")
    train(adapted)
    adapted.save(tmp_path / "a")
    other = Network()
    other.inner.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match="trained on another base model: Network"):
        load_adapted(other, tmp_path / "a")
    load_adapted(other, tmp_path / "a", ignore_base_mismatch=True)
    with pytest.raises(AdapterError, match="target_modules: 'inner' matches nothing"):
        load_adapted(nn.Sequential(nn.Linear(3, 3)), tmp_path / "a", ignore_base_mismatch=True)
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(AdapterError, match="holds method prompt"):
        load_adapted(Network(), tmp_path / "a")
    adapted.parameters()[0].data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="holds NaN or Inf: not saved"):
        adapted.save(tmp_path / "b")


def test_running_averages_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert "1: running averages change" in adapt(model).messages[-1]
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(4, 3))
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])  # what it warns of
