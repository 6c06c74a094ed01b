# SPDX-License-Identifier: Apache-2.0
"""The fused pass against the model's own: families, adapters, precisions, and whatever it must leave to the library."""

from __future__ import annotations

import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from lightning_cl.replay.fused_network import FusedNetwork
from lightning_cl.replay.generation import DecodeEngine
from lightning_cl.replay.library_network import LibraryNetwork
from tests.helpers.models import lora, tiny_llama
from tests.replay.test_generation import SIZES, family, naive


def trained_lora(**settings: Any) -> Any:
    """A model whose adapters do something."""
    model = lora(tiny_llama(), **settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def logits_of(model: Any, network: FusedNetwork, tokens: torch.Tensor, shared: int) -> torch.Tensor:
    """What the fused pass says after each token from ``shared`` on."""
    network.allocate(len(tokens), 16)
    found = [network.forward(tokens[:, :shared], torch.zeros(1, dtype=torch.long), None)]
    for i in range(shared, tokens.shape[1]):
        found.append(network.forward(tokens[:, i : i + 1], torch.tensor([i]), i + 1 if i % 2 else 16))
    return torch.stack(found, 1)


def models() -> dict[str, Any]:
    import transformers as t

    torch.manual_seed(0)
    sizes = {**SIZES, "initializer_range": 0.2}
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    return {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
        "one key head": t.LlamaForCausalLM(t.LlamaConfig(**{**sizes, "num_key_value_heads": 1})),
        "as many key heads": t.LlamaForCausalLM(t.LlamaConfig(**{**sizes, "num_key_value_heads": 4})),
        "width of its own": t.LlamaForCausalLM(t.LlamaConfig(**sizes, head_dim=16, tie_word_embeddings=True)),
        "scaled rotation": t.LlamaForCausalLM(t.LlamaConfig(**sizes, rope_parameters=yarn)),
        "mistral": t.MistralForCausalLM(t.MistralConfig(**sizes, sliding_window=40)),
        "qwen 2, biases": t.Qwen2ForCausalLM(t.Qwen2Config(**sizes)),
    }


@pytest.mark.parametrize("name", list(models()))
@pytest.mark.parametrize("shared", [1, 5])
def test_logits_equal_the_models_own(name: str, shared: int) -> None:
    model = models()[name].double().eval()
    for part in model.modules():
        if getattr(part, "bias", None) is not None:
            torch.nn.init.normal_(part.bias)
    tokens = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert FusedNetwork.supports(model, 12)
        network = FusedNetwork(model)
        assert network.agrees()
        found = logits_of(model, network, tokens, shared)
        expected = model(input_ids=tokens).logits[:, shared - 1 :]
    # The library makes its rotation and its norms in float32 even in a double model.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_merged_into_copies() -> None:
    model = trained_lora(target_modules="all-linear")
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = DecodeEngine(model, length=14).generate([[1]] * 3)
    assert [row.tolist() for row in made.rows] == [naive(model, [1], 14, 0, i) for i in range(3)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with model.disable_adapter():
        off = DecodeEngine(model, length=14).generate([[1]] * 3)
        assert [row.tolist() for row in off.rows] == [naive(model, [1], 14, 0, i) for i in range(3)]
    assert not any(torch.equal(a, b) for a, b in zip(made.rows, off.rows, strict=True))


def test_under_autocast_it_computes_in_the_autocast_dtype() -> None:
    model = models()["llama"].eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network = FusedNetwork(model)
        assert network.dtype == torch.bfloat16
        assert network.agrees()


def test_half_precision_agrees_within_rounding() -> None:
    model = models()["llama"].bfloat16().eval()
    with torch.no_grad():
        assert FusedNetwork(model).agrees()


def _hooked() -> Any:
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output + 1)
    return model


def test_what_acts_on_the_model_from_outside_is_seen_and_left_to_its_own_pass() -> None:
    model = _hooked().eval()
    with pytest.warns(UserWarning, match="does not compute what its family does .* generated with its own forward"):
        made = DecodeEngine(model, length=12).generate([[1]] * 2)
    assert [row.tolist() for row in made.rows] == [naive(model, [1], 12, 0, i) for i in range(2)]


def _mixture() -> Any:
    return family("mixture of experts, no static cache")


def _dora() -> Any:
    return trained_lora(use_dora=True)


def _saved_head() -> Any:
    return trained_lora(modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    "make",
    [_dora, _saved_head, _mixture, lambda: family("mistral, sliding window"), lambda: family("granite, logit scale")],
    ids=["DoRA", "a saved head", "experts", "a sliding window", "another family"],
)
def test_other_models_are_left_to_the_library(make: Any) -> None:
    from lightning_cl.anatomy import pretrained_model

    model = make().eval()
    assert not FusedNetwork.supports(pretrained_model(model), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = DecodeEngine(model, length=12)
        assert isinstance(engine._network(), LibraryNetwork)
        made = engine.generate([[1]] * 2)
    assert [row.tolist() for row in made.rows] == [naive(model, [1], 12, 0, i) for i in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "compile"])
def test_recorded_steps_with_adapters_equal_eager_ones(mode: Any) -> None:
    model = trained_lora(target_modules="all-linear").cuda()
    prompts = [[1], [1, 5, 9], [1], [1, 7], [1]]
    eager = DecodeEngine(model, length=100, mode="eager").generate(prompts)
    with mock.patch.dict(os.environ):  # compiling sets variables for its compilers
        recorded = DecodeEngine(model, length=100, mode=mode, batch_size=3).generate(prompts)
    assert recorded.mode == ("graph" if mode == "auto" else "compile")
    same = sum(torch.equal(a[:20], b[:20]) for a, b in zip(eager.rows, recorded.rows, strict=True))
    assert same >= 4  # a rounding may tip one draw
    on_cpu = DecodeEngine(model.cpu(), length=100).generate(prompts)
    assert sum(torch.equal(a[:20], b[:20]) for a, b in zip(eager.rows, on_cpu.rows, strict=True)) >= 4
