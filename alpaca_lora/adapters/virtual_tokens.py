"""What prefix tuning and prompt tuning share: virtual tokens in front of every segment, of which the model knows keys
and values only (`models.attention.Prefix`), and PEFT's form of a prompt-learning folder.

Knows our decoders; knows no formula of either method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter, EncodeText, Kept
from alpaca_lora.adapters.linear_adapter import check_free, seeded
from alpaca_lora.adapters.targets import find_modules, task_type
from alpaca_lora.adapters.whole_modules import CLASS_HEADS, PEFT_PREFIX, WholeModules
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM

KEY = "prompt_embeddings"  # PEFT's name of the one tensor of such an adapter
BASE_PREFIX = "base_model."  # PEFT wraps the model once here, not twice as for methods that are put into it
START = "start"
TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
# What we write: understood by every PEFT since 0.7.
DEFAULTS: Mapping[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "num_transformer_submodules": 1,
    "revision": None,
}  # fmt: skip
KNOWN = {*DEFAULTS, "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "modules_to_save",
         "peft_type", "peft_version", "task_type"}  # fmt: skip


class CapturingPlan(Packed):
    """One segment, causal, that keeps every layer's keys and values."""

    def __init__(self, length: int) -> None:
        super().__init__((length,))
        self.kept: dict[int, KeysValues] = {}

    def attend(
        self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        self.kept[layer] = k_TKE, v_TKE
        return super().attend(layer, q_THE, k_TKE, v_TKE, scale, window)


def keys_values_of(model: CausalLM, x_PD: torch.Tensor) -> list[KeysValues]:
    """Keys and values that tokens with these embeddings have in every layer where nothing stands before them.

    Causal tokens see nothing behind them either, so these are what every segment that follows sees. Not checkpointed:
    what goes out of a layer besides its output could not be made again.
    """
    plan = CapturingPlan(len(x_PD))
    checkpointing, model.gradient_checkpointing = model.gradient_checkpointing, False
    try:
        model.run_layers(x_PD, torch.arange(len(x_PD), device=x_PD.device), plan)
    finally:
        model.gradient_checkpointing = checkpointing
    return [plan.kept[layer] for layer in range(model.config.num_layers)]


class VirtualTokens(nn.Module):
    """Virtual tokens of one kind; a `models.attention.Prefix`.

    `table` is what PEFT keeps of them, (P, columns) float32; ``start``: the table before the first step.
    """

    start: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.length = len(start)
        self.register_buffer("start", start.detach().float().clone(), persistent=False)

    def table(self) -> torch.Tensor:
        raise NotImplementedError

    def keys_values(self) -> list[KeysValues]:
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """Name -> what is trained."""
        raise NotImplementedError


class VirtualTokenAdapter(Adapter):
    """An adapter that is the `prefix` of a model: one `VirtualTokens`."""

    mergeable = False
    known: ClassVar[frozenset[str]]  # keys of an adapter_config.json besides `KNOWN`
    model: CausalLM

    def __init__(
        self, model: CausalLM, tokens: VirtualTokens, config: dict[str, Any], messages: list[str], *, trainable: bool,
        whole: WholeModules | None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, messages, whole)
        self.tokens: VirtualTokens | None = tokens.requires_grad_(trainable)
        model.prefix = tokens

    # ---- what a method says

    @classmethod
    @abstractmethod
    def _widths(cls, model: CausalLM) -> dict[str, int]:
        """adapter_config.json keys that must fit the model."""

    @classmethod
    @abstractmethod
    def _columns(cls, model: CausalLM) -> int:
        """Width of the table."""

    @classmethod
    @abstractmethod
    def _new_tokens(cls, model: CausalLM, ids_P: torch.Tensor, options: Any, seed: int) -> VirtualTokens:
        """Virtual tokens that start as these tokens of the vocabulary."""

    @classmethod
    @abstractmethod
    def _saved_tokens(cls, model: CausalLM, table: torch.Tensor) -> VirtualTokens:
        """The virtual tokens of a file."""

    @classmethod
    def _config(cls, model: CausalLM) -> dict[str, Any]:
        """adapter_config.json keys of this method alone."""
        return {}

    # ---- made

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """Put virtual tokens before every segment, as `adapters.options.AdapterOptions` say; freezes everything else.

        They start as the tokens of ``virtual_tokens_text``, repeated or cut; without a text, or without the tokenizer's
        ``encode_text``, as tokens drawn from the vocabulary.

        Raises ConfigError: longer than the model's context, a text without tokens, modules that PEFT would not keep.
        AdapterError: the model carries an adapter already.
        """
        decoder, length = _free_decoder(model, cls.method), int(options.num_virtual_tokens)
        context = decoder.config.max_position_embeddings
        if length >= context:
            raise ConfigError(
                f"{length} virtual tokens leave no room for a row in the model's context", field="num_virtual_tokens",
                expected=f"fewer than {context}",
            )  # fmt: skip
        saved = find_modules(decoder, options.modules_to_save)
        if saved and task_type(decoder) != "SEQ_CLS":
            raise ConfigError(
                f"method {cls.method} trains no other modules: PEFT keeps none beside virtual tokens",
                field="modules_to_save", fix="leave it out, or choose method lora",
            )  # fmt: skip
        messages: list[str] = []
        ids_P = _start_ids(decoder, options.virtual_tokens_text, encode_text, length, seed, messages)
        with torch.no_grad():
            tokens = cls._new_tokens(decoder, ids_P, options, seed)
        config = {
            **DEFAULTS, **cls._widths(decoder), **cls._config(decoder), "num_virtual_tokens": length,
            "peft_type": cls.peft_type, "task_type": task_type(decoder), "modules_to_save": None,
        }  # fmt: skip
        decoder.requires_grad_(False)
        whole = WholeModules.train(decoder, saved) if saved else None
        if whole is not None:
            config["modules_to_save"] = [*whole.config_keys(tying=False)["modules_to_save"]]
        return cls(decoder, tokens, config, messages, trainable=True, whole=whole)

    @classmethod
    def expected_shapes(cls, model: nn.Module, config: Mapping[str, Any], *, file: Any) -> dict[str, tuple[int, ...]]:
        """As `Adapter.expected_shapes`: one table, and a classifier's head."""
        decoder = _decoder(model, cls.method)
        length, context = config.get("num_virtual_tokens"), decoder.config.max_position_embeddings
        if type(length) is not int or not 1 <= length < context:
            raise AdapterError(
                f"is {length!r}", file=file, field="num_virtual_tokens",
                expected=f"at least 1, fewer than the model's context of {context}",
            )  # fmt: skip
        wanted = {"num_transformer_submodules": 1, **cls._widths(decoder)}
        for key, value in wanted.items():
            if config.get(key) not in (value, None):
                raise AdapterError(
                    f"is {config[key]!r}", file=file, field=key, expected=f"{value}",
                    fix="is this the right base model?",
                )  # fmt: skip
        if config.get("task_type") not in TASKS:
            raise AdapterError(
                f"{config['task_type']!r} is not supported by method {cls.method}", file=file, field="task_type",
                expected="CAUSAL_LM or SEQ_CLS",
            )  # fmt: skip
        whole = WholeModules.expected_shapes(decoder, _entries(config), file=file)
        return {KEY: (length, cls._columns(decoder)), **{_single(key): shape for key, shape in whole.items()}}

    @classmethod
    def from_peft(
        cls, model: nn.Module, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, trainable: bool,
        file: Any,
    ) -> Self:  # fmt: skip
        """Put saved virtual tokens on `model`; `tensors` are those of `expected_shapes`."""
        decoder = _free_decoder(model, cls.method)
        messages = [
            f"{file}: {key}: unknown key, kept as it is and not used"
            for key in sorted(config)
            if key not in KNOWN | cls.known
        ]
        tokens = cls._saved_tokens(decoder, tensors[KEY].to(decoder.embeddings.weight.device, torch.float32))
        doubled = {_double(key): tensor for key, tensor in tensors.items() if key != KEY}
        decoder.requires_grad_(False)
        whole = WholeModules.from_tensors(decoder, doubled, _entries(config), trainable=trainable)
        return cls(decoder, tokens, {**config}, messages, trainable=trainable, whole=whole)

    # ---- asked

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.tokens is not None:
            yield from self.tokens.tensors().items()

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((_single(key), parameter) for key, parameter in super()._all_parameters())

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """PEFT key -> tensor on the CPU, a copy; of the virtual tokens always the plain table."""
        if self.tokens is None:
            return {}
        whole = {} if self.whole is None else self.whole.state_tensors()
        with torch.no_grad():
            own = self.tokens.table().detach().to("cpu", torch.float32, copy=True)
        return {KEY: own, **{_single(key): tensor for key, tensor in whole.items()}}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """The table before the first step: what `moved` compares with, and what a reparametrised prefix adds to."""
        return {} if self.tokens is None else {START: self.tokens.start.clone()}

    def load_extra_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Kept]:
        if self.tokens is None or tensors.keys() != {START} or tensors[START].shape != self.tokens.start.shape:
            raise AdapterError(f"holds not the start of method {self.method}", field="extra state")
        self.tokens.start.copy_(tensors[START])
        return {}

    def facts(self) -> list[tuple[str, str]]:
        return [("virtual tokens", f"{self.config['num_virtual_tokens']} before every row")]

    # ---- ended

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """AdapterError: always."""
        raise AdapterError(
            f"method {self.method} cannot be merged: virtual tokens are no change of any weight",
            fix="use the adapter folder with the base model",
        )  # fmt: skip

    def merge(self) -> None:
        """AdapterError: always."""
        self.merged_tensors()

    def remove(self) -> None:
        """Take the virtual tokens off. AdapterError when they are off already."""
        if self.tokens is None:
            raise AdapterError("the adapter is not on the model any more: it was removed")
        self.tokens = self.model.prefix = None
        if self.whole is not None:
            self.whole.restore()


def _decoder(model: nn.Module, method: str) -> CausalLM:
    if not isinstance(model, CausalLM):
        raise ConfigError(
            f"method {method} works on this package's decoders only, not on {type(model).__name__}", field="method",
            fix="use method lora",
        )  # fmt: skip
    return model


def _free_decoder(model: nn.Module, method: str) -> CausalLM:
    decoder = _decoder(model, method)
    check_free(decoder)
    return decoder


def _start_ids(
    model: CausalLM, text: str, encode_text: EncodeText | None, length: int, seed: int, messages: list[str]
) -> torch.Tensor:
    """ids_P that the virtual tokens start as. What the encoder puts before every text (BOS, where the model was trained
    with it: the place that most heads look at where nothing else matters) stands there once, the text is repeated.
    """
    device = model.embeddings.weight.device
    if not text or encode_text is None:
        if text:
            messages.append("virtual_tokens_text is not used: there is no tokenizer to read it; the start is random")
        return torch.randint(model.config.vocab_size, (length,), generator=seeded(seed, "ids", KEY)).to(device)
    front, ids = encode_text(""), encode_text(text)
    front = front if ids[: len(front)] == front else []
    body = ids[len(front) :]
    if not body:
        raise ConfigError("has no tokens", field="virtual_tokens_text", expected="a text, or an empty one for random")
    return torch.tensor((front + body * -(-length // len(body)))[:length], device=device)


def _entries(config: Mapping[str, Any]) -> Any:
    """modules_to_save, which PEFT heeds for classifiers only when it comes to virtual tokens."""
    if config.get("task_type") != "SEQ_CLS":
        return None
    entries = config.get("modules_to_save")
    return list(CLASS_HEADS) if entries is None else entries


def _single(key: str) -> str:
    """``base_model.model.score.weight`` as PEFT writes it here: ``base_model.score.weight``."""
    return BASE_PREFIX + key.removeprefix(PEFT_PREFIX) if key.startswith(PEFT_PREFIX) else key


def _double(key: str) -> str:
    return PEFT_PREFIX + key.removeprefix(BASE_PREFIX)
