# SPDX-License-Identifier: Apache-2.0
"""The decode engine against a naive loop without a cache, over model families, batch sizes and two FSDP2 processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.replay.fused_network import FusedNetwork
from lightning_cl.replay.generation import DecodeEngine
from lightning_cl.replay.library_network import LibraryNetwork
from lightning_cl.replay.sampling import InverseSampler, row_uniforms
from tests.helpers import spawn
from tests.helpers.models import PlainLM, lora, tiny_llama

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def family(name: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    if name == "mistral, sliding window":
        return t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=5))
    if name == "gemma 2, soft caps":
        config = t.Gemma2Config(**SIZES, head_dim=8, sliding_window=6, final_logit_softcapping=2.0)
        return t.Gemma2ForCausalLM(config)
    if name == "gemma 3, mixed windows":
        return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6))
    if name == "granite, logit scale":
        return t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=0.25))
    if name == "gpt-2, learned positions":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    if name == "mixture of experts, no static cache":
        return t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    raise ValueError(name)


FAMILIES = [
    "llama",
    "mistral, sliding window",
    "gemma 2, soft caps",
    "gemma 3, mixed windows",
    "granite, logit scale",
    "gpt-2, learned positions",
    "mixture of experts, no static cache",
]


def naive(model: Any, prompt: list[int], length: int, seed: int, row: int, temperature: float = 1.0) -> list[int]:
    """One row, all tokens again for each new one, and a plain cumulative sum."""
    tokens, numbers = list(prompt), row_uniforms(seed, row, length)
    while len(tokens) < length:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        cumulative = np.cumsum(torch.softmax(logits.double() / temperature, -1).numpy())
        tokens.append(int(np.searchsorted(cumulative, numbers[len(tokens)] * cumulative[-1], side="right")))
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_naive_loop(name: str) -> None:
    model = family(name).eval()
    prompts = [[1], [1, 5, 9, 11], [1, 7]]
    made = DecodeEngine(model, length=20, seed=3).generate(prompts, first_row=4)
    for i, (prompt, row) in enumerate(zip(prompts, made.rows, strict=True)):
        assert row.tolist() == naive(model, prompt, 20, seed=3, row=4 + i)


@pytest.mark.parametrize("name", ["llama", "granite, logit scale"])
def test_a_shared_prompt_is_one_parallel_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = family(name).eval(), [[1, 4, 5, 6], [1, 9, 9, 9, 9, 9]]
    network = FusedNetwork if name == "llama" else LibraryNetwork
    calls: list[int] = []
    forward = network.forward

    def counted(self: Any, tokens: Any, *args: Any) -> Any:
        calls.append(tokens.shape[1])
        return forward(self, tokens, *args)

    monkeypatch.setattr(network, "agrees", lambda self: True, raising=False)
    monkeypatch.setattr(network, "forward", counted)
    made = DecodeEngine(model, length=12, temperature=0.7).generate(prompts)
    assert calls == [4] + [1] * 7
    assert [row.tolist() for row in made.rows] == [
        naive(model, p, 12, seed=0, row=i, temperature=0.7) for i, p in enumerate(prompts)
    ]


def test_rows_do_not_depend_on_the_batch() -> None:
    model = tiny_llama()
    whole = DecodeEngine(model, length=16).generate([[1]] * 7)
    for size in (1, 3, 5):
        parts = DecodeEngine(model, length=16, batch_size=size).generate([[1]] * 7)
        assert all(torch.equal(a, b) for a, b in zip(whole.rows, parts.rows, strict=True))
        assert parts.batch_size <= size
    assert len({tuple(row.tolist()) for row in whole.rows}) == 7
    again = DecodeEngine(model, length=16).generate([[1]] * 2, first_row=5)
    assert torch.equal(again.rows[1], whole.rows[6])
    assert not torch.equal(DecodeEngine(model, length=16, seed=1).generate([[1]]).rows[0], whole.rows[0])


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 600:] = -float("inf")
    draw = InverseSampler(700, torch.device("cpu"), temperature=1.3)
    numbers = torch.from_numpy(row_uniforms(7, 0, 20000))
    tokens, finite = draw(logits.expand(20000, -1), numbers)
    assert finite.all()
    expected = 20000 * torch.softmax(logits[0] / 1.3, -1)
    counts = torch.bincount(tokens, minlength=700).float()
    assert not counts[600:].any()
    often = expected > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5  # chi-square: mean n, variance 2n


@pytest.mark.parametrize("vocabulary", [100, 512, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_is_the_inverse_of_the_cumulative_sum(
    vocabulary: int, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InverseSampler, "_elements", 3 * vocabulary)  # in parts of three rows
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, vocabulary, generator=generator) + 30).to(dtype)
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
    tokens, finite = InverseSampler(vocabulary, torch.device("cpu"), temperature)(logits, uniforms)
    assert torch.equal(tokens, expected)
    assert finite.all()


def test_the_ends_of_the_distribution() -> None:
    draw = InverseSampler(300, torch.device("cpu"))
    logits = torch.full((4, 300), -float("inf"))
    logits[0, 0] = logits[1, 299] = logits[2, 255] = logits[3, 256] = 0.0
    for number in (0.0, 0.5, 1 - 2**-53):
        tokens, _ = draw(logits, torch.full((4,), number, dtype=torch.float64))
        assert tokens.tolist() == [0, 299, 255, 256]


def test_rows_end_at_the_end_token() -> None:
    model = tiny_llama()
    free = DecodeEngine(model, length=40).generate([[1]] * 6)
    ends = [3, 30, 77]
    made = DecodeEngine(model, length=40, on_eos="stop", eos_token_ids=ends).generate([[1]] * 6)
    for row, full, ended in zip(made.rows, free.rows, made.ended, strict=True):
        hits = [i for i, token in enumerate(full.tolist()) if token in ends and i > 0]
        want = full[: hits[0] + 1] if hits else full
        assert torch.equal(row, want)
        assert ended is bool(hits)
    assert any(made.ended)


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    made = DecodeEngine(tiny_llama(), length=10, on_eos="stop", eos_token_ids=[1]).generate([[1], [1, 1, 1]])
    assert all(len(row) > len(prompt) for row, prompt in zip(made.rows, [[1], [1, 1, 1]], strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model = lora(tiny_llama(attention_dropout=0.5), lora_dropout=0.5)
    model.train()
    model.base_model.model.model.norm.eval()
    before = [part.training for part in model.modules()]
    first = DecodeEngine(PlainLM(model), length=12).generate([[1]] * 2)
    again = DecodeEngine(PlainLM(model), length=12).generate([[1]] * 2)
    assert [part.training for part in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(first.rows, again.rows, strict=True))  # no dropout
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "granite, logit scale"])
def test_a_compiled_model_is_not_compiled_for_decoding(name: str) -> None:
    model, compiled = family(name).eval(), []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    expected = naive(model, [1], 12, seed=0, row=0)
    model.compile(backend=backend)
    assert DecodeEngine(model, length=12).generate([[1]]).rows[0].tolist() == expected
    assert not compiled
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert compiled  # and training goes on compiled


@pytest.mark.parametrize("name", ["llama", "granite, logit scale"])
def test_logits_that_are_not_finite_stop_with_the_position(name: str) -> None:
    model = family(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    with pytest.raises(RuntimeError, match="Generation stopped at position 6 of 16: the logits are not finite"):
        DecodeEngine(model, length=16).generate([[1], [1, 3, 3, 3, 3, 77, 3]])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"length": 1}, ValueError, "`length=1`"),
        ({"length": 129}, MisconfigurationException, "`length=129` is beyond the context .* 128 tokens"),
        ({"length": 8, "temperature": 0.0}, ValueError, "`temperature=0.0`"),
        ({"length": 8, "batch_size": 0}, ValueError, "`batch_size=0`"),
        ({"length": 8, "on_eos": "stop"}, ValueError, '`on_eos="stop"` without `eos_token_ids`'),
    ],
)
def test_refusals(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        DecodeEngine(tiny_llama(), **kwargs)


@pytest.mark.parametrize("prompt", [[], list(range(8))])
def test_a_prompt_needs_room(prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=f"Prompt 1 has {len(prompt)} tokens and `length=8`"):
        DecodeEngine(tiny_llama(), length=8).generate([[1], prompt])


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="has no language-model head"):
        DecodeEngine(tiny_llama().model, length=8)


def _sharded(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = tiny_llama(tie_word_embeddings=True)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    rows = []
    for first in (rank, rank + 2):  # the ranks make different rows, and different numbers of them
        engine = DecodeEngine(model, length=14, batch_size=1)
        rows.append(engine.generate([[1]] * (1 + rank), first_row=10 * first).rows[0])
    names = [type(p).__name__ for p in model.parameters()]
    ids = torch.arange(8).view(1, 8) + rank
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    spawn.save(folder, rank, {"rows": rows, "names": names, "grads": grads})


def test_fsdp2_gathers_once_and_trains_on(tmp_path: Path) -> None:
    spawn.run(_sharded, 2, tmp_path)
    ranks = spawn.load(tmp_path)
    model = tiny_llama(tie_word_embeddings=True)
    for rank, result in enumerate(ranks):
        for got, first in zip(result["rows"], (rank, rank + 2), strict=True):
            assert torch.equal(got, DecodeEngine(model, length=14).generate([[1]], first_row=10 * first).rows[0])
        assert set(result["names"]) == {"Parameter"} or set(result["names"]) == {"DTensor"}
    for rank in range(2):
        ids = torch.arange(8).view(1, 8) + rank
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ranks[0]["grads"][name], parameter.grad)


def _expected_mode(name: str) -> str:
    """A sliding window shorter than the rows keeps state that cannot be recorded."""
    return "eager" if name == "mistral, sliding window" or name.startswith("gemma") else "graph"


@pytest.mark.parametrize("name", FAMILIES[:6])
def test_what_would_be_recorded_on_a_gpu(name: str) -> None:
    engine = DecodeEngine(family(name), length=40)
    assert engine._resolved_mode(torch.device("cuda"), engine._network()) == _expected_mode(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES[:6])
def test_recorded_steps_equal_eager_ones(name: str) -> None:
    model = family(name).cuda()
    eager = DecodeEngine(model, length=40, mode="eager").generate([[1]] * 5)
    recorded = DecodeEngine(model, length=40, batch_size=3).generate([[1]] * 5)
    assert recorded.mode == _expected_mode(name)
    same = sum(torch.equal(a, b) for a, b in zip(eager.rows, recorded.rows, strict=True))
    assert same >= 4  # a rounding may tip one draw
