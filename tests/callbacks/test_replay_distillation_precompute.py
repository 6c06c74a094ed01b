# SPDX-License-Identifier: Apache-2.0
"""`ReplayDistillation(precompute=True)`: the reference is taken once, and everything else is as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import weights
from lightning_cl.callbacks import ReplayDistillation, ReplayMixer
from lightning_cl.replay import EpisodicMemory, SelfGenerated
from lightning_cl.replay.stored_reference import StoredReference
from tests.callbacks.test_replay_distillation import Recorder, fit, general, naive_kl, naive_run, resume, same
from tests.helpers import spawn, waits
from tests.helpers.fsdp1 import cpu_fsdp1
from tests.helpers.models import PlainLM, TokenRows, lora, pack, tiny_llama, trainer


def build() -> Any:
    """LoRA, and a norm that is trained too, so that switching the adapters off is not all of the reference."""
    model = lora(tiny_llama())
    for name, parameter in model.named_parameters():
        if name.endswith("model.norm.weight"):
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize("anchor", ["initial", "previous_task"])
def test_equals_the_hand_written_loop_in_both_of_two_tasks(tmp_path: Path, anchor: str, layout: str) -> None:
    module = Recorder(build(), lr=0.3)
    mixer = ReplayMixer(general(ragged=True), rows_per_batch=2, layout=layout)
    method = ReplayDistillation(weight=2.0, anchor=anchor, precompute=True)
    for _ in range(2):
        teacher = copy.deepcopy(module.model) if anchor == "previous_task" else tiny_llama()
        expected = copy.deepcopy(module.model)
        module.batches.clear()
        fit(tmp_path, module, [mixer, method])
        if layout == "joined":
            same(naive_run(expected, teacher, module.batches, 2, 2.0, 0.3), module.model)
            continue
        optimizer = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.3)
        for task, replay in zip(module.batches[0::2], module.batches[1::2], strict=True):
            optimizer.zero_grad()
            (expected(**task).loss + 2.0 * naive_kl(expected, teacher, replay, 2)).backward()
            optimizer.step()
        same(expected, module.model)


def test_one_pass_over_many_rows_instead_of_one_in_each_step(tmp_path: Path) -> None:
    """One pass of all 6 general rows before the steps, after the row that the head is checked with."""
    module = Recorder(build(), lr=0.1)
    seen: list[tuple[int, bool]] = []
    module.model.get_base_model().model.register_forward_pre_hook(
        lambda part, args, kwargs: seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    )
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(precompute=True)])
    steps = len(module.batches)
    assert steps > 2
    assert seen == [(1, False), (6, False)] + [(6, True)] * steps


def test_packed_batches(tmp_path: Path) -> None:
    """As with a pass in each step."""
    models = []
    for precompute in (False, True):
        module = Recorder(lora(tiny_llama(use_cache=False)), lr=0.3)
        data = torch.utils.data.DataLoader(TokenRows(16, ragged=True), batch_size=4, collate_fn=pack)
        callbacks = [
            ReplayMixer(general(ragged=True), rows_per_batch=2),
            ReplayDistillation(2.0, precompute=precompute),
        ]
        trainer(tmp_path, callbacks=callbacks).fit(module, data)
        models.append(module.model)
    same(*models)


@pytest.mark.parametrize("how", [{"refresh": "per_step"}, {"refresh": "every_n_steps", "every_n_steps": 3}])
def test_a_new_pool_has_new_states(tmp_path: Path, how: Any) -> None:
    """And the same run as with a pass in each step."""
    models, taken = [], []
    take = StoredReference.take
    for precompute in (False, True):
        module = Recorder(build(), lr=0.3)
        mixer = ReplayMixer(SelfGenerated(4, 12, **how), rows_per_batch=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoredReference, "take", lambda *a, **k: (taken.append(len(a[4])), take(*a, **k)))
            fit(tmp_path, module, [mixer, ReplayDistillation(2.0, precompute=precompute)])
        models.append(module.model)
    same(*models)
    assert taken == [4] * mixer.sources[0]._pools
    assert len(taken) > 1


def test_two_sources_with_a_reference_each(tmp_path: Path) -> None:
    """Past tasks' own samples are held to this task's start, general rows to the initial model."""
    models = []
    for precompute in (False, True):
        module = Recorder(build(), lr=0.3)
        made = SelfGenerated(4, 12, prompts="past_tasks", parser=lambda row, text: True)
        callbacks = [ReplayMixer([general(), made], rows_per_batch=2), ReplayDistillation(2.0, precompute=precompute)]
        for _ in range(2):
            fit(tmp_path, module, callbacks)
        models.append(module.model)
    assert {source for kind in callbacks[1]._kind_of.values() for source in [kind]} == {"initial", "previous_task"}
    same(*models)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resumed_equals_unbroken(tmp_path: Path, stop_at: int) -> None:
    def make() -> tuple[Recorder, list[Any]]:
        source = SelfGenerated(4, 12, refresh="every_n_steps", every_n_steps=3)
        method = ReplayDistillation(target_kl=0.01, anchor="previous_task", precompute=True)
        return Recorder(build(), lr=0.3), [ReplayMixer(source, rows_per_batch=2), method]

    resume(tmp_path, stop_at, make)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_and_no_step_waits_for_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # Lightning sets it
    # The first compares tokens and states.
    batches = waits.forbid(monkeypatch, StoredReference, "batch")
    models = []
    for precompute in (False, True):
        module = Recorder(build(), lr=0.3)
        callbacks = [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(2.0, precompute=precompute)]
        fit(tmp_path, module, callbacks, accelerator="gpu")
        models.append(module.model.cpu())
    same(*models)
    assert len(batches) == len(module.batches) > 2


def _strategies() -> dict[str, Any]:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_cl.strategies import CLFSDPStrategy

    return {"ddp": DDPStrategy, "cl_fsdp": CLFSDPStrategy}


def _two_ranks(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, make in _strategies().items():
        module = Recorder(build(), lr=0.3)
        # Ragged and uneven: the ranks' parts of a pass have other widths, and one has a row more.
        callbacks = [ReplayMixer(general(5, ragged=True), rows_per_batch=1), ReplayDistillation(2.0, precompute=True)]
        fit(folder, module, callbacks, strategy=make(), devices=2)
        weights.reshard(module)
        found = weights.trainable(module)
        whole = weights.gather(module, {n: weights.local(p) for n, p in found.items()}, found, everywhere=True)
        results[name] = {"weights": whole, "batches": module.batches}
    module = Recorder(build(), lr=0.3)
    with pytest.raises(MisconfigurationException, match=r"`ReplayDistillation\(precompute=True\)` runs the network"):
        fit(
            folder,
            module,
            [ReplayMixer(general(), rows_per_batch=1), ReplayDistillation(precompute=True)],
            strategy=cpu_fsdp1(),
            devices=2,
        )
    spawn.save(folder, rank, results)


def test_two_processes_equal_one_and_fsdp1_is_refused(tmp_path: Path) -> None:
    spawn.run(_two_ranks, 2, tmp_path)
    ranks = spawn.load(tmp_path)
    for strategy in _strategies():
        expected, teacher = PlainLM(build()), tiny_llama()
        model = expected.model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for pair in zip(*(r[strategy]["batches"] for r in ranks), strict=True):
            optimizer.zero_grad()
            for batch in pair:
                task = {key: value[:-1] for key, value in batch.items()}
                ((model(**task).loss + 2.0 * naive_kl(model, teacher, batch, 1)) / 2).backward()
            optimizer.step()
        for name, parameter in weights.trainable(expected).items():
            torch.testing.assert_close(ranks[1][strategy]["weights"][name], parameter.detach(), rtol=1e-4, atol=1e-5)


class TestRefusals:
    """Bad input, each with its message."""

    def test_rows_that_are_not_known_ahead(self, tmp_path: Path) -> None:
        mixer = ReplayMixer([general(), EpisodicMemory(8)], rows_per_batch=2)
        with pytest.raises(MisconfigurationException, match="the rows of EpisodicMemory are not known ahead"):
            fit(tmp_path, Recorder(build()), [mixer, ReplayDistillation(precompute=True)])
        # In any order of the callbacks.
        fit(tmp_path, Recorder(build()), [ReplayDistillation(precompute=True, sources=["GeneralSamples"]), mixer])

    def test_a_trained_head(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="this head is trained"):
            fit(tmp_path, Recorder(tiny_llama()), [ReplayMixer(general()), ReplayDistillation(precompute=True)])

    def test_rows_that_are_cut_in_the_step(self, tmp_path: Path) -> None:
        class Cuts(PlainLM):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step({key: value[:, :6] for key, value in batch.items()}, batch_idx)

        with pytest.raises(MisconfigurationException, match="replay rows are cut differently"):
            fit(tmp_path, Cuts(build()), [ReplayMixer(general()), ReplayDistillation(precompute=True)])

    def test_more_states_than_the_host_can_hold(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4}
        monkeypatch.setattr("os.sysconf", pages.__getitem__)
        with pytest.raises(MisconfigurationException, match="GiB of states of 6 rows on a node"):
            fit(tmp_path, Recorder(build()), [ReplayMixer(general()), ReplayDistillation(precompute=True)])
        pages["SC_PHYS_PAGES"] = 40
        fit(tmp_path, Recorder(build()), [ReplayMixer(general()), ReplayDistillation(precompute=True)])

    def test_padding_before_the_tokens(self) -> None:
        stored = StoredReference()
        stored._states = {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
        with pytest.raises(MisconfigurationException, match="padding before the"):
            stored.batch(["a", "b"], mask)
        assert stored.batch(["a", "b"], mask.flip(1)).shape == (2, 3, 3)
