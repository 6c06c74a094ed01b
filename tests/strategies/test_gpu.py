# SPDX-License-Identifier: Apache-2.0
"""What only CUDA shows: its 4-bit kernels, generated code in compiled blocks, NCCL, FSDP1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.strategies import CLSingleDeviceStrategy
from lightning_cl.strategies.checkpoint import verify_checkpoint
from lightning_cl.strategies.packed_linear import unpacked
from tests.helpers import models, spawn
from tests.strategies import workers

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; this machine has fewer")


def _module(optimizer: str = "sgd") -> Any:
    """Wide enough for the kernels that large models get."""
    return workers.plain(
        also=("norm",), optimizer=optimizer, hidden_size=128, intermediate_size=256, num_attention_heads=4
    )


def _fit(folder: Path, module: Any, devices: int = 1, loader: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    trainer = workers.trainer(folder, devices=devices, accelerator="gpu", **kwargs)
    trainer.fit(module, models.loader(16, 4) if loader is None else loader)
    return {name: value.cpu() for name, value in workers.whole(module).items()}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_one_gpu_4bit_training_equals_training_on_the_dequantized_base(tmp_path: Path, quant_type: Any) -> None:
    reference, module = _module(), _module()
    workers.round_to_4_bits(reference, quant_type, "cuda")
    found = _fit(tmp_path, module, strategy=CLSingleDeviceStrategy(quantization=quant_type))
    workers.close(found, _fit(tmp_path, reference), atol=1e-3)


@pytest.mark.parametrize("double", [False, True])
def test_generated_code_unpacks_what_the_cuda_kernel_does(double: bool) -> None:
    import bitsandbytes.functional as F

    weight = torch.randn(2048, 128, dtype=torch.bfloat16, device="cuda")
    packed, state = F.quantize_4bit(weight, compress_statistics=double, quant_type="nf4", quant_storage=torch.bfloat16)
    packed.view(torch.int16)[:, 0] = torch.arange(2**16, device="cuda").to(torch.int16)
    assert torch.equal(torch.compile(unpacked)(packed, state), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_gpu_compiled_blocks_train_to_the_same_weights(tmp_path: Path, quantization: Any, recompute: bool) -> None:
    expected = _fit(tmp_path, _module(), strategy=CLSingleDeviceStrategy(quantization=quantization))
    strategy = CLSingleDeviceStrategy(
        quantization=quantization, compile_blocks=True, activation_checkpointing=recompute
    )
    workers.close(_fit(tmp_path, _module(), strategy=strategy), expected, atol=1e-3)


def test_one_gpu_is_taken_by_name_and_its_checkpoint_is_read_on_a_cpu(tmp_path: Path) -> None:
    module, other = _module(), _module()
    trainer = workers.trainer(tmp_path, devices=1, accelerator="gpu", strategy="cl_single_device")
    assert trainer.strategy.root_device == torch.device("cuda", 0)
    trainer.fit(module, models.loader(16, 4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    workers.trainer(tmp_path, devices=1).validate(other, models.loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    on_gpu = {name: value.cpu() for name, value in workers.whole(module).items()}
    workers.close(workers.whole(other), on_gpu, atol=0)


def _two(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, arguments in {
        "bf16": {"precision": "bf16-true", "quantization": "nf4", "activation_checkpointing": True},
        "nf4": {"quantization": "nf4"},
        "compiled": {"quantization": "nf4", "compile_blocks": True, "activation_checkpointing": True, "prefetch": 1},
        "gathered": {"reshard_after_forward": False},
        "replicas": {"quantization": "nf4", "replicate": 2},
    }.items():
        precision = arguments.pop("precision", "32-true")
        strategy = workers.strategy(**arguments, sharded_checkpoint=name == "nf4")
        module = _module()
        trainer = workers.trainer(folder, accelerator="gpu", strategy=strategy, precision=precision)
        trainer.fit(module, models.loader(16, 4))
        if name == "nf4":
            trainer.save_checkpoint(folder / "a.ckpt")
        found[name] = {key: value.cpu() for key, value in workers.whole(module).items()}
    # NCCL alone is there by now.
    with pytest.raises(MisconfigurationException, match="needs a backend for tensors in host memory"):
        _offloaded(folder)
    spawn.save(folder, rank, found)


def _offloaded(folder: Path) -> Any:
    trainer = workers.trainer(folder, accelerator="gpu", strategy=workers.strategy(cpu_offload=True))
    module = _module()
    trainer.fit(module, models.loader(16, 4))
    trainer.save_checkpoint(folder / "offloaded.ckpt")
    return module


def _offload(rank: int, folder: Path) -> None:
    found = {key: value.cpu() for key, value in workers.whole(_offloaded(folder)).items()}
    spawn.save(folder, rank, found)


@two_gpus
def test_two_gpus_shards_in_host_memory_train_as_one(tmp_path: Path) -> None:
    spawn.run(_offload, 2, tmp_path)
    expected = _fit(tmp_path, _module(), loader=workers.rows_of_ranks(16, 4, 2))
    workers.close(spawn.load(tmp_path)[0], expected, atol=1e-3)
    verify_checkpoint(tmp_path / "offloaded.ckpt")


@two_gpus
def test_two_gpus_train_as_one_sharded_and_in_4_bits(tmp_path: Path) -> None:
    spawn.run(_two, 2, tmp_path)
    found = spawn.load(tmp_path)[0]
    rows = workers.rows_of_ranks(16, 4, 2)
    full = _fit(tmp_path, _module(), loader=rows)
    nf4 = _fit(tmp_path, _module(), loader=rows, strategy="cl_single_device_4bit")
    workers.close(found["gathered"], full, atol=1e-3)
    for name in ("nf4", "compiled", "replicas"):
        workers.close(found[name], nf4, atol=1e-3)
    assert all(torch.isfinite(value).all() for value in found["bf16"].values())
    verify_checkpoint(tmp_path / "a.ckpt")
    other = _module()
    workers.trainer(tmp_path, devices=1, accelerator="gpu").validate(
        other, models.loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    workers.close({n: v.cpu() for n, v in workers.whole(other).items()}, found["nf4"], atol=0)


def _fsdp1(rank: int, folder: Path) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    from lightning_cl import callbacks, replay

    ids = [torch.randint(4, 99, (12,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    rows = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    made = [
        callbacks.ReplayMixer(replay.GeneralSamples(rows, num_samples=8), rows_per_batch=2),
        callbacks.ReplayDistillation(),
        callbacks.LoRAInterpolator(),
    ]
    module = _module()
    trainer = workers.trainer(folder, accelerator="gpu", strategy=FSDPStrategy(use_orig_params=True), callbacks=made)
    trainer.fit(module, models.loader(16, 4))
    spawn.save(folder, rank, {name: float(value) for name, value in trainer.callback_metrics.items()})


@two_gpus
def test_two_gpus_under_stock_fsdp1(tmp_path: Path) -> None:
    spawn.run(_fsdp1, 2, tmp_path)
    for found in spawn.load(tmp_path):
        assert found["cl/replay_rows"] == 2
        assert all(torch.isfinite(torch.tensor(value)) for value in found.values())
