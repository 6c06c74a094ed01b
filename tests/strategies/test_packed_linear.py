# SPDX-License-Identifier: Apache-2.0
"""The 4-bit product of compiled blocks: bitsandbytes' weight bit for bit, and nothing of its size kept for later."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd

from lightning_cl.strategies import quantization
from lightning_cl.strategies.blocks import find_shard_blocks, prepare_blocks
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.packed_linear import packed_linear, unpacked
from tests.strategies import workers


def _weight(dtype: torch.dtype, quant_type: str, double: bool, shape: tuple[int, int] = (48, 64)) -> tuple[Tensor, Any]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return bnb.quantize_4bit(weight, compress_statistics=double, quant_type=quant_type, quant_storage=dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (33, 8), (65, 64), (7, 12)])
def test_the_unpacked_weight_number_by_number(quant_type: str, double: bool, shape: tuple[int, int]) -> None:
    """Blocks that end in the middle of a row, and a last one that is not whole."""
    packed, state = _weight(torch.bfloat16, quant_type, double, shape)
    assert torch.equal(unpacked(packed, state), workers.dequantized(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_unpacked_weight_is_that_of_bitsandbytes(dtype: torch.dtype, quant_type: str, double: bool) -> None:
    packed, state = _weight(dtype, quant_type, double, (65, 128))
    assert torch.equal(unpacked(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_byte_is_unpacked_in_compiled_code(double: bool) -> None:
    # Among all pairs of bytes are those that a copy of 16-bit numbers may change.
    packed, state = _weight(torch.bfloat16, "nf4", double, (2048, 128))
    packed.view(torch.int16)[:, 0] = torch.arange(2**16).to(torch.int16)
    torch.compiler.reset()
    found = torch.compile(unpacked)(packed, state)
    assert torch.equal(found, bnb.dequantize_4bit(packed, state))


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


@pytest.mark.parametrize("shape", [(32, 64), (32, 32), (33, 8)])
def test_a_layer_is_the_same_eager_and_compiled_whatever_its_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False))
    quantization.quantize(module, QuantizationConfig("nf4", skip=()), torch.device("cpu"), torch.float32)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.compiler.reset()
    results = []
    for run in (module, torch.compile(module)):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][0], x @ workers.dequantized(module[0].weight, module[0].quant_state).T)


def _kept(quantized: bool, recompute: bool, double: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that two compiled blocks keep for their backward pass, parameters and scales left out."""
    # Divides a block as the generator of code would, and generates none.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch.compiler.reset()
    module = workers.plain(also=(), hidden_size=128, intermediate_size=512, num_attention_heads=4)
    blocks = find_shard_blocks(module)
    prepare_blocks(module, blocks, recompute=recompute, compile=True)
    own = {part.data_ptr() for part in module.buffers()}
    if quantized:
        config = QuantizationConfig("nf4", double=double)
        quantization.quantize(module, config, torch.device("cpu"), torch.float32)
        states = [module.get_submodule(name).quant_state for name in quantization.record_of(module).quantized]
        states += [state.state2 for state in states if state.nested]
        own |= {tensor.data_ptr() for s in states for tensor in (s.absmax, s.code, s.offset) if tensor is not None}
    own |= {part.data_ptr() for part in module.parameters()}
    ids = torch.arange(64).view(2, 32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(kept.values())


def _products(quantized: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Matrix products in the code of a block, forward and backward."""
    counts: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        counts.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    divided = aot_autograd(
        fw_compiler=count,
        bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=core_aten_decompositions(),
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=divided))
    torch.compiler.reset()
    module = workers.plain(also=(), hidden_size=128, intermediate_size=512, num_attention_heads=4)
    prepare_blocks(module, find_shard_blocks(module), recompute=recompute, compile=True)
    if quantized:
        quantization.quantize(module, QuantizationConfig("nf4"), torch.device("cpu"), torch.float32)
    ids = torch.arange(64).view(2, 32)
    module.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(counts)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_computes_no_product_more_in_4_bits(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    full, packed = (_products(quantized, recompute, monkeypatch) for quantized in (False, True))
    assert full > 14
    assert packed == full


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_keeps_no_more_in_4_bits(recompute: bool, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    full, packed = _kept(False, recompute, double, monkeypatch), _kept(True, recompute, double, monkeypatch)
    assert packed <= 1.1 * full
    if recompute:
        hidden = 2 * 32 * 128 * 4
        assert full < 8 * hidden, "each of two blocks has an input to keep; products of one block alone would be more"
