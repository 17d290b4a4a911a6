r"""The plan: which linear of a model is stored by which scheme. Entries of a file, a table for people.

    plan:
      - modules: [down_proj, 'model\.layers\.[01]\..*']
        scheme: int8
      - modules: all-linear
        scheme: int4
        group_size: 64

The first entry that means a linear decides; ``dense`` keeps it as it is. The `quantization.json` of a quantized folder
holds its plan in the same words, so that it serves as a plan for another model too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from alpaca_lora.errors import AlpacaLoraError, ConfigError, ModelFileError, nearest
from alpaca_lora.models.linear import Linear, PackedLinear
from alpaca_lora.models.module_names import ALL_LINEAR, HEADS, name_matcher
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.options import QuantizeOptions, SchemeOptions
from alpaca_lora.quantization.scheme import Scheme, scheme_class
from alpaca_lora.weights.contained import read_json
from alpaca_lora.yaml_reader import read_yaml_list

DENSE = "dense"
SMALLEST_GROUP = 8
ENTRY_KEYS = ("modules", "scheme")
Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class Plan:
    """Name of a linear -> its scheme, in the model's order; linears that are not named stay dense."""

    schemes: Mapping[str, Scheme]

    @classmethod
    def uniform(cls, model: nn.Module, scheme: str | Scheme, settings: Mapping[str, Any] | None = None) -> Plan:
        """One scheme for every linear but the heads. A group size that is not among the ``settings`` is fitted to each
        linear. ConfigError for settings that cannot be, or do not fit a linear.
        """
        chosen = {}
        for name, shape in linear_shapes(model).items():
            if name.rpartition(".")[2] not in HEADS:
                chosen[name] = _checked(_made(scheme, settings or {}, shape), name, shape)
        return cls(chosen)

    @classmethod
    def from_entries(
        cls, model: nn.Module, entries: Any, *, file: str | PathLike[str], lines: Sequence[int] = (),
        by_name: bool = False,
    ) -> Plan:  # fmt: skip
        """The plan of entries, which stand on ``lines`` of ``file``. One ConfigError naming file and entry: what is no
        entry, names nothing, does not fit; or a plan that leaves every linear dense. ``by_name``: linears are named in
        full, nothing is a pattern.
        """
        if not isinstance(entries, list) or not entries:
            raise ConfigError("names no layer", file=file, field="plan", expected="a list of entries")
        shapes, chosen = linear_shapes(model), dict[str, Scheme | None]()
        for number, entry in enumerate(entries):
            where = f"plan[{number}]"
            try:
                for name, scheme in _entry_schemes(entry, shapes, where, by_name).items():
                    chosen.setdefault(name, scheme)
            except AlpacaLoraError as error:
                field = error.field if (error.field or "").startswith(where) else f"{where}.{error.field}"
                raise ConfigError(
                    error.what, file=file, line=lines[number] if lines else None, field=field, expected=error.expected,
                    fix=error.fix,
                ) from error  # fmt: skip
        plan = cls({name: found for name in shapes if (found := chosen.get(name)) is not None})
        if not plan.schemes:
            raise ConfigError("leaves every layer dense", file=file, field="plan", expected="a scheme for some layer")
        return plan

    @classmethod
    def from_file(cls, model: nn.Module, path: str | PathLike[str], *, field: str = "quantization_plan") -> Plan:
        """As `from_entries`, of a YAML or JSON file (a quantized folder's quantization.json, for example); ``field``:
        the option that named it.
        """
        if not Path(path).is_file():
            raise ConfigError(f"there is no file {str(path)!r}", field=field, expected="a YAML or JSON file")
        if Path(path).suffix != ".json":
            items = read_yaml_list(Path(path), "plan", field=field)
            entries = [{key: entry.value for key, entry in item.items()} for item in items]
            lines = [min((entry.line for entry in item.values()), default=1) for item in items]
            return cls.from_entries(model, entries, file=path, lines=lines)
        try:
            entries = read_json(Path(path)).get("plan")
        except ModelFileError as error:  # not JSON: a file of the user's configuration, not of a model
            raise ConfigError(error.what, file=path, line=error.line, expected=error.expected) from error
        return cls.from_entries(model, entries, file=path)

    @classmethod
    def from_stored(cls, model: nn.Module, entries: Any, *, file: str | PathLike[str]) -> Plan:
        """The plan of a quantized folder, its linears named in full. ModelFileError when it does not fit the model."""
        try:
            return cls.from_entries(model, entries, file=file, by_name=True)
        except ConfigError as error:
            raise ModelFileError(
                error.what, file=file, field=error.field, expected=error.expected, fix="quantize the model again"
            ) from error

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """What the quantized linears of a model are; they carry no adapter."""
        linears = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
        return cls({name: linear.scheme for name, linear in linears})

    def made_on_rows(self) -> str | None:
        """A linear whose scheme needs calibration rows, if there is one."""
        return next((name for name, scheme in self.schemes.items() if scheme.needs_calibration), None)

    def to_entries(self) -> list[dict[str, Any]]:
        """The plan as entries: linears of the same scheme together, in the order of the first of each."""
        groups: dict[str, dict[str, Any]] = {}
        for name, scheme in self.schemes.items():
            content = scheme.to_json()
            groups.setdefault(json.dumps(content, sort_keys=True), {"modules": [], **content})["modules"].append(name)
        return list(groups.values())

    def digest(self) -> str:
        """64 hexadecimal digits, equal for equal plans whatever the order of their linears."""
        content = {name: scheme.to_json() for name, scheme in self.schemes.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bits_per_weight(self, shapes: Mapping[str, Shape]) -> float:
        """Stored bits of all linears of the plan over the number of their weights."""
        sizes = {name: shapes[name][0] * shapes[name][1] for name in self.schemes}
        bits = sum(scheme.bits_per_weight(*shapes[name]) * sizes[name] for name, scheme in self.schemes.items())
        return bits / sum(sizes.values())

    def summary(self, shapes: Mapping[str, Shape]) -> str:
        """``nf4, 4.13 bits per weight``; the schemes by name where there are several."""
        names = ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes.values()))
        return f"{names}, {self.bits_per_weight(shapes):.2f} bits per weight"

    def table(self, shapes: Mapping[str, Shape], *, dense_bits: int = 16) -> Table:
        """Which linears get which scheme, with bits and bytes; ``shapes`` of all linears of the model."""
        table = Table(title="quantization plan", title_justify="left", box=None, pad_edge=False)
        for heading in ("linears", "number", "scheme", "bits per weight", "bytes"):
            table.add_column(heading, justify="right" if heading in ("number", "bits per weight", "bytes") else "left")
        groups = [(entry["modules"], _settings_text(entry)) for entry in self.to_entries()]
        dense = [name for name in shapes if name not in self.schemes]
        for names, label in [*groups, *([(dense, DENSE)] if dense else [])]:
            bits = [self._bits(name, shapes[name], dense_bits) for name in names]
            weights = [shapes[name][0] * shapes[name][1] for name in names]
            stored = sum(b * n for b, n in zip(bits, weights, strict=True))
            table.add_row(
                _kinds(names), str(len(names)), label, f"{stored / sum(weights):.2f}", f"{stored / 8e6:,.1f} MB"
            )
        return table

    def _bits(self, name: str, shape: Shape, dense_bits: int) -> float:
        scheme = self.schemes.get(name)
        return dense_bits if scheme is None else scheme.bits_per_weight(*shape)


def scheme_settings(options: SchemeOptions) -> dict[str, Any]:
    """The settings of a scheme that a user gave, by the scheme's own names."""
    given = {
        "block_size": options.block_size, "double_quant": options.double_quant, "group_size": options.group_size,
        "symmetric": options.symmetric, "format": options.fp8_format,
    }  # fmt: skip
    if isinstance(options, QuantizeOptions):
        given |= {"observer": options.observer, "percentile": options.percentile}
    return {setting: value for setting, value in given.items() if value is not None}


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name -> (out, in) of every linear of ours, dense or packed, in the model's order."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear | PackedLinear)
    }


def _entry_schemes(entry: Any, shapes: Mapping[str, Shape], where: str, by_name: bool) -> dict[str, Scheme | None]:
    """Name -> scheme (None: dense) of the linears that one entry means."""
    if not isinstance(entry, dict) or any(key not in entry for key in ENTRY_KEYS):
        raise ConfigError("is no entry", field=where, expected="an object with modules and scheme")
    modules = entry["modules"]
    words = [modules] if isinstance(modules, str) else modules
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigError("names no layer", field=f"{where}.modules", expected="names of linears, or all-linear")
    settings = {key: value for key, value in entry.items() if key not in ENTRY_KEYS}
    if by_name and (unknown := [word for word in words if word not in shapes]):
        raise ConfigError(
            f"{unknown[0][:200]!r} names no linear of this model", field=f"{where}.modules", expected="names in full"
        )
    names = words if by_name else _matched(words, list(shapes), f"{where}.modules")
    if entry["scheme"] == DENSE:
        return dict.fromkeys(names)
    if not isinstance(entry["scheme"], str):
        raise ConfigError("names no scheme", field=f"{where}.scheme", expected="the name of a scheme")
    return {name: _checked(_made(entry["scheme"], settings, shapes[name]), name, shapes[name]) for name in names}


def _matched(words: Sequence[str], names: Sequence[str], field: str) -> list[str]:
    found: set[str] = set()
    for word in words:
        matches = name_matcher(word, field)
        hits = [name for name in names if matches(name)]
        if not hits:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            alike = nearest(word, [*ends, ALL_LINEAR], count=3) or nearest(word, names, count=3)
            raise ConfigError(
                f"{word!r} names no linear of this model", field=field, expected="names of linears, or all-linear",
                fix=f"nearest: {', '.join(alike)}" if alike else f"linears here: {', '.join(ends[:12])}",
            )  # fmt: skip
        found.update(hits)
    return [name for name in names if name in found]


def _made(scheme: str | Scheme, settings: Mapping[str, Any], shape: Shape) -> Scheme:
    """The scheme with its settings; a group size that nobody gave is halved until it divides the linear's inputs."""
    if isinstance(scheme, Scheme):
        return scheme
    kind = scheme_class(scheme)
    made = kind.make(settings)
    group_size = getattr(made, "group_size", None)
    if group_size is None or "group_size" in settings:
        return made
    while shape[1] % group_size and group_size > SMALLEST_GROUP:
        group_size //= 2
    return kind.make({**settings, "group_size": group_size})


def _checked(scheme: Scheme, name: str, shape: Shape) -> Scheme:
    """The scheme itself; ConfigError naming the linear when its settings do not fit the linear's shape."""
    try:
        scheme.parts(*shape)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.what}", field=error.field, expected=error.expected, fix=error.fix) from error
    return scheme


def _settings_text(entry: Mapping[str, Any]) -> str:
    """The scheme with its settings but those that are as usual; the group size is told always."""
    usual = scheme_class(entry["scheme"])().to_json()
    settings = [
        f"{key} {value}" for key, value in entry.items()
        if key not in ENTRY_KEYS and (value != usual[key] or key == "group_size")
    ]  # fmt: skip
    return entry["scheme"] + (f" ({', '.join(settings)})" if settings else "")


def _kinds(names: Sequence[str]) -> str:
    """The last parts of names, each once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
