# SPDX-License-Identifier: Apache-2.0
"""The 4-bit product as an operator: equal to one with the unpacked weight, and computed twice where that is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from lightning_cl.strategies import quantization
from lightning_cl.strategies.blocks import find_shard_blocks, prepare_blocks
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.packed_linear import packed_linear
from tests.strategies import workers


def _weight(dtype: torch.dtype, quant_type: str, double: bool) -> tuple[Tensor, Any]:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return bnb.quantize_4bit(weight, compress_statistics=double, quant_type=quant_type, quant_storage=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_value_and_gradient_are_those_of_the_unpacked_weight(dtype: torch.dtype, quant_type: str, double: bool) -> None:
    packed, state = _weight(dtype, quant_type, double)
    weight = bnb.dequantize_4bit(packed, state)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = packed_linear(x, packed, state)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(found, x @ weight.T, **tolerance)
    torch.testing.assert_close(gradient, upstream @ weight, **tolerance)


@pytest.mark.parametrize("double", [False, True])
def test_the_operator_keeps_its_promises_to_the_compiler(double: bool) -> None:
    packed, state = _weight(torch.float32, "nf4", double)
    scales, inner = [state.absmax], 0
    if double:
        scales, inner = [*scales, state.offset, state.state2.absmax, state.state2.code], state.state2.blocksize
    arguments = (packed, scales, list(state.shape), state.blocksize, inner, state.quant_type, state.dtype)
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.lightning_cl.packed_linear.default, (x, *arguments))


def _kept(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that two compiled, recomputed blocks keep for their backward pass, parameters left out."""
    # Divides a block as the generator of code would, and generates none.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch.compiler.reset()
    module = workers.plain(also=(), hidden_size=128, intermediate_size=512, num_attention_heads=4)
    blocks = find_shard_blocks(module)
    prepare_blocks(module, blocks, recompute=True, compile=True)
    if quantized:
        config = QuantizationConfig("nf4", double=False)
        quantization.quantize(module, config, torch.device("cpu"), torch.float32)
    ids = torch.arange(64).view(2, 32)
    own = {part.data_ptr() for part in [*module.parameters(), *module.buffers()]}
    own |= {module.get_submodule(n).quant_state.absmax.data_ptr() for n in quantization.record_of(module).quantized}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(kept.values())


def test_a_recomputed_block_keeps_no_more_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    full, packed = _kept(False, monkeypatch), _kept(True, monkeypatch)
    hidden = 2 * 32 * 128 * 4
    assert packed <= 1.1 * full
    assert full < 8 * hidden, "each of two blocks has an input to keep; products of one block alone would be more"
