from dataclasses import dataclass, replace

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.data.table import ExampleTable
from alpaca_lora.errors import MachineError
from alpaca_lora.training import preflight
from alpaca_lora.training.activation_levels import set_levels
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.preflight import Probe, check_fits, foretell, longest_batch, probe, smallest_change
from alpaca_lora.training.probe_cache import ProbeCache
from tests.tiny import tiny_model
from tests.training.tiny_run import LENGTHS, table

GIB = 2**30


@dataclass
class Sizes:
    micro_batch_size: int = 4
    cutoff_len: int = 32
    seed: int = 7
    gradient_checkpointing: bool | str = False
    optimizer_state: str = "float32"
    max_memory_gb: float | None = None
    batch_size: int = 64


def measured(*, per_token: int, baseline: int = GIB, num_tokens: int = 2048) -> Probe:
    return Probe(baseline, baseline + per_token * num_tokens, num_tokens, 512, 300.0, 0)


def probed(sizes: Sizes, **overrides):
    model = tiny_model()
    adapter = Lora.attach(model, AdapterOptions(lora_r=4, lora_dropout=0.1), seed=7)
    before = {name: p.detach().clone() for name, p in adapter.trained_parameters()}
    result = probe(model, adapter, causal_lm_loss, ExampleTable.from_examples(table()), sizes, **overrides)
    return result, adapter, before


def test_longest_batch_takes_the_longest_rows_that_fit():
    batch = longest_batch(ExampleTable.from_examples(table()), 60, 8)
    assert batch.lengths == (29, 23)  # 29 + 23 + 17 > 60
    assert longest_batch(ExampleTable.from_examples(table()), 1, 8).lengths == (29,)  # one row at least


def test_longest_batch_is_never_more_rows_than_a_step_has():
    assert longest_batch(ExampleTable.from_examples(table()), 60, 1).lengths == (29,)


def test_foretelling_by_two_tries_leaves_out_what_is_not_per_token():
    small, large = Probe(0, 1000 + 10 * 8, 8, 8, 1.0, 0), Probe(0, 1000 + 10 * 32, 32, 8, 1.0, 0)
    assert foretell(small, large, 64) == 1000 + 10 * 64
    assert foretell(None, small, 64) > 4 * foretell(small, large, 64)


def test_probe_measures_and_leaves_no_trace():
    result, adapter, before = probed(Sizes())
    assert result.num_tokens == sum(LENGTHS) and result.longest_row == max(LENGTHS)
    assert result.tokens_per_second > 0 and result.peak_bytes >= result.baseline_bytes > 0
    assert result.optimizer_bytes == 12 * sum(p.numel() for p in before.values())
    for name, parameter in adapter.trained_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
    assert adapter.rows.keys_T is None


def test_run_that_cannot_fit_is_refused_with_the_smallest_change():
    with pytest.raises(MachineError, match=r"needs .* GiB at its peak and may take 0.00 GiB") as caught:
        probed(Sizes(max_memory_gb=0.001))
    assert caught.value.exit_code == 4 and caught.value.fix


def test_out_of_memory_in_the_probe_is_one_message():
    def loss(model, batch, num_supervised):
        raise torch.OutOfMemoryError("no")

    model = tiny_model()
    adapter = Lora.attach(model, AdapterOptions(lora_r=4), seed=7)
    with pytest.raises(MachineError, match="out of memory in the probe of"):
        probe(model, adapter, loss, ExampleTable.from_examples(table()), Sizes())


@pytest.mark.parametrize(
    ("limit", "sizes", "change"),
    [
        # 1 GiB + 2048 tokens of 1 MiB = 3 GiB, and 5 % reserve
        (2.7, Sizes(4, 512), "--micro_batch_size 3"),
        (1.6, Sizes(4, 512), "--micro_batch_size 1"),
        (1.3, Sizes(4, 512), "--gradient_checkpointing auto --micro_batch_size 2"),
        (1.5, Sizes(1, 2048), "--gradient_checkpointing auto"),
        (1.3, Sizes(4, 512, gradient_checkpointing=True), "--cutoff_len 2"),
        (1.3, Sizes(4, 512, gradient_checkpointing="auto"), "--cutoff_len 2"),
        (1.3, Sizes(4, 512, gradient_checkpointing="mlp"), "--gradient_checkpointing auto"),
        (0.5, Sizes(4, 512), "smaller base model"),
    ],
)
def test_smallest_change(limit, sizes, change):
    result = measured(per_token=2**20)
    with pytest.raises(MachineError) as caught:
        check_fits(result, int(limit * GIB), sizes)
    assert change in caught.value.fix
    tokens = 512 * int(caught.value.fix.split("micro_batch_size ")[1].split()[0]) if "micro_batch" in change else 0
    if "checkpointing" not in change and tokens:
        # the promise of the message: so many tokens fit by the same arithmetic
        assert (GIB + tokens * 2**20) * (1 + preflight.RESERVE) <= limit * GIB


def test_what_fits_is_not_refused():
    check_fits(measured(per_token=2**20), 4 * GIB, Sizes(4, 512))
    assert "micro_batch_size" in smallest_change(measured(per_token=2**20), 3 * GIB, 2 * GIB, Sizes(4, 512), 2048)


def test_probe_is_remembered_for_the_same_facts_only(tmp_path):
    result = measured(per_token=5)
    cache = ProbeCache(tmp_path / "new", {"base": "a", "lengths": [1, 2]})
    assert cache.recall() is None
    assert cache.remember(result) and cache.recall() == result
    assert ProbeCache(tmp_path / "new", {"base": "b", "lengths": [1, 2]}).recall() is None
    cache.path.write_text('{"something": "else"}')
    assert cache.recall() is None


def test_levels_that_were_chosen_are_remembered(tmp_path):
    result = replace(measured(per_token=5), levels=("layer", "mlp"))
    cache = ProbeCache(tmp_path, {"base": "a"})
    assert cache.remember(result) and cache.recall() == result


@pytest.mark.parametrize(("state", "per_number"), [("float32", 12), ("int8", 6.1), ("disk", 4)])
def test_the_optimizer_takes_what_its_averages_take(state, per_number):
    result, _, before = probed(Sizes(optimizer_state=state))
    assert result.optimizer_bytes == sum(int(per_number * p.numel()) for p in before.values())


# ---- levels chosen by what fits


class FakeMemory:
    """Peaks of a machine whose layers keep exactly what is counted, on top of a gigabyte."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kept_per_token: dict[str, int], surcharge: int = 0) -> None:
        self.kept, self.surcharge, self.steps = kept_per_token, surcharge, []
        monkeypatch.setattr(preflight, "peak_memory_bytes", lambda device: self.peak)
        monkeypatch.setattr(preflight, "current_memory_bytes", lambda device: GIB)
        monkeypatch.setattr(preflight, "count_kept", self.count)
        self.peak = 0

    def count(self, model, forward, per):
        forward()
        return {level: [size * 128] * 2 for level, size in self.kept.items()}  # the stream is rounded up to 128

    def loss(self, model, batch, num_supervised):
        levels = model.levels()
        self.steps.append(levels)
        over = self.surcharge if set(levels) not in ({"layer"}, {"disk"}) else 0
        self.peak = GIB + over + sum(self.kept[level] for level in levels) * 128
        return causal_lm_loss(model, batch, num_supervised)


KEPT = {"none": 4_000_000, "norms": 3_000_000, "mlp": 2_000_000, "layer": 1_000_000, "disk": 0}


def chosen_within(monkeypatch, bytes_for_layers: int, checkpointing: str = "auto", **more):
    memory = FakeMemory(monkeypatch, KEPT, **more)
    model = tiny_model()
    adapter = Lora.attach(model, AdapterOptions(lora_r=4, lora_dropout=0.1), seed=7)
    limit = (GIB + bytes_for_layers + 12 * sum(p.numel() for _, p in adapter.trained_parameters())) * 1.051
    sizes = Sizes(gradient_checkpointing=checkpointing, max_memory_gb=limit / 1e9)
    rows = ExampleTable.from_examples(table())
    result = probe(model, adapter, memory.loss, rows, sizes)
    return result, model, memory


@pytest.mark.parametrize(
    ("millions", "levels"),
    [
        (8, ("none", "none")), (7, ("norms", "none")), (6, ("norms", "norms")), (5, ("mlp", "norms")),
        (4, ("mlp", "mlp")), (3, ("layer", "mlp")), (2, ("layer", "layer")),
    ],
)  # fmt: skip
def test_the_cheapest_levels_that_fit_are_measured_and_stay_on_the_model(monkeypatch, millions, levels):
    result, model, memory = chosen_within(monkeypatch, millions * 128 * 1_000_000)
    assert result.levels == levels and model.levels() == levels and memory.steps[-1] in (levels, ("layer",) * 2)
    assert result.peak_bytes == GIB + sum(KEPT[level] for level in levels) * 128


@pytest.mark.parametrize(
    ("millions", "levels"),
    [
        (8, ("none", "none")), (7, ("norms", "none")), (6, ("norms", "norms")), (5, ("disk", "none")),
        (3, ("disk", "norms")), (2, ("disk", "disk")),
    ],
)  # fmt: skip
def test_what_memory_has_no_room_for_goes_to_the_disk(monkeypatch, millions, levels):
    result, model, _ = chosen_within(monkeypatch, millions * 128 * 1_000_000, "disk")
    assert result.levels == levels and model.levels() == levels
    assert result.peak_bytes == GIB + sum(KEPT[level] for level in levels) * 128
    set_levels(model, "disk")  # as the trainer does
    assert model.levels() == levels


def test_levels_that_take_more_than_was_counted_are_lowered_until_they_fit(monkeypatch):
    result, model, memory = chosen_within(monkeypatch, 6 * 128 * 1_000_000, surcharge=128 * 1_000_000)
    assert ("norms", "norms") in memory.steps  # tried first
    assert result.levels == model.levels() == ("mlp", "norms")


def test_what_does_not_fit_with_inputs_alone_is_refused(monkeypatch):
    with pytest.raises(MachineError, match="GiB at its peak and may take"):
        chosen_within(monkeypatch, 128 * 1_000_000)
