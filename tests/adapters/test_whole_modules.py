"""Modules trained wholly: PEFT is the oracle of names, files and tied heads; the base comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.adapters.freeze import Freeze
from alpaca_lora.adapters.lora_config import DEFAULTS, NO_TARGETS
from alpaca_lora.adapters.merge import merge_into_folder
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.adapters.whole_modules import PEFT_PREFIX, WholeModules, is_tied, matching, outermost
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from alpaca_lora.kernels.cross_entropy import linear_cross_entropy
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import load_base
from tests.adapters.conftest import IDS, make_twins, our_logits, train_a_little
from tests.adapters.peft_twin import (
    PEFT_ON_TRANSFORMERS,
    assert_peft_loads_ours,
    assert_we_load_peft_s,
    our_loss,
    our_steps,
    their_steps,
)
from tests.adapters.test_merge import COMPUTE, base_folder
from tests.models.hf_models import hf_model, ours_from
from tests.tiny import tiny_model

UNTIED_WARNING = "ignore:Model has .tie_word_embeddings=True.:UserWarning"
EMBEDDING, HEAD = f"{PEFT_PREFIX}model.embed_tokens.weight", f"{PEFT_PREFIX}lm_head.weight"


def adapter_of(model: CausalLM, names: list[str]) -> Adapter:
    """The names as they are, in the form of a file without low-rank updates."""
    model.requires_grad_(False)
    whole = WholeModules.train(model, names)
    return Freeze(model, {**DEFAULTS, "target_modules": NO_TARGETS, **whole.config_keys()}, [], whole)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}


# ---- trained in place


def test_only_what_is_named_is_trained_and_restored_bit_for_bit() -> None:
    model = tiny_model()
    before = weights(model)
    adapter = adapter_of(model, ["model.layers.1.mlp", "model.norm"])
    whole = adapter.whole
    assert whole is not None and whole.covers("model.layers.1.mlp.up_proj") and not whole.covers("model.layers.1")
    assert not any(whole.moved().values())
    our_steps(model, adapter)
    own = {f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")} | {"model.norm.weight"}
    assert changed(model, before) == own
    assert whole.moved().keys() == {name.removesuffix(".weight") for name in own}
    for name, norm in whole.moved().items():
        difference = (model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"]).norm()
        assert norm == pytest.approx(float(difference), rel=1e-5) and norm > 0
        relative = float(difference / before[f"{name}.weight"].norm())
        assert whole.relative()[name] == pytest.approx(relative, rel=1e-5)
    whole.restore()
    assert changed(model, before) == set() and not any(p.requires_grad for p in model.parameters())


def test_keep_makes_them_the_model_s_own() -> None:
    model = tiny_model()
    before = weights(model)
    adapter = adapter_of(model, ["model.norm"])
    our_steps(model, adapter)
    wanted = our_logits(model)
    assert adapter.whole is not None
    adapter.whole.keep()
    assert changed(model, before) == {"model.norm.weight"} and torch.equal(our_logits(model), wanted)
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_keep_the_base_s_dtype_but_for_norms() -> None:
    model = tiny_model().bfloat16()
    attach_score(model, 2, seed=0)
    adapter = adapter_of(model, ["model.layers.1", "score"])
    dtypes = {key.removeprefix(PEFT_PREFIX): tensor.dtype for key, tensor in adapter.state_tensors().items()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if "norm" in name or name.startswith("score") else torch.bfloat16), name
    hidden = model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.model.layers[1].parameters())  # pyright: ignore
    assert adapter.whole is not None
    adapter.whole.restore()
    assert all(p.dtype == torch.bfloat16 for p in model.model.parameters())


@pytest.mark.parametrize("family", ["qwen2", "gpt-neo"])
def test_norms_and_biases_are_float32_beside_weights_that_are_not(family: str) -> None:
    """And the forward of a linear, an RMSNorm, a LayerNorm takes both; gradients are those of the float32 model."""

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = ours_from(hf_model(family)).bfloat16().to(dtype)
        adapter = adapter_of(model, [name for name, _ in model.named_children()])
        hidden_TD = model(IDS % 97, torch.arange(len(IDS)), Packed([len(IDS)]))
        assert hidden_TD.dtype == dtype
        hidden_TD.float().square().mean().backward()
        own = {key: p for key, p in adapter.trained_parameters() if p.ndim == 1}
        assert len(own) > 4 and {p.dtype for p in own.values()} == {torch.float32}
        assert any(p.dtype == dtype for _, p in adapter.trained_parameters())
        return {key: p.grad for key, p in own.items() if p.grad is not None}

    rounded, exact = gradients(torch.bfloat16), gradients(torch.float32)
    assert rounded.keys() == exact.keys()
    for key, gradient in exact.items():
        if gradient.norm() > 1e-3:
            assert (rounded[key] - gradient).norm() <= 16 * 2**-8 * gradient.norm(), key


def test_other_people_s_layers_keep_one_dtype() -> None:
    """Theirs want it; a `score` of theirs is a linear like any other."""

    class User(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.score = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(self.norm(self.body(x)))

    model = User().bfloat16()
    whole = WholeModules.train(model, ["score", "norm", "body"])
    model(torch.randn(3, 4, dtype=torch.bfloat16)).float().square().sum().backward()
    assert {parameter.dtype for _, parameter in whole.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is not None for _, parameter in whole.parameters())


def test_names_that_cannot_be_trained_are_refused() -> None:
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(
        ConfigError, match=r"modules_to_save: the head .*\(tied\).*name model.embed_tokens, which trains"
    ):
        WholeModules.train(model, ["lm_head"])
    user = nn.ModuleDict({"out": nn.Linear(2, 2), "fc_out": nn.Linear(2, 2), "act": nn.ReLU()})
    with pytest.raises(ConfigError, match="act has no weights"):
        WholeModules.train(user, ["act"])
    with pytest.raises(ConfigError, match=r"PEFT would take fc_out for out.*name fc_out too"):
        WholeModules.train(user, ["out"])
    assert not any(p.requires_grad for p in model.parameters())
    for names in (["act"], ["out"]):
        with pytest.raises(ConfigError, match=r"^trained_modules: "):
            WholeModules.train(user, names, field="trained_modules")
    WholeModules.train(user, ["out", "fc_out"])


def test_matching_is_peft_s() -> None:
    model = tiny_model()
    assert matching(model, ["norm"]) == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm",
    ]  # fmt: skip
    assert matching(model, ["layers.1", "1.mlp", "lm_head"]) == ["model.layers.1", "lm_head"]
    assert matching(tiny_model(tie_word_embeddings=True), ["lm_head"]) == ["lm_head"]
    assert outermost(["a.b.c", "a.b", "a.bc"]) == ["a.b", "a.bc"]


# ---- gradients of head and embedding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_embedding_and_head_are_those_of_the_plain_loss(tied: bool, dtype: torch.dtype) -> None:
    def gradients(fused: bool, computed: torch.dtype) -> dict[str, torch.Tensor]:
        model = tiny_model(tie_word_embeddings=tied).to(dtype).to(computed)
        named = dict(adapter_of(model, ["model.embed_tokens", *([] if tied else ["lm_head"])]).trained_parameters())
        hidden_TD = model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
        if fused:
            loss = linear_cross_entropy(hidden_TD[:-1], model.head_weight(), IDS[1:], len(IDS) - 1)
        else:
            loss = nn.functional.cross_entropy(model.logits(hidden_TD)[:-1], IDS[1:])
        loss.backward()
        return {key: p.grad.float() for key, p in named.items() if p.grad is not None}

    ours, plain = gradients(True, dtype), gradients(False, torch.float32)
    assert ours.keys() == plain.keys() == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    for key, gradient in plain.items():
        # eight roundings of bfloat16 in a row, which two layers and their backward pass have and more
        bound = 1e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert (ours[key] - gradient).norm() <= bound * gradient.norm()
    if tied and dtype == torch.float32:  # the negative control: either half alone is something else
        halves = gradients_of_halves()
        assert all((ours[EMBEDDING] - half).abs().max() > 0.1 * plain[EMBEDDING].abs().max() for half in halves)
        assert (sum(halves) - plain[EMBEDDING]).abs().max() < 1e-6


def gradients_of_halves() -> list[torch.Tensor]:
    """Of the tied matrix as embedding only, as head only."""
    found = []
    for as_embedding in (True, False):
        model = tiny_model(tie_word_embeddings=True)
        table = model.embeddings.weight
        head = nn.Parameter(table.detach().clone(), requires_grad=not as_embedding)
        table.requires_grad_(as_embedding)
        hidden_TD = model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
        nn.functional.cross_entropy(hidden_TD[:-1] @ head.t(), IDS[1:]).backward()
        grad = (table if as_embedding else head).grad
        assert grad is not None
        found.append(grad)
    return found


# ---- PEFT reads ours, we read PEFT's

NAMES = [
    ["model.layers.1", "model.norm"],
    ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp"],
    ["model.embed_tokens"],
]


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    ("names", "tied"),
    [(n, t) for n in NAMES for t in (False, True)] + [(["lm_head"], False), (["model.embed_tokens", "lm_head"], False)],
)
def test_peft_loads_ours(tmp_path: Path, names: list[str], tied: bool) -> None:
    from peft import get_peft_model_state_dict

    twins = make_twins(tie_word_embeddings=tied)
    before = twins.our_logits()
    adapter = adapter_of(twins.ours, names)
    our_steps(twins.ours, adapter)
    assert (twins.our_logits() - before).abs().max() > 0.05
    theirs = assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    loaded, ours = get_peft_model_state_dict(theirs, save_embedding_layers=False), adapter.state_tensors()
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[key], ours[key]) for key in ours)
    assert (HEAD in ours) == ("lm_head" in names or (tied and "model.embed_tokens" in names))
    again = make_twins(tie_word_embeddings=tied).ours
    loaded_adapter, _ = load_adapter(tmp_path / "a", again)
    assert is_tied(again) is tied
    assert torch.equal(our_logits(again), twins.our_logits())
    assert loaded_adapter.moved() == pytest.approx(adapter.moved())


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS, UNTIED_WARNING)
@pytest.mark.parametrize(
    ("tied", "config", "is_tied_then"),
    [
        *((tied, {"modules_to_save": names}, tied) for tied in (False, True) for names in NAMES[:2]),
        (False, {"modules_to_save": ["norm", "layers.1.mlp"]}, False),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        (True, {"modules_to_save": ["embed_tokens"]}, False),  # PEFT trains a copy, the head stays what it was
        (True, {"modules_to_save": ["lm_head"]}, False),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    ],
)
def test_we_load_peft_s(tmp_path: Path, tied: bool, config: dict[str, Any], is_tied_then: bool) -> None:
    from peft import LoraConfig, get_peft_model

    twins = make_twins(tie_word_embeddings=tied)
    before = twins.our_logits()
    theirs = get_peft_model(twins.theirs, LoraConfig(target_modules=NO_TARGETS, task_type="CAUSAL_LM", **config))
    their_steps(theirs)
    adapter = assert_we_load_peft_s(twins, theirs, tmp_path)
    assert (twins.our_logits() - before).abs().max() > 0.05
    assert (twins.ours.lm_head is None) is is_tied_then
    adapter.remove()
    assert (twins.ours.lm_head is None) is tied and torch.equal(twins.our_logits(), before)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS, UNTIED_WARNING)
def test_an_untied_head_can_be_trained_on_and_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_base(str(base_folder(tmp_path / "base", tie_word_embeddings=True)), COMPUTE)
    twins = make_twins(tie_word_embeddings=True)
    theirs = get_peft_model(twins.theirs, LoraConfig(target_modules=NO_TARGETS, modules_to_save=["lm_head"]))
    their_steps(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    adapter, _ = load_adapter(tmp_path / "theirs", base.model, trainable=True)
    assert [key for key, _ in adapter.trained_parameters()] == [HEAD]
    our_steps(base.model, adapter)
    wanted = our_logits(base.model)
    save_adapter(tmp_path / "ours", adapter)
    other = tiny_model(tie_word_embeddings=True)
    load_adapter(tmp_path / "ours", other)
    assert torch.equal(our_logits(other), wanted)
    merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32)
    merged = load_base(str(tmp_path / "merged"), COMPUTE)
    assert merged.model.lm_head is not None and (our_logits(merged.model) - wanted).abs().max() < 1e-5


# ---- files that do not fit


def shapes(model: nn.Module, entries: Any, **more: Any) -> dict[str, tuple[int, ...]]:
    return WholeModules.expected_shapes(model, entries, file="f.json", **more)


def test_expected_shapes() -> None:
    tied = tiny_model(tie_word_embeddings=True)
    assert shapes(tied, None) == {} and WholeModules.from_tensors(tied, {}, None, trainable=False) is None
    assert shapes(tied, ["embed_tokens"]) == {EMBEDDING: (264, 32)}
    assert shapes(tied, ["embed_tokens"], tied=True) == {EMBEDDING: (264, 32), HEAD: (264, 32)}
    assert shapes(tied, ["lm_head"]) == {HEAD: (264, 32)}
    attach_score(tied, 3, seed=0)
    assert shapes(tied, ["classifier", "score"]) == {f"{PEFT_PREFIX}score.weight": (3, 32)}
    for entries, message in (
        (["layers.7"], r"f.json: modules_to_save: 'layers.7' names no module of this model, is this the right base"),
        ("norm", "is 'norm', expected names of modules"),
        ([1], r"is \[1\]"),
    ):
        with pytest.raises(AdapterError, match=message):
            shapes(tied, entries)


def test_types_that_cannot_tie_name_both() -> None:
    model = tiny_model(tie_word_embeddings=True)
    adapter = adapter_of(model, ["model.embed_tokens"])
    train_a_little(adapter)
    assert adapter.whole is not None
    keys = adapter.whole.config_keys(tying=False)
    assert keys == {"modules_to_save": ["model.embed_tokens", "lm_head"]}
    tensors, again = adapter.state_tensors(), tiny_model(tie_word_embeddings=True)
    assert shapes(again, keys["modules_to_save"]).keys() == tensors.keys() == {EMBEDDING, HEAD}
    whole = WholeModules.from_tensors(again, tensors, keys["modules_to_save"], trainable=True)
    assert whole is not None and is_tied(again) and [key for key, _ in whole.parameters()] == [EMBEDDING]
    assert torch.equal(our_logits(again), our_logits(model))


def test_what_is_not_finite_is_not_merged() -> None:
    model = tiny_model()
    adapter = adapter_of(model, ["model.norm"])
    train_a_little(adapter)
    assert {name for name, _ in adapter.merged_tensors()} == {"model.norm.weight"}
    model.model.norm.weight.data[3] = torch.nan  # pyright: ignore
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        adapter.merge()


def test_the_loss_falls_on_a_tied_model() -> None:
    model = tiny_model(tie_word_embeddings=True)
    adapter = adapter_of(model, ["model.embed_tokens"])
    before = our_loss(model).item()
    our_steps(model, adapter, steps=5)
    assert our_loss(model).item() < before - 0.1
