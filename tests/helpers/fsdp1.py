# SPDX-License-Identifier: Apache-2.0
"""PyTorch's first FSDP under Lightning's strategy, on CPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class _CpuFSDP1(FSDPStrategy):
    """Lightning's FSDP1 strategy, which refuses the CPU; PyTorch's own FSDP1 runs there when it is told the device."""

    def __init__(self, whole: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._whole = whole

    def _setup_model(self, model: Any) -> Any:
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=None if self._whole else policy,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )


def cpu_fsdp1(whole: bool = False) -> FSDPStrategy:
    """The strategy; ``whole``: the module is one group, else each block is one."""
    return _CpuFSDP1(whole, state_dict_type="full", process_group_backend="gloo")
