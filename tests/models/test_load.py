"""Loading: folders and GGUF, refusals that name the tensors, memory and time on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.device import Compute
from alpaca_lora.errors import ModelFileError, NumericalError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import check_tensors, load_base, open_source
from tests.models.hf_models import MODELS, hf_model
from tests.tiny import CHATML, VOCAB_SIZE, ByteTokenizer, tiny_model

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 1, "test")
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16, 1, "test")


def logits(model: CausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    length = len(ids_T)
    return model.logits(model(ids_T, torch.arange(length), Packed((length,))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied tiny Llama with a byte tokenizer, as transformers saves it."""
    return save("llama-multi-query-tied", tmp_path / "base")


def save(name: str, folder: Path, **arguments: object) -> Path:
    hf_model(name, vocab_size=VOCAB_SIZE).save_pretrained(folder, **arguments)  # pyright: ignore
    ByteTokenizer(chat_template=CHATML).save(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_saved_model_loads_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "base")
    base = load_base(str(folder), FLOAT32)
    ids_T = torch.arange(30)
    expected = hf_model(name, vocab_size=VOCAB_SIZE)(ids_T[None]).logits[0]
    torch.testing.assert_close(logits(base.model, ids_T), expected, atol=1e-4, rtol=0)
    assert not any(p.requires_grad or p.is_meta for p in base.model.parameters())
    assert base.tokenizer.chat_template == CHATML
    assert (base.path, base.name, base.notices) == (folder, str(folder), [])


@torch.no_grad()
def test_shards_and_other_dtypes_load_into_the_computes_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    hf_model("llama3", vocab_size=VOCAB_SIZE).half().save_pretrained(folder, max_shard_size="20KB")
    ByteTokenizer().save(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    base = load_base(str(folder), BFLOAT16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert "llama, 2 layers, " in base.description and "bfloat16 on cpu" in base.description
    exact = hf_model("llama3", vocab_size=VOCAB_SIZE)(torch.arange(9)[None]).logits[0]
    assert (logits(base.model, torch.arange(9)) - exact).abs().mean() < 0.03 * exact.std()


def test_all_that_does_not_fit_is_named_in_one_error_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.query.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["value_head.weight"] = torch.zeros(2, 32)

    edit(folder, change)
    monkeypatch.setattr("alpaca_lora.weights.huggingface.HuggingFaceFolder.read", None)  # any read would be a TypeError
    with pytest.raises(ModelFileError) as caught:
        load_base(str(folder), FLOAT32)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert (
        "1 tensors are missing: model.layers.0.self_attn.q_proj.weight (there is model.layers.0.self_attn.query"
        in message
    )
    assert "2 tensors are not of this model: model.layers.0.self_attn.query.weight" in message
    assert "value_head.weight" in message
    assert "1 tensors have another shape: model.layers.1.mlp.up_proj.weight is 3x5, expected 44x32" in message


def test_a_long_list_of_misfits_is_cut(folder: Path) -> None:
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name])
    with pytest.raises(ModelFileError, match=r"6 tensors are missing: (\S+, ){5}\.\.\., the weights"):
        load_base(str(folder), FLOAT32)


def test_config_of_another_size_is_a_misshapen_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 45}))
    with pytest.raises(
        ModelFileError, match=r"6 tensors have another shape: .*gate_proj.weight is 44x32, expected 45x32"
    ):
        load_base(str(folder), FLOAT32)


def test_config_errors_name_the_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelFileError, match=r"config\.json: model_type: unsupported architecture 'gpt2'"):
        load_base(str(folder), FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    edit(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(
        NumericalError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or inf"
    ):
        load_base(str(folder), FLOAT32)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    hf_model("llama3").save_pretrained(tmp_path)  # 97 rows
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ModelFileError, match="the tokenizer has 261 ids, the embedding 97 rows"):
        load_base(str(tmp_path), FLOAT32)


def test_derived_buffers_of_older_files_are_skipped(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_base(str(folder), FLOAT32).notices == []


def test_a_head_beside_a_tied_embedding_is_ignored_and_said_when_it_differs(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    base = load_base(str(folder), FLOAT32)
    assert base.notices == [] and base.model.lm_head is None
    edit(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    notices = load_base(str(folder), FLOAT32).notices
    assert len(notices) == 1 and "lm_head.weight is ignored" in notices[0]


def test_fingerprint_follows_the_weights_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = load_base(str(folder), FLOAT32).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert load_base(str(moved), FLOAT32).fingerprint == first
    edit(moved, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    assert load_base(str(moved), FLOAT32).fingerprint != first


def test_check_tensors_accepts_the_model_of_its_own_config(folder: Path) -> None:
    source = open_source(folder)
    assert check_tensors(source, load_base(str(folder), FLOAT32).model) == []
    with pytest.raises(ModelFileError, match=r"10 tensors are missing: model\.layers\.2\."):
        check_tensors(source, tiny_model(num_layers=3))


MEASURE = """
import sys, time
import torch
from alpaca_lora.device import Compute, peak_memory_bytes
from alpaca_lora.models.load import load_base
start = time.perf_counter()
base = load_base(sys.argv[1], Compute(torch.device("cpu"), torch.float32, 1, "test"))
print(time.perf_counter() - start, peak_memory_bytes(), base.model.num_parameters())
"""


@pytest.mark.slow
def test_the_real_model_loads_within_its_memory(smollm2: Path) -> None:
    """Two copies of the weights in float32 would be 1.08 GB on top of some 0.25 GB for the program."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(smollm2)], capture_output=True, text=True, check=True)
    _, peak, parameters = map(float, done.stdout.split())
    assert parameters == 134_515_008
    assert peak < 1.2e9


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model_knows_the_capital_of_france(smollm2: Path) -> None:
    base = load_base(str(smollm2), FLOAT32)
    ids = base.tokenizer.encode_text("The capital of France is")
    assert base.tokenizer.decode([int(logits(base.model, torch.tensor(ids))[-1].argmax())]).strip() == "Paris"
