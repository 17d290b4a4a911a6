"""The example runs, learns what it says, and what it leaves is an adapter that PEFT loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alpaca_lora import load_adapted
from alpaca_lora.errors import AdapterError
from examples.adapt_any_model import VOCAB, Network, run


def test_it_trains_saves_loads_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(tmp_path / "adapter")
    assert outcome.before < 0.6 and outcome.after > 0.95  # of two classes of one size
    assert outcome.reload_difference == 0
    assert outcome.merge_difference < 1e-4  # float32 sums in another order, logits of about 10
    printed = capsys.readouterr().out
    assert [name in printed for name in ("inner ", "outer ", "classes ")] == [True] * 3
    assert "1,936 of 8,658 numbers trained" in printed
    with pytest.raises(AdapterError, match="trained on another base model"):
        load_adapted(Network(), tmp_path / "adapter")  # another random start
    from peft import PeftModel

    ids, fresh, ours = torch.arange(VOCAB)[None], Network(), Network()
    ours.load_state_dict(fresh.state_dict())
    load_adapted(ours, tmp_path / "adapter", ignore_base_mismatch=True)
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(ids), ours(ids))
