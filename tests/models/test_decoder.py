"""Every family against transformers: logits, packed streams, greedy generation, gradients."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.errors import UserError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from tests.models.hf_models import MODELS, hf_model, ours_from
from tests.tiny import tiny_model

LENGTHS = (40, 1, 7, 23, 13)


def sequences(lengths: tuple[int, ...] = LENGTHS, vocab_size: int = 97, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def run(model: CausalLM, *segments: torch.Tensor) -> torch.Tensor:
    """float32 logits of all rows of the stream of ``segments``."""
    lengths = [len(segment) for segment in segments]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return model.logits(model(torch.cat(segments), positions_T, Packed(lengths)))


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest):
    theirs = hf_model(request.param)
    return theirs, ours_from(theirs)


@torch.no_grad()
def test_single_and_packed_logits_equal_transformers(pair) -> None:
    theirs, ours = pair
    segments = sequences()
    expected = [theirs(segment[None]).logits[0] for segment in segments]
    assert torch.cat(expected).std() > 0.3  # flat logits would agree with anything
    for segment, logits_TV in zip(segments, expected, strict=True):
        torch.testing.assert_close(run(ours, segment), logits_TV, atol=1e-4, rtol=0)
    torch.testing.assert_close(run(ours, *segments), torch.cat(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair) -> None:
    theirs, ours = pair
    ids = sequences((11,), seed=3)[0]
    expected = ids.clone()
    for _ in range(14):
        ids = torch.cat((ids, run(ours, ids)[-1:].argmax(-1)))
        expected = torch.cat((expected, theirs(expected[None]).logits[0, -1:].argmax(-1)))
    assert ids.tolist() == expected.tolist()


@torch.no_grad()
def test_generate_of_transformers_gives_the_same_tokens() -> None:
    theirs = hf_model("llama2-grouped-query")
    ours = ours_from(theirs)
    ids = sequences((9,))[0]
    expected = theirs.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    for _ in range(20):
        ids = torch.cat((ids, run(ours, ids)[-1:].argmax(-1)))
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt-neo", "qwen2-window"])
@torch.no_grad()
def test_without_windows_the_logits_differ(name: str) -> None:
    """Negative control: the windows of these models do act on sequences of this length."""
    theirs = hf_model(name)
    ours = ours_from(theirs)
    for module in ours.modules():
        if hasattr(module, "window"):
            module.window = None
    segment = sequences()[0]
    assert (run(ours, segment) - theirs(segment[None]).logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt-neo", "rope-dynamic"])
@torch.no_grad()
def test_a_segment_does_not_see_its_neighbours(name: str) -> None:
    model = ours_from(hf_model(name))
    first, second, third = sequences((9, 12, 20))
    other = (first + 1) % 97
    before, after = run(model, first, second, third), run(model, other, second, third)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


@pytest.mark.parametrize("name", ["llama2-grouped-query", "gemma3", "gpt-neo", "qwen3"])
def test_gradients_equal_transformers_with_and_without_checkpointing(name: str) -> None:
    theirs = hf_model(name)
    ours = ours_from(theirs).requires_grad_(True)
    segments = sequences((17, 6))
    weight_TV = torch.randn(23, 97, generator=torch.Generator().manual_seed(5))
    (torch.cat([theirs(segment[None]).logits[0] for segment in segments]) * weight_TV).sum().backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    plain = {}
    for checkpointing in (False, True):
        ours.gradient_checkpointing = checkpointing
        ours.zero_grad()
        (run(ours, *segments) * weight_TV).sum().backward()
        for key, parameter in ours.named_parameters():
            assert parameter.grad is not None, key
            torch.testing.assert_close(parameter.grad, expected[key], atol=2e-4, rtol=1e-3)
            if checkpointing:
                assert torch.equal(parameter.grad, plain[key]), key
        plain = {key: parameter.grad for key, parameter in ours.named_parameters()}


def test_everything_is_frozen_and_backward_stops_below_the_lowest_trained_layer() -> None:
    model = tiny_model(num_layers=3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.num_parameters(trained_only=True) == 0
    seen: list[bool] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    run(model, torch.arange(5))
    assert seen == [False, True, True]


def test_tied_head_is_the_embedding_and_counted_once() -> None:
    untied, tied = tiny_model(), tiny_model(tie_word_embeddings=True)
    assert tied.lm_head is None
    assert tied.head_weight() is tied.embeddings.weight
    assert untied.lm_head is not None and untied.head_weight() is untied.lm_head.weight
    assert untied.num_parameters() - tied.num_parameters() == tied.embeddings.weight.numel()


@torch.no_grad()
def test_bfloat16_model_stays_near_float32() -> None:
    """The activations are bfloat16 (8 bits of mantissa), the logits float32."""
    exact = tiny_model(sandwich_norms=True, qk_norm=True, norm_offset=1.0, embedding_scale=32**0.5)
    rounded = tiny_model(sandwich_norms=True, qk_norm=True, norm_offset=1.0, embedding_scale=32**0.5).to(torch.bfloat16)
    segment = torch.arange(30)
    logits_TV = run(rounded, segment)
    assert logits_TV.dtype == torch.float32
    error = (logits_TV - run(exact, segment)).abs().mean() / run(exact, segment).std()
    assert 0 < error < 8 * 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama3", "rope-dynamic", "gemma3", "gpt-neo"])
@torch.no_grad()
def test_a_gpu_gives_the_same_logits(name: str) -> None:
    model = ours_from(hf_model(name))
    segments = sequences()
    expected = run(model, *segments)
    model.to("cuda")
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS]).cuda()
    hidden_TD = model(torch.cat(segments).cuda(), positions_T, Packed(LENGTHS))
    torch.testing.assert_close(model.logits(hidden_TD).cpu(), expected, atol=1e-3, rtol=0)


def test_gpt_neo_refuses_positions_beyond_its_table() -> None:
    model = ours_from(hf_model("gpt-neo"))
    with pytest.raises(UserError, match="a sequence of 65 tokens is longer than this model's 64 positions"):
        run(model, torch.zeros(65, dtype=torch.int64))
