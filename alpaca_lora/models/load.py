"""From a name to a model that can run: finds the file, checks it against its configuration, streams the weights in.

All that can be wrong with a file is found before the first weight is allocated, except what only the values show.
Knows neither file formats (`weights` does) nor adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from alpaca_lora.device import Compute
from alpaca_lora.errors import ModelFileError, nearest
from alpaca_lora.models.build import build_model
from alpaca_lora.models.classifier import SCORE_WEIGHT, expect_score, find_score
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import PackedLinear
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.file_rows import FileRows
from alpaca_lora.weights.gguf import GgufFile, open_gguf
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.huggingface import HuggingFaceFolder, open_folder

Source = HuggingFaceFolder | GgufFile
# Puts packed linears into an empty model before it is compared with its file; returns what the model's fingerprint is
# then (None: the file's own) and what the user should be told
Pack = Callable[[CausalLM, Source, Compute], tuple[str | None, list[str]]]
Fill = Callable[[Source, CausalLM, torch.dtype, torch.device], None]

# what a folder of our own packed weights says in its config.json; without a `Pack` it is refused like any other. There
# is no quant_method on purpose: transformers only warns of one that it does not know, and makes up the missing weights
PACKED_CONFIG = {"format": "alpaca_lora"}
# Buffers that older files carry; they follow from the configuration.
DERIVED = (".rotary_emb.inv_freq", ".attn.attention.bias", ".attn.attention.masked_bias")
TIED_HEAD = "lm_head.weight"


@dataclass
class Base:
    """A base model ready to run. ``name`` is what the user asked for, ``path`` the folder or file that it was."""

    model: CausalLM
    config: ModelConfig
    tokenizer: Tokenizer
    fingerprint: str
    name: str
    path: Path
    description: str
    notices: list[str] = field(default_factory=list)


def load_base(
    path_or_name: str, compute: Compute, *, dtype: torch.dtype | None = None, pack: Pack | None = None,
    fill: Fill | None = None,
) -> Base:  # fmt: skip
    """Load a folder, .gguf file, hub id or alias; weights frozen, in ``dtype`` (default: the compute's), on its device.

    Weights go one by one from the file into their place; ``pack`` (quantization/load.py) says which linears are kept
    in another form, ``fill`` puts the weights in place in the loader's stead. ModelFileError: an architecture we cannot
    run, tensors that are missing, extra or misshapen (named together), token ids without a row. NumericalError: a
    weight is not finite.
    """
    path = resolve(path_or_name)
    source = open_source(path)
    try:
        if pack is not None and source.config.get("quantization_config") == PACKED_CONFIG:
            del source.config["quantization_config"]
        config = ModelConfig.from_hf(source.config, file=path if path.is_file() else path / "config.json")
        dtype = dtype or compute.dtype
        model = build_model(config, dtype=dtype)
        expect_score(model, source.shapes, source.config, file=path)
        packed_fingerprint, pack_notices = pack(model, source, compute) if pack is not None else (None, [])
        notices = [*source.notices, *pack_notices, *check_tensors(source, model)]
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, config, path)
        (fill or read_weights)(source, model, dtype, compute.device)
        fingerprint = packed_fingerprint or source.fingerprint
    finally:
        source.close()
    size = f"{config.num_layers} layers, {model.num_parameters() / 1e6:,.1f}M parameters"
    if (score := find_score(model)) is not None:
        size += f", a classifier of {len(score.labels)} classes"
    description = f"{config.model_type}, {size}, {str(dtype).removeprefix('torch.')} on {compute.device}"
    return Base(model, config, tokenizer, fingerprint, path_or_name, path, description, notices)


def open_source(path: Path) -> Source:
    """The weight file of a resolved path; no weight is read yet."""
    return open_gguf(path) if path.is_file() else open_folder(path)


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer that came with the weights."""
    if isinstance(source, GgufFile):
        return Tokenizer.from_gguf(source.tokenizer_fields)
    return Tokenizer.from_folder(source.tokenizer_folder)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """ModelFileError when the tokenizer makes ids that the embedding has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size} rows",
            file=path,
            fix="take tokenizer and weights of the same model",
        )


def check_tensors(source: Source, model: CausalLM) -> list[str]:
    """Compare the names and shapes of all tensors with the model's -> notices. One ModelFileError names all misfits."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, linear in packed_linears(model):
        expected |= {f"{name}.{part}": shape for part, shape in linear.stored_shapes().items()}
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith(DERIVED)}
    notices = []
    if model.lm_head is None and TIED_HEAD in found:
        notices += _tied_head_notice(source, model)
        del found[TIED_HEAD]
    problems = _differences(expected, found)
    if problems:
        raise ModelFileError("; ".join(problems), file=source.path, fix="the weights are not of this configuration")
    return notices


def _tied_head_notice(source: Source, model: CausalLM) -> list[str]:
    """A tied model's file may hold the head as well; it is not read, and that is said when it is not the embedding."""
    embedding = next(name for name, parameter in model.named_parameters() if parameter is model.embeddings.weight)
    same = source.shapes.get(embedding) == source.shapes[TIED_HEAD]
    if same and torch.equal(source.read(embedding), source.read(TIED_HEAD)):
        return []
    where = source.where(TIED_HEAD)
    return [f"{where}: {TIED_HEAD} is ignored: the configuration ties the head to the embedding, which differs from it"]


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name, shape in expected.items() if name in found and found[name] != shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(_with_nearest(missing, extra))}")
    if extra:
        problems.append(f"{len(extra)} tensors are not of this model: {_some(_with_nearest(extra, missing))}")
    if misshapen:
        shapes = (f"{name} is {_shape(found[name])}, expected {_shape(expected[name])}" for name in misshapen)
        problems.append(f"{len(misshapen)} tensors have another shape: {_some(shapes)}")
    return problems


def _with_nearest(names: Iterable[str], others: list[str]) -> Iterable[str]:
    """Lazily: the hint costs a comparison with every other name, and only the first few are shown."""
    for name in names:
        hint = nearest(name, others)
        yield f"{name} (there is {hint[0]})" if hint else name


def _some(texts: Iterable[str], shown: int = 5) -> str:
    iterator = iter(texts)
    first = [text for _, text in zip(range(shown), iterator, strict=False)]
    return ", ".join(first) + (", ..." if len(first) == shown and next(iterator, None) is not None else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def read_weights(
    source: Source, model: CausalLM, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
) -> None:
    """Put each tensor of the file in its place, one by one; the model on the meta device takes no memory before.
    ``names``: only these parameters, and no packed linear.
    """
    for name in [name for name, _ in model.named_parameters()] if names is None else list(names):
        # the classification head is float32 everywhere
        tensor = source.read(name, dtype=torch.float32 if name == SCORE_WEIGHT else dtype).to(device)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if (rows := _stays_in_file(source, model, module, name, tensor)) is not None:
            del tensor  # read to see that its numbers are finite
            model.embeddings.stay_in_file(rows)
        else:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    for name, linear in packed_linears(model) if names is None else ():
        linear.read(name, source, device)


def _stays_in_file(
    source: Source, model: CausalLM, module: nn.Module, name: str, tensor: torch.Tensor
) -> FileRows | None:
    """The token embedding of which only rows are used, on a processor, as it is in a file of its dtype."""
    is_lookup = module is model.embeddings and model.lm_head is not None
    if not is_lookup or tensor.device.type != "cpu" or isinstance(source, GgufFile):
        return None
    return source.rows_in_file(name, tensor.dtype)


def packed_linears(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """(name, linear) of those whose weight is no parameter."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
