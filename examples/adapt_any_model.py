"""LoRA on a model of your own: an embedding, three linears, two classes. Seconds on one core.

`python examples/adapt_any_model.py [FOLDER]` trains a small network on one task, adapts it to another with LoRA on
every linear, saves the adapter, loads it on a fresh copy and merges it, and checks that all three say the same.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora import adapt, load_adapted  # noqa: E402

VOCAB, LENGTH, WIDTH = 40, 11, 48  # an odd length has a majority
ROWS, STEPS, BATCH = 4096, 300, 64


class Network(nn.Module):
    """Rows of token ids (N, LENGTH) -> logits of two classes (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.classes = nn.Linear(WIDTH, 2)

    def forward(self, ids_NT: torch.Tensor) -> torch.Tensor:
        x_NTD = F.gelu(self.inner(self.embedding(ids_NT)))
        return self.classes(F.gelu(self.outer(x_NTD.mean(dim=1))))


@dataclass(frozen=True)
class Outcome:
    """Shares of right answers on rows that were not trained on, and the largest differences of a logit."""

    before: float
    after: float
    reload_difference: float
    merge_difference: float


def rows(task: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (N, LENGTH), classes (N,)): which half of the vocabulary most tokens are of, or which parity they have."""
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    votes = ids < VOCAB // 2 if task == "halves" else ids % 2 == 0
    classes = (votes.sum(dim=1) * 2 > LENGTH).long()
    return ids, classes


def train(model: nn.Module, parameters: list[nn.Parameter], task: str) -> None:
    """A plain loop: nothing in it knows of adapters."""
    ids, classes = rows(task, seed=1)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    order = torch.Generator().manual_seed(2)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(ROWS, (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(ids[chosen]), classes[chosen]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, task: str) -> float:
    """On rows of another seed than those of `train`."""
    ids, classes = rows(task, seed=3)
    return float((model(ids).argmax(dim=1) == classes).float().mean())


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a logit."""
    ids, _ = rows("parity", seed=3)
    return float((one(ids) - other(ids)).abs().max())


def run(folder: Path) -> Outcome:
    """Everything this file is about; the adapter is left in `folder`."""
    torch.manual_seed(0)
    model = Network()
    train(model, list(model.parameters()), "halves")
    pretrained = copy.deepcopy(model).eval()
    before = accuracy(model, "parity")

    adapted = adapt(model, r=8, alpha=16, dropout=0.05)
    print(adapted.summary())
    train(model, adapted.parameters(), "parity")
    after = accuracy(model, "parity")
    adapted.save(folder)

    fresh = copy.deepcopy(pretrained)
    load_adapted(fresh, folder)
    reload_difference = difference(fresh, model)

    merged = copy.deepcopy(pretrained)
    load_adapted(merged, folder).merge()
    return Outcome(before, after, reload_difference, difference(merged, model))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/adapt_any_model"
    outcome = run(folder)
    print(f"accuracy before {outcome.before:.1%}, after {outcome.after:.1%}; the adapter is in {folder}")
    print(f"a fresh model with the loaded adapter differs by {outcome.reload_difference:.1e}")
    print(f"the merged model differs by {outcome.merge_difference:.1e}")
    if outcome.reload_difference > 0 or outcome.merge_difference > 1e-4:
        raise SystemExit("they should be the same")


if __name__ == "__main__":
    main()
