# SPDX-License-Identifier: Apache-2.0
"""One device, taken from the accelerator, with adapter-only checkpoints and, if wanted, a 4-bit base."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_cl.strategies import checks, config
from lightning_cl.strategies.background import BackgroundCheckpointIO
from lightning_cl.strategies.blocks import find_shard_blocks, prepare_blocks
from lightning_cl.strategies.checkpoint import AtomicCheckpointIO, CheckpointContents, load_checkpoint
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.quantization import adopted, quantize
from lightning_cl.strategies.record import record_of
from lightning_cl.strategies.shards import StoredTensor


class CLSingleDeviceStrategy(SingleDeviceStrategy):
    """Trains on one device; checkpoints hold what trains instead of the frozen base.

    The device is the accelerator's: ``Trainer(accelerator="gpu", devices=[1], strategy="cl_single_device")`` runs on
    the second GPU. The module stays on the device between the fits of a task stream; call ``module.cpu()`` to free it.

    A checkpoint holds the weights that train or ever trained in this run, all adapters, persistent buffers, and
    Lightning's loops, optimizers, callbacks and data module; for the base it holds a fingerprint, which is checked when
    the checkpoint is loaded. With LoRA r16 on an 8B model that is tens of MB instead of 16 GB.

    Args:
        quantization: ``"nf4"``, ``"fp4"`` or a :class:`QuantizationConfig` holds the frozen linear layers in 4 bits.
            Each layer is quantized by itself on its way to the device, so the full-precision model is never on it.
        activation_checkpointing: recompute each block's activations in the backward pass: less memory, a third more
            arithmetic (a quarter with ``compile_blocks``).
        compile_blocks: ``torch.compile`` each block, which are equal and so compiled once. LoRA on the shape of
            Llama-3-8B trained 1.36 times as fast on an H100, after some 20 s. Generation stays eager, and so does a block
            whose inner layers a callback reads (a router's, in evaluation alone); each new kind of shape takes another
            compilation, up to a general one.
        save_base: keep the frozen base in checkpoints as well.
        check_base: refuse a checkpoint that was trained on another base.

    Raises:
        MisconfigurationException: with more than one device, or 4 bits on a device without kernels for them.

    Example:
        >>> pl.Trainer(accelerator="cpu", strategy="cl_single_device", logger=False).strategy.root_device
        device(type='cpu')

    In YAML::

        trainer:
          strategy: cl_single_device_4bit
    """

    strategy_name = "cl_single_device"

    def __init__(
        self,
        quantization: QuantizationConfig | Literal["nf4", "fp4"] | None = None,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        save_base: bool = False,
        check_base: bool = True,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.quantization = config.resolve(quantization)
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile_blocks
        self.contents = CheckpointContents(save_base=save_base, check_base=check_base)
        self._parallel_devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices that the Trainer chose (exactly one)."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[Any] | None) -> None:
        # Lightning hands the accelerator's devices to every strategy that has this attribute. Without it the device
        # would be fixed in the constructor, before the accelerator is known.
        if devices is not None and len(devices) != 1:
            raise MisconfigurationException(
                f"`{type(self).__name__}` drives one device, but the Trainer found {len(devices)} ({devices[0]}, ...)."
                " Pass `devices=1`, or use `strategy='cl_fsdp'` for all of them."
            )
        self._parallel_devices = devices
        if devices:
            self._root_device = torch.device(devices[0])

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        module = self.lightning_module
        assert module is not None
        problems = checks.precision(self, self.quantization)
        problems += checks.single_device(module)
        checks.raise_together(problems)
        self.contents.prepare(module)
        if self.quantization is not None or adopted(module):
            quantize(module, self.quantization, self.root_device, checks.compute_dtype(self.precision_plugin))
        prepare_blocks(module, find_shard_blocks(module), self.activation_checkpointing, self.compile_blocks)
        super().setup(trainer)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.contents.weights(self.lightning_module)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        assert self.lightning_module is not None
        self.contents.finish(self.lightning_module, checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if isinstance(self._checkpoint_io, BackgroundCheckpointIO):
            self._checkpoint_io.wait()
        if self._checkpoint_io is None or isinstance(self._checkpoint_io, AtomicCheckpointIO | _WrappingCheckpointIO):
            checkpoint = load_checkpoint(checkpoint_path)
        else:
            checkpoint = self._checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)
        self._checkpoint_path = str(checkpoint_path)
        # Lightning and callbacks expect tensors; on one device each stored tensor is read whole anyway.
        return _read_all(checkpoint)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.contents.restore(self.lightning_module, checkpoint, strict, self._checkpoint_path)

    @override
    def teardown(self) -> None:
        # Unlike stock Lightning, the module stays where it is: a task stream fits and validates many times, and moving
        # an 8B base to the CPU and back takes longer than validating.
        _optimizers_to_device(self.optimizers, torch.device("cpu"))
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def quantized_layers(self) -> list[str]:
        """Names of the layers held in 4 bits."""
        module: nn.Module | None = self.lightning_module
        return list(record_of(module).quantized) if module is not None else []


def _read_all(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {k: _read_all(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_read_all(v) for v in value]
    return value
