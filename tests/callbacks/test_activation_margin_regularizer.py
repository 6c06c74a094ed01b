# SPDX-License-Identifier: Apache-2.0
"""The margin regularizer against a naive float32 form, in every kind of module, and what it promises."""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_cl.attachment import Attachment
from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.functional import activation_margin_loss, activation_thresholds, encode_activation_states
from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
from lightning_cl.weights import adapters_disabled
from tests.callbacks.margin_tools import (
    ROWS,
    Pairs,
    Recorder,
    fit,
    logged,
    module,
    naive,
    references,
    source,
)
from tests.helpers import models, waits


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


# ------------------------------------------------------------------------------- the weight


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
        values = logged(
            tmp_path, callback, net=net, data=models.loader(rows=64), max_steps=30 if name == "free" else 80
        )
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


def test_mean_is_exact_where_the_last_step_of_an_epoch_is_shorter(tmp_path: Path) -> None:
    callback = Recorder(reduction="mean")
    fit(
        tmp_path, callback, module(lr=0.1), ReplayMixer(source(), rows_per_batch=2), accumulate_grad_batches=3,
        max_steps=-1, max_epochs=1,
    )  # fmt: skip
    h0 = references(module().model)
    tokens = torch.cat(list(h0.values()))
    lower, upper = activation_thresholds(tokens)
    for window in (callback.steps[:3], callback.steps[3:]):
        total, entries = 0.0, 0
        for step in window:
            ((_, hidden),) = step["hidden"].items()
            for row, key in enumerate(step["ids"]):
                h, r = hidden[row, : len(h0[key])], h0[key]
                states = encode_activation_states(r, lower, upper)
                total += float(activation_margin_loss(h, states, lower, upper, reduction="sum"))
                entries += h.numel()
        # Lightning divides each batch's loss by the batches of a full step, also in the shorter one.
        assert sum(float(step["value"].detach()) for step in window) / 3 == pytest.approx(
            total / entries, rel=1e-4, abs=1e-7
        )
    assert [len(callback.steps[:3]), len(callback.steps[3:])] == [3, 1]


class Pooled(models.PlainLM):
    """Watched where each row has one activation, whatever its tokens."""

    def __init__(self, network: Any, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.pool = torch.nn.Linear(32, 6)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (output.hidden_states[-1] * mask).sum(1) / mask.sum(1)
        return output.loss + 0.0 * self.pool(mean).square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_activation_a_row_of_tokens(tmp_path: Path, accumulate: int) -> None:
    torch.manual_seed(3)
    callback, net = Recorder(layers="pool", reduction="mean"), Pooled(models.tiny_llama(), lr=0.3)
    fit(
        tmp_path, callback, net, ReplayMixer(source(), rows_per_batch=2, layout="joined"),
        accumulate_grad_batches=accumulate, max_steps=4 // accumulate,
    )  # fmt: skip
    stored = callback._reference.states
    assert {stored.tokens(row) for row in stored.rows} == {1}
    lower, upper = stored.layers["pool"].thresholds
    for start in range(0, 4, accumulate):
        window = callback.steps[start : start + accumulate]
        total = 0.0
        for step in window:
            hidden = step["hidden"]["pool"]
            states = stored.batch("pool", step["ids"], 1)[:, 0]
            total += float(activation_margin_loss(hidden, states, lower, upper, reduction="sum"))
        got = sum(float(step["value"].detach()) for step in window) / accumulate
        assert got == pytest.approx(total / (2 * accumulate * 6), rel=1e-4, abs=1e-7)
    assert float(callback.steps[-1]["value"].detach()) > 0


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
def test_the_step_never_waits_for_the_gpu(
    tmp_path: Path, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first steps compile, and compare the rows' tokens with the stored ones once.
    calls = [
        waits.forbid(monkeypatch, Attachment, name, after=2)
        for name in ("_after_batch_transfer", "_with_replay_loss", "_with_terms")
    ]
    mixer = ReplayMixer(source(), rows_per_batch=2, layout="joined")
    fit(
        tmp_path,
        ActivationMarginRegularizer(**kwargs),
        mixer=mixer,
        accelerator="gpu",
        max_steps=6,
        data=models.loader(rows=32),
    )
    assert {len(found) for found in calls} == {6}


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
