# SPDX-License-Identifier: Apache-2.0
"""ReplayMixer: how much, in what layout, with what weight, from which sources, and across restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import replay_rows
from lightning_cl.callbacks import ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, ReplaySource, Row
from lightning_cl.replay.rows import layout_of
from tests.helpers import models
from tests.test_attachment import Probe, _fit, _gradients


class Counting(ReplaySource):
    """Rows with a given number of loss-bearing tokens, in order."""

    def __init__(self, tokens: list[int] | None = None) -> None:
        self.tokens = tokens or [1]
        self.drawn = 0

    def available(self) -> int:
        return len(self.tokens)

    def draw(self, count: int, rank: int, world_size: int) -> list[Row]:
        rows = []
        for _ in range(count):
            n = self.tokens[self.drawn % len(self.tokens)]
            self.drawn += 1
            rows.append(Row({"input_ids": torch.ones(n + 1, dtype=torch.long)}, str(self.drawn), n))
        return rows


def _layout(rows: int, length: int = 5) -> Any:
    ids = torch.ones(rows, length, dtype=torch.long)
    return layout_of({"input_ids": ids, "attention_mask": ids, "labels": ids})


@given(ratio=st.floats(0.01, 0.9), batches=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_ratio_is_exact_on_average(ratio: float, batches: list[int]) -> None:
    """After any number of batches the replay rows are within one of their share, r / (1 - r) of the task rows."""
    mixer = ReplayMixer(Counting(), ratio=ratio)
    drawn = 0
    for i, rows in enumerate(batches):
        drawn += len(mixer._draw(_layout(rows), 0))
        wanted = sum(batches[: i + 1]) * ratio / (1 - ratio)
        assert wanted - 1 - 1e-6 <= drawn <= wanted + 1e-6


def test_the_default_is_one_replay_row_to_four() -> None:
    assert len(ReplayMixer(Counting())._draw(_layout(32), 0)) == 8


@given(
    ratio=st.floats(0.05, 0.8),
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batches=st.lists(st.tuples(st.integers(1, 8), st.integers(2, 20)), min_size=1, max_size=20),
)
def test_token_ratio_is_exact_within_one_row(ratio: float, tokens: list[int], batches: list[tuple[int, int]]) -> None:
    """Over any run of steps, the replay's loss-bearing tokens are within one row of their share."""
    mixer = ReplayMixer(Counting(tokens), token_ratio=ratio)
    error = [0.0]
    for rows, length in batches:
        replay = sum(row.tokens for row in mixer._draw(_layout(rows, length), 0))
        error.append(error[-1] + replay - rows * (length - 1) * ratio / (1 - ratio))
    # Between any two steps, so also over one optimizer step of several batches.
    assert max(error) - min(error) <= max(tokens) + 1e-6


def test_sources_share_the_rows_evenly_and_an_empty_one_leaves_its_share() -> None:
    first, second, empty = Counting(), Counting(), EpisodicMemory(4)
    mixer = ReplayMixer([first, second, empty], rows_per_batch=3)
    for _ in range(4):
        assert len(mixer._draw(_layout(2), 0)) == 3
    assert {first.drawn, second.drawn} == {6}


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_task_weight(tmp_path: Any, layout: str) -> None:
    """(task + replay) / 2 with each loss a mean over its own tokens, for a module that gives losses by row."""

    class ByRow(models.PlainLM):
        def per_row_loss(self, batch: dict[str, Tensor]) -> Tensor:
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            return losses.view_as(labels).sum(1) / (labels != -100).sum(1)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            tokens = (batch["labels"][:, 1:] != -100).sum(1)
            return (self.per_row_loss(batch) * tokens).sum() / tokens.sum()

    module = ByRow(models.tiny_llama())
    source = GeneralSamples(models.TokenRows(6, seed=9, ragged=True), num_samples=6)
    mixer = ReplayMixer(source, rows_per_batch=2, task_weight=0.5, layout=layout)
    probe = Probe()
    trainer, steps = _fit(tmp_path, module, [mixer, probe], models.loader(ragged=True))
    reference = models.PlainLM(models.tiny_llama())
    drawn = [int(i.split(":")[1]) for i in probe.steps[0]["ids"]]
    task = models.collate([models.TokenRows(16, ragged=True)[i] for i in range(4)])
    replay = models.collate([models.TokenRows(6, seed=9, ragged=True)[i] for i in drawn])
    (0.5 * reference.model(**task).loss + 0.5 * reference.model(**replay).loss).backward()
    for key, gradient in _gradients(reference).items():
        torch.testing.assert_close(steps[0][key], gradient, atol=1e-6, rtol=1e-5)
    assert trainer.callback_metrics["cl/task_weight"] == 0.5


def test_task_weight_needs_the_losses_apart(tmp_path: Any) -> None:
    mixer = ReplayMixer(GeneralSamples(models.TokenRows(3), 3), task_weight=0.5, layout="joined")
    with pytest.raises(
        MisconfigurationException, match=r'needs the task and replay rows\' losses apart.*layout="separate"'
    ):
        _fit(tmp_path, models.PlainLM(models.tiny_llama()), [mixer])


def test_auto_layout_takes_the_cheaper_one(tmp_path: Any) -> None:
    """Equal lengths are joined; rows four times as long have their own pass; the choice is logged."""
    for length, separate in ((12, 0.0), (48, 1.0)):
        source = GeneralSamples(models.TokenRows(6, seed=9, length=length), num_samples=6)
        trainer, _ = _fit(tmp_path, models.PlainLM(models.tiny_llama()), [ReplayMixer(source, rows_per_batch=1)])
        assert trainer.callback_metrics["cl/replay_separate"] == separate


def _pack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.cat([row["input_ids"] for row in rows])[None]
    labels = ids.clone()
    lengths = [len(row["input_ids"]) for row in rows]
    labels[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@pytest.mark.parametrize(
    ("layout", "collate", "seen"),
    [
        ("joined", models.collate, [[0, 0, 0, 0, 1, 1]]),
        ("joined", _pack, [[0, 0, 0, 0, 1, 1]]),
        ("separate", models.collate, [[0, 0, 0, 0], [1, 1]]),
    ],
)
def test_a_module_can_ask_which_rows_are_replay(
    tmp_path: Any, layout: str, collate: Any, seen: list[list[int]]
) -> None:
    masks: dict[str, list[list[int]]] = {"train": [], "val": []}

    class Asks(models.PlainLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            masks["train"].append(replay_rows(batch).int().tolist())
            assert not replay_rows({"input_ids": torch.zeros(3, 5, dtype=torch.long)}).any(), "another batch"
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            masks["val"].append(replay_rows(batch).int().tolist())

    source = GeneralSamples(models.TokenRows(6, seed=9, ragged=True), num_samples=6)
    rows = torch.utils.data.DataLoader(models.TokenRows(4, ragged=True), 4, collate_fn=collate)
    trainer = models.trainer(tmp_path, callbacks=[ReplayMixer(source, rows_per_batch=2, layout=layout)], max_steps=1)
    trainer.fit(Asks(models.tiny_llama(use_cache=False)), rows, rows)
    assert masks == {"train": seen, "val": [[0, 0, 0, 0]]}


def test_packed_batches_equal_padded_ones(tmp_path: Any) -> None:
    """A packed batch with replay segments gives the gradients of the padded batch with the same replay rows."""
    results = []
    for collate in (models.collate, _pack):
        module = models.PlainLM(models.lora(models.tiny_llama(use_cache=False)))
        probe = Probe(reference=True, term=lambda step: _masked_square(step))
        data = torch.utils.data.DataLoader(models.TokenRows(8, ragged=True), 4, collate_fn=collate)
        source = GeneralSamples(models.TokenRows(6, seed=9, ragged=True), num_samples=6)
        _, steps = _fit(tmp_path, module, [ReplayMixer(source, rows_per_batch=2), probe], data)
        results.append((steps[0], probe.steps[0]))
    (padded, padded_probe), (packed, packed_probe) = results
    assert padded_probe["ids"] == packed_probe["ids"]
    width = packed_probe["mask"].shape[1]
    assert torch.equal(padded_probe["mask"][:, :width], packed_probe["mask"])
    mask = packed_probe["mask"]
    torch.testing.assert_close(
        padded_probe["hidden"][:, :width][mask], packed_probe["hidden"][mask], atol=1e-5, rtol=1e-4
    )
    padded_reference, packed_reference = (p["reference"]["initial"][:, :width] for p in (padded_probe, packed_probe))
    torch.testing.assert_close(padded_reference[mask], packed_reference[mask], atol=1e-5, rtol=1e-4)
    for key, gradient in padded.items():
        torch.testing.assert_close(packed[key], gradient, atol=1e-5, rtol=1e-4)


def _masked_square(step: Any) -> Tensor:
    hidden = next(iter(step.activations.values()))
    return (hidden.square() * step.replay.token_mask[..., None]).sum() / step.replay.token_mask.sum()


class Data(pl.LightningDataModule):
    """The same batches in every epoch, with a state that Lightning saves."""

    def train_dataloader(self) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(models.TokenRows(16), batch_size=4, collate_fn=models.collate)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resume_in_the_middle_of_a_task_is_exact(tmp_path: Path, stop_at: int) -> None:
    """Weights, memory and the order of replay go on bit for bit, also in the epoch in which the memory fills."""

    def callbacks() -> list[pl.Callback]:
        general = GeneralSamples(models.TokenRows(5, seed=4), num_samples=5)
        return [ReplayMixer([EpisodicMemory(6, replay_current_task=True), general], ratio=0.3)]

    def train(steps: int, found: list[pl.Callback], ckpt: Any = None, save: bool = False) -> Any:
        module = models.PlainLM(models.tiny_llama(), optimizer="adamw")
        saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="step", every_n_train_steps=stop_at, save_top_k=-1)
        trainer = models.trainer(
            tmp_path,
            max_steps=steps,
            callbacks=[*found, *([saver] if save else [])],
            enable_checkpointing=save,
            max_epochs=4,
        )
        trainer.fit(module, datamodule=Data(), ckpt_path=ckpt)
        return module

    unbroken_callbacks = callbacks()
    unbroken = train(8, unbroken_callbacks)
    train(stop_at, callbacks(), save=True)
    resumed_callbacks = callbacks()
    resumed = train(8, resumed_callbacks, ckpt=str(tmp_path / "step.ckpt"))
    for (name, a), b in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one, two = (c[0].state_dict() for c in (unbroken_callbacks, resumed_callbacks))  # type: ignore[attr-defined]
    assert one["sources"][0]["kept"]["ids"] == two["sources"][0]["kept"]["ids"]
    assert {k: one[k] for k in ("clock", "owed", "next_source")} == {
        k: two[k] for k in ("clock", "owed", "next_source")
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 0.2, "rows_per_batch": 3}, "was given rows_per_batch and ratio: keep exactly one"),
        ({"ratio": 1.0}, r"`ReplayMixer\(ratio=1.0\)`: the share of replay .* between 0 and 1"),
        ({"token_ratio": 0.0}, r"`ReplayMixer\(token_ratio=0.0\)`"),
        ({"rows_per_batch": 0}, r"`ReplayMixer\(rows_per_batch=0\)`: must be at least 1"),
        ({"layout": "both"}, r"`ReplayMixer\(layout='both'\)`: use \"auto\""),
        ({"task_weight": 1.5}, r"`ReplayMixer\(task_weight=1.5\)`: must lie between 0 and 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayMixer(Counting(), **kwargs)


@pytest.mark.parametrize("sources", [[], ["text.jsonl"]])
def test_bad_sources(sources: Any) -> None:
    with pytest.raises(ValueError, match="give `GeneralSamples`, `EpisodicMemory`, `SelfGenerated`"):
        ReplayMixer(sources)


def test_two_mixers_that_disagree(tmp_path: Any) -> None:
    def mixers() -> list[pl.Callback]:
        memory = ReplayMixer(EpisodicMemory(3), layout="joined")
        return [memory, ReplayMixer(GeneralSamples(models.TokenRows(3), 3), layout="separate")]

    with pytest.raises(MisconfigurationException, match="Several `ReplayMixer`s ask for different `layout`"):
        _fit(tmp_path, models.PlainLM(models.tiny_llama()), mixers())


def test_two_mixers_append_in_order(tmp_path: Any) -> None:
    class First(GeneralSamples):
        pass

    class Second(GeneralSamples):
        pass

    probe = Probe()
    mixers = [ReplayMixer(cls(models.TokenRows(3, seed=9), 3), rows_per_batch=2) for cls in (First, Second)]
    _fit(tmp_path, models.PlainLM(models.tiny_llama()), [*mixers, probe])
    assert [i.split(":")[0] for i in probe.steps[0]["ids"]] == ["First", "First", "Second", "Second"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))
def test_any_amount_fits_any_batch(rows: int, length: int, other: int) -> None:
    """What the joiner builds always has the task's rows first and unchanged."""
    from lightning_cl.replay.rows import collate_rows, join

    layout = _layout(rows, length)
    drawn = ReplayMixer(Counting([other]), rows_per_batch=3)._draw(layout, 0)
    joined = join(layout, collate_rows(drawn, layout, {}), {})
    assert joined["input_ids"].shape == (rows + 3, max(length, other + 1))
    assert torch.equal(joined["input_ids"][:rows, :length], layout.leaves["input_ids"])
    assert (joined["attention_mask"].sum(1)[rows:] == other + 1).all()
