"""A model gone through one layer at a time, with sample rows: each layer's weights are there only in its turn.

Knows linears and the order of layers; no architecture, no scheme. What a layer gets besides its input is noted once,
from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.cross_entropy import linear_cross_entropy
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear
from alpaca_lora.models.load import Source, read_weights

LEAST_TOKENS = 128  # fewer say nothing about what a model's activations are like
STREAM_TOKENS = 2048  # of one pass through a layer
DRAWN_ROWS = 256  # rows of logits at a time

Rows = Sequence[torch.Tensor]  # int64 token ids (T,) each
Inputs = list[torch.Tensor]  # what a linear sees, (T, in) of each stream


def check_rows(rows: Rows, field: str = "calibration_data") -> None:
    """ConfigError naming ``field`` when there are no rows or too few tokens in them."""
    if (count := sum(map(len, rows))) < LEAST_TOKENS:
        raise ConfigError(f"{count} tokens to calibrate on", field=field, expected=f"at least {LEAST_TOKENS} tokens")


class Stream:
    """Some of the rows on their way: the activations in front of the next layer. context: what each layer gets
    besides.
    """

    def __init__(self, rows: Rows, x_TD: torch.Tensor, context: list[tuple[Any, ...]]) -> None:
        self.rows, self.x_TD, self.context = rows, x_TD, context

    def next_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(places in the stream that have a next token in their row, those tokens), int64 (N,) each."""
        starts, places, start = [], [], 0
        for row in self.rows:
            places.append(torch.arange(start, start + len(row) - 1))
            starts.append(row[1:])
            start += len(row)
        device = self.x_TD.device
        return torch.cat(places).to(device), torch.cat(starts).to(device)


class LayerWalk:
    """The layers of ``model`` in their order. With a ``source``, a layer is empty but between `fill` and `empty`, and
    what is no layer is read at once; without one, the model is loaded already and stays so.
    """

    def __init__(
        self, model: CausalLM, source: Source | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.model, self._source, self._dtype = model, source, dtype
        self.device = device or model.embeddings.weight.device
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = [f"{names[id(layer)]}." for layer in model.layers]
        if source is not None:
            outside = [n for n, _ in model.named_parameters() if not n.startswith(tuple(self.prefixes))]
            read_weights(source, model, dtype, self.device, outside)

    def __len__(self) -> int:
        return len(self.prefixes)

    def layer(self, index: int) -> Any:
        return self.model.layers[index]

    def fill(self, index: int) -> None:
        """Read a layer."""
        if self._source is not None:
            names = [n for n, _ in self.model.named_parameters() if n.startswith(self.prefixes[index])]
            read_weights(self._source, self.model, self._dtype, self.device, names)

    def empty(self, index: int) -> None:
        """Forget the weights of a layer that can be read again."""
        if self._source is not None:
            for module in self.layer(index).modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    setattr(module, leaf, _on_meta(parameter))

    def weight(self, name: str) -> torch.Tensor:
        """The dense weight of a linear, (out, in): as the file holds it, where there is one."""
        if self._source is not None:
            return self._source.read(f"{name}.weight").to(self.device)
        return self.model.get_submodule(name).weight.detach()  # pyright: ignore

    def inside(self, index: int, names: Sequence[str]) -> list[str]:
        """Those of the linears that lie in a layer."""
        return [name for name in names if name.startswith(self.prefixes[index])]

    def outside(self, names: Sequence[str]) -> list[str]:
        """Those of the linears that lie in no layer: heads."""
        return [name for name in names if not name.startswith(tuple(self.prefixes))]

    def put(self, name: str, module: nn.Module) -> None:
        """Put a linear in another's place, whose weight is forgotten if it can be read again."""
        parent, _, leaf = name.rpartition(".")
        before: Any = self.model.get_submodule(name)
        if self._source is not None and isinstance(before, Linear):
            before.weight = _on_meta(before.weight)
        setattr(self.model.get_submodule(parent), leaf, module)

    @torch.no_grad()
    def streams(self, rows: Rows) -> list[Stream]:
        """The rows as streams of about `STREAM_TOKENS`, embedded."""
        streams, together = [], list[torch.Tensor]()
        for place, row in enumerate(rows):
            together.append(row)
            if sum(map(len, together)) >= STREAM_TOKENS or place == len(rows) - 1:
                streams.append(self._stream(together))
                together = []
        return streams

    def _stream(self, rows: Rows) -> Stream:
        ids_T = torch.cat(list(rows)).to(self.device)
        positions_T = torch.cat([torch.arange(len(row)) for row in rows]).to(self.device)
        with _captured(self.model) as captures:
            self.model.run_layers(self.model.embed(ids_T), positions_T, Packed([len(row) for row in rows]))
        return Stream(list(rows), captures[0].seen[0], [capture.seen[1] for capture in captures])

    def inputs(self, index: int, names: Sequence[str], streams: Sequence[Stream]) -> dict[str, Inputs]:
        """Linear of a layer -> what it sees in each stream; linears that share an input share its tensors."""
        seen: dict[str, Inputs] = {name: [] for name in names}

        def note(name: str) -> Callable[..., None]:
            return lambda _linear, given: seen[name].append(given[0])

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
        try:
            for stream in streams:
                self.layer(index)(stream.x_TD, *stream.context[index])
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def advance(self, index: int, streams: Sequence[Stream]) -> None:
        """Put the streams through a layer as it is now."""
        for stream in streams:
            stream.x_TD = self.layer(index)(stream.x_TD, *stream.context[index])

    def loss(self, stream: Stream, x_TD: torch.Tensor, ids_N: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of -log p of the next tokens (nats), or of ``ids_N`` in their places, given what comes out of the last
        layer; differentiable in it.
        """
        places_N, next_N = stream.next_tokens()
        hidden_ND = self.model.final_norm(x_TD).index_select(0, places_N)
        head: Any = self.model.lm_head
        assert head is None or isinstance(head, Linear), "a head that is not dense may see its inputs otherwise"
        weight_VD, softcap = self.model.head_weight(), self.model.config.logit_softcap
        return linear_cross_entropy(hidden_ND, weight_VD, next_N if ids_N is None else ids_N, 1, softcap)

    @torch.no_grad()
    def draw(self, stream: Stream, x_TD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Tokens ids_N that the model itself would have gone on with, in the place of each next token."""
        places_N, _ = stream.next_tokens()
        hidden_ND = self.model.final_norm(x_TD).index_select(0, places_N)
        drawn = []
        for some_MD in hidden_ND.split(DRAWN_ROWS):
            # by the inverse of the distribution: torch.multinomial takes a hundred times the time
            cumulated_MV = self.model.logits(some_MD).softmax(-1).cumsum(-1)
            share_M1 = torch.rand(len(some_MD), 1, generator=generator, device=self.device)
            place_M1 = torch.searchsorted(cumulated_MV, share_M1 * cumulated_MV[:, -1:], right=True)
            drawn.append(place_M1.clamp_max_(cumulated_MV.shape[1] - 1)[:, 0])
        return torch.cat(drawn)


def _on_meta(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


class _Capture(nn.Module):
    """Stands in a layer's place and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor, tuple[Any, ...]]

    def forward(self, x_TD: torch.Tensor, *context: Any) -> torch.Tensor:
        self.seen = x_TD, context
        return x_TD


@contextmanager
def _captured(model: CausalLM) -> Iterator[list[_Capture]]:
    """The model with a `_Capture` in the place of each layer."""
    layers: Any = model.layers
    own, captures = list(layers), [_Capture() for _ in layers]
    try:
        for index, capture in enumerate(captures):
            layers[index] = capture
        yield captures
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer
