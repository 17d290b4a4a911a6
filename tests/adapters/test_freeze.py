"""Freezing: what is chosen, that nothing goes back below it, and PEFT's form of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import method_class
from alpaca_lora.adapters.freeze import Freeze, final_norms, frozen_below, layer_names
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.lora_config import NO_TARGETS
from alpaca_lora.adapters.merge import merge_into_folder
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.load import load_base
from tests.adapters.conftest import IDS, Twins, make_twins, our_logits, train_a_little
from tests.adapters.peft_twin import (
    PEFT_ON_TRANSFORMERS,
    assert_merges_as_peft,
    assert_peft_loads_ours,
    assert_we_load_peft_s,
    our_loss,
    our_steps,
    their_steps,
)
from tests.adapters.test_merge import COMPUTE, base_folder
from tests.models.hf_models import hf_model, ours_from
from tests.tiny import tiny_model

Make = Callable[..., Any]


def frozen(model: Any, options: Any) -> Freeze:
    return Freeze.attach(model, options, seed=0)


def trained_modules(adapter: Freeze) -> set[str]:
    assert adapter.whole is not None
    return set(adapter.whole.names)


# ---- what is chosen


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"model.layers.1", "model.layers.2", "model.norm"}),
        ({"train_last_layers": 1}, {"model.layers.2", "model.norm"}),
        ({"train_last_layers": 0}, {"lm_head"}),
        ({"trained_modules": ["norm", "layers.2"]}, {"model.layers.2", "model.norm"}),
        ({"trained_modules": [r".*\.(0|2)\.mlp"]}, {"model.layers.0.mlp", "model.layers.2.mlp"}),
        ({"trained_modules": ["mlp", "up_proj"]}, {f"model.layers.{n}.mlp" for n in range(3)}),
    ],
)
def test_the_options_choose_modules(options: Make, changes: dict[str, Any], names: set[str]) -> None:
    model = tiny_model(num_layers=3)
    adapter = frozen(model, options(**changes))
    assert trained_modules(adapter) == names == set(adapter.config["modules_to_save"])
    inside = tuple(f"{name}." for name in names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(inside)
    }
    assert adapter.config["target_modules"] == NO_TARGETS and adapter.config["bias"] == "none"


def test_head_only_of_a_tied_model_is_the_embedding_and_says_so(options: Make) -> None:
    adapter = frozen(tiny_model(tie_word_embeddings=True), options(train_last_layers=0))
    assert trained_modules(adapter) == {"model.embed_tokens"}
    assert "model.embed_tokens is trained, which is both" in adapter.messages[0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"train_last_layers": 0}, {"score"}),
        ({"train_last_layers": 1}, {"model.layers.1", "model.norm", "score"}),
        ({"trained_modules": ["norm"]}, {"model.norm", "score"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_s_head_is_always_trained(
    options: Make, changes: dict[str, Any], names: set[str], tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    attach_score(model, 3, seed=0)
    adapter = frozen(model, options(**changes))
    assert trained_modules(adapter) == names and adapter.config["task_type"] == "SEQ_CLS"


def test_other_models(options: Make) -> None:
    neo = ours_from(hf_model("gpt-neo"))
    assert layer_names(neo) == [f"transformer.h.{n}" for n in range(3)] and final_norms(neo) == ["transformer.ln_f"]
    user = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    adapter = frozen(user, options(trained_modules=["2"]))
    assert trained_modules(adapter) == {"2"}
    adapter.remove()
    with pytest.raises(ConfigError, match="train_last_layers: 2 of 0 layers, expected at most 0, name trained_modules"):
        frozen(user, options())


def test_what_does_not_exist_is_named(options: Make) -> None:
    model = tiny_model()
    for changes, message in (
        ({"train_last_layers": 3}, "train_last_layers: 3 of 2 layers, expected at most 2"),
        ({"trained_modules": ["normm"]}, "trained_modules: 'normm' names no module with weights.*nearest: norm"),
        ({"trained_modules": ["layers.2"]}, r"trained_modules: 'layers.2' names no module"),
        ({"trained_modules": ["("]}, r"trained_modules: '\(' is not a regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            frozen(model, options(**changes))
    with pytest.raises(ConfigError, match=r"the head is the embedding here \(tied\)"):
        frozen(tiny_model(tie_word_embeddings=True), options(trained_modules=["lm_head"]))
    Lora.attach(model, options(), seed=0)
    with pytest.raises(AdapterError, match=r"model.layers.0.self_attn.q_proj: already carries an adapter"):
        frozen(model, options())


# ---- nothing goes back below


def layers_gone_back_through(model: Any, checkpointing: bool) -> list[int]:
    """Numbers of the layers whose output's gradient a backward pass computes."""
    model.gradient_checkpointing = checkpointing
    reached: list[int] = []

    def watch(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if output.grad_fn is not None:
                output.register_hook(lambda _: reached.append(number))

        return hook

    handles = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(model.layers)]
    our_loss(model).backward()
    for handle in handles:
        handle.remove()
    model.gradient_checkpointing = False
    return sorted(set(reached))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"train_last_layers": 1}, [3]),
        ({"train_last_layers": 2}, [2, 3]),
        ({"train_last_layers": 0}, []),
        ({"trained_modules": ["norm"]}, []),
        ({"trained_modules": ["layers.1.mlp"]}, [1, 2, 3]),
        ({"trained_modules": ["embed_tokens"]}, [0, 1, 2, 3]),  # the negative control: from the bottom, all of them
    ],
)
def test_no_backward_pass_below_what_is_trained(
    options: Make, changes: dict[str, Any], reached: list[int], checkpointing: bool
) -> None:
    model = tiny_model(num_layers=4)
    adapter = frozen(model, options(**changes))
    found = layers_gone_back_through(model, checkpointing)
    # where only the norm or the head after the layers is trained, their output is a constant
    assert found == reached
    assert frozen_below(model) == 4 - len(reached)
    trained = {id(p) for _, p in adapter.trained_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_outputs_below_have_no_graph(options: Make) -> None:
    model = tiny_model(num_layers=3)
    frozen(model, options(train_last_layers=1))
    outputs: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: outputs.append(output))  # pyright: ignore
    model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
    assert [output.grad_fn is not None for output in outputs] == [False, False, True]


def test_facts_say_how_much_and_how_far(options: Make) -> None:
    model = tiny_model(num_layers=3)
    adapter = frozen(model, options(train_last_layers=1))
    our_steps(model, adapter)
    facts = dict(adapter.facts())
    count = sum(p.numel() for p in model.layers[2].parameters()) + 32
    assert facts["trained weights"].startswith(f"{count:,} of {model.num_parameters():,}, ")
    assert facts["layers without a backward pass"] == "2 of 3"
    assert "model." in facts["largest change"] and not facts["largest change"].startswith("0.00%")


def test_what_started_at_zero_has_no_share(options: Make) -> None:
    """Biases often do: a change of infinitely many percent says nothing."""
    user = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    nn.init.zeros_(user[0].weight)
    nn.init.zeros_(user[0].bias)
    adapter = frozen(user, options(trained_modules=["0", "1"]))
    train_a_little(adapter)
    facts = dict(adapter.facts())
    assert "inf" not in facts["largest change"] and facts["largest change"].endswith("of its norm, 1")
    assert facts["from zero"].startswith("1 modules")
    adapter.remove()
    assert "from zero" not in dict(frozen(user, options(trained_modules=["1"])).facts())


def test_errors_name_the_option_that_the_user_gave(options: Make) -> None:
    user = nn.ModuleDict({"out": nn.Linear(2, 2), "fc_out": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"^trained_modules: PEFT would take fc_out for out"):
        frozen(user, options(trained_modules=[r"out"]))


# ---- PEFT's form


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes", [{"train_last_layers": 1}, {"train_last_layers": 0}, {"trained_modules": ["norm", r".*\.0\.mlp"]}]
)
def test_peft_loads_ours_merges_as_we_do_and_we_load_it_again(
    options: Make, tmp_path: Path, changes: dict[str, Any], tied: bool
) -> None:
    twins = make_twins(tie_word_embeddings=tied)
    before = twins.our_logits()
    adapter = frozen(twins.ours, options(**changes))
    our_steps(twins.ours, adapter)
    assert (twins.our_logits() - before).abs().max() > 0.05
    theirs = assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    again = tiny_model(tie_word_embeddings=tied)
    loaded, _ = load_adapter(tmp_path / "a", again)
    assert isinstance(loaded, Freeze) and loaded.messages == [] and torch.equal(our_logits(again), twins.our_logits())
    save_adapter(tmp_path / "b", loaded)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    if not tied:  # PEFT's merge of a tied model is its own affair
        assert_merges_as_peft(twins, adapter, theirs)
    with pytest.raises(AdapterError, match="merged or removed"):
        loaded.remove()
        loaded.remove()


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("modules", [["layers.1", "model.norm"], ["mlp", "lm_head"]])
def test_we_load_peft_s(twins: Twins, tmp_path: Path, modules: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=NO_TARGETS, modules_to_save=modules, task_type="CAUSAL_LM")
    theirs = get_peft_model(twins.theirs, config)
    their_steps(theirs)
    before = twins.our_logits()
    adapter = assert_we_load_peft_s(twins, theirs, tmp_path)
    assert (twins.our_logits() - before).abs().max() > 0.05
    assert all(norm > 0 for norm in adapter.moved().values())


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "changes", [{"train_last_layers": 0}, {"train_last_layers": 1}, {"method": "bitfit"}, {"method": "full"}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_a_classifier_of_ours_and_we_load_peft_s(
    options: Make, tmp_path: Path, changes: dict[str, Any], tied: bool
) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = tiny_model(tie_word_embeddings=tied)
    keys = {key: value for key, value in model.config.to_hf().items() if key != "model_type"}
    theirs = LlamaForSequenceClassification(LlamaConfig(**keys, num_labels=3, attn_implementation="eager"))
    theirs.load_state_dict(model.state_dict(), strict=False)
    attach_score(model, 3, seed=0)

    def labels(model: Any) -> torch.Tensor:
        return model.score(model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))[-1:])

    chosen = options(**changes)
    adapter = method_class(chosen.method).attach(model, chosen, seed=0)
    train_a_little(adapter)
    save_adapter(tmp_path / "ours", adapter)
    with torch.no_grad():
        wanted = labels(model)
        peft_model = PeftModel.from_pretrained(theirs, str(tmp_path / "ours"), is_trainable=True).eval()
        assert (peft_model(input_ids=IDS[None]).logits - wanted).abs().max() < 1e-5
        peft_model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
        again = tiny_model(tie_word_embeddings=tied)
        load_adapter(tmp_path / "theirs", again)
        assert (labels(again) - wanted).abs().max() < 1e-5


def test_a_file_that_trains_nothing_and_one_that_changes_nothing(options: Make, tmp_path: Path) -> None:
    adapter = frozen(tiny_model(), options(train_last_layers=1))
    save_adapter(tmp_path / "a", adapter, allow_untrained=True)
    loaded, _ = load_adapter(tmp_path / "a", tiny_model())
    assert "the adapter changes nothing" in loaded.messages[0]
    with pytest.raises(AdapterError, match="did not move"):
        save_adapter(tmp_path / "b", adapter)
    with pytest.raises(AdapterError, match=r"f: modules_to_save: names nothing that is trained"):
        Freeze.expected_shapes(tiny_model(), {**adapter.config, "modules_to_save": None}, file="f")


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_folder_says_the_same(options: Make, tmp_path: Path, tied: bool) -> None:
    base = load_base(str(base_folder(tmp_path / "base", tie_word_embeddings=tied)), COMPUTE)
    adapter = frozen(base.model, options(trained_modules=["embed_tokens", "layers.1"]))
    train_a_little(adapter)
    wanted = our_logits(base.model)
    report = merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32)
    assert report.mean_adapter_effect > 0.1
    merged = load_base(str(tmp_path / "merged"), COMPUTE)
    assert (merged.model.lm_head is None) is tied and (our_logits(merged.model) - wanted).abs().max() < 1e-5
