# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_cl.strategies.packed_weight import PackedWeight
from tests.helpers import spawn

# Every pattern of 16 bits, the NaNs among them; an odd number of rows, so that the ranks' shards differ in length.
_ROWS = 2**16 - 1


def _every_pattern(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(_ROWS, dtype=torch.int32).to(torch.int16)[:, None]
    if dtype is torch.float32:
        return (bits.to(torch.int32) << 16).view(dtype)
    return bits.view(dtype)


def _gather_twice(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        whole = _every_pattern(dtype)
        module = nn.Module()
        module.packed = nn.Parameter(whole.clone().as_subclass(PackedWeight), requires_grad=False)
        module.adapter = nn.Parameter(torch.ones(4, dtype=dtype))
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        sent, gathered = {}, []
        for _ in range(2):
            module.unshard()
            gathered.append(module.packed.view(torch.uint8).clone())
            assert module.packed.dtype is dtype
            module.reshard()
        for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
            sent[parameter._module_info.param_name] = parameter.all_gather_inputs[0].dtype
        found[str(dtype)] = (sent, gathered, whole.view(torch.uint8))
    spawn.save(folder, rank, found)


def test_packed_weights_are_gathered_as_integers_bit_for_bit(tmp_path: Path) -> None:
    spawn.run(_gather_twice, 2, tmp_path)
    for found in spawn.load(tmp_path):
        for sent, gathered, whole in found.values():
            # Two dtypes in a group: FSDP2 then copies it as bytes.
            assert not sent["packed"].is_floating_point
            assert sent["adapter"].is_floating_point
            for copy in gathered:
                assert torch.equal(copy, whole)


@pytest.mark.gpu
def test_a_foreach_copy_on_the_gpu_leaves_the_integers_of_every_pattern_alone() -> None:
    weight = _every_pattern(torch.bfloat16).cuda().as_subclass(PackedWeight)
    (shard,), _ = weight.fsdp_pre_all_gather(None, weight.shape, (1, 1), None, None)
    copy = torch.empty_like(shard)
    torch._foreach_copy_([copy], [shard])
    assert torch.equal(copy.cpu(), shard.cpu())
