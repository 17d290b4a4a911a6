"""GGUF files as Hugging Face tensors: transformers' models written out and read back, and real files against other
readers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca_lora.errors import MachineError, ModelFileError, NumericalError
from alpaca_lora.weights import gguf as gguf_module
from alpaca_lora.weights.gguf import GgufFile, open_gguf
from alpaca_lora.weights.hub import resolve
from tests.weights.tiny_gguf import TOKENS, finish, write_model

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip


def hf_model(model_type: str, **keys: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **keys}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


MODELS = {
    "llama": ("llama", {}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 4, "query_pre_attn_scalar": 8},
        {"attention.sliding_window": 4, "rope.freq_base": 1e6},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_written_like_llama_cpp_does_is_read_back(tmp_path: Path, name: str) -> None:
    model_type, keys, fields = MODELS[name]
    model = hf_model(model_type, **keys)
    expected, architecture = weights_of(model), name.partition("-")[0]
    source = open_gguf(write_model(tmp_path / "m.gguf", expected, architecture, fields=fields))
    assert source.shapes == {key: tuple(tensor.shape) for key, tensor in expected.items()}
    exact = name != "gemma3"  # 1 + w rounds the small ones
    for key, tensor in expected.items():
        read = source.read(key)
        assert torch.equal(read, tensor) if exact else torch.allclose(read, tensor, atol=3e-7), key
    source.close()
    # and the configuration is the model's: a model made from it, with the weights read, says the same
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    assert {k: tuple(p.shape) for k, p in again.named_parameters()} == source.shapes
    again.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None] * 3 % 40
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_q_and_k_would_be_wrong_without_the_permutation(tmp_path: Path) -> None:
    """The negative control: the file holds another order than the model."""
    expected = weights_of(hf_model("llama"))
    path = write_model(tmp_path / "m.gguf", expected)
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(path).tensors}
    for letter in "qk":
        raw, weight = stored[f"blk.0.attn_{letter}.weight"], expected[f"model.layers.0.self_attn.{letter}_proj.weight"]
        assert not torch.equal(raw, weight)
        assert torch.equal(raw.sort(0).values, weight.sort(0).values)


# --- blocks ----------------------------------------------------------------------------------------------------------


def readable_types() -> list[GGMLQuantizationType]:
    types = []
    for type_, (_, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), dtype=np.uint8), type_)
            types.append(type_)
        except NotImplementedError:
            continue
    return types


def file_of_blocks(path: Path, type_: GGMLQuantizationType, rows: int, columns: int) -> Path:
    """An embedding of random blocks. Bytes below 0x60: whatever field they fall into, scales stay finite."""
    elements, size = GGML_QUANT_SIZES[type_]
    raw = np.random.default_rng(type_).integers(0, 0x60, (rows, columns // elements * size), dtype=np.uint8)
    writer = GGUFWriter(path, "qwen2")
    for key, value in (("embedding_length", columns), ("feed_forward_length", 8), ("block_count", 1)):
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_uint32("qwen2.attention.head_count", 1)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=type_)
    finish(writer)
    return path


NAME = "model.embed_tokens.weight"


def test_many_types_are_readable() -> None:
    names = {type_.name for type_ in readable_types()}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"} <= names
    assert len(names) >= 24


@pytest.mark.parametrize("type_", readable_types(), ids=lambda type_: type_.name)
def test_block_type_is_read_as_the_package_reads_it(tmp_path: Path, type_: GGMLQuantizationType) -> None:
    path = file_of_blocks(tmp_path / "m.gguf", type_, 21, 512)
    (tensor,) = GGUFReader(path).tensors
    expected = torch.from_numpy(np.array(dequantize(tensor.data, type_))).view(21, 512)
    source = open_gguf(path)
    assert source.shapes == {NAME: (21, 512)}
    read = source.read(NAME)
    assert torch.equal(read.float(), expected)
    assert read.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(type_.name, torch.float32)
    assert torch.equal(source.read(NAME, dtype=torch.bfloat16), expected.bfloat16())
    source.close()


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 32), (7, 4096), (2100, 512), (33, 32768)])
def test_tensors_that_do_not_fit_the_chunks(tmp_path: Path, rows: int, columns: int) -> None:
    type_ = GGMLQuantizationType.Q8_0
    path = file_of_blocks(tmp_path / "m.gguf", type_, rows, columns)
    (tensor,) = GGUFReader(path).tensors
    source = open_gguf(path)
    assert torch.equal(source.read(NAME), torch.from_numpy(dequantize(tensor.data, type_)))
    source.close()
    assert gguf_module.CHUNK_ELEMENTS < 2100 * 512


@pytest.mark.parametrize("name", ["Q8_K", "I32", "F64"])
def test_type_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = file_of_blocks(tmp_path / "m.gguf", GGMLQuantizationType[name], 4, 256)
    with pytest.raises(ModelFileError, match=rf"{NAME}: block type {name} cannot be read.*another quantization"):
        open_gguf(path)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", weights_of(hf_model("llama")))


def test_file_that_shrinks_after_it_was_opened(damaged: Path) -> None:
    source = open_gguf(damaged)
    with open(damaged, "rb+") as file:
        file.truncate(damaged.stat().st_size - 64)
    last = max(source.shapes, key=lambda name: source._blocks[name].end)
    with pytest.raises(ModelFileError, match=rf"{last}: the file ends at byte"):
        source.read(last)
    source.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(damaged: Path, value: float) -> None:
    source = open_gguf(damaged)
    name = "model.layers.1.mlp.up_proj.weight"
    with open(damaged, "rb+") as file:
        file.seek(source._blocks[name].start + 40)
        file.write(np.float32(value).tobytes())
    source.read("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(NumericalError, match=rf"m\.gguf: {name}: weights that are NaN"):
        source.read(name)
    source.close()


def test_tensor_of_another_kind_of_model_is_named(tmp_path: Path) -> None:
    state = weights_of(hf_model("llama"))
    path = write_model(tmp_path / "m.gguf", state, extra={"blk.0.ffn_gate_inp.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_gate_inp\.weight: llama models have no tensor"):
        open_gguf(path)


def test_unknown_name(damaged: Path) -> None:
    source = open_gguf(damaged)
    with pytest.raises(ModelFileError, match=r"m\.gguf: model\.nothing: is not in the file"):
        source.read("model.nothing")
    assert source.where(NAME) == str(damaged)
    source.close()


def test_tokenizer_fields_are_plain_values(damaged: Path) -> None:
    source = open_gguf(damaged)
    source.close()
    fields = source.tokenizer_fields
    assert fields["tokenizer.ggml.tokens"] == TOKENS
    assert fields["tokenizer.ggml.scores"] == [float(-i) for i in range(len(TOKENS))]
    assert fields["tokenizer.chat_template"] == "{{ messages }} 你好"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert not any(key.startswith("llama.") for key in fields)


def test_fingerprint(tmp_path: Path) -> None:
    state = weights_of(hf_model("llama"))

    def fingerprint(**arguments: object) -> str:
        source = open_gguf(write_model(tmp_path / "m.gguf", **{"state": state, **arguments}))
        value = source.fingerprint
        source.close()
        return value

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(block_type=GGMLQuantizationType.F16) != base
    assert fingerprint(fields={"rope.freq_base": 20_000.0}) != base
    name = "model.layers.1.self_attn.v_proj.weight"
    assert fingerprint(state={**state, name: state[name] * 1.01}) != base


# --- real models -----------------------------------------------------------------------------------------------------


def compare_with_transformers(path: Path, source: GgufFile) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = weights_of(theirs)
    assert source.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it(smollm2: Path) -> None:
    source = open_gguf(smollm2)
    compare_with_transformers(smollm2, source)
    source.close()


@pytest.mark.slow
def test_gemma3_fits_transformers_model() -> None:
    """The second real model: sandwich norms stored as 1 + w, five block types, a vocabulary of 262,144.

    Names, shapes and configuration against transformers' class; values against the package, block by block
    (transformers' own reader gives the same values, but takes a minute for this vocabulary).
    """
    try:
        path = resolve("gemma3-270m")
    except MachineError as error:
        pytest.skip(f"needs the model gemma3-270m: {error}")
    source = open_gguf(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    assert source.shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    raw = np.memmap(path, mode="r")
    for name, block in source._blocks.items():
        if name != NAME:  # the embedding alone is two thirds of the file
            rows = raw[block.start : block.end].reshape(block.shape[0] if len(block.shape) > 1 else 1, -1)
            expected = torch.from_numpy(np.array(dequantize(rows, block.type))).view(block.shape)
            assert torch.equal(source.read(name), expected - 1 if name.endswith("norm.weight") else expected), name
    source.close()


def test_smollm2_in_time(smollm2: Path) -> None:
    """Processor seconds, so that a busy machine does not fail it; the limit of the whole load is 4 s of wall time."""
    start = time.process_time()
    source = open_gguf(smollm2)
    total = sum(source.read(name, dtype=torch.bfloat16).numel() for name in source.shapes)
    assert len(source.fingerprint) == 64
    source.close()
    assert total == 134_515_008
    assert time.process_time() - start < 3.5
