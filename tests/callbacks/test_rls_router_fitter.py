# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer, RLSRouterFitter
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from lightning_cl.routing import Expansion
from lightning_cl.routing.features import prompt_mask
from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import DIM, TaskRows, fit, fitter, mixed, module
from tests.helpers import models


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
    assert tools.routes(router, lm) == tools.EXPECTED
    assert router.route(mixed()).adapters == tools.EXPECTED
    text = lm.model.generate(
        input_ids=mixed()["input_ids"][:, :4], attention_mask=torch.ones(6, 4, dtype=torch.long), max_new_tokens=2
    )
    assert text.shape == (6, 6)
    assert router.routed.last.adapters == tools.EXPECTED
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


@pytest.mark.parametrize(("instruction", "least"), [("own", 60), ("", 58), ("shared", 54), ("paraphrased", 54)])
def test_tasks_are_told_apart_without_an_instruction_of_their_own(tmp_path, instruction, least):
    """Templated prompts; the instruction removed; one instruction for all tasks, in one wording and in several."""
    lm, router = module(), fitter(expansion_dim=256, ridge="auto")
    for task in range(3):
        fit(tmp_path, router, lm, task, rows={"rows": 40, "instruction": instruction}, limit_train_batches=10)
    right = 0
    for task in range(3):
        test = models.collate([TaskRows(task, rows=20, instruction=instruction, seed=5)[i] for i in range(20)])
        right += router.route(test).adapters.count(f"task_{task}")
    assert right >= least
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


# ---------------------------------------------------------------------- its card


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
