# SPDX-License-Identifier: Apache-2.0
"""Strategies for any LightningModule: one device or FSDP2, full precision or 4 bits, with adapter-only checkpoints.

Importing this package puts four names into Lightning's registry, so that ``Trainer(strategy="cl_fsdp_4bit")`` and the
same word in YAML work.

>>> from lightning.pytorch.strategies import StrategyRegistry
>>> [name for name in StrategyRegistry.available_strategies() if name.startswith("cl_")]
['cl_single_device', 'cl_single_device_4bit', 'cl_fsdp', 'cl_fsdp_4bit']
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_cl.strategies.background import BackgroundCheckpointIO
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.fsdp import CLFSDPStrategy
from lightning_cl.strategies.single_device import CLSingleDeviceStrategy

__all__ = ["BackgroundCheckpointIO", "CLFSDPStrategy", "CLSingleDeviceStrategy", "QuantizationConfig"]


def _register() -> None:
    for name, strategy, bits in (
        ("cl_single_device", CLSingleDeviceStrategy, ""),
        ("cl_single_device_4bit", CLSingleDeviceStrategy, ", frozen linear layers in 4 bits (NF4)"),
        ("cl_fsdp", CLFSDPStrategy, ""),
        ("cl_fsdp_4bit", CLFSDPStrategy, ", frozen linear layers in 4 bits (NF4)"),
    ):
        where = "one device" if strategy is CLSingleDeviceStrategy else "FSDP2"
        options = {"quantization": "nf4"} if bits else {}
        # A reloaded module registers the reloaded class instead of raising.
        StrategyRegistry.register(
            name, strategy, description=f"{where}, adapter-only checkpoints{bits}", override=True, **options
        )


_register()
