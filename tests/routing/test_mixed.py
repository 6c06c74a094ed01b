# SPDX-License-Identifier: Apache-2.0
"""Mixed batches in as many products as one adapter takes give what PEFT gives piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_cl.routing.mixed import MixedAdapters
from lightning_cl.routing.router import BASE

NAMES = ["task_0", BASE, "task_2", "task_0", "task_1", "task_2"]


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 12, dtype=dtype), nn.Linear(12, 5, bias=False, dtype=dtype)
        self.table, self.map = nn.Embedding(16, 8, dtype=dtype), nn.Conv1d(8, 8, 1, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(self.table(ids))))


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Three adapters of different ranks and scalings; only the first two reach the second layer."""
    from peft import LoraConfig, get_peft_model

    model = None
    for k, rank in enumerate((2, 3, 4)):
        layers = ["one", "two"] if k < 2 else ["one"]
        settings = LoraConfig(**{"r": rank, "lora_alpha": 2 * rank + k, "target_modules": layers, **config})
        if model is None:
            model = get_peft_model(Layers(dtype), settings, adapter_name="task_0")
        else:
            model.add_adapter(f"task_{k}", settings)
    assert model is not None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    return model.eval()


def ours(model: Any, names: list[str], x: torch.Tensor, layer: str = "one") -> torch.Tensor:
    mixed, part = MixedAdapters(names), model.base_model.model.get_submodule(layer)
    assert mixed.can_add(part)
    return mixed.add(part, x, part(x, adapter_names=mixed.base_names))


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 8), (6, 2, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_gets_its_own_adapter(shape, dtype):
    model, x = adapted(dtype), torch.randn(shape, dtype=dtype)  # PEFT keeps the adapters in float32
    layer = model.base_model.model.one
    with torch.no_grad():
        found = ours(model, NAMES, x)
        expected = layer(x, adapter_names=NAMES)
        torch.testing.assert_close(found, expected, **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}))
        assert found.dtype == dtype
        assert torch.equal(found[1], layer(x, adapter_names=[BASE] * 6)[1])


@pytest.mark.parametrize("name", ["task_0", "task_1"])
def test_one_adapter_for_all_is_pefts_plain_pass_to_the_bit(name):
    model, x = adapted(), torch.randn(6, 4, 8)
    model.set_adapter(name)
    with torch.no_grad():
        assert torch.equal(ours(model, [name] * 6, x), model.base_model.model.one(x))


def test_an_adapter_that_does_not_reach_a_layer_adds_nothing_there():
    model, x = adapted(), torch.randn(6, 4, 12)
    layer = model.base_model.model.two
    with torch.no_grad():
        torch.testing.assert_close(ours(model, NAMES, x, "two"), layer(x, adapter_names=NAMES), atol=1e-5, rtol=1e-5)
        assert torch.equal(ours(model, ["task_2"] * 6, x, "two"), layer(x, adapter_names=[BASE] * 6))


def test_under_autocast():
    model, x = adapted(), torch.randn(6, 4, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(model, NAMES, x)
        expected = model.base_model.model.one(x, adapter_names=NAMES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("config", "layer"),
    [({"target_modules": ["table"]}, "table"), ({"target_modules": ["map"]}, "map"), ({"lora_bias": True}, "one")],
)
def test_embeddings_convolutions_and_biases_are_left_to_peft(config, layer):
    model = adapted(**config)
    assert not MixedAdapters(NAMES).can_add(model.base_model.model.get_submodule(layer))


def test_on_a_4bit_base():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]), adapter_name="task_0")
    model.add_adapter("task_1", LoraConfig(r=2, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    model.eval()
    names, x = ["task_1", BASE, "task_0", "task_1"], torch.randn(4, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(model, names, x, "0"), model.base_model.model[0](x, adapter_names=names), atol=1e-4, rtol=1e-4
        )
