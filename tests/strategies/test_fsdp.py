# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two CPU processes equals one process, for any module, in full precision and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.strategies import CLFSDPStrategy, checks
from tests.helpers import models, spawn
from tests.strategies import fsdp_scenarios, workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    spawn.run(workers.run_scenarios, 2, folder, fsdp_scenarios.ALL)
    return spawn.load(folder)


def _one(folder: Path, module: Any, *loaders: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    for loader in loaders:
        workers.trainer(folder, devices=1, **kwargs).fit(module, loader)
    return workers.whole(module)


def test_two_fits_on_two_ranks_equal_one_process(ranks: Any, tmp_path: Path) -> None:
    first, second = workers.result(ranks, "fit_twice")
    expected = _one(
        tmp_path,
        workers.plain(optimizer="sgd"),
        workers.rows_of_ranks(16, 4, 2),
        workers.rows_of_ranks(8, 4, 2, seed=1),
    )
    workers.close(first, expected)
    workers.close(first, second, atol=0)


def test_tied_weights_clipping_and_accumulation(ranks: Any, tmp_path: Path) -> None:
    expected = _one(
        tmp_path,
        workers.plain(optimizer="sgd", lora=False, tie_word_embeddings=True),
        workers.rows_of_ranks(16, 4, 2),
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
    )
    workers.close(workers.result(ranks, "tied")[0], expected)


def test_gradients_exist_for_trainable_parameters_only(ranks: Any) -> None:
    found = workers.result(ranks, "frozen_gradients")
    assert sum(seen["sum"] for seen in found) == found[0]["trainable"]


def test_a_frozen_root_stays_gathered_until_a_part_of_it_trains(ranks: Any, tmp_path: Path) -> None:
    loaders = workers.rows_of_ranks(16, 4, 2), workers.rows_of_ranks(16, 4, 2, seed=1)
    expected, _ = fsdp_scenarios.frozen_root(0, tmp_path, 1, loaders)
    for found, gathered in workers.result(ranks, "frozen_root"):
        assert gathered == [True, True, False, False]
        workers.close(found, expected)
    assert any(name.endswith("model.norm.weight") for name in expected)


def test_reference_pass_with_swapped_weights_changes_no_gradient(ranks: Any, tmp_path: Path) -> None:
    (trained, seen), (_, other) = workers.result(ranks, "slow_weights")
    workers.close(trained, _one(tmp_path, workers.plain(optimizer="sgd"), workers.rows_of_ranks(16, 4, 2)))
    module, callback = workers.plain(optimizer="sgd"), fsdp_scenarios.SlowPass()
    workers.trainer(tmp_path, devices=1, callbacks=[callback]).fit(module, workers.rows_of_ranks(16, 4, 2))
    for step, expected in enumerate(callback.seen):
        size = seen.numel() // len(callback.seen)
        got = torch.cat([seen[step * size : (step + 1) * size], other[step * size : (step + 1) * size]])
        torch.testing.assert_close(got, expected.flatten(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("manual", [False, True])
def test_any_module_trains_as_on_one_process(ranks: Any, tmp_path: Path, manual: bool) -> None:
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    module = fsdp_scenarios.Loose(manual)
    for epoch in range(2):
        order = [list(_shuffled(rows, r, epoch)) for r in range(2)]
        loader = torch.utils.data.DataLoader(rows, batch_size=8, sampler=order[0] + order[1])
        workers.trainer(tmp_path, devices=1).fit(module, loader)
    workers.close(workers.result(ranks, "any_module")[0][int(manual)], workers.whole(module))


def _shuffled(rows: torch.Tensor, rank: int, epoch: int) -> Any:
    sampler = torch.utils.data.DistributedSampler(rows, 2, rank, shuffle=True, seed=0)
    sampler.set_epoch(epoch)
    return sampler


def _one_in_4_bits(folder: Path) -> dict[str, torch.Tensor]:
    rows = workers.rows_of_ranks(16, 4, 2), workers.rows_of_ranks(16, 4, 2, seed=1)
    return _one(folder, workers.plain(also=("norm",), optimizer="sgd"), *rows, strategy="cl_single_device_4bit")


def test_4bit_under_fsdp_equals_4bit_on_one_device(ranks: Any, tmp_path: Path) -> None:
    expected = _one_in_4_bits(tmp_path)
    workers.close(workers.result(ranks, "four_bit")[0], expected, atol=1e-5)


def test_4bit_replicas_keep_whole_packed_weights_and_train_the_same(ranks: Any, tmp_path: Path) -> None:
    expected = _one_in_4_bits(tmp_path)
    for (trained, read), bases in workers.result(ranks, "four_bit_replicas"):
        workers.close(trained, expected, atol=1e-5)
        workers.close(read, trained, atol=0)
        assert bases[0].keys() == bases[1].keys()
        for name, value in bases[0].items():
            assert torch.equal(bases[1][name], value), name


def test_4bit_layers_of_transformers_under_fsdp(ranks: Any, tmp_path: Path) -> None:
    module = fsdp_scenarios.their_four_bit(-1, tmp_path)
    expected = _one(tmp_path, module, workers.rows_of_ranks(16, 4, 2))
    workers.close(workers.result(ranks, "their_four_bit")[0], expected, atol=1e-5)


def test_4bit_storage_follows_the_compute_dtype(ranks: Any) -> None:
    found = workers.result(ranks, "four_bit_bf16")[0]
    assert {dtype for dtype, _ in found.values()} == {torch.bfloat16}
    assert all(3 < loss < 7 for _, loss in found.values())


@pytest.mark.parametrize("name", ["replicas", "kept", "offload", "blocks", "size", "recompute", "compile"])
def test_options_do_not_change_the_result(ranks: Any, tmp_path: Path, name: str) -> None:
    expected = _one(tmp_path, workers.plain(optimizer="sgd"), workers.rows_of_ranks(16, 4, 2))
    workers.close(workers.result(ranks, "options")[0][name], expected)


@pytest.mark.parametrize(("offload", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "nccl")])
def test_shards_in_host_memory_have_a_backend_of_their_own(offload: bool, backend: str) -> None:
    strategy = CLFSDPStrategy(cpu_offload=offload, cluster_environment=LightningEnvironment())
    strategy.parallel_devices = [torch.device("cuda", 0)]
    assert strategy._get_process_group_backend() == backend


def test_host_memory_without_a_backend_is_refused() -> None:
    """As after a fit on GPUs alone: Lightning takes the process group that there is."""
    for backends, refused in (("cuda:gloo", True), ("cpu:gloo,cuda:gloo", False)):
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
        try:
            problems = checks.host_memory(cpu_offload=True)
            assert bool(problems) == refused
            assert checks.host_memory(cpu_offload=False) == []
        finally:
            dist.destroy_process_group()
        if refused:
            with pytest.raises(MisconfigurationException, match=r"without one \(cuda:gloo\), from an earlier fit"):
                checks.raise_together(problems)


def test_changed_packed_bytes_stop_the_run_on_both_ranks(ranks: Any) -> None:
    for message in workers.result(ranks, "probe"):
        assert "gives another output after sharding" in message
        assert "packed bytes changed" in message
        assert message.startswith("[rank 1] ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_rank", "[rank 1] The trainable parameters have several dtypes (float32, float64)"),
        ("product", "`replicate=2` x `shard=2` does not make the 2 processes"),
        ("unknown_block", "`blocks` names 'Decoder', which is neither a class nor a submodule"),
        ("float16", "`precision='16-true'` computes in float16"),
        ("double", "`precision='64-true'` cannot be used with `cl_fsdp`"),
        ("uint8", "1 4-bit layers are stored as uint8 (first: model.packed)"),
        ("shared", "One parameter is shared between blocks that FSDP gathers separately"),
        ("scalar", "1 trainable parameters are scalars (first: temperature), which FSDP cannot shard"),
        ("all_trainable", "has no frozen `nn.Linear` layer to hold in 4 bits"),
        ("other_precision", "sharded in an earlier fit with other settings (precision: '32-true', now 'bf16-true')"),
        ("added", "2 trainable parameters were added after the module was sharded (first: extra.weight)"),
        ("adapters", "`only=['lora_A']` fits no frozen linear layer"),
    ],
)
def test_refusals_are_raised_on_all_ranks(ranks: Any, name: str, message: str) -> None:
    for messages in workers.result(ranks, "refusals"):
        assert message in messages[name]
        assert messages[name].startswith("MisconfigurationException")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicate": 0}, r"`replicate=0` is no number of processes"),
        ({"shard": -1}, r"`shard=-1` is no number of processes. Use a positive integer or `auto`"),
        ({"prefetch": -1}, r"`prefetch=-1` is negative"),
        ({"reduce_dtype": "int8"}, r"`reduce_dtype='int8'` is unknown"),
        ({"blocks": ["A"], "min_parameters": 3}, r"`blocks=\['A'\]` and `min_parameters=3` both say what to shard"),
    ],
)
def test_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        CLFSDPStrategy(**arguments)


def test_module_sharded_before_is_refused_on_one_device(tmp_path: Path) -> None:
    from lightning_cl.strategies.record import record_of

    module = workers.plain()
    record_of(module).sharded = {}
    with pytest.raises(MisconfigurationException, match=r"was sharded by `cl_fsdp` in an earlier fit"):
        workers.trainer(tmp_path, devices=1).fit(module, models.loader())
