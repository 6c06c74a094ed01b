# SPDX-License-Identifier: Apache-2.0
"""FSDP2 for any LightningModule, on GPUs or CPUs, with adapter-only checkpoints and, if wanted, a 4-bit base."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl import weights
from lightning_cl.distributed import gather_objects
from lightning_cl.strategies import checks, config, evaluation, sharding, shards
from lightning_cl.strategies.background import BackgroundCheckpointIO
from lightning_cl.strategies.blocks import find_shard_blocks, prepare_blocks
from lightning_cl.strategies.checkpoint import AtomicCheckpointIO, CheckpointContents, load_checkpoint
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.files import aside
from lightning_cl.strategies.quantization import Probe, adopted, quantize
from lightning_cl.strategies.record import note_trainable, record_of


class CLFSDPStrategy(ModelParallelStrategy):
    """Shards any LightningModule with FSDP2; no ``configure_model`` is needed, and CPUs with gloo work as GPUs do.

    The network's blocks are found by themselves and gathered one at a time; embeddings, final norm and head belong to
    one root group, which is gathered during a step, so a ``training_step`` may use their weights directly. Repeated fits
    of the same module (a task stream) shard it once. Checkpoints are as those of ``cl_single_device``, and each of the
    two reads the other's, at any number of processes.

    Memory: parameters, gradients and optimizer state are divided by ``shard``; gradients exist for trainable parameters
    only, also where frozen and trainable ones share a block.

    Args:
        quantization: ``"nf4"``, ``"fp4"`` or a :class:`QuantizationConfig` holds the frozen linear layers in 4 bits.
            Layers are quantized and sharded block by block, so the full-precision model is never on a device.
        replicate: number of copies of the sharded model (hybrid sharding); gradients are averaged over the copies.
            ``replicate=N, shard=1`` is data parallelism, for instance with a 4-bit base, which then stays whole.
        shard: number of processes that share one copy; ``"auto"`` = all processes divided by ``replicate``.
        blocks: class names or dotted names of the blocks; None finds them.
        min_parameters: instead, make every smallest submodule with at least this many parameters a block.
        reshard_after_forward: free a block's gathered parameters after its forward pass and gather them again for the
            backward pass; False trades memory for communication.
        prefetch: gather this many blocks ahead; 0 leaves the order to FSDP.
        reduce_dtype: dtype in which gradients are averaged, ``"float32"`` or the parameters' own (``"compute"``).
        activation_checkpointing: recompute each block's activations in the backward pass.
        compile_blocks: ``torch.compile`` each block, as in ``CLSingleDeviceStrategy``; the blocks are those that are
            sharded.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        sharded_checkpoint: write a folder, each rank its shards, instead of one file gathered on rank 0.
        save_base: keep the frozen base in checkpoints as well.
        check_base: refuse a checkpoint that was trained on another base.
        process_group_backend: of ``torch.distributed``; None = nccl on GPUs, with gloo beside it for ``cpu_offload``, and
            gloo on CPUs.
        timeout: of collectives, after which a rank that died takes the others down.

    Raises:
        MisconfigurationException: in ``setup``, on all ranks together, with every rank's problems.

    Example:
        >>> CLFSDPStrategy(quantization="nf4", replicate=2).quantization.quant_type
        'nf4'

    In YAML::

        trainer:
          accelerator: gpu
          devices: 8
          precision: bf16-true
          strategy:
            class_path: lightning_cl.strategies.CLFSDPStrategy
            init_args:
              quantization: nf4
              activation_checkpointing: true
    """

    strategy_name = "cl_fsdp"

    def __init__(
        self,
        quantization: QuantizationConfig | Literal["nf4", "fp4"] | None = None,
        replicate: int = 1,
        shard: int | Literal["auto"] = "auto",
        blocks: list[str] | None = None,
        min_parameters: int | None = None,
        reshard_after_forward: bool = True,
        prefetch: int = 0,
        reduce_dtype: Literal["float32", "compute"] = "float32",
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        cpu_offload: bool = False,
        sharded_checkpoint: bool = False,
        save_base: bool = False,
        check_base: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        accelerator: pl.accelerators.Accelerator | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=sharded_checkpoint, process_group_backend=process_group_backend, timeout=timeout
        )
        for name, size in (("replicate", replicate), ("shard", shard)):
            if size != "auto" and (not isinstance(size, int) or size < 1):
                raise MisconfigurationException(
                    f"`{name}={size!r}` is no number of processes. Use a positive integer"
                    f"{' or `auto`' if name == 'shard' else ''}."
                )
        if prefetch < 0:
            raise MisconfigurationException(f"`prefetch={prefetch}` is negative. Use 0 or a small number of blocks.")
        if reduce_dtype not in ("float32", "compute"):
            raise MisconfigurationException(f"`reduce_dtype={reduce_dtype!r}` is unknown. Use 'float32' or 'compute'.")
        if blocks is not None and min_parameters is not None:
            raise MisconfigurationException(
                f"`blocks={blocks}` and `min_parameters={min_parameters}` both say what to shard. Give one of them."
            )
        self._accelerator = accelerator
        self.cluster_environment = cluster_environment
        self._checkpoint_io = checkpoint_io
        self.precision_plugin = precision_plugin
        self.quantization = config.resolve(quantization)
        self.replicate = replicate
        self.shard = shard
        self.blocks = blocks
        self.min_parameters = min_parameters
        self.reshard_after_forward = reshard_after_forward
        self.prefetch = prefetch
        self.reduce_dtype = reduce_dtype
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile_blocks
        self.cpu_offload = cpu_offload
        self.contents = CheckpointContents(save_base=save_base, check_base=check_base)

    # --- processes -------------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = self._make_mesh()
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @override
    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # a checkpoint gathers shards in host memory, which NCCL cannot
        return super()._get_process_group_backend()

    def _make_mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        shard = self.world_size // self.replicate if self.shard == "auto" else self.shard
        if shard * self.replicate != self.world_size:
            raise MisconfigurationException(
                f"`replicate={self.replicate}` x `shard={self.shard}` does not make the {self.world_size} processes of this"
                " run. Choose two numbers whose product is the number of devices of all nodes, or `shard='auto'`."
            )
        if self.replicate == 1:
            return init_device_mesh(self.root_device.type, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(self.root_device.type, (self.replicate, shard), mesh_dim_names=("replicate", "shard"))

    # --- set-up ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        module = self.lightning_module
        assert module is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        record = record_of(module)
        if record.sharded is not None:
            sharding.refresh(module)
        wanted = self._layout()
        problems = checks.precision(self, self.quantization)
        problems += checks.fsdp(module, str(self.precision_plugin.precision), wanted)
        problems += checks.host_memory(self.cpu_offload)
        checks.raise_together(problems)
        if record.sharded is None:
            self.contents.prepare(module)
            self._shard(module)
            record.sharded = wanted
        else:
            note_trainable(module)
        self.model = module
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING and not self.cpu_offload:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _layout(self) -> dict[str, Any]:
        assert self._device_mesh is not None
        return {
            "mesh": tuple(self._device_mesh.shape),
            "precision": str(self.precision_plugin.precision),
            "quantization": None if self.quantization is None else self.quantization.quant_type,
            "cpu_offload": self.cpu_offload,
        }

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        dtype = checks.compute_dtype(self.precision_plugin)
        mixed = str(self.precision_plugin.precision).endswith("-mixed")
        blocks = find_shard_blocks(module, self.blocks, self.min_parameters)
        checks.raise_together(checks.groups(module, blocks, converted=not mixed and dtype is not torch.float32))
        prepare_blocks(module, blocks, self.activation_checkpointing, self.compile_blocks)
        probe: Any = None
        assert self._device_mesh is not None
        # A 4-bit weight that no other process holds a part of needs no gathering, which costs more than the product.
        shardable = self.cpu_offload or self._device_mesh["shard"].size() > 1

        def before_block(name: str) -> None:
            nonlocal probe
            if self.quantization is not None or adopted(module):
                done = quantize(module, self.quantization, self.root_device, dtype, part=name, shardable=shardable)
                if probe is None and done and (self.quantization is None or self.quantization.check):
                    probe = Probe(module, done[0])
            # Block by block, so that a model which is mapped from its file is never in memory as a whole.
            self.precision_plugin.convert_module(module.get_submodule(name))

        sharding.shard_module(
            module,
            blocks,
            before_block,
            reshard_after_forward=self.reshard_after_forward,
            prefetch=self.prefetch,
            mesh=self._device_mesh,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype if mixed else None,
                reduce_dtype=torch.float32 if self.reduce_dtype == "float32" and dtype is not torch.float64 else None,
                cast_forward_inputs=mixed,
            ),
            offload_policy=CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        )
        if not self.cpu_offload:
            self.model_to_device()
        if probe is not None:
            with sharding.gathered(module, probe.name):
                problems = probe.compare()
            checks.raise_together(problems)

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    @override
    def teardown(self) -> None:
        # An evaluation leaves the root group gathered; between fits it is memory for nothing.
        if self.lightning_module is not None and record_of(self.lightning_module).sharded is not None:
            sharding.refresh(self.lightning_module)
        super().teardown()

    # --- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().training_step
        return self._in_root(lambda: step(*args, **kwargs))

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().validation_step
        return evaluation.run_step(self.lightning_module, args, lambda: self._in_root(lambda: step(*args, **kwargs)))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().test_step
        return evaluation.run_step(self.lightning_module, args, lambda: self._in_root(lambda: step(*args, **kwargs)))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        step = super().predict_step
        return self._in_root(lambda: step(*args, **kwargs))

    def _in_root(self, call: Callable[[], Any]) -> Any:
        assert self.lightning_module is not None
        return sharding.in_root(self.lightning_module, call)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return evaluation.count_each_row_once(dataloader)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        # Lightning averages the counts of rows as integers, which drops half a row: a mean over 101 rows on two ranks
        # would be divided by 100.
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and str(reduce_op).lower() in ("mean", "avg"):
            tensor = tensor.to(torch.float64)
        return super().reduce(tensor, group, reduce_op)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            # The step is still running: what it will return cannot carry the hook that starts FSDP's backward pass.
            sharding.fsdp_state(module)._register_pre_backward_hook(closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            module.unshard()  # type: ignore[operator]

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            # The step goes on with the updated weights, of which the gathered copy knows nothing.
            module.reshard()  # type: ignore[operator]
            module.unshard()  # type: ignore[operator]
        return result

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

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
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights.reshard(self.lightning_module)
        state = self.contents.weights(self.lightning_module)
        return state if self._save_distributed_checkpoint else self._whole(state)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        return state if self._save_distributed_checkpoint else self._whole(state)

    def _whole(self, value: Any) -> Any:
        # Every rank takes part in gathering, tensor by tensor, and rank 0 alone keeps the result.
        if isinstance(value, Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            return whole.detach().cpu() if self.is_global_zero else None
        if isinstance(value, dict):
            return {k: self._whole(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._whole(v) for v in value]
        return value

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        assert self.lightning_module is not None
        path = Path(self.broadcast(filepath))
        self.contents.finish(self.lightning_module, checkpoint)
        if self._save_distributed_checkpoint:
            with aside(path if self.is_global_zero and path.is_file() else None):
                self.barrier()
                shards.save_folder(checkpoint, path, self.global_rank)
            return
        error: Exception | None = None
        if self.is_global_zero:
            try:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            except Exception as caught:
                error = caught
        message = self.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if message is not None:
            raise OSError(f"Rank 0 could not write the checkpoint: {message}")

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        self._checkpoint_path = str(path)
        checkpoint: dict[str, Any] = {}
        error: Exception | None = None
        try:
            if isinstance(self._checkpoint_io, BackgroundCheckpointIO):
                self._checkpoint_io.wait()
            checkpoint = load_checkpoint(path)
        except Exception as caught:
            error = caught
        messages = [m for m in gather_objects(None if error is None else str(error)) if m]
        if error is not None:
            raise error
        if messages:
            raise RuntimeError(f"Another rank could not read the checkpoint: {messages[0]}")
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        sharding.refresh(module)
        self.contents.restore(module, checkpoint, strict, self._checkpoint_path)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            local = {
                index: {name: _like_parameter(parameters[int(index)], value) for name, value in entry.items()}
                for index, entry in state["state"].items()
            }
            optimizer.load_state_dict({"state": local, "param_groups": state["param_groups"]})

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)


def _like_parameter(parameter: Tensor, value: Any) -> Any:
    if isinstance(value, Tensor | shards.StoredTensor):
        if tuple(value.shape) == tuple(parameter.shape) and parameter.dim() > 0:
            return shards.like(parameter, value)
        return value.read() if isinstance(value, shards.StoredTensor) else value.clone()
    return value
