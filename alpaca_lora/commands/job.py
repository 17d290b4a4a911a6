"""All that a run needs before its first step, put together from the rooms: `finetune` trains it, `check` shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from alpaca_lora import __version__
from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.commands.base_model import open_base
from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.data.loader import Loader
from alpaca_lora.data.prepare import Prepared, prepare
from alpaca_lora.data.preview import class_counts_table
from alpaca_lora.device import Compute, pick_compute, seed_everything
from alpaca_lora.errors import ConfigError
from alpaca_lora.models.classifier import attach_score, refuse_classifier
from alpaca_lora.models.load import Base, packed_linears
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import dense_source
from alpaca_lora.quantization.plan import Plan, linear_shapes, scheme_settings
from alpaca_lora.quantization.qat import fake_quantize
from alpaca_lora.quantization.rounding_error import FIELD as START_FIELD
from alpaca_lora.text.rendered import Rendered, Span, Template
from alpaca_lora.text.templates import load_template
from alpaca_lora.training.classification import ClassificationLoss, class_weights
from alpaca_lora.training.identity import RunIdentity
from alpaca_lora.training.loss import Judge, Loss, LossOnly, causal_lm_loss
from alpaca_lora.training.schedule import total_steps, warmup_steps
from alpaca_lora.training.signals import SignalFlag
from alpaca_lora.training.state import TrainState


@dataclass(frozen=True)
class Job:
    """Configuration, model with adapter, and rows. ``loader`` gives the training batches, ``val_loader`` the others;
    ``base_plan`` is how the base was quantized while it was loaded.
    """

    config: FinetuneConfig
    compute: Compute
    base: Base
    template: Template
    prepared: Prepared
    adapter: Adapter
    num_base_parameters: int
    base_plan: Plan | None
    loader: Loader
    val_loader: Loader | None
    loss: Loss
    judge: Judge

    def identity(self) -> RunIdentity:
        """What a checkpoint must share with this run to be resumed by it."""
        steps = total_steps(self.config.num_epochs, self.config.max_steps, self.loader.steps_per_epoch)
        return RunIdentity.of(
            self.config.model_dump(), total_steps=steps, warmup_steps=warmup_steps(self.config.warmup_steps, steps),
            fingerprints={
                "base model": self.base.fingerprint, "template": self.template.digest,
                "data": self.prepared.fingerprint, "dtype": self.compute.dtype_name,
            },
            data_hashes=self.prepared.data_hashes,
        )  # fmt: skip

    def record(self, state: TrainState) -> AdapterRecord:
        """The adapter folder's alpaca_lora.json; no times in it, so that equal runs write equal files."""
        tokenizer = self.base.tokenizer
        metrics = {
            "step": state.step, "train_loss": state.train_loss, "val_loss": state.val_loss,
            "best_val_loss": state.best_val_loss, "best_step": state.best_step, **state.best_figures,
        }  # fmt: skip
        return AdapterRecord(
            base_model=self.config.base_model, base_fingerprint=self.base.fingerprint,
            template=self.template.to_record(), system_prompt=self.config.system_prompt,
            stop_ids=list(tokenizer.stop_ids), stop_strings=list(self.template.stop_tokens),
            add_bos=tokenizer.add_bos, add_eos=self.config.add_eos_token, tokenizer_fingerprint=tokenizer.fingerprint,
            data_hashes=dict(self.prepared.data_hashes), config=self.config.model_dump(), metrics=metrics,
            labels=list(self.prepared.labels), version=__version__,
            base_plan=self.base_plan.to_entries() if self.base_plan is not None else [],
            quantization_aware=self._trained_for(),
        )  # fmt: skip

    def _trained_for(self) -> dict[str, Any]:
        """The scheme and its settings, and the dtype of the weights that were merged and quantized."""
        if self.config.quantization_aware is None:
            return {}
        scheme, dtype = self.config.quantization_aware, self.compute.dtype_name
        return {"scheme": scheme, "settings": scheme_settings(self.config), "dtype": dtype}


def assemble(config: FinetuneConfig, console: Console, signals: SignalFlag) -> Job:
    """Load, prepare and attach; says what it found."""
    say = speaker(console)
    compute = pick_compute(config.device, config.dtype, config.num_threads)
    seed_everything(config.seed)
    base = open_base(config, compute)
    say(f"base model: {base.name}: {base.description} ({compute.reason})")
    for notice in base.notices:
        say(notice)
    if config.task == "generation":
        refuse_classifier(base.model)
    num_base = base.model.num_parameters()
    on_load = config.quantize is not None or config.quantization_plan is not None
    base_plan = Plan.of(base.model) if on_load else None
    classifies = config.task == "classification"
    # before the rows are read: a wrong target is to be told of at once. A classifier's head has to know its classes
    adapter = None if classifies else _attach(config, base, say)
    template = load_template(config.prompt_template_name, base.tokenizer)
    if not classifies:
        say(f"template: {template.name} ({template.source}, sha256 {template.digest[:12]})")
    prepared = prepare(
        config, base.tokenizer, template, system_prompt=config.system_prompt, seed=config.seed,
        on_progress=lambda *_: signals.check(),
    )  # fmt: skip
    console.print(prepared.ledger.table())
    if classifies:
        console.print(class_counts_table(prepared.labels, prepared.class_counts, prepared.val_class_counts))
    for message in prepared.messages:
        say(message)
    if adapter is None:
        attach_score(base.model, prepared.labels, seed=config.seed)
        adapter = _attach(config, base, say)
    for message in _context_notes(base, prepared):
        say(message)
    loss, judge = _loss(config, prepared)
    loader = _loader(config, prepared.train)
    # here and not only by the trainer: a schedule that cannot be is refused before anything is measured or moved
    adapter.begin(total_steps(config.num_epochs, config.max_steps, loader.steps_per_epoch))
    return Job(
        config, compute, base, template, prepared, adapter, num_base, base_plan,
        loader=loader, val_loader=_loader(config, prepared.val) if prepared.val else None,
        loss=loss, judge=judge,
    )  # fmt: skip


def _attach(config: FinetuneConfig, base: Base, say: Callable[[str], None]) -> Adapter:
    """The method of the configuration, on the base; where it is quantization-aware, through quantized weights."""

    def encode_text(text: str) -> list[int]:
        tokenizer = base.tokenizer
        front = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return front + list(tokenizer.encode(Rendered(text, (Span(0, len(text)),), (), False, True)).ids)

    plan = None
    if config.quantization_aware is not None:
        if packed_linears(base.model):
            raise ConfigError(f"{base.name} is quantized already", field="quantization_aware", expected="a dense base")
        plan = Plan.uniform(base.model, config.quantization_aware, scheme_settings(config))
    shapes = linear_shapes(base.model)
    adapter = method_class(config.method).attach(base.model, config, seed=config.seed, encode_text=encode_text)
    for message in adapter.messages:
        say(message)
    if config.init_lora_weights == "rounding_error" and adapter.method == "lora":
        _require_rounding_error(adapter, base)
    if plan is not None:
        fake_quantize(base.model, plan)
        say(f"quantization-aware: trained for {plan.summary(shapes)}")
    return adapter


def _require_rounding_error(adapter: Adapter, base: Base) -> None:
    """ConfigError when there is no error to start from, or the weights that it is found with are not at hand."""
    layers: Mapping[str, Any] = getattr(adapter, "layers", {})
    if not any(isinstance(layer.base, QuantizedLinear) for layer in layers.values()):
        raise ConfigError(
            "is rounding_error, and no linear that is adapted is quantized", field=START_FIELD, expected="default",
            fix="add --quantize nf4, or leave it out",
        )  # fmt: skip
    with dense_source(base, START_FIELD):
        pass


def _loss(config: FinetuneConfig, prepared: Prepared) -> tuple[Loss, Judge]:
    """What is learned by, and judged by: of tokens, or of classes."""
    if config.task == "generation":
        return causal_lm_loss, LossOnly(causal_lm_loss)
    weights = class_weights(prepared.class_counts) if config.class_weights == "balanced" else None
    loss = ClassificationLoss(weights)
    return loss, loss


def _context_notes(base: Base, prepared: Prepared) -> list[str]:
    """What to say of rows longer than the model was made for; ConfigError where it has no positions for them."""
    context = base.config.max_position_embeddings - base.model.prefix_length
    longest = int(prepared.train.lengths.max())
    if longest <= context:
        return []
    what = f"the longest row has {longest:,} tokens, the model's context is {context:,}"
    if not base.config.ropes:
        raise ConfigError(what, field="cutoff_len", expected=f"at most {context}")
    return [f"{what}: it learns positions that generate refuses; lower cutoff_len"]


def _loader(config: FinetuneConfig, table: Any) -> Loader:
    return Loader(
        table, batch_size=config.batch_size, token_budget=config.micro_batch_size * config.cutoff_len, seed=config.seed,
        group_by_length=config.group_by_length,
    )  # fmt: skip


def speaker(console: Console) -> Callable[[str], None]:
    """Plain lines on the console, whatever they contain."""
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
