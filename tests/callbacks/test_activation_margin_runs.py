# SPDX-License-Identifier: Apache-2.0
"""The margin regularizer over tasks, restarts and stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayDistillation, ReplayMixer
from lightning_cl.replay.identity import weights_fingerprint
from lightning_cl.replay.state_store import StateStore, StoreError
from tests.callbacks.margin_tools import (
    ROWS,
    fit,
    module,
    source,
    stateful,
)
from tests.helpers import models

# ------------------------------------------------------------------------------- tasks and restarts


def test_the_initial_anchor_belongs_to_the_run_and_previous_task_does_not(tmp_path: Path) -> None:
    for anchor, same in (("initial", True), ("previous_task", False)):
        callback, net, mixer = ActivationMarginRegularizer(anchor=anchor), module(), ReplayMixer(source())
        digests = []
        for task in range(2):
            fit(tmp_path, callback, net, mixer, models.loader(seed=task))
            digests.append(callback._reference.states.digest)
            fingerprint = callback._reference.states.manifest["weights"]
        assert (digests[0] == digests[1]) is same
        initial = weights_fingerprint(module().model.model)
        assert (fingerprint == initial) is same


def test_a_stream_of_tasks(tmp_path: Path) -> None:
    callback = ActivationMarginRegularizer(store=str(tmp_path / "states"))
    tasks = [Task(name, train=models.TokenRows(8, seed=i)) for i, name in enumerate("ab")]
    trainer = models.trainer(tmp_path, callbacks=[ReplayMixer(source(), rows_per_batch=2), callback], max_steps=2)
    net = module()
    fit_stream(trainer, net, TaskStream(tasks, batch_size=4))
    assert callback._reference.states.manifest["weights"] == weights_fingerprint(module().model.model)
    assert float(trainer.callback_metrics["cl/activation_margin"]) > 0


def test_one_reference_pass_serves_distillation_too(tmp_path: Path) -> None:
    net, passes = module(lora=True), []
    net.model.get_base_model().model.register_forward_pre_hook(lambda part, args: passes.append(part.training))
    margin = ActivationMarginRegularizer(reference="recompute", objective="l2")
    mixer = ReplayMixer(source(), rows_per_batch=2, layout="joined")
    fit(tmp_path, margin, net, mixer, more=(ReplayDistillation(),), max_steps=3)
    assert passes[-4:] == [False, True] * 2  # the first step also finds out where to run it


class Stop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kwargs", "lora"),
    [
        ({}, False),
        ({"store": "states"}, False),
        ({"anchor": "previous_task"}, False),
        ({"reference": "recompute"}, True),
        ({"reference": "recompute", "anchor": "previous_task"}, True),
        ({"target": 0.05, "reduction": "mean"}, False),
        ({"weight": "dynamic", "objective": "l2"}, False),
    ],
)
def test_a_resumed_second_task_ends_where_the_unbroken_one_ends(tmp_path: Path, kwargs: Any, lora: bool) -> None:
    def run(folder: Path, ckpt: Any, stop: int | None) -> dict[str, Tensor]:
        settings = {**kwargs, **({"store": str(tmp_path / kwargs["store"])} if "store" in kwargs else {})}
        callback, net = ActivationMarginRegularizer(**{"weight": 2.0, **settings}), module(lora, optimizer="adamw")
        mixer = ReplayMixer(source(), rows_per_batch=2)
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        for task in (0, 1) if ckpt is None else (1,):
            more: list[Callback] = [saver] if task else []
            if task and stop:
                more.append(Stop(stop))
            try:
                fit(
                    folder,
                    callback,
                    net,
                    mixer,
                    stateful(task),
                    ckpt if task else None,
                    tuple(more),
                    enable_checkpointing=bool(task),
                    max_steps=4,
                )
            except (KeyboardInterrupt, SystemExit):
                assert stop
        return {k: v.clone() for k, v in net.state_dict().items()}

    whole = run(tmp_path / "whole", None, None)
    run(tmp_path / "broken", None, 2)
    resumed = run(tmp_path / "resumed", tmp_path / "broken" / "step=2.ckpt", None)
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key


def test_a_checkpoint_holds_the_states_or_their_hash(tmp_path: Path) -> None:
    sizes = {}
    for store in (None, str(tmp_path / "file")):
        saver = ModelCheckpoint(tmp_path / str(bool(store)), every_n_train_steps=4)
        callback = ActivationMarginRegularizer(store=store)
        fit(tmp_path, callback, more=(saver,), enable_checkpointing=True)
        state = torch.load(saver.best_model_path, weights_only=True)["callbacks"]["ActivationMarginRegularizer"][
            "reference"
        ]
        sizes[store] = None if state["states"] is None else len(state["states"]["blob"])
        assert state["taken"]["digest"] == callback._reference.states.digest
    assert sizes[None] == callback._reference.states.nbytes()
    assert sizes[str(tmp_path / "file")] is None


def test_a_late_start_says_so(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    net, mixer = module(), ReplayMixer(source())
    trainer = models.trainer(tmp_path, callbacks=[mixer, saver], enable_checkpointing=True, max_steps=2)
    trainer.fit(net, models.loader())
    with pytest.warns(UserWarning, match=r"begins in task 0 at step 2 without a reference from before"):
        fit(tmp_path, ActivationMarginRegularizer(), module(), ReplayMixer(source()), ckpt=saver.best_model_path)


# ------------------------------------------------------------------------------- the store


def test_a_store_is_written_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "states.clstates"
    first, second = (ActivationMarginRegularizer(store=str(path)) for _ in range(2))
    a = fit(tmp_path, first, module())
    written = path.stat().st_mtime_ns
    net, evaluated = module(), []
    net.model.register_forward_pre_hook(lambda part, args: evaluated.append(1) if not part.training else None)
    b = fit(tmp_path, second, net)
    assert path.stat().st_mtime_ns == written
    assert not evaluated
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    manifest = StateStore.open(path).manifest
    assert manifest["layers"] == ["model.model.norm"]
    assert {"weights", "tokenizer", "rows", "num_std", "dtype", "version"} <= manifest.keys()
    # without its adapters a LoRA model is its base
    network = module(lora=True).model.get_base_model().model
    assert manifest["weights"] == weights_fingerprint(network, adapters=False) != weights_fingerprint(network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": {"seed": 3}}, r"weights: stored '[0-9a-f]+.*, this run '[0-9a-f]+"),
        ({"num_std": 2.0}, r"num_std: stored 1.0, this run 2.0"),
        ({"layers": "layers.0"}, r"layers: stored \['model.model.norm'\], this run \['model.model.layers.0'\]"),
        ({"objective": "l1"}, r"objective: stored 'margin', this run 'l1'"),
        ({"rows": {"max_tokens": 6}}, r"rows: stored '[0-9a-f]+.*, this run '[0-9a-f]+"),
        ({"precision": "bf16-mixed"}, r"dtype: stored 'float32, precision 32-true', this run 'float32, precision bf16"),
        ({"skip_first_token": True}, r"skip_first_token: stored False, this run True"),
        ({"anchor": "previous_task"}, r"anchor: stored 'initial', this run 'previous_task'"),
        ({"tokenizer": True}, r"tokenizer: stored 'none', this run '\w+, \d+ tokens'"),
        ({"version": "0.0.0"}, r"version: stored '[^']+', this run '0.0.0'"),
    ],
)
def test_a_store_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    path = str(tmp_path / "states")
    fit(tmp_path, ActivationMarginRegularizer(store=path), max_steps=1)
    change = dict(change)
    net = module(**change.pop("net", {}))
    if change.pop("tokenizer", False):
        net.tokenizer = models.tiny_tokenizer()
    if "version" in change:
        monkeypatch.setattr("lightning_cl.__version__", change.pop("version"))
    mixer = ReplayMixer(source(**change.pop("rows", {})))
    trainer = {"precision": change.pop("precision")} if "precision" in change else {}
    remedy = r".*wrong reference. Delete .*states to take them anew.*`allow_other_model=True`"
    with pytest.raises(StoreError, match=message + remedy):
        fit(tmp_path, ActivationMarginRegularizer(store=path, **change), net, mixer, **trainer)
    assert Path(path).exists()


def test_collecting_shows_its_progress_where_the_trainer_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in (False, True):
        fit(tmp_path, ActivationMarginRegularizer(), max_steps=1, enable_progress_bar=shown)
        assert ("Reference activations" in capsys.readouterr().err) == shown


def test_another_model_s_states_on_purpose(tmp_path: Path) -> None:
    path = str(tmp_path / "states")
    first = ActivationMarginRegularizer(store=path)
    fit(tmp_path, first, module())
    second = ActivationMarginRegularizer(store=path, allow_other_model=True)
    fit(tmp_path, second, module(seed=3))
    assert second._reference.states.digest == first._reference.states.digest


def test_a_damaged_store_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "states"
    fit(tmp_path, ActivationMarginRegularizer(store=str(path)), max_steps=1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    net = module()
    with pytest.raises(StoreError, match="is no intact store of activation states: its states do not match"):
        fit(tmp_path, ActivationMarginRegularizer(store=str(path)), net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), module().parameters(), strict=True))


def test_two_bits_an_entry(tmp_path: Path) -> None:
    callback, values = ActivationMarginRegularizer(), ActivationMarginRegularizer(objective="l2")
    fit(tmp_path, callback)
    fit(tmp_path, values)
    tokens = sum(len(row["input_ids"]) for row in ROWS)
    (states,) = callback._reference.states.layers.values()
    (stored,) = values._reference.states.layers.values()
    assert states.rows.numel() * 16 == tokens * 32 * 4
    assert stored.rows.dtype == torch.bfloat16
    assert stored.rows.shape == (tokens, 32)


def test_a_file_is_replaced_when_the_next_task_takes_a_new_reference(tmp_path: Path) -> None:
    path = tmp_path / "states"
    callback, net, mixer = (
        ActivationMarginRegularizer(anchor="previous_task", store=str(path)),
        module(),
        ReplayMixer(source()),
    )
    seen = []
    for task in range(2):
        fit(tmp_path, callback, net, mixer, models.loader(seed=task))
        seen.append(StateStore.open(path).digest)
        assert callback._reference.states.digest == seen[-1]
    assert seen[0] != seen[1]
