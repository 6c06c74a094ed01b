# SPDX-License-Identifier: Apache-2.0
"""The margin regularizer in real runs: against a naive float32 form, over tasks and restarts, and every refusal."""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
from lightning_cl.replay.collecting import weights_fingerprint
from lightning_cl.replay.state_store import StateStore, StoreError
from lightning_cl.weights import adapters_disabled
from tests.helpers import models

ROWS = models.TokenRows(6, length=11, seed=5, ragged=True).rows


class Recorder(ActivationMarginRegularizer):
    """Keeps what each step's term was given and gave."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Any]] = []

    def _term(self, step: Any) -> Tensor | None:
        value = super()._term(step)
        hidden = {name: h.detach().clone() for name, h in step.activations.items()}
        if step.replay.count:
            self.steps.append(
                {"ids": step.replay.ids, "hidden": hidden, "mask": step.replay.token_mask, "value": value}
            )
        return value


def source(rows: Any = ROWS, **kwargs: Any) -> GeneralSamples:
    return GeneralSamples(rows, num_samples=len(rows), **kwargs)


def module(lora: bool = False, seed: int = 0, **kwargs: Any) -> models.PlainLM:
    network = models.tiny_llama(seed)
    return models.PlainLM(models.lora(network) if lora else network, **{"lr": 0.5, **kwargs})


def fit(
    folder: Any,
    callback: Callback,
    net: pl.LightningModule | None = None,
    mixer: ReplayMixer | None = None,
    data: Any = None,
    ckpt: Any = None,
    more: tuple[Callback, ...] = (),
    **kwargs: Any,
) -> pl.LightningModule:
    net = net or module()
    mixer = mixer or ReplayMixer(source(), rows_per_batch=2)
    trainer = models.trainer(folder, callbacks=[mixer, callback, *more], **kwargs)
    trainer.fit(net, data or models.loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return net


def references(network: Any, layer: str = "norm") -> dict[str, Tensor]:
    """Each row's float32 activations, one unpadded row at a time."""
    found: dict[str, Tensor] = {}
    backbone = network.get_base_model().model if hasattr(network, "get_base_model") else network.model
    part = backbone.get_submodule(layer)
    chosen = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        for i in chosen:
            outputs: list[Any] = []
            handle = part.register_forward_hook(lambda _m, _a, out, o=outputs: o.append(out))
            backbone.eval()(ROWS[i]["input_ids"][None])
            handle.remove()
            out = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            found[f"GeneralSamples:{i}"] = out.reshape(-1, out.shape[-1])
    return found


def naive(
    step: dict[str, Any], layer: str, h0: dict[str, Tensor], objective: str, reduction: str, skip: bool
) -> Tensor:
    """The term as the paper writes it, row by row and token by token, in float64."""
    tokens = torch.cat([h[1:] if skip else h for h in h0.values()]).double()
    mean, sd = tokens.mean(0), tokens.std(0, correction=0)
    lower, upper = (mean - sd).float().double(), (mean + sd).float().double()
    parts = []
    for row, key in enumerate(step["ids"]):
        n = len(h0[key])
        assert int(step["mask"][row].sum()) == n
        h, r = step["hidden"][layer][row, :n].double(), h0[key].double()
        if objective == "l1":
            m = (h - r).abs()
        elif objective == "l2":
            m = (h - r) ** 2
        else:
            inside = (h - upper).clamp_min(0) + (lower - h).clamp_min(0)
            m = torch.where(r <= lower, (h - lower).clamp_min(0), inside)
            m = torch.where(r >= upper, (upper - h).clamp_min(0), m)
        parts.append(m[1:] if skip else m)
    entries = torch.cat(parts)
    return entries.sum() / ((entries != 0).sum() + 1e-8 if reduction == "violations" else entries.numel())


@pytest.mark.parametrize(
    ("kwargs", "lora", "layout"),
    [
        ({}, False, "auto"),
        ({}, True, "joined"),
        ({"reduction": "mean"}, False, "joined"),
        ({"objective": "l1"}, False, "joined"),
        ({"objective": "l2"}, True, "separate"),
        ({"skip_first_token": True}, False, "joined"),
        ({"skip_first_token": True, "reduction": "mean", "collect_batch_size": 1}, False, "separate"),
        ({"reference": "recompute"}, True, "joined"),
        ({"reference": "recompute", "objective": "l2"}, True, "separate"),
        ({"reference": "recompute", "skip_first_token": True}, False, "joined"),
        ({"layers": "layers.0"}, False, "joined"),
    ],
)
def test_equals_the_naive_form_in_every_step(tmp_path: Path, kwargs: dict[str, Any], lora: bool, layout: Any) -> None:
    callback, net = Recorder(weight=3.0, **kwargs), module(lora)
    layer = "layers.0" if "layers" in kwargs else "norm"
    context = adapters_disabled(net)
    with context:
        h0 = references(copy.deepcopy(net.model), layer)
    fit(tmp_path, callback, net, ReplayMixer(source(), rows_per_batch=2, layout=layout), max_steps=5)
    assert len(callback.steps) == 5
    name = callback._watched[0]
    for step in callback.steps:
        want = naive(
            step,
            name,
            h0,
            kwargs.get("objective", "margin"),
            kwargs.get("reduction", "violations" if "objective" not in kwargs else "mean"),
            kwargs.get("skip_first_token", False),
        )
        # imitation is stored in bfloat16
        tolerance = 2e-2 if "objective" in kwargs and "reference" not in kwargs else 2e-5
        assert float(step["value"].detach()) == pytest.approx(3.0 * float(want), rel=tolerance, abs=tolerance)
    assert float(callback.steps[-1]["value"].detach()) > 0


def test_several_layers_are_averaged(tmp_path: Path) -> None:
    callback, net = Recorder(layers=["model.model.layers.1", "final_norm"]), module()
    h0 = {name: references(copy.deepcopy(net.model), name) for name in ("layers.1", "norm")}
    fit(tmp_path, callback, net)
    assert callback._watched == ["model.model.layers.1", "model.model.norm"]
    for step in callback.steps:
        parts = [naive(step, f"model.model.{n}", h0[n], "margin", "violations", False) for n in h0]
        assert float(step["value"].detach()) == pytest.approx(float(sum(parts)) / 2, rel=1e-4, abs=1e-6)


def test_stored_and_recomputed_references_train_alike(tmp_path: Path) -> None:
    stored = fit(tmp_path, ActivationMarginRegularizer(weight=5.0), module(lora=True))
    recomputed = fit(tmp_path, ActivationMarginRegularizer(weight=5.0, reference="recompute"), module(lora=True))
    plain = fit(tmp_path, ActivationMarginRegularizer(weight=0.0), module(lora=True))
    for a, b, c in zip(stored.parameters(), recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert not a.requires_grad or not torch.equal(a, c)


def test_the_run_is_left_as_it_was_by_collecting(tmp_path: Path) -> None:
    class Before(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.random = torch.rand(1).item()
            self.training = all(part.training for part in pl_module.modules())
            self.values = {k: v.clone() for k, v in pl_module.state_dict().items()}
            trainer.should_stop = True

    seen = []
    for callback in (ActivationMarginRegularizer(), ActivationMarginRegularizer(weight=0.0, reference="recompute")):
        torch.manual_seed(7)
        before = Before()
        net = module()
        hooks = {name: len(part._forward_hooks) for name, part in net.named_modules()}
        fit(tmp_path, callback, net, more=(before,), max_steps=1)
        assert before.training
        assert hooks == {name: len(part._forward_hooks) for name, part in net.named_modules()}
        assert "log" not in vars(net)
        seen.append(before)
    assert seen[0].random == seen[1].random
    initial = module().state_dict()
    assert all(torch.equal(v, initial[k]) for k, v in seen[0].values.items())


def test_every_row_runs_once_through_the_network(tmp_path: Path) -> None:
    net, counted = module(), []
    net.model.model.register_forward_pre_hook(
        lambda part, args, kwargs: counted.append(kwargs["input_ids"].shape) if not part.training else None,
        with_kwargs=True,
    )
    head = []
    net.model.lm_head.register_forward_pre_hook(
        lambda part, args: head.append(args[0].shape[1]) if not part.training else None
    )
    fit(tmp_path, ActivationMarginRegularizer(collect_batch_size=4), net)
    assert sorted(shape[0] for shape in counted) == [2, 4]
    # rows of like length share a batch, and the head sees one token of each
    lengths = sorted((len(r["input_ids"]) for r in ROWS), reverse=True)
    assert [shape[1] for shape in counted] == [lengths[0], lengths[4]]
    assert head == [1, 1]


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
    ],
)
def test_a_store_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = str(tmp_path / "states")
    fit(tmp_path, ActivationMarginRegularizer(store=path), max_steps=1)
    net = module(**change.pop("net", {}))
    mixer = ReplayMixer(source(**change.pop("rows", {})))
    trainer = {"precision": change.pop("precision")} if "precision" in change else {}
    remedy = r".*wrong reference. Delete .*states to take them anew.*`allow_other_model=True`"
    with pytest.raises(StoreError, match=message + remedy):
        fit(tmp_path, ActivationMarginRegularizer(store=path, **change), net, mixer, **trainer)
    assert Path(path).exists()


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


# ------------------------------------------------------------------------------- the weight


def logged(folder: Path, callback: ActivationMarginRegularizer, **kwargs: Any) -> dict[str, list[float]]:
    class Keep(Callback):
        values: dict[str, list[float]] = {}  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            for key, value in trainer.callback_metrics.items():
                self.values.setdefault(key, []).append(float(value))

    keep = Keep()
    keep.values = {}
    fit(folder, callback, more=(keep,), **kwargs)
    return keep.values


def test_dynamic_weight_is_the_ratio_of_the_losses_and_clamped(tmp_path: Path) -> None:
    free = logged(tmp_path, ActivationMarginRegularizer(weight="dynamic", max_weight=1e6))
    for weight, loss, total in zip(
        free["cl/activation_margin_weight"][1:],
        free["cl/activation_margin_loss"][1:],
        free["cl/activation_margin"][1:],
        strict=True,
    ):
        assert total == pytest.approx(weight * loss, rel=1e-5)
    # at weight = task loss / margin loss the term is as large as the task's loss
    assert free["cl/activation_margin_ratio"][1:] == pytest.approx([1.0] * 3, rel=1e-4)
    clamped = logged(tmp_path, ActivationMarginRegularizer(weight="dynamic", max_weight=2.0))
    assert max(clamped["cl/activation_margin_weight"]) == 2.0


def test_target_is_held(tmp_path: Path) -> None:
    tails = {}
    for name, chosen in (("free", {"weight": 1e-3}), ("held", {"target": 0.05, "max_weight": 1e3})):
        callback = ActivationMarginRegularizer(reduction="mean", **chosen)
        net = module(lr=0.01, optimizer="adamw")
        values = logged(tmp_path, callback, net=net, data=models.loader(rows=64), max_steps=100)
        losses = values.get("cl/activation_margin_loss") or [v / 1e-3 for v in values["cl/activation_margin"]]
        tails[name] = sum(losses[-15:]) / 15
    assert tails["free"] > 4 * 0.05
    assert tails["held"] == pytest.approx(0.05, rel=0.5)
    assert max(values["cl/activation_margin_weight"]) > 10.0


def test_a_target_out_of_reach_is_reported(tmp_path: Path) -> None:
    callback = ActivationMarginRegularizer(target=1e-6, max_weight=1.5)
    with pytest.warns(
        UserWarning, match=r"`ActivationMarginRegularizer\(target=1e-06\)` was not met: the loss ended at"
    ):
        fit(tmp_path, callback)


def test_weight_in_the_gradient(tmp_path: Path) -> None:
    """The step with weight w moves the weights by w times the step that the margin alone makes, plus the task's."""
    moved = []
    for weight in (0.0, 1.0, 3.0):
        net = module(seed=1)
        callback = ActivationMarginRegularizer(weight=weight, reduction="mean", anchor="initial", layers="layers.0")
        fit(tmp_path, callback, net, max_steps=2)
        moved.append(net.model.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert not torch.equal(moved[0], moved[1])
    first = (moved[1] - moved[0]).norm()
    assert float((moved[2] - moved[0]).norm() / first) == pytest.approx(3.0, rel=0.1)


# ------------------------------------------------------------------------------- other modules


class Vectors(pl.LightningModule):
    """Rows of numbers with integer labels, in tuples; nothing of a language model."""

    def __init__(self, manual: bool = False, tokens: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2))
            self.head = nn.Linear(7, 3)
        self.automatic_optimization = not manual
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden.mean(1) if self.tokens else hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x * 2.0 if self.automatic_optimization else x), y)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n: int, shape: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, *shape, generator=generator)
        self.y = torch.randint(0, 3, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_any_module_with_a_layer_of_rows(tmp_path: Path, manual: bool, tokens: bool) -> None:
    shape = (4, 5) if tokens else (5,)
    data = torch.utils.data.DataLoader(Pairs(16, shape, 0), batch_size=4)
    general = Pairs(6, shape, 1)
    callback, net = Recorder(layers="body.1"), Vectors(manual, tokens)
    h0 = net.body[:2](general.x * (1.0 if manual else 2.0)).detach()
    fit(tmp_path, callback, net, ReplayMixer(GeneralSamples(general, num_samples=6), rows_per_batch=2), data)
    flat = h0.reshape(-1, 7).double()
    mean, sd = flat.mean(0), flat.std(0, correction=0)
    (layer,) = callback._reference.states.layers.values()
    assert torch.allclose(layer.thresholds.double(), torch.stack([mean - sd, mean + sd]), atol=1e-6)
    assert callback._reference.states.tokens(callback._reference.states.rows[0]) == (4 if tokens else 1)
    assert len(callback.steps) == 4
    assert float(callback.steps[0]["value"].detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(callback.steps[-1]["value"].detach()) > 0


def test_rows_of_other_sources_carry_no_states(tmp_path: Path) -> None:
    mixer = ReplayMixer([source(), EpisodicMemory(8)], rows_per_batch=4)
    callback, net = Recorder(), module()
    h0 = references(copy.deepcopy(net.model))
    for task in range(2):
        fit(tmp_path, callback, net, mixer, models.loader(seed=task))
    mixed = [s for s in callback.steps if any(i.startswith("EpisodicMemory") for i in s["ids"])]
    assert mixed
    for step in mixed:
        keep = [i for i, key in enumerate(step["ids"]) if key in h0]
        assert 0 < len(keep) < len(step["ids"])
        general = {
            "ids": [step["ids"][i] for i in keep],
            "mask": step["mask"][keep],
            "hidden": {k: v[keep] for k, v in step["hidden"].items()},
        }
        want = naive(general, "model.model.norm", h0, "margin", "violations", False)
        assert float(step["value"].detach()) == pytest.approx(float(want), rel=1e-4)


def test_packed_batches_give_the_same_terms(tmp_path: Path) -> None:
    def pack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([row["input_ids"] for row in rows])[None]
        labels = ids.clone()
        lengths = [len(row["input_ids"]) for row in rows]
        labels[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}

    terms = []
    for collate in (models.collate, pack):
        callback = Recorder(layers=["layers.0", "final_norm"])
        data = torch.utils.data.DataLoader(models.TokenRows(16), 4, collate_fn=collate)
        net = models.PlainLM(models.tiny_llama(use_cache=False), lr=0.1)
        fit(tmp_path, callback, net, ReplayMixer(source(), rows_per_batch=2, layout="joined"), data)
        terms.append([float(step["value"].detach()) for step in callback.steps])
    assert terms[0] == pytest.approx(terms[1], rel=2e-3, abs=1e-5)
    assert terms[0][-1] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(tmp_path: Path, precision: Any) -> None:
    callback = Recorder(weight=2.0)
    fit(tmp_path, callback, precision=precision, mixer=ReplayMixer(source(), rows_per_batch=2, layout="joined"))
    assert callback._reference.states.manifest["dtype"].endswith(f"precision {precision}")
    values = [float(step["value"].detach()) for step in callback.steps]
    assert all(step["value"].dtype == torch.float32 for step in callback.steps)
    # rows in other company round differently: a few activations beside a threshold are off it by as little
    assert values[0] < 0.1
    assert values[-1] > values[0]


FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": {},
    "Cohere": {},
    "Falcon": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {},
    "Gemma3Text": {"head_dim": 8},
    "Mamba": {},
    "Mistral": {},
    "OPT": {},
    "Olmo2": {},
    "Phi3": {},
    "Qwen3": {},
    "Qwen3Moe": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_families(tmp_path: Path, family: str) -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 64, **shape, **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config).float()
    # what the head reads is what is held
    read: list[Tensor] = []
    network.get_output_embeddings().register_forward_pre_hook(lambda part, args: read.append(args[0].detach()))
    callback = Recorder()
    mixer = ReplayMixer(source(), rows_per_batch=2, layout="joined")
    fit(tmp_path, callback, models.PlainLM(network, lr=0.1), mixer, max_steps=2)
    (hidden,) = callback.steps[-1]["hidden"].values()
    assert torch.equal(read[-1][-2:, : hidden.shape[1]], hidden)
    assert [float(step["value"].detach()) for step in callback.steps] == pytest.approx([0.0, 0.5], abs=0.5)


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


@pytest.mark.slow
def test_compiled_network(tmp_path: Path) -> None:
    values = []
    for compiled in (False, True):
        callback, net = Recorder(), module(lr=0.1)
        if compiled:
            net.model.compile(backend="eager")
        fit(tmp_path, callback, net, ReplayMixer(source(), rows_per_batch=2, layout="joined"))
        values.append([float(step["value"].detach()) for step in callback.steps])
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kwargs", [{}, {"weight": "dynamic"}, {"target": 0.1, "reduction": "mean"}, {"objective": "l2"}]
)
def test_the_step_never_waits_for_the_gpu(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    class Strict(ActivationMarginRegularizer):
        calls = 0

        def _term(self, step: Any) -> Tensor | None:
            self.calls += 1
            # the first steps compile, and compare the rows' lengths with the stored ones once
            torch.cuda.set_sync_debug_mode("error" if self.calls > 2 else "default")
            try:
                return super()._term(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    callback = Strict(**kwargs)
    fit(tmp_path, callback, accelerator="gpu", max_steps=6, data=models.loader(rows=32))
    assert callback.calls == 6


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_std": 0}, r"`num_std=0`: the thresholds are"),
        ({"num_std": -1.0}, r"`num_std=-1.0`"),
        ({"weight": -1.0}, r"weight=-1.0\)`: the factor of a loss must be a finite number >= 0"),
        ({"weight": "auto"}, r"weight='auto'\)`"),
        ({"weight": "dynamic", "target": 0.1}, r"both set the weight"),
        ({"target": -0.1}, r"`target=-0.1`: a penalty"),
        ({"max_weight": 0.0}, r"max_weight=0.0\)`: the bound of the weight"),
        ({"layers": []}, r"layers=\[\]\)`: name at least one layer"),
        ({"objective": "l3"}, r"objective='l3'\)`: use one of \['margin', 'l1', 'l2'\]"),
        ({"reference": "live"}, r"reference='live'"),
        ({"anchor": "auto"}, r"anchor='auto'\)`: use one of \['initial', 'previous_task'\]"),
        ({"reduction": "sum"}, r"reduction='sum'"),
        ({"collect_batch_size": 0}, r"collect_batch_size=0\)`: at least 1"),
        ({"store": "x", "reference": "recompute"}, r"recomputed in each step is not stored"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationMarginRegularizer(**kwargs)


def stateful(seed: int) -> Any:
    """A loader that resumes in the middle of an epoch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(models.TokenRows(16, seed=seed), batch_size=4, collate_fn=models.collate)


def refused(folder: Path, message: str, callback: Callback, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(folder, callback, *args, **kwargs)


def test_no_replay_rows_in_the_run(tmp_path: Path) -> None:
    trainer = models.trainer(tmp_path, callbacks=[ActivationMarginRegularizer()])
    with pytest.raises(MisconfigurationException, match=r"no callback of this Trainer adds any. Add `ReplayMixer\("):
        trainer.fit(module(), models.loader())


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """What Lightning's strategy wraps the module in, on GPUs alone."""

    trainer = SimpleNamespace(strategy=SimpleNamespace(model=FullyShardedDataParallel()))
    with pytest.raises(MisconfigurationException, match=r"\(FSDP1\) the weights exist only inside .* Use FSDP2"):
        ActivationMarginRegularizer().on_task_start(trainer, module())


def test_a_layer_that_does_not_exist(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"No submodule is called 'model.norn'.*Closest names: .*norm",
        ActivationMarginRegularizer(layers="model.norn"),
    )


def test_no_source_with_fixed_rows(tmp_path: Path) -> None:
    message = r"none of the replay sources \['EpisodicMemory'\] has one. Add `GeneralSamples\(...\)`"
    refused(tmp_path, message, ActivationMarginRegularizer(), mixer=ReplayMixer(EpisodicMemory(4)))
    refused(tmp_path, message, ActivationMarginRegularizer(reference="recompute"), mixer=ReplayMixer(EpisodicMemory(4)))


def test_two_sources_with_the_same_ids(tmp_path: Path) -> None:
    other = source(models.TokenRows(6, seed=9).rows)
    refused(
        tmp_path,
        r"Two rows of the replay sources .* have the id 'GeneralSamples:\d'",
        ActivationMarginRegularizer(),
        mixer=ReplayMixer([source(), other]),
    )


class Images(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "conv",
            r"The watched module 'conv' put out a float32 tensor \[6, 2, 2, 2\] for 6 rows.*`\[rows, tokens, D\]`",
        ),
        ("unused", r"The watched module 'unused' put out nothing: it did not run"),
    ],
)
def test_a_layer_without_rows_and_hidden_dimension(tmp_path: Path, layer: str, message: str) -> None:
    data = torch.utils.data.DataLoader(Pairs(8, (1, 4, 4), 0), batch_size=4)
    mixer = ReplayMixer(GeneralSamples(Pairs(6, (1, 4, 4), 1), num_samples=6), rows_per_batch=2)
    refused(tmp_path, message, ActivationMarginRegularizer(layers=layer), Images(), mixer, data)


class Cutting(models.PlainLM):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({k: v[:, :5] for k, v in batch.items()}, batch_idx)


def test_rows_cut_in_training_step(tmp_path: Path) -> None:
    message = r"saw 5 tokens a row, the batch \d+: replay rows are cut differently than when the states were taken"
    refused(tmp_path, message, ActivationMarginRegularizer(), Cutting(models.tiny_llama()))


def test_rows_cut_differently_in_a_later_task(tmp_path: Path) -> None:
    callback, net = ActivationMarginRegularizer(), module()
    fit(tmp_path, callback, net)
    message = r"not those whose states were stored .*truncated differently \(`max_tokens`\).*Use the same rows"
    refused(tmp_path, message, callback, net, ReplayMixer(source(max_tokens=6)))


def test_rows_cut_differently_are_taken_anew_where_the_initial_model_is_at_hand(tmp_path: Path) -> None:
    callback, net = Recorder(), module(lora=True)
    fit(tmp_path, callback, net)
    fit(tmp_path, callback, net, ReplayMixer(source(max_tokens=6), rows_per_batch=2))
    fresh = ActivationMarginRegularizer()
    fit(tmp_path, fresh, module(lora=True), ReplayMixer(source(max_tokens=6)), max_steps=1)
    assert callback._reference.states.digest == fresh._reference.states.digest


def test_other_settings_after_a_restart(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, ActivationMarginRegularizer(), more=(saver,), enable_checkpointing=True, max_steps=2)
    refused(
        tmp_path,
        r"taken with other settings \(num_std: then 1.0, now 1.5\)",
        ActivationMarginRegularizer(num_std=1.5),
        ckpt=saver.best_model_path,
    )


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_restart_without_its_store(tmp_path: Path, what: str) -> None:
    path = tmp_path / "states"
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, ActivationMarginRegularizer(store=str(path)), more=(saver,), enable_checkpointing=True, max_steps=2)
    path.unlink()
    if what == "another":
        fit(tmp_path, ActivationMarginRegularizer(store=str(path)), module(seed=2), max_steps=1)
    message = "that are not at" if what == "gone" else "holds other activation states"
    refused(tmp_path, message, ActivationMarginRegularizer(store=str(path)), ckpt=saver.best_model_path)


def test_a_term_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    pl_module.model.model.norm.weight[3] = float("nan")

    with pytest.raises(RuntimeError, match=r"cl/activation_margin is not finite at batch 2, replay samples \[General"):
        fit(tmp_path, ActivationMarginRegularizer(), more=(Poison(),))


def test_self_generated_rows_are_held_to_the_model_that_made_them(tmp_path: Path) -> None:
    net = module(lora=True)
    net.tokenizer = models.tiny_tokenizer()
    mixer = ReplayMixer(SelfGenerated(pool_size=6, length=9), rows_per_batch=2)
    callback = Recorder(reference="recompute", objective="l2")
    fit(tmp_path, callback, net, mixer)
    assert float(callback.steps[0]["value"].detach()) > 0
    assert len(callback.steps) == 4


# ------------------------------------------------------------------------------------ fragment and card

CATALOGUE = Path(__file__).parents[2] / "callbacks"


def test_cards_snippet_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CATALOGUE / "activation_margin_regularizer.md").read_text()
    first = text.splitlines()[0]
    links = re.findall(r"\]\(([^)]+)\)", first)
    assert "../tests/callbacks/test_activation_margin_regularizer.py" in links
    for link in links:
        assert (CATALOGUE / link).is_file(), link
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet, "activation_margin_regularizer.md", "exec"), scope)
    assert scope["margin"].task_index == 2
    assert float(scope["trainer"].callback_metrics["cl/activation_margin"]) > 0


def test_card_names_every_argument() -> None:
    table = (CATALOGUE / "activation_margin_regularizer.md").read_text()
    for name in inspect.signature(ActivationMarginRegularizer).parameters:
        assert re.search(rf"^\| `{name}` \|", table, re.MULTILINE), name


def test_fragment_trains_in_a_stock_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    general = tmp_path / "examples" / "assets" / "general.jsonl"
    general.parent.mkdir(parents=True)
    general.write_text("".join(f'{{"text": "the {i}th text of all"}}\n' for i in range(8)))
    settings = {
        "max_steps": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [],
    }
    (tmp_path / "base.yaml").write_text(json.dumps({"trainer": settings}))
    fragment = str(CATALOGUE / "activation_margin_regularizer.yaml")
    monkeypatch.setattr("sys.argv", ["cli", "--config", "base.yaml", "--config", fragment])
    cli = LightningCLI(Speaking, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, models.loader())
    assert float(cli.trainer.callback_metrics["cl/activation_margin"]) > 0


class Speaking(models.PlainLM):
    def __init__(self) -> None:
        super().__init__(models.tiny_llama(), lr=0.5)
        self.tokenizer = models.tiny_tokenizer()


def test_every_argument_goes_through_yaml() -> None:
    from jsonargparse import ArgumentParser

    given = {
        "weight": "dynamic",
        "num_std": 0.5,
        "layers": ["final_norm", "model.layers.0"],
        "objective": "l1",
        "reference": "stored",
        "anchor": "previous_task",
        "reduction": "mean",
        "target": None,
        "max_weight": 7.0,
        "store": "states",
        "allow_other_model": True,
        "skip_first_token": True,
        "collect_batch_size": 3,
    }
    assert given.keys() == inspect.signature(ActivationMarginRegularizer).parameters.keys()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=ActivationMarginRegularizer)
    config = {"class_path": "lightning_cl.callbacks.ActivationMarginRegularizer", "init_args": given}
    parsed = parser.parse_object({"callback": config})
    again = parser.parse_string(parser.dump(parsed))
    callback = parser.instantiate_classes(again).callback
    for name, value in given.items():
        assert getattr(callback, name) == value, name
