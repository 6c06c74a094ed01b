# SPDX-License-Identifier: Apache-2.0
"""Two processes, DDP or FSDP2, collect half of the states each and train as one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cl import weights
from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.replay import GeneralSamples
from lightning_cl.replay.identity import weights_fingerprint
from lightning_cl.replay.state_store import StoreError
from tests.helpers import models, spawn
from tests.test_attachment_distributed import ShardedLM

# Ragged, so that ranks and batches hold different numbers of tokens; without labels, so that the task's own loss is the
# same mean on one rank and on two.
ROWS = [
    {**row, "labels": torch.full_like(row["labels"], -100)}
    for row in models.TokenRows(6, length=11, seed=5, ragged=True).rows
]
EXACT = {"reduction": "mean", "weight": 3.0}


def _fsdp2() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _run(
    folder: Path, processes: int, strategy: str, kwargs: dict[str, Any], lora: bool = False, accumulate: int = 1
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    network = models.lora(models.tiny_llama()) if lora else models.tiny_llama()
    module = (ShardedLM if strategy == "fsdp2" else models.PlainLM)(network, lr=0.3)
    evaluated: list[int] = []
    backbone = network.get_base_model().model if lora else network.model
    backbone.register_forward_pre_hook(
        lambda part, args, kw: None if part.training else evaluated.append(len(kw["input_ids"])), with_kwargs=True
    )
    callback = ActivationMarginRegularizer(collect_batch_size=2, **kwargs)
    share = processes * accumulate
    trainer = models.trainer(
        folder,
        callbacks=[
            ReplayMixer(GeneralSamples(ROWS, num_samples=6), rows_per_batch=4 // share, layout="joined"),
            callback,
        ],
        strategy={"fsdp2": _fsdp2}.get(strategy, lambda: strategy)(),
        devices=processes,
        accumulate_grad_batches=accumulate,
        max_steps=3,
        use_distributed_sampler=False,
    )
    data = models.TokenRows(16)
    rank = int(os.environ.get("RANK", "0"))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=processes, rank=rank, shuffle=False)
    trainer.fit(module, torch.utils.data.DataLoader(data, 4 // share, sampler=sampler, collate_fn=models.collate))
    weights.reshard(module)
    parameters = weights.trainable(module)
    shards = {n: weights.local(p) for n, p in parameters.items()}
    store = callback._reference.states
    return {
        "final": weights.gather(module, shards, parameters, everywhere=True),
        "evaluated": evaluated,
        "digest": None if store is None else store.digest,
        "manifest": None if store is None else store.manifest,
        "rows": None if store is None else store.rows,
        "layers": None
        if store is None
        else {k: (v.rows.clone(), v.thresholds.clone()) for k, v in store.layers.items()},
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("cl/activation")},
        "fingerprint": weights_fingerprint(backbone),
    }


# (strategy, constructor arguments, LoRA, batches of an optimizer step)
CASES: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "ddp": ("ddp", EXACT, False, 1),
    "ddp-accumulated": ("ddp", EXACT, False, 2),
    "ddp-l2": ("ddp", {"objective": "l2", "weight": 0.1}, True, 1),
    "ddp-target": ("ddp", {"target": 0.05, "reduction": "mean"}, False, 1),
    "fsdp2": ("fsdp2", EXACT, False, 1),
    "fsdp2-lora": ("fsdp2", EXACT, True, 1),
    "fsdp2-recompute": ("fsdp2", {**EXACT, "reference": "recompute"}, True, 1),
    "fsdp2-accumulated": ("fsdp2", EXACT, False, 2),
    "cl_fsdp": ("cl_fsdp", EXACT, True, 1),
    "cl_fsdp-previous": ("cl_fsdp", {**EXACT, "reference": "recompute", "anchor": "previous_task"}, True, 1),
}


def _worker(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (strategy, kwargs, lora, accumulate) in CASES.items():
        results[name] = _run(folder / name, 2, strategy, kwargs, lora, accumulate)
    path = str(folder / "states")
    results["file"] = _run(folder / "file", 2, "ddp", {**EXACT, "store": path})
    with pytest.raises(StoreError, match=r"num_std: stored 1.0, this run 2.0"):
        _run(folder / "file", 2, "ddp", {**EXACT, "store": path, "num_std": 2.0})
    spawn.save(folder, rank, results)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn.run(_worker, 2, folder)
    return spawn.load(folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], tmp_path: Path, case: str) -> None:
    _, kwargs, lora, _ = CASES[case]
    one = _run(tmp_path, 1, "auto", kwargs, lora)
    for got in ranks:
        _close(got[case]["final"], one["final"])
        assert got[case]["metrics"].keys() == one["metrics"].keys()
    first, second = (got[case] for got in ranks)
    # both hold all of the states, and ran their share of the rows
    assert first["digest"] == second["digest"]
    if "reference" in kwargs:
        return
    assert [sum(got[case]["evaluated"]) for got in ranks] == [3, 3]
    assert sum(one["evaluated"]) == 6
    assert first["rows"] == one["rows"]
    for layer, (states, thresholds) in one["layers"].items():
        torch.testing.assert_close(first["layers"][layer][1], thresholds, rtol=1e-5, atol=1e-6)
        assert (first["layers"][layer][0] != states).float().mean() < 0.01
    # the weights' hash does not know about ranks and shards
    assert first["manifest"]["weights"] == one["manifest"]["weights"]
    assert first["fingerprint"] == second["fingerprint"]


def test_one_file_for_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["file"]["digest"] == ranks[0]["ddp"]["digest"]
    for got in ranks:
        _close(got["file"]["final"], got["ddp"]["final"])


def test_the_weight_is_one(ranks: list[dict[str, Any]]) -> None:
    first, second = (got["ddp-target"]["metrics"]["cl/activation_margin_weight"] for got in ranks)
    assert first == second


def test_accumulation_alone_changes_nothing(tmp_path: Path) -> None:
    whole = _run(tmp_path / "1", 1, "auto", EXACT)
    for accumulate in (2, 4):
        _close(_run(tmp_path / str(accumulate), 1, "auto", EXACT, accumulate=accumulate)["final"], whole["final"])


def _close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
