# SPDX-License-Identifier: Apache-2.0
"""Blocks that are compiled or recomputed: one code for all of them, caches left to generation, options that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_cl.strategies.blocks import (
    caches_ignored,
    find_shard_blocks,
    is_prepared,
    prepare_blocks,
    run_uncompiled,
)
from tests.helpers import models

IDS = torch.arange(4, 20)[None].repeat(3, 1)


def _deep(layers: int = 10) -> Any:
    return models.PlainLM(models.lora(models.tiny_llama(num_hidden_layers=layers))).train()


def _gradients(module: Any, **kwargs: Any) -> list[torch.Tensor]:
    module.zero_grad()
    module.model(input_ids=IDS, labels=IDS, **kwargs).loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_ten_blocks_with_the_cache_that_models_make_unasked_share_one_code(traces: Any, recompute: bool) -> None:
    module = _deep()
    expected = _gradients(module)
    prepare_blocks(module, find_shard_blocks(module), recompute=recompute, compile=True)
    found = _gradients(module)
    assert traces.frame_count == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_generation_is_not_compiled_and_scoring_is(traces: Any) -> None:
    module = _deep(2)
    module.eval()
    expected = module.model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    prepare_blocks(module, find_shard_blocks(module), compile=True)
    assert torch.equal(module.model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), expected)
    assert traces.frame_count == 0
    with torch.no_grad():
        module.model(input_ids=IDS, use_cache=False)
    assert traces.frame_count == 1


def test_a_cache_that_holds_something_is_kept(traces: Any) -> None:
    from transformers import DynamicCache

    module = _deep(2)
    with torch.no_grad():
        cache = module.model(input_ids=IDS, past_key_values=DynamicCache(), use_cache=True).past_key_values
        expected = module.model(input_ids=IDS[:, :2], past_key_values=cache, use_cache=True).logits
        prepare_blocks(module, find_shard_blocks(module), compile=True)
        cache = module.model(input_ids=IDS, past_key_values=DynamicCache(), use_cache=True).past_key_values
    found = module.model(input_ids=IDS[:, :2], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected)
    assert traces.frame_count == 0


def test_a_pass_whose_cache_nobody_reads_runs_the_code_of_one_without(traces: Any) -> None:
    module = _deep(2).eval()
    prepare_blocks(module, find_shard_blocks(module), compile=True)
    with torch.no_grad():
        # With a mask: given none and no cache, older transformers make one in case the rows are packed.
        expected = module.model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        with caches_ignored():
            found = module.model(input_ids=IDS, use_cache=True)
        assert traces.frame_count == 1
        assert torch.equal(found.logits, expected)
        assert found.past_key_values.get_seq_length() == 0
        # Afterwards, and in a pass that goes on with a cache, it is kept.
        cache = module.model(input_ids=IDS, use_cache=True).past_key_values
        assert cache.get_seq_length() == IDS.shape[1]
        with caches_ignored():
            cache = module.model(input_ids=IDS[:, :2], past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == IDS.shape[1] + 2
    assert traces.frame_count == 1


def test_asked_again_and_asked_otherwise() -> None:
    module = _deep(2)
    blocks = find_shard_blocks(module)
    block = module.get_submodule(blocks[0])
    plain = block.forward
    assert not is_prepared(block)
    prepare_blocks(module, blocks, recompute=True)
    assert is_prepared(block)
    first = block.forward
    prepare_blocks(module, blocks, recompute=True)
    assert block.forward is first
    prepare_blocks(module, blocks)
    assert not is_prepared(block)
    assert block.forward == plain


def test_blocks_run_uncompiled_until_the_last_who_asked_takes_it_back(traces: Any) -> None:
    module = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    module[1][0] = module[0][0]  # shared: both blocks have it
    prepare_blocks(module, ["0", "1", "2"], compile=True)
    seen: list[str] = []
    module[0][0].register_forward_hook(lambda *args: seen.append("hook"))

    def hooks_seen(index: int) -> int:
        seen.clear()
        module[index](torch.ones(2, 4))
        return len(seen)

    module[2](torch.ones(2, 4))  # the code that all share, made where there is no hook
    assert traces.frame_count == 1
    asked = [run_uncompiled(module, [module[0][0]]), run_uncompiled(module, [module[0][0]], training=False)]
    assert [hooks_seen(0), hooks_seen(1)] == [1, 1]
    asked[0]()
    asked[0]()
    assert [hooks_seen(0), hooks_seen(1)] == [0, 0]  # in training the second does without
    module.eval()
    assert [hooks_seen(0), hooks_seen(1)] == [1, 1]
    asked[1]()
    module.train()
    assert hooks_seen(0) == 0
    assert traces.frame_count == 1
