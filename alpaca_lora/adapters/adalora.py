"""AdaLoRA: updates B diag(E) A whose ranks are decided while they train (Zhang et al. 2023).

All modules start with more rank than they shall have on average; a budget that falls over the steps goes to the
triplets that matter most anywhere in the model (`rank_allocator`). What was pruned is zero and may grow again until the
budget is final; then it is removed, and the rest of the run is cheaper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import nn

from alpaca_lora.adapters import adalora_config
from alpaca_lora.adapters.adalora_linear import AdaLoRALinear, deviation, initial_triplets
from alpaca_lora.adapters.base import EncodeText, Kept
from alpaca_lora.adapters.linear_adapter import PEFT_PREFIX, AdaptedLinear, device_of, features
from alpaca_lora.adapters.lora import Lora, rank_line
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.adapters.lora_linear import DropoutRows
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.rank_allocator import BudgetSchedule, RankAllocator, Triplets
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError

# LoRA's options that have no meaning here
_OTHERS = ("use_rslora", "lora_plus_ratio", "rank_pattern", "alpha_pattern")


class AdaLora(Lora):
    """The adapter: all `AdaLoRALinear`s of one model, by module name. See `adapters.base.Adapter`.

    ``masks``: module -> which of its initial triplets stay (R,), from the first pruning on.
    """

    method = "adalora"
    peft_type = "ADALORA"
    layers: dict[str, AdaLoRALinear]
    _check, _settings = staticmethod(adalora_config.check_config), staticmethod(adalora_config.settings)

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        config = {**adalora_config.DEFAULTS, **self.config}
        self.orth_weight = float(config["orth_reg_weight"])
        self.phases: tuple[float, float] = (config["tinit"], config["tfinal"])
        self.masks = {name: torch.tensor(mask) for name, mask in adalora_config.masks_of(config).items()}
        self.allocator: RankAllocator | None = None  # made by `begin`; a file with final ranks needs none
        self.step = 0  # optimizer steps done
        self._penalty: torch.Tensor | None = None
        self._news: dict[str, int] = {}  # ranks that the step changed

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """As `Lora.attach`. ConfigError too for an initial rank that leaves nothing to prune."""
        for field in _OTHERS:
            if getattr(options, field) != AdapterOptions.model_fields[field].get_default():
                raise ConfigError(
                    f"is {getattr(options, field)}, which has no meaning for method adalora", field=field,
                    fix="leave it out",
                )  # fmt: skip
        adapter = super().attach(model, options, seed=seed, encode_text=encode_text)
        adapter.phases = options.adalora_tinit, options.adalora_tfinal
        return adapter

    @classmethod
    def _config(cls, model: nn.Module, options: Any, targets: list[str]) -> dict[str, Any]:
        initial = options.adalora_init_r
        return {
            **super()._config(model, options, targets),
            "peft_type": cls.peft_type, "r": adalora_config.UNUSED_R, "target_r": options.lora_r,
            "init_r": (3 * options.lora_r + 1) // 2 if initial is None else initial,
            "tinit": 0, "tfinal": 0, "total_step": 1,  # known when the run begins
            "deltaT": options.adalora_delta_t, "beta1": options.adalora_beta1, "beta2": options.adalora_beta2,
            "orth_reg_weight": options.adalora_orth_weight, "rank_pattern": None,
        }  # fmt: skip

    @classmethod
    def _new_layer(cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, seed: int) -> AdaptedLinear:
        triplets = initial_triplets(seed, name, setting.rank, *features(base))
        on_device = Triplets(*(factor.to(device_of(base)) for factor in triplets))
        return AdaLoRALinear(base, on_device, setting.scale, rows, name)

    @classmethod
    def _saved_layer(
        cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, tensors: Mapping[str, torch.Tensor]
    ) -> AdaptedLinear:
        triplets = Triplets(tensors["lora_A"], tensors["lora_B"], tensors["lora_E"])
        return AdaLoRALinear(base, triplets, setting.scale, rows, name)

    @classmethod
    def _shapes(cls, base: nn.Module, setting: Setting) -> dict[str, tuple[int, ...]]:
        in_features, out_features = features(base)
        rank = setting.rank
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank), "lora_E": (rank, 1)}

    def _moved(self) -> dict[str, float]:
        """Of modules that still have a rank: one without did act, by what the allocator decided."""
        return {name: layer.change() for name, layer in self.layers.items() if layer.rank}

    # ---- in training

    def begin(self, total_steps: int) -> None:
        """Plan the phases of a run of ``total_steps``. ConfigError when they do not fit into it."""
        super().begin(total_steps)
        if self._has_final_ranks():
            return  # an adapter that was loaded: its ranks are what they are
        tinit, tfinal = adalora_config.phases(*self.phases, self.config["deltaT"], total_steps)
        self.config.update(tinit=tinit, tfinal=tfinal, total_step=total_steps)
        count = len(self.layers)
        schedule = BudgetSchedule(
            self.config["init_r"] * count, self.config["target_r"] * count, tinit, total_steps - tfinal,
            self.config["deltaT"],
        )  # fmt: skip
        self.allocator = RankAllocator(schedule, beta1=self.config["beta1"], beta2=self.config["beta2"])

    def penalty(self) -> torch.Tensor | None:
        """orth_reg_weight times how far the singular vectors are from orthogonal, see `adalora_linear.deviation`."""
        if not self.orth_weight or not any(layer.rank for layer in self.layers.values()):
            return None
        penalty = self.orth_weight * deviation(self.layers.values())
        self._penalty = penalty.detach()
        return penalty

    def after_step(self, step: int) -> Mapping[str, Kept]:
        """Importance, and the masks where they are due; the pruned values become zero. What shrinks, when the budget
        is final. NumericalError when something of a module had never moved by then.
        """
        super().after_step(step)
        self.step, self._news = step + 1, {}
        if self._has_final_ranks():
            return {}
        if self.allocator is None:
            raise AdapterError("AdaLoRA's schedule was not made: call begin(total_steps) before the first step")
        before = self.ranks()
        masks = self.allocator.after_step(
            self.step,
            {name: layer.triplets() for name, layer in self.layers.items()},
            {name: layer.gradients() for name, layer in self.layers.items()},
        )
        if masks is not None:
            self.masks = masks
            with torch.no_grad():
                for name, mask_R in masks.items():
                    self.layers[name].lora_E.masked_fill_(~mask_R[:, None], 0.0)
        self._news = {name: rank for name, rank in self.ranks().items() if step == 0 or rank != before[name]}
        if self.step < self.allocator.schedule.final:
            return {}
        super().check_acted()  # now: what is left afterwards cannot be compared with the start
        self._fix_ranks()
        return self._kept()

    def ranks(self) -> dict[str, int]:
        """Module -> how many of its triplets are in use."""
        return {n: int(self.masks[n].sum()) if n in self.masks else layer.rank for n, layer in self.layers.items()}

    def _has_final_ranks(self) -> bool:
        return self.config.get("rank_pattern") is not None

    def _fix_ranks(self) -> None:
        masks = {name: mask_R.tolist() for name, mask_R in self.masks.items()}
        self.config["rank_pattern"] = adalora_config.pattern_of(masks)

    def _kept(self) -> dict[str, Kept]:
        """Parameter name -> the triplets of it that stay, for modules that lose some."""
        kept: dict[str, Kept] = {}
        for name, mask_R in self.masks.items():
            index = mask_R.nonzero().view(-1)
            if len(index) < len(mask_R):
                for suffix, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
                    kept[f"{PEFT_PREFIX}{name}.{suffix}"] = Kept(dim, index)
        return kept

    # ---- state

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Masks, averages of the importance, and how far the schedule is."""
        if self.allocator is None:
            return {}
        tensors = {"adalora.schedule": torch.tensor([self.step, *self._plan()])}
        tensors |= {f"adalora.mask.{name}": mask_R.to("cpu", torch.uint8) for name, mask_R in self.masks.items()}
        for kind, averages in self._averages().items():
            for name, triplets in averages.items():
                for factor, average in zip(Triplets._fields, triplets, strict=True):
                    tensors[f"adalora.{kind}.{name}.lora_{factor}"] = average.to("cpu", copy=True)
        return tensors

    def load_extra_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Kept]:
        """Put back what `extra_state` gave. AdapterError when it is of another schedule or of other modules."""
        if self.allocator is None:
            return super().load_extra_state(tensors)
        found = dict(tensors)
        schedule = found.pop("adalora.schedule", torch.empty(0)).tolist()
        if schedule[1:] != self._plan():
            raise AdapterError(f"schedule {schedule[1:]}", field="adalora.schedule", expected=f"{self._plan()}")
        for averages in self._averages().values():
            averages.clear()
        self.step, self.masks = int(schedule[0]), {}
        for name, layer in self.layers.items():
            if (mask := found.pop(f"adalora.mask.{name}", None)) is not None:
                self.masks[name] = mask.to(layer.lora_E.device, torch.bool)
            for kind, averages in self._averages().items():
                own = [found.pop(f"adalora.{kind}.{name}.lora_{factor}", None) for factor in Triplets._fields]
                if all(average is not None for average in own):
                    averages[name] = Triplets(*(average.to(layer.lora_E.device, copy=True) for average in own))  # pyright: ignore
        if found:
            raise AdapterError("is unknown: of another adapter?", field=sorted(found)[0])
        self._check_state()
        if self.step < self.allocator.schedule.final:
            return {}
        self._fix_ranks()
        return self._kept()

    def _plan(self) -> list[int]:
        return list(dataclasses.astuple(self.allocator.schedule)) if self.allocator else []

    def _averages(self) -> dict[str, dict[str, Triplets]]:
        assert self.allocator is not None
        return {"sensitivity": self.allocator.sensitivity, "uncertainty": self.allocator.uncertainty}

    def _check_state(self) -> None:
        """AdapterError when loaded masks or averages are not there for all modules or for none, or misshapen."""
        found: dict[str, Mapping[str, Iterable[torch.Tensor]]] = {
            "mask": {name: [mask_R] for name, mask_R in self.masks.items()}, **self._averages()
        }  # fmt: skip
        for kind, by_name in found.items():
            for name, layer in self.layers.items():
                wanted = [factor.shape for factor in layer.triplets()]
                if kind == "mask":
                    wanted = [(self.config["init_r"],)]
                if by_name and [tensor.shape for tensor in by_name.get(name, ())] != wanted:
                    raise AdapterError("is missing or has another shape", field=f"adalora.{kind}.{name}")

    # ---- told

    def is_settled(self) -> bool:
        """Whether the ranks are final."""
        return self._has_final_ranks()

    def log_record(self) -> dict[str, Any]:
        """budget: triplets that may stay. ranks: of the modules whose rank the step changed; of all at the first."""
        record: dict[str, Any] = {}
        if self.allocator is not None:
            record["budget"] = self.allocator.schedule.budget(self.step)
        if self._penalty is not None:
            record["penalty"] = float(self._penalty)
        if self._news:
            record["ranks"] = dict(self._news)
        return record

    def check_acted(self) -> None:
        """As `Lora.check_acted`; NumericalError when the budget was not reached, or what was pruned is still there."""
        super().check_acted()
        if self.allocator is None and self._has_final_ranks():
            return
        if self.allocator is None or not self._has_final_ranks():
            final = self.allocator.schedule.final if self.allocator else None
            raise NumericalError(
                f"AdaLoRA's ranks are not final: {self.step} steps were taken, the last pruning is at step {final}",
                fix="let the run go to its last step: the schedule was planned for all of them",
            )
        schedule, held = self.allocator.schedule, sum(layer.rank for layer in self.layers.values())
        planned = sum(self.ranks().values())
        if held != planned or not 0 < planned <= schedule.target:  # fewer than the target where scores tied
            raise NumericalError(
                f"AdaLoRA's budget was not reached: {held} triplets are left, {planned} by its masks, "
                f"{schedule.target} were planned"
            )

    def facts(self) -> list[tuple[str, str]]:
        """Budget reached, ranks, and the mean effective rank of the modules that still have one."""
        ranks = [layer.rank for layer in self.layers.values()]
        count, initial = len(ranks), self.config["init_r"]
        lines = [
            ("budget", f"{sum(ranks)} triplets left of {initial * count}, {self.config['target_r'] * count} planned"),
            ("ranks", f"{min(ranks)} to {max(ranks)} from {initial}, mean {sum(ranks) / count:.1f}"),
        ]
        if left := [layer for layer in self.layers.values() if layer.rank]:
            lines.append(("effective rank", f"{rank_line(left)} with a rank"))
        return lines
