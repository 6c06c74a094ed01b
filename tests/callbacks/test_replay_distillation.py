# SPDX-License-Identifier: Apache-2.0
"""ReplayDistillation in real fits against a hand-written loop with all logits and a second model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.anatomy import logit_transform, pretrained_model
from lightning_cl.callbacks import ForgettingMonitor, ReplayDistillation, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
from lightning_cl.report.html import page
from lightning_cl.report.run import find_runs
from tests.helpers import spawn
from tests.helpers.fsdp1 import cpu_fsdp1
from tests.helpers.models import PlainLM, TokenRows, loader, lora, pack, tiny_llama, trainer


class Recorder(PlainLM):
    """Keeps the batches of its training steps and what is logged."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.batches: list[dict[str, Tensor]] = []
        self.logged: dict[str, list[float]] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return super().training_step(batch, batch_idx)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.setdefault(name, []).append(float(value))
        super().log(name, value, *args, **kwargs)


def general(rows: int = 6, length: int = 12, ragged: bool = False) -> GeneralSamples:
    return GeneralSamples(TokenRows(rows, length, seed=5, ragged=ragged), num_samples=rows)


def fit(folder: Path, module: Any, callbacks: list[Any], **kwargs: Any) -> Any:
    run = trainer(folder, callbacks=callbacks, **kwargs)
    run.fit(module, loader(rows=32))
    return run


def naive_kl(model: Any, teacher: Any, batch: dict[str, Tensor], replay: int, tau: float = 1.0) -> Tensor:
    inputs = {key: batch[key][-replay:] for key in ("input_ids", "attention_mask")}
    transform = logit_transform(model) or (lambda logits: logits)
    assert transform is not None
    student = model(**inputs).logits / tau
    with torch.no_grad():
        p = torch.softmax(teacher(**inputs).logits / tau, -1)
    kl = (p * (p.log() - student.log_softmax(-1))).sum(-1)
    return kl[inputs["attention_mask"].bool()].mean()


def naive_run(
    model: Any, teacher: Any, batches: list[Any], replay: int, weight: float, lr: float, tau: float = 1.0
) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        task = {key: value[:-replay] for key, value in batch.items()}
        loss = model(**task).loss + weight * naive_kl(model, teacher, batch, replay, tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def same(a: Any, b: Any) -> None:
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def build(kind: str) -> Any:
    if kind == "full":
        return tiny_llama()
    if kind == "full, tied":
        return tiny_llama(tie_word_embeddings=True)
    if kind == "lora":
        return lora(tiny_llama())
    if kind == "lora, trained norm and tied embedding":
        model = lora(tiny_llama(tie_word_embeddings=True))
        for name, parameter in model.named_parameters():
            if name.endswith(("model.norm.weight", "embed_tokens.weight")):
                parameter.requires_grad_(True)
        return model
    if kind == "lora, head copied by modules_to_save":
        return lora(tiny_llama(), modules_to_save=["lm_head"])
    if kind == "lora on the head":
        return lora(tiny_llama(), target_modules=["q_proj", "lm_head"])
    raise ValueError(kind)


def initial(kind: str) -> Any:
    """A second model that is what the first was before any adapter."""
    return tiny_llama(tie_word_embeddings="tied" in kind)


KINDS = [
    "full",
    "full, tied",
    "lora",
    "lora, trained norm and tied embedding",
    "lora, head copied by modules_to_save",
    "lora on the head",
]


@pytest.mark.parametrize("anchor", ["initial", "previous_task"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_hand_written_loop(tmp_path: Path, kind: str, anchor: str) -> None:
    module = Recorder(build(kind), lr=0.3)
    teacher = copy.deepcopy(module.model) if anchor == "previous_task" else initial(kind)
    expected = copy.deepcopy(module.model)
    method = ReplayDistillation(weight=2.0, anchor=anchor, chunk_size=5)
    fit(tmp_path, module, [ReplayMixer(general(ragged=True), rows_per_batch=2, layout="joined"), method])
    assert (module.batches[0]["labels"][-2:] == -100).all()
    same(naive_run(expected, teacher, module.batches, 2, 2.0, 0.3), module.model)


def test_the_package_s_own_module(tmp_path: Path) -> None:
    module = Ours(build("full, tied"), 0.3)
    teacher, expected = copy.deepcopy(module.model), copy.deepcopy(module.model)
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(2.0)])
    same(naive_run(expected, teacher, module.batches, 2, 2.0, 0.3), module.model)


@pytest.mark.parametrize("family", ["gemma 2, soft caps", "granite, logit scale"])
def test_soft_caps_and_logit_scales(tmp_path: Path, family: str) -> None:
    from tests.replay.test_generation import family as build_family

    module = Recorder(build_family(family), lr=0.1)
    teacher, expected = copy.deepcopy(module.model), copy.deepcopy(module.model)
    source = GeneralSamples(TokenRows(4, 8, vocab=97), num_samples=4)
    run = trainer(
        tmp_path,
        max_steps=2,
        callbacks=[ReplayMixer(source, rows_per_batch=2, layout="joined"), ReplayDistillation(3.0)],
    )
    run.fit(module, loader(vocab=97))
    same(naive_run(expected, teacher, module.batches, 2, 3.0, 0.1), module.model)


def test_temperature(tmp_path: Path) -> None:
    module = Recorder(tiny_llama(), lr=0.3)
    teacher, expected = copy.deepcopy(module.model), copy.deepcopy(module.model)
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(2.0, temperature=2.0)])
    same(naive_run(expected, teacher, module.batches, 2, 2.0, 0.3, tau=2.0), module.model)


def test_the_reference_moves_with_the_tasks_or_not(tmp_path: Path) -> None:
    for anchor in ("initial", "previous_task"):
        module = Recorder(tiny_llama(), lr=0.3)
        callbacks = [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(2.0, anchor=anchor)]
        fit(tmp_path, module, callbacks)
        teacher = tiny_llama() if anchor == "initial" else copy.deepcopy(module.model)
        expected = copy.deepcopy(module.model)
        module.batches.clear()
        fit(tmp_path, module, callbacks)
        same(naive_run(expected, teacher, module.batches, 2, 2.0, 0.3), module.model)


def test_auto_anchors_each_source_by_itself(tmp_path: Path) -> None:
    """Second task: memory rows are held to the task's start, general rows to the initial model."""
    module = Recorder(tiny_llama(), lr=0.3)
    mixer = ReplayMixer([general(), EpisodicMemory(8)], rows_per_batch=4)
    callbacks = [mixer, ReplayDistillation(2.0)]
    fit(tmp_path, module, callbacks)
    start = copy.deepcopy(module.model)
    expected = copy.deepcopy(module.model)
    module.batches.clear()
    fit(tmp_path, module, callbacks)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    known = {tuple(row["input_ids"].tolist()) for row in TokenRows(6, 12, seed=5)}
    for batch in module.batches:
        first = [tuple(row.tolist()) in known for row in batch["input_ids"][-4:]]
        assert sum(first) == 2
        parts = []
        for row, is_general in enumerate(first):
            one = {k: v[-4:][row : row + 1] for k, v in batch.items()}
            parts.append(naive_kl(expected, tiny_llama() if is_general else start, one, 1))
        loss = expected(**{k: v[:-4] for k, v in batch.items()}).loss + 2.0 * torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(expected, module.model)


def test_other_sources_keep_their_labels(tmp_path: Path) -> None:
    module = Recorder(lora(tiny_llama()), lr=0.1)
    mixer = ReplayMixer([SelfGenerated(8, 12), EpisodicMemory(8)], rows_per_batch=4)
    callbacks = [mixer, ReplayDistillation(2.0, sources=["SelfGenerated"])]
    fit(tmp_path, module, callbacks)
    module.batches.clear()
    fit(tmp_path, module, callbacks)
    for batch in module.batches:
        labelled = (batch["labels"][-4:] != -100).any(1)
        assert labelled.sum() == 2


def test_labels_objective(tmp_path: Path) -> None:
    module = Recorder(tiny_llama(), lr=0.3)
    expected = copy.deepcopy(module.model)
    mixer = ReplayMixer(general(ragged=True), rows_per_batch=2, layout="joined")
    fit(tmp_path, module, [mixer, ReplayDistillation(2.0, objective="labels")])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    for batch in module.batches:
        rows = {k: batch[k][-2:] for k in ("input_ids", "attention_mask")}
        rows["labels"] = rows["input_ids"].masked_fill(~rows["attention_mask"].bool(), -100)
        loss = expected(**{k: v[:-2] for k, v in batch.items()}).loss + 2.0 * expected(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(expected, module.model)
    assert "cl/distillation_kl" not in module.logged


class OwnLabels(Recorder):
    """Derives its labels inside the step, so replay rows cannot be left out of its loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({**batch, "labels": batch["input_ids"]}, batch_idx)


def test_separate_layout_for_modules_that_make_their_labels(tmp_path: Path) -> None:
    def strip(rows: Any) -> Any:
        from tests.helpers.models import collate

        return {k: v for k, v in collate(rows).items() if k != "labels"}

    module = OwnLabels(tiny_llama(), lr=0.3)
    expected, teacher = copy.deepcopy(module.model), copy.deepcopy(module.model)
    source = GeneralSamples(
        [{k: v.tolist() for k, v in row.items() if k != "labels"} for row in TokenRows(6, 12, seed=5)], num_samples=6
    )
    data = torch.utils.data.DataLoader(TokenRows(16), batch_size=4, collate_fn=strip)
    callbacks = [ReplayMixer(source, rows_per_batch=2, layout="separate"), ReplayDistillation(2.0)]
    trainer(tmp_path, callbacks=callbacks).fit(module, data)
    task, replay = module.batches[0::2], module.batches[1::2]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    for one, other in zip(task, replay, strict=True):
        loss = expected(**one).loss + 2.0 * naive_kl(expected, teacher, other, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(expected, module.model)


def test_packed_batches(tmp_path: Path) -> None:
    # With a cache, transformers does not see that the row is packed, and its segments attend to each other.
    module = Recorder(tiny_llama(use_cache=False), lr=0.3)
    teacher, expected = copy.deepcopy(module.model), copy.deepcopy(module.model)
    data = torch.utils.data.DataLoader(TokenRows(16, ragged=True), batch_size=4, collate_fn=pack)
    callbacks = [ReplayMixer(general(ragged=True), rows_per_batch=2), ReplayDistillation(2.0)]
    trainer(tmp_path, callbacks=callbacks).fit(module, data)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    for batch in module.batches:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        first = starts[-2]
        replay = torch.tensor_split(batch["input_ids"][0, first:], [starts[-1] - first])
        kls = [(naive_kl(expected, teacher, _row(ids), 1), len(ids)) for ids in replay]
        loss = expected(**{key: value[:, :first] for key, value in batch.items()}).loss
        loss = loss + 2.0 * sum(kl * n for kl, n in kls) / sum(n for _, n in kls)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(expected, module.model)


def _row(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def test_a_given_reference(tmp_path: Path) -> None:
    frozen = tiny_llama(seed=7)
    module = Recorder(tiny_llama(), lr=0.3)
    expected = copy.deepcopy(module.model)
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(2.0, reference=frozen)])
    same(naive_run(expected, frozen, module.batches, 2, 2.0, 0.3), module.model)


def test_offloaded_reference_is_the_same(tmp_path: Path) -> None:
    results = []
    for offload in (False, True):
        module = Recorder(tiny_llama(), lr=0.3)
        method = ReplayDistillation(2.0, offload_reference=offload)
        fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), method])
        results.append(module.model)
    same(*results)


@pytest.mark.parametrize("target", [pytest.param(0.002, marks=pytest.mark.slow), 0.02])
def test_target_kl_holds_the_divergence(tmp_path: Path, target: float) -> None:
    module = Recorder(tiny_llama(), lr=2e-3, optimizer="adamw")
    method = ReplayDistillation(target_kl=target)
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=4), method], max_steps=160, max_epochs=-1)
    tail = module.logged["cl/distillation_kl"][-50:]
    assert 0.5 * target < sum(tail) / len(tail) < 1.5 * target
    path = module.logged["cl/distillation_weight"]
    assert len(path) == 160
    assert len({round(w, 6) for w in path}) > 50


def test_a_target_out_of_reach_is_said(tmp_path: Path) -> None:
    module = Recorder(tiny_llama(), lr=5.0)
    method = ReplayDistillation(target_kl=1e-9)
    with pytest.warns(UserWarning, match=r"`ReplayDistillation\(target_kl=1e-09\)`: the target was not met"):
        fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), method])


def test_the_report_plots_the_weights_path_and_the_divergence(tmp_path: Path) -> None:
    rows = [Task(name, train=TokenRows(16, 12, seed=i), val=TokenRows(4, 12, seed=9)) for i, name in enumerate("ab")]
    method = [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(target_kl=0.02)]
    monitor = ForgettingMonitor("val_loss", mode="min", plots=False, print_table=False)
    run = trainer(tmp_path, callbacks=[*method, monitor], max_epochs=2, max_steps=-1, log_every_n_steps=1)
    fit_stream(run, PlainLM(tiny_llama(), lr=1e-2), TaskStream(rows, batch_size=4))
    runs, problems = find_runs([tmp_path])
    text = page(runs, problems)
    for heading, name in (("weights that adapt", "weight"), ("divergence (nats a token)", "kl")):
        card = text.split(f"<h3>{heading}", 1)[1].split("<h3>", 1)[0]
        assert card.count(f'data-series="cl/distillation_{name}"') > 8  # a point for each step of both tasks


def test_logged_terms(tmp_path: Path) -> None:
    module = Recorder(tiny_llama())
    fit(tmp_path, module, [ReplayMixer(general(), rows_per_batch=2), ReplayDistillation(4.0)])
    for kl, term in zip(module.logged["cl/distillation_kl"], module.logged["cl/distillation"], strict=True):
        assert term == pytest.approx(4.0 * kl, rel=1e-5)
    assert "cl/distillation_ratio" in module.logged


def resume(folder: Path, stop_at: int, make: Callable[[], tuple[Recorder, list[Any]]]) -> None:
    """A run of seven steps that goes on from its checkpoint after ``stop_at`` of them ends with the same bits."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torchdata.stateful_dataloader import StatefulDataLoader

    from tests.helpers.models import collate

    def run(ckpt: Any = None) -> Recorder:
        module, callbacks = make()
        if ckpt is None:
            callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=stop_at, save_top_k=-1))
        data = StatefulDataLoader(TokenRows(32), batch_size=4, collate_fn=collate)
        trainer(folder, max_steps=7, callbacks=callbacks, enable_checkpointing=ckpt is None).fit(
            module, data, ckpt_path=ckpt
        )
        return module

    whole, resumed = run(), run(folder / f"step={stop_at}.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("anchor", ["initial", "previous_task"])
@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_resumed_equals_unbroken(tmp_path: Path, anchor: str, stop_at: int) -> None:
    def make() -> tuple[Recorder, list[Any]]:
        method = ReplayDistillation(target_kl=0.01, anchor=anchor)
        return Recorder(tiny_llama(), lr=0.3), [ReplayMixer(general(), rows_per_batch=2), method]

    resume(tmp_path, stop_at, make)


class Ours(CausalLMModule):
    """The package's own module, which calls backbone and head by itself."""

    def __init__(self, model: Any, lr: float) -> None:
        super().__init__(model)
        self.lr, self.batches = lr, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


# The strategy, what trains, the anchor, and whether the module is the package's own.
DISTRIBUTED = [
    ("ddp", "lora, trained norm and tied embedding", "initial", False),
    ("cl_fsdp", "lora, trained norm and tied embedding", "initial", False),
    ("cl_fsdp", "full, tied", "previous_task", False),
    ("cl_fsdp", "full", "initial", False),
    ("cl_fsdp", "lora, head copied by modules_to_save", "initial", False),
    ("cl_fsdp", "full, tied", "initial", True),
    ("fsdp", "lora, trained norm and tied embedding", "initial", False),
    ("fsdp", "full, tied", "previous_task", False),
    ("fsdp, one group", "lora, trained norm and tied embedding", "initial", False),
    ("fsdp, one group", "full, tied", "previous_task", False),
]


def _two_ranks(rank: int, folder: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_cl import weights
    from lightning_cl.strategies import CLFSDPStrategy

    results = []
    for strategy, kind, anchor, ours in DISTRIBUTED:
        module: Any = Ours(build(kind), 0.3) if ours else Recorder(build(kind), lr=0.3)
        callbacks = [ReplayMixer(general(), rows_per_batch=1), ReplayDistillation(2.0, anchor=anchor)]
        make: Any = {
            "ddp": DDPStrategy,
            "cl_fsdp": CLFSDPStrategy,
            "fsdp": cpu_fsdp1,
            "fsdp, one group": partial(cpu_fsdp1, whole=True),
        }[strategy]
        fit(folder, module, callbacks, strategy=make(), devices=2)
        weights.reshard(module)
        found = weights.trainable(module)
        whole = weights.gather(module, {n: weights.local(p) for n, p in found.items()}, found, everywhere=True)
        results.append({"weights": whole, "batches": module.batches})
    spawn.save(folder, rank, results)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn.run(_two_ranks, 2, folder)
    return spawn.load(folder)


@pytest.mark.parametrize("case", range(len(DISTRIBUTED)), ids=[", ".join(map(str, case)) for case in DISTRIBUTED])
def test_two_processes_equal_one(two_ranks: list[Any], case: int) -> None:
    _, kind, anchor, _ = DISTRIBUTED[case]
    ranks = [results[case] for results in two_ranks]
    expected = PlainLM(build(kind))
    model = expected.model
    teacher = copy.deepcopy(model) if anchor == "previous_task" else initial(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for pair in zip(*(r["batches"] for r in ranks), strict=True):
        optimizer.zero_grad()
        for batch in pair:
            task = {key: value[:-1] for key, value in batch.items()}
            ((model(**task).loss + 2.0 * naive_kl(model, teacher, batch, 1)) / 2).backward()
        optimizer.step()
    parameters = {n: p for n, p in expected.named_parameters() if p.requires_grad}
    assert set(ranks[0]["weights"]) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(ranks[0]["weights"][name], parameter.detach(), rtol=1e-4, atol=1e-5)


class TestRefusals:
    """Bad input, each with its message."""

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"weight": -1.0}, r"`ReplayDistillation\(weight=-1.0\)`"),
            ({"target_kl": -0.1}, "`target=-0.1`"),
            ({"target_kl": 0.1, "weight": 0.0}, "`initial=0.0`"),
            ({"objective": "soft"}, r"`ReplayDistillation\(objective='soft'\)`"),
            ({"anchor": "now"}, r"`ReplayDistillation\(anchor='now'\)`"),
            ({"temperature": 0.0}, r"`ReplayDistillation\(temperature=0.0\)`"),
            ({"objective": "labels", "target_kl": 0.1}, "with labels no divergence is measured"),
            ({"objective": "labels", "precompute": True}, "with labels there is no reference"),
            ({"sources": []}, "would distil nothing"),
            ({"chunk_size": 0}, r"`ReplayDistillation\(chunk_size=0\)`"),
            ({"reference": torch.nn.Linear(1, 1), "anchor": "previous_task"}, "does not move from task to task"),
        ],
    )
    def test_arguments(self, kwargs: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ReplayDistillation(**kwargs)

    def test_no_replay_rows(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="`ReplayDistillation` works on replay rows"):
            fit(tmp_path, PlainLM(tiny_llama()), [ReplayDistillation()])

    def test_no_head(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="`LlamaModel` has no language-model head"):
            fit(tmp_path, PlainLM(tiny_llama().model), [ReplayMixer(general()), ReplayDistillation()])

    def test_unknown_source(self, tmp_path: Path) -> None:
        method = ReplayDistillation(sources=["SelfGenerated"])
        with pytest.raises(MisconfigurationException, match="no replay source called 'SelfGenerated'"):
            fit(tmp_path, PlainLM(tiny_llama()), [ReplayMixer(general()), method])

    def test_a_reference_that_is_the_model_being_trained(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        with pytest.raises(MisconfigurationException, match="is the model being trained"):
            fit(tmp_path, module, [ReplayMixer(general()), ReplayDistillation(reference=module.model)])

    def test_a_reference_of_another_architecture(self, tmp_path: Path) -> None:
        frozen = tiny_llama(num_hidden_layers=1)
        with pytest.raises(MisconfigurationException, match="The reference has no parameter"):
            fit(tmp_path, PlainLM(tiny_llama()), [ReplayMixer(general()), ReplayDistillation(reference=frozen)])

    def test_a_reference_beside_adapters(self, tmp_path: Path) -> None:
        module = PlainLM(lora(tiny_llama()))
        with pytest.raises(MisconfigurationException, match="the same model with the adapters off"):
            fit(tmp_path, module, [ReplayMixer(general()), ReplayDistillation(reference=tiny_llama())])

    def test_logits_made_otherwise(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        head = module.model.lm_head
        module.model.register_forward_hook(lambda m, a, output: setattr(output, "logits", 3 * output.logits))
        assert head is pretrained_model(module).get_output_embeddings()
        with pytest.raises(MisconfigurationException, match="makes its logits otherwise than by its head"):
            fit(tmp_path, module, [ReplayMixer(general()), ReplayDistillation()])

    def test_labels_in_a_pass_of_their_own(self, tmp_path: Path) -> None:
        values = []
        for layout in ("joined", "separate"):
            mixer = ReplayMixer(general(), layout=layout)
            run = fit(tmp_path, PlainLM(tiny_llama()), [mixer, ReplayDistillation(objective="labels")])
            values.append(run.callback_metrics["cl/distillation"])
        torch.testing.assert_close(*values)

    def test_a_late_start_is_said(self, tmp_path: Path) -> None:
        module, mixer = PlainLM(tiny_llama()), ReplayMixer(general())
        late = ReplayDistillation()
        late._clock.completed = 1
        with pytest.warns(UserWarning, match="first sees the model at task 1"):
            fit(tmp_path, module, [mixer, late])
