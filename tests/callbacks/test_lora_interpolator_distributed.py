# SPDX-License-Identifier: Apache-2.0
"""Two processes, DDP or FSDP2, average and replay as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.replay import EpisodicMemory
from lightning_cl.replay.rows import layout_of, split_rows
from tests.helpers import models, spawn
from tests.helpers.fsdp1 import cpu_fsdp1


class Sharded(models.PlainLM):
    """Blocks and then the network are FSDP2 groups; LoRA, head, final norm and embedding are trained."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        network = self.model.get_base_model()
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in network.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With a state: Lightning cannot load the empty one of plain SGD into a sharded model.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.5)


def _loader(processes: int, rank: int, rows: int, batch_size: int, seed: int) -> torch.utils.data.DataLoader:
    """Every ``processes``-th row from ``rank`` on, so that a step of all processes sees what one process sees."""
    rows_of_rank = torch.utils.data.Subset(models.TokenRows(rows, seed=seed), range(rank, rows, processes))
    return torch.utils.data.DataLoader(rows_of_rank, batch_size // processes, collate_fn=models.collate)


class Seen(Callback):
    """The weights while validation runs."""

    def __init__(self) -> None:
        self.validated: dict[str, Tensor] = {}

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights.reshard(pl_module)
        parameters = weights.trainable(pl_module)
        shards = {n: weights.local(p) for n, p in parameters.items()}
        self.validated = weights.gather(pl_module, shards, parameters, everywhere=True)


def _module(everything: bool) -> Sharded:
    model = models.lora(models.tiny_llama(tie_word_embeddings=True), r=3)
    if everything:
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("embed_tokens", "norm")):
                parameter.requires_grad_(True)
    return Sharded(model, lr=0.1)


def _memory(filled: bool) -> EpisodicMemory:
    memory = EpisodicMemory(16)
    if filled:
        batch = models.collate(models.TokenRows(16, seed=5).rows)
        memory.observe(split_rows(layout_of(batch)))
        memory.end_task(None, None, 0)
    return memory


def _run(
    folder: Path,
    processes: int,
    rank: int,
    strategy: Any,
    everything: bool,
    ckpt: str | None = None,
    tasks: tuple[int, ...] = (0, 1),
    save: bool = True,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Two tasks with replay in the second; ``ckpt`` resumes in its middle, with everything built anew."""
    memory = _memory(filled=0 not in tasks and ckpt is None)
    module, mixer, seen = _module(everything), ReplayMixer(memory, rows_per_batch=2 // processes), Seen()
    callback = LoRAInterpolator(half_life=0.4, consistency_weight=2.0, layers="all")
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    for task in tasks:
        trainer = models.trainer(
            folder,
            callbacks=[mixer, callback, seen, *([saver] if task and save else [])],
            enable_checkpointing=bool(task) and save,
            accelerator=accelerator,
            devices=processes,
            strategy=strategy() if callable(strategy) else strategy,
            max_steps=-1,
            max_epochs=2,
            use_distributed_sampler=False,
        )
        data = [_loader(processes, rank, rows, 4, seed) for rows, seed in ((16, task), (4, 9))]
        trainer.fit(module, *data, ckpt_path=ckpt, weights_only=bool(ckpt))
    average = callback._average
    root, parameters = average._module, average.parameters
    final = weights.gather(root, {n: weights.local(p) for n, p in parameters.items()}, parameters, everywhere=True)
    return {
        "slow": weights.gather(root, average.shards, average.parameters, everywhere=True),
        "final": final,
        "validated": seen.validated,
        "elements": sum(shard.numel() for shard in average.shards.values()),
        "loss": trainer.callback_metrics["cl/consistency"],
    }


def _fsdp2() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _worker(rank: int, folder: Path) -> None:
    fsdp2 = _run(folder / "fsdp2", 2, rank, _fsdp2, everything=True)
    resumed = _run(
        folder / "resumed", 2, rank, _fsdp2, everything=True, ckpt=str(folder / "fsdp2" / "step=4.ckpt"), tasks=(1,)
    )
    ddp = _run(folder / "ddp", 2, rank, "ddp", everything=False)
    spawn.save(folder, rank, {"fsdp2": fsdp2, "resumed": resumed, "ddp": ddp})


def _fsdp1_worker(rank: int, folder: Path) -> None:
    # One task alone: Lightning cannot wrap a module with FSDP1 a second time. PyTorch cannot save it on the CPU.
    spawn.save(folder, rank, _run(folder, 2, rank, cpu_fsdp1, everything=True, tasks=(1,), save=False))


def _gpu_fsdp1() -> Any:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return FSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}, use_orig_params=True, state_dict_type="full")


def _gpu_fsdp1_worker(rank: int, folder: Path) -> None:
    spawn.save(folder, rank, _run(folder, 2, rank, _gpu_fsdp1, everything=True, tasks=(1,), accelerator="gpu"))


def _assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        # Where the tensors lie differs between one GPU, the other, and a module that Lightning took back to the CPU.
        a, b = got[name].cpu(), wanted[name].cpu()
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def _assert_equal(ranks: list[dict[str, Any]], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    for got in ranks:
        for part in ("slow", "final", "validated"):
            _assert_close(got[part], one[part], tolerance)


def _assert_shards(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Each rank holds its part of the slow weights alone."""
    assert sum(got["elements"] for got in ranks) == one["elements"]
    assert max(got["elements"] for got in ranks) < 0.6 * one["elements"]


def test_ddp_and_fsdp2_equal_one_process(tmp_path: Path) -> None:
    spawn.run(_worker, 2, tmp_path)
    ranks = spawn.load(tmp_path)
    one = _run(tmp_path / "one", 1, 0, "auto", everything=True)
    _assert_equal([got["fsdp2"] for got in ranks], one)
    _assert_shards([got["fsdp2"] for got in ranks], one)
    _assert_equal([got["ddp"] for got in ranks], _run(tmp_path / "one_lora", 1, 0, "auto", everything=False))
    for got in ranks:
        for part in ("slow", "final"):
            assert all(torch.equal(got["resumed"][part][n], t) for n, t in got["fsdp2"][part].items())
    expected = weights.trainable(_module(everything=True))
    checkpoint = torch.load(tmp_path / "fsdp2" / "step=4.ckpt", weights_only=True)
    slow = checkpoint["callbacks"]["LoRAInterpolator"]["slow"]
    assert {name: tensor.shape for name, tensor in slow.items()} == {n: p.shape for n, p in expected.items()}
    assert slow.keys() <= checkpoint["state_dict"].keys()


def test_fsdp1_equals_one_process(tmp_path: Path) -> None:
    spawn.run(_fsdp1_worker, 2, tmp_path)
    ranks = spawn.load(tmp_path)
    one = _run(tmp_path / "one", 1, 0, "auto", everything=True, tasks=(1,), save=False)
    _assert_equal(ranks, one)
    _assert_shards(ranks, one)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP1 over two ranks needs two GPUs")
def test_fsdp1_of_lightning_equals_one_process_and_saves_both_sets(tmp_path: Path) -> None:
    spawn.run(_gpu_fsdp1_worker, 2, tmp_path)
    ranks = spawn.load(tmp_path)
    one = _run(tmp_path / "one", 1, 0, "auto", everything=True, tasks=(1,), accelerator="gpu")
    _assert_equal(ranks, one, tolerance=1e-4)
    _assert_shards(ranks, one)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    slow = checkpoint["callbacks"]["LoRAInterpolator"]["slow"]
    assert {n: t.shape for n, t in slow.items()} == {n: p.shape for n, p in weights.trainable(_module(True)).items()}
