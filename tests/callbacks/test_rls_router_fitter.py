# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer, RLSRouterFitter
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from lightning_cl.routing import Expansion, load_routed
from lightning_cl.routing.features import prompt_mask
from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import DIM, TaskRows, fit, fitter, mixed, module
from tests.helpers import models, spawn
from tests.strategies.workers import result, run_scenarios

EXPECTED = [f"task_{i % 3}" for i in range(6)]


def naive_features(lm: Any, rows: Any) -> Tensor:
    """Row by row: the first block's output on the prompt alone, averaged, expanded."""
    base = lm.model.get_base_model().model
    out = []
    for row in rows:
        ids = row["input_ids"][row["labels"] == -100][None]
        hidden: list[Tensor] = []
        handle = base.layers[0].register_forward_hook(
            lambda m, a, o, h=hidden: h.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad(), lm.model.disable_adapter():
            base(input_ids=ids)
        handle.remove()
        out.append(torch.relu(hidden[0][0].mean(0) @ Expansion(32, DIM).matrix()))
    return torch.stack(out).double()


def routes(router: RLSRouterFitter, lm: Any) -> list[str]:
    batch = mixed()
    lm.eval()
    with torch.no_grad():
        lm.model(**batch)
    return router.routed.last.adapters


# ---------------------------------------------------------------------- what it learns


def test_three_tasks_route_themselves_and_the_router_is_the_joint_solution(tmp_path):
    lm, router = module(), fitter()
    for task in range(3):
        fit(tmp_path, router, lm, task, max_epochs=2, accumulate_grad_batches=2)
    assert router._statistics.total.counts.tolist() == [16, 16, 16]  # two epochs, each row once
    features = torch.cat([naive_features(lm, TaskRows(task)) for task in range(3)])
    targets = torch.eye(3, dtype=torch.float64).repeat_interleave(16, 0)
    expected = torch.linalg.solve(features.T @ features + 1e-3 * torch.eye(DIM), features.T @ targets)
    torch.testing.assert_close(router.router.weight, expected, atol=1e-3, rtol=1e-3)
    assert routes(router, lm) == EXPECTED
    assert router.route(mixed()).adapters == EXPECTED
    text = lm.model.generate(
        input_ids=mixed()["input_ids"][:, :4], attention_mask=torch.ones(6, 4, dtype=torch.long), max_new_tokens=2
    )
    assert text.shape == (6, 6)
    assert router.routed.last.adapters == EXPECTED
    assert [c.name for c in router.router.classes] == ["task 0", "task 1", "task 2"]


def test_each_adapter_is_trained_alone(tmp_path):
    lm, router = module(), fitter()
    after_first: dict[str, Tensor] = {}
    for task in range(3):
        fit(tmp_path, router, lm, task)
        if task == 0:
            after_first = router._bank.snapshot("task_0")
        trained = {n for n, p in lm.model.named_parameters() if p.requires_grad}
        assert trained == set(router._bank.parameters(f"task_{task}"))
    assert all(torch.equal(router._bank.snapshot("task_0")[n], v) for n, v in after_first.items())
    # The third task's adapter is what an ordinary run with that adapter alone gives.
    alone = module()
    other = fitter()
    other._clock.completed = 2
    fit(tmp_path, other, alone, 2)
    for name, value in router._bank.snapshot("task_2").items():
        assert torch.equal(other._bank.snapshot("task_2")[name], value)
        assert "lora_A" in name or bool(value.any())


def test_the_base_and_the_users_adapter_stay_as_they_were(tmp_path):
    lm, router = module(), fitter()
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    with pytest.warns(UserWarning, match="the adapter 'default' is not in its initial state"):
        fit(tmp_path, router, lm, 0)
    now = dict(lm.model.named_parameters())
    assert all(torch.equal(now[n], v) for n, v in before.items())


@pytest.mark.parametrize("shared", [False, True])
def test_tasks_are_told_apart_with_one_instruction_for_all(tmp_path, shared):
    lm, router = module(), fitter(expansion_dim=256, ridge="auto")
    for task in range(3):
        fit(tmp_path, router, lm, task, rows={"rows": 40, "shared": shared}, limit_train_batches=10)
    right = 0
    for task in range(3):
        test = models.collate([TaskRows(task, rows=20, shared=shared, seed=5)[i] for i in range(20)])
        right += router.route(test).adapters.count(f"task_{task}")
    assert right >= (54 if shared else 58)
    assert router._statistics.total.ridge != 1.0


def test_dropout_below_the_feature_layer_is_off_and_comes_back(tmp_path):
    lm = module()
    lm.model.get_base_model().model.embed_tokens = nn.Sequential(
        lm.model.get_base_model().model.embed_tokens, nn.Dropout(0.5)
    )
    plain = module()
    counts = []
    for one in (lm, plain):
        router = fitter()
        fit(tmp_path, router, one, 0)
        counts.append(router._statistics.total.gram)
    torch.testing.assert_close(*counts)


def test_gradient_checkpointing_counts_rows_once(tmp_path):
    lm, plain, found = module(), module(), []
    lm.model.get_base_model().gradient_checkpointing_enable()
    lm.model.enable_input_require_grads()
    for one in (lm, plain):
        router = fitter()
        fit(tmp_path, router, one, 0)
        found.append((router._statistics.total.counts.tolist(), router._statistics.total.gram))
    assert found[0][0] == found[1][0] == [16]
    torch.testing.assert_close(found[0][1], found[1][1])


class Manual(models.PlainLM):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()


def test_manual_optimization(tmp_path):
    lm, router = Manual(module().model), fitter()
    fit(tmp_path, router, lm, 0)
    assert router._statistics.total.counts.tolist() == [16]


class OwnLoss(models.PlainLM):
    """Takes tuples, and computes its loss itself: the network never sees the labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_module_with_its_own_loss_is_fitted_and_routed_by_its_prompts(tmp_path):
    lm, plain, routers = OwnLoss(module().model), module(), [fitter(), fitter()]
    for one, router in zip((lm, plain), routers, strict=True):
        fit(tmp_path, router, one, 0)
    torch.testing.assert_close(routers[0]._statistics.total.gram, routers[1]._statistics.total.gram)
    trainer = models.trainer(tmp_path, callbacks=[routers[0]])
    trainer.validate(lm, tools.loader(0), verbose=False)
    scores = routers[0].routed.last.scores
    expected = routers[0].route(models.collate([TaskRows(0)[i] for i in range(12, 16)])).scores
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


class Packed(models.PlainLM):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"]).loss


def pack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = [torch.cat([torch.tensor([-100]), row["labels"][1:]]) for row in rows]
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


def test_packed_rows_are_told_apart(tmp_path):
    # Eager attention of a packed row mixes segments below the first block; the first block's values differ, the counts
    # and the pooling do not: so the embedding is the feature layer here.
    found = []
    for cls, collate in ((Packed, pack), (models.PlainLM, models.collate)):
        lm = cls(module().model)
        router = fitter(feature_layer="model.embed_tokens")
        trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1)
        trainer.fit(lm, DataLoader(TaskRows(0), batch_size=4, collate_fn=collate))
        found.append(router._statistics.total)
    assert found[0].counts.tolist() == found[1].counts.tolist() == [16]
    torch.testing.assert_close(found[0].gram, found[1].gram)


# ---------------------------------------------------------------------- with replay


class Texts(torch.utils.data.Dataset):
    def __init__(self, rows: int = 12) -> None:
        generator = torch.Generator().manual_seed(9)
        self.rows = [torch.randint(4, 128, (10,), generator=generator) for _ in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.rows[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_replay_rows_are_no_task_rows(tmp_path, layout):
    replay = ReplayMixer(GeneralSamples(Texts()), rows_per_batch=2, layout=layout)
    lm, router, plain, alone = module(), fitter(), module(), fitter()
    fit(tmp_path, router, lm, 0, callbacks=[replay])
    fit(tmp_path, alone, plain, 0)
    assert router._statistics.total.counts.tolist() == [16]
    torch.testing.assert_close(router._statistics.total.gram, alone._statistics.total.gram, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_general_class_is_learnt_from_general_samples_each_once(tmp_path, layout):
    replay = ReplayMixer(GeneralSamples(Texts(6)), rows_per_batch=2, layout=layout)
    lm, router = module(), fitter(general_class=True)
    for task in range(2):
        fit(tmp_path, router, lm, task, callbacks=[replay], max_epochs=2)
    assert router._statistics.total.counts.tolist() == [16, 6, 16]
    assert [c.name for c in router.router.classes] == ["task 0", "general", "task 1"]
    lm.eval()
    found = router.route(models.collate([Texts(6)[i] for i in range(6)]))
    assert found.names.count("general") == 6
    assert found.adapters == ["__base__"] * 6


def test_slow_weights_are_kept_for_each_adapter_and_come_first(tmp_path):
    lm, router, average = module(), fitter(), LoRAInterpolator(half_life=0.5, consistency_weight=0.0)
    for task in range(2):
        fit(tmp_path, router, lm, task, callbacks=[average])
    for k in range(2):  # what is stored is what the module holds: the slow weights
        now = router._bank.snapshot(f"task_{k}")
        assert all(torch.equal(value, now[name]) for name, value in router._stored[f"task_{k}"].items())
    plain, alone = module(), fitter()
    fit(tmp_path, alone, plain, 0)
    assert not all(torch.equal(v, router._stored["task_0"][n]) for n, v in alone._stored["task_0"].items())
    trainer = models.trainer(tmp_path, callbacks=[fitter(), LoRAInterpolator()])
    with pytest.raises(MisconfigurationException, match=r"`LoRAInterpolator` comes after `RLSRouterFitter`"):
        trainer.fit(module(), tools.loader(0))


def test_routing_accuracy_goes_to_the_logger_and_is_no_score_of_a_task(tmp_path):
    data = TaskStream([Task("t0", train=TaskRows(0), val=TaskRows(0, rows=4))], batch_size=4, collate_fn=models.collate)
    lm, router, logger = module(), fitter(), CSVLogger(tmp_path)
    trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1, logger=logger)
    matrix = fit_stream(trainer, lm, data)
    assert matrix.compute()["average"] is not None
    assert "cl/routing_accuracy" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "cl/routing_accuracy" not in trainer.callback_metrics


def test_general_class_without_general_samples_and_memories_are_refused(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="`general_class=True` of `RLSRouterFitter` learns from replayed"
    ):
        fit(tmp_path, fitter(general_class=True), module(), 0)
    memory = ReplayMixer(EpisodicMemory(4))
    with pytest.raises(MisconfigurationException, match="`EpisodicMemory` would train each task's adapter on the rows"):
        fit(tmp_path, fitter(), module(), 0, callbacks=[memory])


# ---------------------------------------------------------------------- evaluation


def stream(tasks: int = 3) -> TaskStream:
    return TaskStream(
        [
            Task(f"t{k}", train=TaskRows(k), val=TaskRows(k, rows=6, seed=3), test=TaskRows(k, rows=6, seed=4))
            for k in range(tasks)
        ],
        batch_size=4,
        collate_fn=models.collate,
    )


def test_fit_stream_evaluates_routed_oracle_and_base_side_by_side(tmp_path):
    lm, router, data = module(), fitter(), stream()
    trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1)
    matrix = fit_stream(trainer, lm, data)
    assert matrix is not None
    assert sorted(router.confusion.stages) == [0, 1, 2]
    assert router.confusion.accuracy() == 1.0
    assert router.confusion.table(2).splitlines()[2].startswith("| t0 | 6 | 0 | 0 |")
    assert [c.name for c in router.router.classes] == ["t0", "t1", "t2"]
    lm.test_step = lambda batch, batch_idx, dataloader_idx=0: lm.log("test_loss", lm.model(**batch).loss, batch_size=6)
    scores = router.side_by_side(trainer, lm, data)
    scores = {mode: torch.tensor([row[f"t{k}"] for k in range(3)]) for mode, row in scores.items()}
    assert set(router.confusion.state_dict()["scores"]) == {"routed", "oracle", "base"}
    assert torch.equal(scores["routed"], scores["oracle"])
    assert bool((scores["routed"] < scores["base"]).all())
    with lm.model.disable_adapter():
        lm.eval()
        rows = models.collate([TaskRows(0, rows=6, seed=4)[i] for i in range(6)])
        with torch.no_grad():
            expected = lm.model(**rows).loss
    assert scores["base"][0] == pytest.approx(float(expected), abs=1e-2)


def test_validation_in_the_middle_of_a_task_uses_what_was_seen_so_far(tmp_path):
    lm, router, seen = module(), fitter(), []

    class Spy(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((router.routed.last.adapters, router._statistics.rows_in_task))

        def on_train_batch_end(self, *args: Any) -> None:
            assert not router.routed.enabled

    fit(tmp_path, router, lm, 0)
    trainer = models.trainer(tmp_path, callbacks=[router, Spy()], max_epochs=1, max_steps=-1, val_check_interval=2)
    trainer.fit(lm, tools.loader(1), DataLoader(TaskRows(1, rows=4, seed=3), batch_size=4, collate_fn=models.collate))
    assert [count for _, count in seen] == [8, 16]
    assert all(adapters == ["task_1"] * 4 for adapters, _ in seen)
    undisturbed, other = fitter(), module()
    for task in range(2):
        fit(tmp_path, undisturbed, other, task)
    assert torch.equal(undisturbed.router.weight, router.router.weight)


def test_predict_and_min_margin(tmp_path):
    class Predicts(models.PlainLM):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().mean(-1)
            )

    lm, router = Predicts(module().model), fitter(min_margin=50.0)
    for task in range(2):
        fit(tmp_path, router, lm, task)
    rows = DataLoader(
        [TaskRows(k, seed=3)[i] for i in range(2) for k in range(2)], batch_size=4, collate_fn=models.collate
    )
    trainer = models.trainer(tmp_path, callbacks=[router])
    base = trainer.predict(lm, rows)[0]
    assert router.routed.last.adapters == ["__base__"] * 4
    router.min_margin = None
    routed = trainer.predict(lm, rows)[0]
    assert router.routed.last.adapters == ["task_0", "task_1"] * 2
    assert not torch.equal(base, routed)
    with router.evaluating_with("base"):
        assert torch.equal(trainer.predict(lm, rows)[0], base)
    with router.routed.given("task_1"):
        first = trainer.predict(lm, rows)[0]
    assert not torch.equal(first, routed)
    assert torch.equal(trainer.predict(lm, rows)[0], routed)
    router.evaluate_with = "oracle"
    with pytest.raises(
        MisconfigurationException, match="`evaluate_with='oracle'` needs to know the task of each loader"
    ):
        trainer.predict(lm, rows)


# ---------------------------------------------------------------------- modules without LoRA


class CNN(pl.LightningModule):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
        )
        self.net[0].requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images(task: int, rows: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(task)
    pixels = torch.randn(rows, 1, 8, 8, generator=generator) * 0.1 + torch.linspace(0, 1, 8) * (1 if task else -1)
    return TensorDataset(pixels, torch.randint(2, (rows,), generator=generator))


def test_a_cnn_gets_the_router_alone(tmp_path, recwarn):
    net, router = CNN(frozen=True), fitter()
    for task in range(2):
        trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1)
        trainer.fit(net, DataLoader(images(task), batch_size=4))
    assert router._statistics.total.counts.tolist() == [16, 16]
    assert not any("are trained, so the features" in str(w.message) for w in recwarn)
    net.train()
    found = router.route(images(0)[0][0][None])
    assert found.names == ["task 0"]
    assert router.route(list(images(1)[:4])).names == ["task 1"] * 4
    assert net.training
    with pytest.raises(RuntimeError, match="There is nothing to export"):
        router.export(tmp_path)


def test_features_that_move_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"'net\.0' and 0 other modules at or below the feature layer 'net\.0'"):
        models.trainer(tmp_path, callbacks=[fitter()]).fit(CNN(frozen=False), DataLoader(images(0), batch_size=4))


# ---------------------------------------------------------------------- state


def run_until(tmp_path: Any, kill_at: int | None) -> tuple[Any, Any, Any]:
    """Task 0, then task 1 in a new process's objects, killed after ``kill_at`` steps and resumed in newer ones."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    lm, router = module(), fitter(ridge="auto")
    fit(tmp_path, router, lm, 0)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 2, "max_steps": -1, "enable_checkpointing": True}

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == kill_at:
                raise KeyboardInterrupt

    trainer = models.trainer(tmp_path, callbacks=[router, saver, Kill()], **settings)
    if kill_at is None:
        trainer.fit(lm, tools.loader(1, cls=StatefulDataLoader))
        return lm, router, trainer
    with pytest.raises(SystemExit):
        trainer.fit(lm, tools.loader(1, cls=StatefulDataLoader))
    again, newer = module(), fitter(ridge="auto")
    saver = ModelCheckpoint(tmp_path / "resumed")
    trainer = models.trainer(tmp_path, callbacks=[newer, saver], **settings)
    trainer.fit(again, tools.loader(1, cls=StatefulDataLoader), ckpt_path=tmp_path / f"step={kill_at - 1}.ckpt")
    return again, newer, trainer


def test_killed_anywhere_and_resumed_to_the_bit(tmp_path):
    whole_lm, whole, _ = run_until(tmp_path / "whole", None)
    for at in (2, 4, 6):  # from a checkpoint early in the first epoch, late in it, and in the second
        lm, router, _ = run_until(tmp_path / str(at), at)
        assert router.task_index == 2
        assert torch.equal(router.router.weight, whole.router.weight)
        assert router._statistics.total.counts.tolist() == [16, 16]
        for k in range(2):
            expected = whole._bank.snapshot(f"task_{k}")
            assert all(torch.equal(v, expected[n]) for n, v in router._bank.snapshot(f"task_{k}").items())
        assert routes(router, lm)[:2] == routes(whole, whole_lm)[:2]


def test_a_stream_resumed_from_a_tasks_end_is_the_unbroken_one(tmp_path):
    def run(folder: Any, ckpt_path: Any = None) -> tuple[Any, Any]:
        lm, router = module(), fitter()
        trainer = models.trainer(folder, callbacks=[router], max_epochs=1, max_steps=-1, enable_checkpointing=True)
        matrix = fit_stream(trainer, lm, stream(2), ckpt_path=ckpt_path)
        return router, matrix

    whole, matrix = run(tmp_path)
    end = next(tmp_path.glob("**/task_0_t0/task_end.ckpt"))
    resumed, again = run(tmp_path, ckpt_path=end)
    assert torch.equal(resumed.router.weight, whole.router.weight)
    assert resumed._statistics.total.counts.tolist() == [16, 16]
    for k in range(2):
        expected = whole._bank.snapshot(f"task_{k}")
        assert all(torch.equal(v, expected[n]) for n, v in resumed._bank.snapshot(f"task_{k}").items())
    assert again.compute()["average"] == matrix.compute()["average"]
    assert resumed.confusion.stages == whole.confusion.stages


@pytest.mark.parametrize("strategy", ["auto", "cl_single_device"])
def test_a_checkpoint_alone_is_enough_to_validate_and_to_go_on(tmp_path, strategy):
    lm, router = module(), fitter()
    for task in range(2):
        trainer = fit(tmp_path, router, lm, task, strategy=strategy)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    scores = trainer.validate(lm, tools.loader(0), verbose=False)
    fresh, new = module(), fitter()
    trainer = models.trainer(tmp_path, callbacks=[new], strategy=strategy)
    assert trainer.validate(fresh, tools.loader(0), ckpt_path=tmp_path / "two.ckpt", verbose=False) == scores
    assert torch.equal(new.router.weight, router.router.weight)
    # The same callback with another module: its adapters are written into that one.
    third = module()
    fit(tmp_path, router, third, 2, strategy=strategy)
    for k in range(2):
        for name, value in router._bank.snapshot(f"task_{k}").items():
            assert torch.equal(value, dict(lm.model.named_parameters())[name])
    assert routes(router, third) == EXPECTED
    content = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert any("router" in state for state in content.values() if isinstance(state, dict))


def test_a_checkpoint_from_before_the_callback_loads(tmp_path):
    lm, router = module(), fitter()
    router.load_state_dict({})
    fit(tmp_path, router, lm, 0)
    assert router.task_index == 1


def test_export_serves_what_was_trained(tmp_path):
    lm, router = module(), fitter()
    for task in range(3):
        fit(tmp_path, router, lm, task)
    router.export(tmp_path / "served")
    batch = mixed()
    lm.eval()
    served = load_routed(models.tiny_llama(num_hidden_layers=3), tmp_path / "served")
    with torch.no_grad():
        assert torch.equal(served(**batch).logits, lm.model(**batch).logits)
    assert served.routed.last.adapters == EXPECTED


def test_an_exception_leaves_no_training_hook(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop here")

    lm, router = module(), fitter()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, router, lm, 0, callbacks=[Stop()])
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in lm.modules())
    fit(tmp_path, router, lm, 0)  # and the task is started again
    assert router._statistics.total.counts.tolist() == [16]


def test_networks_built_in_configure_model(tmp_path):
    class Late(models.PlainLM):
        def __init__(self) -> None:
            super().__init__(None)

        def configure_model(self) -> None:
            if self.model is None:
                self.model = module().model

    lm, router = Late(), fitter()
    for task in range(2):
        fit(tmp_path, router, lm, task)
    assert routes(router, lm)[:2] == ["task_0", "task_1"]
    assert "configure_model" not in vars(lm)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expansion_dim": 0}, "`expansion_dim=0` of `RLSRouterFitter` leaves no features"),
        ({"ridge": 0.0}, r"`ridge=0\.0` of `RLSRouterFitter`: the router's system needs a ridge above 0"),
        ({"ridge": -1.0}, r"`ridge=-1\.0` of `RLSRouterFitter`"),
        ({"ridge": "best"}, "`ridge='best'` of `RLSRouterFitter`"),
        ({"min_margin": -0.1}, r"`min_margin=-0\.1` of `RLSRouterFitter` can never be undercut"),
        ({"max_tasks": 0}, "`max_tasks=0` of `RLSRouterFitter` allocates no adapter"),
        ({"evaluate_with": "best"}, "`evaluate_with='best'` of `RLSRouterFitter` is unknown"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        RLSRouterFitter(**arguments)


def test_bad_models_and_tasks_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'model\.layers\.9'"):
        fit(tmp_path, fitter(feature_layer="model.layers.9"), module(), 0)
    with pytest.raises(MisconfigurationException, match=r"`layers_to_transform=\[0, 1, 2\]`"):
        fit(tmp_path, fitter(), module(layers_to_transform=[0, 1, 2]), 0)
    lm, router = module(), fitter(max_tasks=1)
    fit(tmp_path, router, lm, 0)
    with pytest.raises(MisconfigurationException, match=r"Task 1 \(the 2th\) has no adapter: `max_tasks=1`"):
        fit(tmp_path, router, lm, 1)
    trained = module()
    trained.model.get_base_model().model.embed_tokens.requires_grad_(True)
    with pytest.raises(
        MisconfigurationException, match=r"embed_tokens.* is at or below the feature layer .* is trained"
    ):
        fit(tmp_path, fitter(), trained, 0)
    head = module()
    head.model.get_base_model().lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters outside the adapters are trained .*lm_head"):
        fit(tmp_path, fitter(), head, 0)


def test_features_with_nan_and_layers_that_are_not_called_are_named(tmp_path):
    broken = module()
    broken.model.get_base_model().model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="Features hold NaN or infinity in 16 of 16 rows"):
        fit(tmp_path, fitter(), broken, 0)
    unused = module()
    unused.model.get_base_model().model.layers[0].spare = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(
        MisconfigurationException, match=r"No features of task 0 were seen: the feature layer '.*spare'"
    ):
        fit(tmp_path, fitter(feature_layer="spare"), unused, 0)


def test_use_before_a_fit_is_named():
    router = fitter()
    assert router.router is None
    with pytest.raises(RuntimeError, match="has seen no module yet"):
        router.route(mixed())
    with pytest.raises(MisconfigurationException, match="`evaluate_with='x'`"), router.evaluating_with("x"):
        pass


def test_route_before_the_first_task_has_ended(tmp_path):
    lm, router = module(), fitter()
    models.trainer(tmp_path, callbacks=[router]).validate(lm, tools.loader(0), verbose=False)
    with pytest.raises(RuntimeError, match="No task has ended yet, so there is no router"):
        router.route(mixed())


# ---------------------------------------------------------------------- many processes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Any:
    lm, router = module(), fitter()
    for task in range(3):
        fit(tmp_path_factory.mktemp("one"), router, lm, task, rows=tools.loader_of_two(task))
    return router._statistics.total, router.router.weight, tools.adapters(router)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    scenarios = [tools.ddp, tools.fsdp, tools.fsdp_4bit, tools.resumed, tools.resumed_sharded, tools.stream]
    spawn.run(run_scenarios, 2, folder, scenarios)
    return spawn.load(folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_4bit"])
def test_three_tasks_in_two_processes_are_those_of_one(two_processes, one_process, strategy):
    first, second = result(two_processes, strategy)
    assert torch.equal(first["weight"], second["weight"])
    assert first["counts"].tolist() == [16, 16, 16]
    assert first["routes"] == second["routes"] == first["route"] == EXPECTED
    torch.testing.assert_close(first["logits"], second["logits"])
    for name, value in first["adapters"].items():
        assert torch.equal(value, second["adapters"][name])
    for k in range(3):
        stored = first["stored"][f"task_{k}"]
        assert all(torch.equal(value, first["adapters"][name]) for name, value in stored.items())
        assert all(bool(value.any()) for name, value in stored.items() if "lora_B" in name)
    if strategy != "ddp":  # adapters of the third task are shards of their block's group
        assert len(first["sharded"]) == len(first["stored"]["task_2"])
    if strategy == "fsdp_4bit":  # the forward pass reads rounded weights, so the numbers are others
        assert first["quantized"] > 0
        return
    total, weight, adapters = one_process
    for name, value in first["adapters"].items():
        torch.testing.assert_close(value, adapters[name], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(first["gram"], total.gram, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(first["weight"], weight, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("form", ["resumed", "resumed_sharded"])
def test_resumed_in_the_middle_of_a_task_under_fsdp2(two_processes, form):
    for found in result(two_processes, form):
        assert found["counts"] == [16, 16]
        assert torch.equal(*found["weights"])
        assert all(torch.equal(value, found["again"][name]) for name, value in found["whole"].items())


def test_a_stream_under_fsdp2_allocates_its_adapters_ahead(two_processes):
    first, second = result(two_processes, "stream")
    assert first["names"] == ["task_0", "task_1", "task_2"]
    assert first["stages"] == second["stages"]
    last = first["stages"][2]
    assert {task: row.get(task, 0) for task, row in last.items()} == {f"t{k}": 6 for k in range(3)}
    assert all(torch.equal(value, second["adapters"][name]) for name, value in first["adapters"].items())


def test_a_task_too_many_for_a_sharded_model_and_fsdp1_are_refused(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    lm, router = module(), fitter()
    fit(tmp_path, router, lm, 0)
    monkeypatch.setattr("lightning_cl.weights.is_sharded", lambda part: True)
    with pytest.raises(MisconfigurationException, match="sharded already and has 1 adapters, so 'task_1'"):
        fit(tmp_path, router, lm, 1)
    trainer = models.trainer(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # which refuses to run on a CPU
    with pytest.raises(MisconfigurationException, match=r"`FSDPStrategy` flattens all adapters of a block"):
        fitter()._prepare(trainer, module())


def test_prompt_mask_is_what_the_fit_uses():
    batch = mixed()
    assert int(prompt_mask(batch["attention_mask"], batch["labels"]).sum()) == int(
        ((batch["labels"] == -100) & batch["attention_mask"].bool()).sum()
    )


def test_the_cards_example_runs(capsys):
    card = (Path(__file__).parents[2] / "callbacks" / "rls_router_fitter.md").read_text()
    assert Path(__file__).parents[2].joinpath("tests/callbacks/test_rls_router_fitter.py").is_file()
    exec(compile(card.split("```python\n")[1].split("```")[0], "rls_router_fitter.md", "exec"), {"__name__": "card"})
    assert "['task_1', 'task_0', 'task_1']" in capsys.readouterr().out


def test_the_cards_table_names_every_argument_and_its_default():
    card = (Path(__file__).parents[2] / "callbacks" / "rls_router_fitter.md").read_text()
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("| `")]
    shown = {row[0].strip(" `"): row[3].strip(" `") for row in rows}
    arguments = inspect.signature(RLSRouterFitter).parameters
    assert list(shown) == list(arguments)
    for name, parameter in arguments.items():
        default = parameter.default
        assert shown[name].strip('"') == ("none" if default is None else str(default))
