# SPDX-License-Identifier: Apache-2.0
"""The attachment under DDP and FSDP2: two gloo processes give the gradients of one batch written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.anatomy import find_final_norm
from lightning_cl.callbacks import ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, joining
from lightning_cl.weights import adapters_disabled
from tests.helpers import models, spawn
from tests.test_attachment import Probe


class ShardedLM(models.PlainLM):
    """Shards its blocks and its network with FSDP2, as Lightning's ModelParallelStrategy expects."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        core = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for block in core.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class KeepFullGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {
            n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for n, p in pl_module.named_parameters()
            if p.grad is not None
        }


def _model(trained: str) -> Any:
    model = models.lora(models.tiny_llama(tie_word_embeddings=trained == "tied"))
    if trained == "tied":
        # Head, final norm and embedding live in the root group: the hard case for swapped weights.
        core = model.get_base_model()
        for part in (core.model.norm, core.model.embed_tokens):
            part.requires_grad_(True)
    return model


CASES = [(layout, trained) for layout in ("joined", "separate") for trained in ("lora", "tied")]


def _train_all(rank: int, folder: Path, strategy: str) -> None:
    for layout, trained in CASES:
        case = folder / f"{layout}-{trained}"
        case.mkdir(exist_ok=True)
        _train(rank, case, strategy, layout, trained)


def _train(rank: int, folder: Path, strategy: str, layout: str, trained: str) -> None:
    cls = ShardedLM if strategy == "fsdp2" else models.PlainLM
    module = cls(_model(trained))
    name = find_final_norm(module)

    class Reference(Probe):
        def on_task_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_task_start(trainer, pl_module)

    def term(step: Any) -> Tensor:
        mask = step.replay.token_mask[..., None]
        return ((step.activations[name] - step.reference["initial"][name]).square() * mask).sum() / mask.sum()

    probe = Reference(reference=True, term=term)
    mixer = ReplayMixer(
        GeneralSamples(models.TokenRows(6, seed=9, ragged=True), num_samples=6), rows_per_batch=2, layout=layout
    )
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        chosen: Any = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    else:
        chosen = "ddp"
    keep = KeepFullGradients()
    trainer = models.trainer(
        folder, callbacks=[mixer, probe, keep], max_steps=1, strategy=chosen, devices=2, use_distributed_sampler=False
    )
    rows = models.TokenRows(8, ragged=True)
    sampler = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, 2, sampler=sampler, collate_fn=models.collate))
    spawn.save(
        folder, rank, {"gradients": keep.gradients, "ids": probe.steps[0]["ids"], "layout": probe.steps[0]["layout"]}
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_two_batches_by_hand(tmp_path: Path, strategy: str) -> None:
    spawn.run(_train_all, 2, tmp_path, strategy)
    for layout, trained in CASES:
        _compare(tmp_path / f"{layout}-{trained}", layout, trained)


def _compare(folder: Path, layout: str, trained: str) -> None:
    results = spawn.load(folder)
    assert all(r["layout"] == layout for r in results)
    drawn = [[int(i.split(":")[1]) for i in r["ids"]] for r in results]
    assert not set(drawn[0]) & set(drawn[1])
    module = models.PlainLM(_model(trained))
    name = find_final_norm(module)
    norm = module.get_submodule(name)
    task, replay = models.TokenRows(8, ragged=True), models.TokenRows(6, seed=9, ragged=True)
    total = torch.zeros(())
    for rank in range(2):
        # The sampler deals rows out in turn.
        rows = [task[i] for i in (rank, rank + 2)] + [replay[i] for i in drawn[rank]]
        batch = models.collate(rows)
        hidden: list[Tensor] = []
        handle = norm.register_forward_hook(lambda m, a, o, hidden=hidden: hidden.append(o))
        loss = module.model(**batch).loss
        with adapters_disabled(module), torch.no_grad():
            module.model(**{k: v[2:] for k, v in batch.items()})
        handle.remove()
        mask = batch["attention_mask"][2:, :, None]
        total = total + loss + ((hidden[0][2:] - hidden[1]).square() * mask).sum() / mask.sum()
    (total / 2).backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    for result in results:
        assert result["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            found = result["gradients"][key]
            torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def _remember(rank: int, folder: Path, world: int) -> None:
    memory = EpisodicMemory(6, seed=3)
    mixer = ReplayMixer(memory, rows_per_batch=1)
    module = models.PlainLM(models.tiny_llama())
    kwargs: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world == 2 else {}
    drawn = []
    for task in range(2):
        probe = Probe()
        trainer = models.trainer(folder, callbacks=[mixer, probe], max_epochs=1, max_steps=-1, **kwargs)
        trainer.fit(module, models.loader(rows=16, batch_size=4 // world, seed=task))
        drawn += [i for step in probe.steps for i in step["ids"]]
    state = memory.state_dict()
    spawn.save(folder, rank, {"ids": state["kept"]["ids"], "drawn": drawn})


def test_the_memory_is_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    """What is kept depends on the rows and the seed alone; and two ranks replay different rows."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        spawn.run(_remember, world, folder, world)
    one, (first, second) = spawn.load(tmp_path / "1", 1)[0], spawn.load(tmp_path / "2")
    assert one["ids"] == first["ids"] == second["ids"]
    assert len(one["ids"]) == 6
    assert all(a != b for a, b in zip(first["drawn"], second["drawn"], strict=True))


class Uneven(models.PlainLM):
    """Rank 1 sees labels of a single token, so that it is owed next to no replay tokens."""

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training and self.global_rank == 1:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, :-1] = -100
        return batch


def _uneven(rank: int, folder: Path) -> None:
    module = Uneven(models.lora(models.tiny_llama()))
    probe = Probe(reference=True)
    source = GeneralSamples(models.TokenRows(6, seed=9), num_samples=6)
    trainer = models.trainer(
        folder, callbacks=[ReplayMixer(source, token_ratio=0.2), probe], max_steps=3, strategy="ddp", devices=2
    )
    trainer.fit(module, models.loader(rows=16, batch_size=2))
    spawn.save(folder, rank, [len(step["ids"]) for step in probe.steps])


def test_ranks_agree_on_whether_there_are_replay_rows(tmp_path: Path) -> None:
    spawn.run(_uneven, 2, tmp_path)
    first, second = spawn.load(tmp_path)
    assert [n > 0 for n in first] == [n > 0 for n in second]
    assert sum(first) > 0


class OtherRows(torch.utils.data.Dataset):
    """Replay rows that fit the batch on the first rank alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        ids = torch.tensor([5, 6, 7])
        return {"input_ids": ids.float() if self.rank else ids, "attention_mask": torch.ones(3, dtype=torch.long)}


def _misfits(rank: int, folder: Path) -> None:
    source = GeneralSamples(OtherRows(rank), num_samples=4)
    trainer = models.trainer(
        folder, callbacks=[ReplayMixer(source, rows_per_batch=1)], max_steps=2, strategy="ddp", devices=2
    )
    with pytest.raises(MisconfigurationException, match=r"do not fit the task's batch at key 'input_ids'"):
        trainer.fit(models.PlainLM(models.lora(models.tiny_llama())), models.loader(rows=8, batch_size=2))


def test_rows_that_do_not_fit_on_one_rank_are_an_error_on_all(tmp_path: Path) -> None:
    spawn.run(_misfits, 2, tmp_path)


def _collations(rank: int, folder: Path) -> None:
    calls = {"collate_rows": 0, "join_packed": 0}

    def counted(name: str) -> Any:
        real = getattr(joining, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        return call

    for name in calls:
        setattr(joining, name, counted(name))
    for collate in (models.collate, models.pack):
        for source in (GeneralSamples(models.TokenRows(6, seed=9), num_samples=6), EpisodicMemory(4)):
            rows = torch.utils.data.DataLoader(models.TokenRows(16), batch_size=2, collate_fn=collate)
            mixer = ReplayMixer(source, rows_per_batch=2)
            trainer = models.trainer(folder, callbacks=[mixer], max_steps=3, strategy="ddp", devices=2)
            trainer.fit(models.PlainLM(models.lora(models.tiny_llama())), rows)
            assert trainer.global_step == 3
    spawn.save(folder, rank, calls)


def test_replay_rows_are_collated_once_a_step_on_each_rank(tmp_path: Path) -> None:
    spawn.run(_collations, 2, tmp_path)
    # Three steps with general samples; the memory of a first task is empty, and nothing is made of nothing.
    assert spawn.load(tmp_path) == [{"collate_rows": 3, "join_packed": 3}] * 2
