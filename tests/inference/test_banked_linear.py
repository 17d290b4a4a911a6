"""Rows of many adapters in one forward: each says what it says alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.inference import banked_linear
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.banked_linear import BankedLinear, BankRows
from alpaca_lora.inference.loaded_adapter import LoadedAdapter, LowRank
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear, project
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import replace_module
from alpaca_lora.quantization.plan import Plan
from tests.inference.adapter_folders import (
    BASE,
    CLOSE,
    KINDS,
    LABELS,
    SPECIAL,
    assert_same,
    ids,
    make_folder,
    said_alone,
    said_together,
)
from tests.tiny import tiny_model


def quantized(scheme: str) -> Callable[[], CausalLM]:
    """The tiny model with every linear but the head stored by this scheme."""

    def make() -> CausalLM:
        model = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16)
        for name, one in Plan.uniform(model, scheme, None).schemes.items():
            replace_module(model, name, QuantizedLinear.from_dense(model.get_submodule(name), one, name=name))
        return model

    return make


@pytest.fixture
def no_direct_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler, or on a GPU."""
    monkeypatch.setattr(banked_linear, "is_ready", lambda device: False)


def bfloat16() -> CausalLM:
    return tiny_model().to(torch.bfloat16)


@pytest.mark.parametrize("kind", [*KINDS, *SPECIAL])
def test_each_method_says_what_it_says_attached(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = make_folder(tmp_path / "a", kind)
    model, prompts = tiny_model(), [ids(9), ids(1, seed=1)]
    bank = AdapterBank(model, BASE)
    adapter = bank.load("a", folder)
    alone, base = said_alone(folder, prompts), said_alone(None, prompts)
    for prompt, expected, plain in zip(prompts, alone, base, strict=True):
        bank._rows.stacks = False
        (found,) = said_together(bank, model, [(adapter, prompt)])
        torch.testing.assert_close(found, expected, **CLOSE)
        bank._rows.stacks = True
        assert_same(said_together(bank, model, [(adapter, prompt)])[0], expected)
        with monkeypatch.context() as patch:
            patch.setattr(banked_linear, "is_ready", lambda device: False)
            assert_same(said_together(bank, model, [(adapter, prompt)])[0], expected)
        assert (found - plain).abs().max() > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_batch_is_each_alone(tmp_path: Path, dtype: str) -> None:
    make = tiny_model if dtype == "float32" else bfloat16
    model = make()
    bank = AdapterBank(model, BASE)
    folders = {kind: make_folder(tmp_path / kind, kind, seed=at) for at, kind in enumerate([*KINDS, *SPECIAL])}
    loaded = {kind: bank.load(kind, folder) for kind, folder in folders.items()}
    prompts = {kind: [ids(length, seed=at) for length in (1, 6)] for at, kind in enumerate([*folders, "base"])}
    expected = {kind: said_alone(folders.get(kind), some, make) for kind, some in prompts.items()}
    rows = [(kind, at) for kind in prompts for at in (0, 1)]
    # bfloat16 keeps 8 bits: two layers of four hidden states that are each rounded to 2^-8 of their size
    share = 32 * 2**-23 if dtype == "float32" else 8 * 2**-8
    for order in (rows, rows[::-1], random.Random(0).sample(rows, len(rows))):
        found = said_together(bank, model, [(loaded.get(kind), prompts[kind][at]) for kind, at in order])
        for (kind, at), logits in zip(order, found, strict=True):
            assert_same(logits, expected[kind][at], share)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantized_bases(tmp_path: Path, scheme: str) -> None:
    make = quantized(scheme)
    model = make()
    bank = AdapterBank(model, BASE)
    folders = {kind: make_folder(tmp_path / kind, kind, model=make()) for kind in ("lora-everywhere", "dora", "prompt")}
    rows = [(bank.load(kind, folder), ids(5)) for kind, folder in folders.items()]
    found = said_together(bank, model, [*rows, (None, ids(5))])
    expected = [said_alone(folder, [ids(5)], make)[0] for folder in [*folders.values(), None]]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_rows_of_the_base_are_untouched_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model()
    bank = AdapterBank(model, BASE)
    adapter = bank.load("a", make_folder(tmp_path / "a", "lora-everywhere"))
    wild = bank.load("wild", make_folder(tmp_path / "wild", "lora-everywhere", lora_alpha=1e5))
    prompts = [ids(4), ids(6, seed=1), ids(4, seed=2)]

    def base_rows(first: LoadedAdapter | None, second: LoadedAdapter | None) -> list[torch.Tensor]:
        return said_together(bank, model, [(first, prompts[0]), (None, prompts[1]), (second, prompts[2])])

    plain = base_rows(None, None)
    assert torch.equal(base_rows(adapter, wild)[1], plain[1])
    # and an adapter beside one whose outputs are out of all bounds
    assert torch.equal(base_rows(adapter, wild)[0], base_rows(adapter, None)[0])


@pytest.mark.parametrize("way", ["direct", "stacked", "one by one"])
def test_an_adapter_that_breaks_hurts_its_own_rows_only(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    bank = AdapterBank(model, BASE)
    bank._rows.stacks = way != "one by one"
    if way == "stacked":
        monkeypatch.setattr(banked_linear, "is_ready", lambda device: False)
    folder = make_folder(tmp_path / "a", "lora-everywhere")
    adapter, sound, broken = (bank.load(name, folder) for name in ("adapter", "sound", "broken"))
    for update in broken.updates.values():
        update.B_OR.fill_(float("nan"))
    before = said_together(bank, model, [(adapter, ids(3)), (sound, ids(3)), (None, ids(3))])
    after = said_together(bank, model, [(adapter, ids(3)), (broken, ids(3)), (None, ids(3))])
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2]) and after[1].isnan().all()


def test_the_head_gets_the_rows_that_are_selected(tmp_path: Path) -> None:
    model, prompts = tiny_model(), [ids(4), ids(5, seed=1), ids(3, seed=2)]
    bank = AdapterBank(model, BASE)
    folder = make_folder(tmp_path / "a", "on-the-head")
    adapter = bank.load("a", folder)
    with torch.inference_mode():
        bank.set_rows([(adapter, 4), (None, 5), (adapter, 3)])
        positions = torch.cat([torch.arange(len(p)) for p in prompts])
        hidden = model(torch.cat(prompts), positions, Packed([4, 5, 3]))
        with pytest.raises(ValueError, match="12 rows were announced, the input has 2: call set_rows"):
            model.logits(hidden[[8, 11]])
        bank.select_rows([8, 11])
        found = model.logits(hidden[[8, 11]])
    assert_same(found[0], said_alone(None, [prompts[1]])[0][-1])
    assert_same(found[1], said_alone(folder, [prompts[2]])[0][-1])


def test_a_classifier_s_head_travels_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    bank = AdapterBank(model, BASE)
    folder = make_folder(tmp_path / "a", "lora", labels=LABELS)
    adapter = bank.load("a", folder)
    assert adapter.labels == tuple(LABELS) and model.score is None
    alone = tiny_model()
    load_adapter(folder, alone, BASE)
    with torch.inference_mode():
        bank.set_rows([(adapter, 7)])
        expected, found = (m(ids(7), torch.arange(7), Packed([7])) for m in (alone, model))
        assert adapter.score is not None and alone.score is not None
        assert_same(adapter.score(found), alone.score(expected))


def test_a_thread_that_announced_nothing_runs_the_base(tmp_path: Path) -> None:
    model = tiny_model()
    bank = AdapterBank(model, BASE)
    adapter = bank.load("a", make_folder(tmp_path / "a"))
    bank.set_rows([(adapter, 5)])
    found: list[torch.Tensor] = []

    @torch.inference_mode()
    def run() -> None:
        found.append(model.logits(model(ids(5), torch.arange(5), Packed([5]))))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(found[0], said_alone(None, [ids(5)])[0])


def test_loading_a_prompt_between_two_forwards_leaves_the_rows(tmp_path: Path) -> None:
    model = tiny_model()
    bank = AdapterBank(model, BASE)
    adapter = bank.load("a", make_folder(tmp_path / "a", "lora-everywhere"))
    with torch.inference_mode():
        bank.set_rows([(adapter, 5)])
        before = model(ids(5), torch.arange(5), Packed([5]))
        # its virtual tokens go through the same linears, as rows of the base
        bank.load("p", make_folder(tmp_path / "p", "prompt"))
        assert torch.equal(model(ids(5), torch.arange(5), Packed([5])), before)


@pytest.mark.parametrize("way", ["direct", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_together_are_those_one_by_one(
    tmp_path: Path, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "stacked":
        monkeypatch.setattr(banked_linear, "is_ready", lambda device: False)
    make = tiny_model if dtype == "float32" else bfloat16
    model = make()
    bank = AdapterBank(model, BASE)
    kinds = ["lora", "lora-everywhere", "rslora", "patterns", "pissa", "one-layer", "pruned", "on-the-head", "dora"]
    loaded = {kind: bank.load(kind, make_folder(tmp_path / kind, kind, seed=at)) for at, kind in enumerate(kinds)}
    chooser = random.Random(1)
    share = 32 * 2**-23 if dtype == "float32" else 8 * 2**-8
    some = kinds[:5]
    for step in range(12):
        # sequences come and go, in any order, with one row or some
        some = [kind for kind in some if chooser.random() < 0.8]
        some += [kind for kind in chooser.sample(kinds, 4) if kind not in some]
        if step % 3 == 0:
            chooser.shuffle(some)
        rows = [(loaded[kind], ids(1 if step % 4 else chooser.randint(1, 3), seed=step)) for kind in some]
        rows.insert(chooser.randint(0, len(rows)), (None, ids(2, seed=step)))
        together = said_together(bank, model, rows)
        assert bool(bank._rows.direct) == (way == "direct") and (bank._rows.stacked is not None) == (way == "stacked")
        assert bank._rows.runs == ()
        bank._rows.stacks = False
        one_by_one = said_together(bank, model, rows)
        assert bank._rows.stacked is None and not bank._rows.direct and len(bank._rows.runs) == len(some)
        bank._rows.stacks = True
        for found, expected in zip(together, one_by_one, strict=True):
            assert_same(found, expected, share)


def test_few_rows_go_in_one_call() -> None:
    rows = BankRows(torch.device("cpu"))
    if not banked_linear.is_ready(rows.device):
        pytest.skip("needs a compiler")
    a, b, large = (low_rank_adapter(["q"], rank, 4, 4) for rank in (1, 2, 65))
    linear = BankedLinear(Linear(4, 4), "q", rows)
    torch.nn.init.normal_(linear.base.weight)
    rows.set([(a, 2), (None, 1), (large, 1), (a, 1), (b, 20)])
    assert len(rows.direct) == 4 and rows.runs == () and rows.stacked is None
    x = torch.randn(25, 4)
    found, expected = linear(x), linear.base(x)
    for start, stop, adapter in rows.direct:
        low = adapter.updates["q"]
        expected[start:stop] += low.scale * (x[start:stop] @ low.A_RD.t() @ low.B_OR.t())
    torch.testing.assert_close(found, expected)
    rows.select([0, 2, 3])
    assert [(run.start, run.stop, run.adapter) for run in rows.direct] == [(0, 1, a), (2, 3, large)]
    with rows.base_only():
        assert torch.equal(linear(x), linear.base(x))
    rows.set([(a, 30), (b, 3)])  # more than are few
    assert rows.direct == () and rows.stacked is not None


def test_which_runs_are_stacked(no_direct_rows: None) -> None:
    rows = BankRows(torch.device("cpu"))
    a, b, c, large = (low_rank_adapter(["q"], rank, 4, 4) for rank in (1, 2, 3, 65))
    rows.set([(a, 1)])
    assert rows.stacked is not None and rows.runs == ()
    rows.set([(None, 2), (a, 1), (b, 1), (c, 1), (large, 1)])
    assert rows.stacked is not None and (rows.stacked.num_adapters, rows.stacked.start) == (3, 2)
    assert [run.adapter for run in rows.runs] == [large]
    rows.set([(a, 2), (b, 1), (None, 1), (c, 2), (a, 1)])
    assert rows.stacked is not None and rows.stacked.start is None
    assert [(run.start, run.stop) for run in rows.runs] == [(6, 7)]  # a second run of the same adapter
    rows.set([(a, 17), (b, 1), (c, 1)])
    assert rows.stacked is not None and rows.stacked.num_adapters == 2 and len(rows.runs) == 1
    rows.select([0, 17, 18])
    assert rows.stacked is not None and (rows.stacked.num_adapters, rows.stacked.num_rows) == (3, 1)


def test_copies_are_made_when_somebody_joins_only(no_direct_rows: None) -> None:
    torch.manual_seed(0)
    rows = BankRows(torch.device("cpu"))
    linear = BankedLinear(Linear(4, 4), "q", rows)
    torch.nn.init.normal_(linear.base.weight)
    a, b, c, d = (low_rank_adapter(["q"], 2, 4, 4) for _ in range(4))
    rows.set([(a, 1), (b, 1), (c, 1)])
    linear(torch.randn(3, 4))
    group = rows.stack.groups[("q",)]
    assert group is not None and group.written == [a, b, c]
    kept = group.A_SDR.data_ptr()
    for one in (a, b, c):
        one.updates["q"].A_RD.zero_()  # the copies do not know
    rows.set([(c, 1), (d, 1), (a, 1)])
    x = torch.randn(3, 4)
    found, plain = linear(x), linear.base(x)
    assert group.written == [a, d, c] and group.A_SDR.data_ptr() == kept
    low = d.updates["q"]
    torch.testing.assert_close(found[1], plain[1] + low.scale * (x[1] @ low.A_RD.t() @ low.B_OR.t()))
    assert not torch.allclose(found[0], plain[0]) and not torch.allclose(found[2], plain[2])


def low_rank_adapter(names: list[str], rank: int, in_features: int, out_features: int) -> LoadedAdapter:
    updates = {
        name: LowRank(torch.randn(rank, in_features), torch.randn(out_features, rank), 0.5 + at)
        for at, name in enumerate(names)
    }
    return LoadedAdapter("a", Path("a"), "lora", "", 0, None, updates=updates)


def test_linears_that_share_an_input_share_the_product_and_its_memory() -> None:
    torch.manual_seed(0)
    rows = BankRows(torch.device("cpu"))
    bases = [Linear(6, 4) for _ in range(3)]
    for base in bases:
        torch.nn.init.normal_(base.weight)
    linears = [BankedLinear(bases[0], "q", rows), bases[1], BankedLinear(bases[2], "v", rows)]
    adapter = low_rank_adapter(["q", "v"], 2, 6, 4)
    updates, x = adapter.updates, torch.randn(3, 5, 6)
    expected = [base(x) for base in bases]
    for at, name in ((0, "q"), (2, "v")):
        low = updates[name]
        expected[at] = expected[at] + low.scale * (x @ low.A_RD.t() @ low.B_OR.t())
    rows.set([(adapter, 15)])
    for found, wanted in zip(project(x, linears), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    group = adapter.group(("q", None, "v"))
    assert group is not None and group.ranks == (2, 2)
    storage = group.A_DR.untyped_storage().data_ptr()
    assert {low.A_RD.untyped_storage().data_ptr() for low in updates.values()} == {storage}
    assert adapter.group((None, "k")) is None


def test_rows_are_checked() -> None:
    rows = BankRows(torch.device("cpu"))
    adapter = low_rank_adapter(["q"], 1, 4, 4)
    linear = BankedLinear(Linear(4, 4), "q", rows)
    rows.set([(adapter, 3)])
    with pytest.raises(ValueError, match="3 rows were announced, the input has 2"):
        linear(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="-1 rows"):
        rows.set([(adapter, -1)])
    adapter.leave()
    with pytest.raises(ValueError, match="not in memory"):
        rows.set([(adapter, 1)])


def test_neighbours_of_one_adapter_are_one_run() -> None:
    rows, one, other = BankRows(torch.device("cpu")), low_rank_adapter(["q"], 1, 4, 4), low_rank_adapter(["q"], 1, 4, 4)
    rows.set([(one, 2), (one, 3), (None, 1), (one, 1), (other, 0), (other, 2)])
    assert [(run.start, run.stop) for run in rows.all_runs] == [(0, 5), (6, 7), (7, 9)]
    rows.select([0, 1, 5, 6, 8])
    assert [(run.start, run.stop) for run in rows.all_runs] == [(0, 2), (3, 4), (4, 5)] and rows.num_rows == 5
