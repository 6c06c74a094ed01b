# SPDX-License-Identifier: Apache-2.0
"""SelfGenerated in real fits: what the rows are, when they are made, state, ranks, past tasks, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.callbacks import ReplayMixer
from lightning_cl.replay import GeneralSamples, SelfGenerated
from lightning_cl.replay.generation import DecodeEngine
from lightning_cl.replay.rows import Row
from tests.helpers import spawn
from tests.helpers.models import PlainLM, loader, lora, tiny_llama, tiny_tokenizer, trainer


class Recorder(PlainLM):
    """Keeps the batches that its training steps get."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.batches: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch["input_ids"].clone())
        return super().training_step(batch, batch_idx)


def fit(
    folder: Path, module: pl.LightningModule, source: SelfGenerated, rows: int = 2, mixer: Any = None, **kwargs: Any
):
    run = trainer(folder, callbacks=[mixer or ReplayMixer(source, rows_per_batch=rows)], **kwargs)
    run.fit(module, loader(length=12))
    return module


def sampled(model: Any, count: int, first: int = 0, seed: int = 0, length: int = 12, prompts: Any = None) -> list[Any]:
    engine = DecodeEngine(model, length=length, seed=seed)
    return [row.tolist() for row in engine.generate(prompts or [[1]] * count, first_row=first).rows]


def test_rows_are_the_initial_model_s_samples_from_bos(tmp_path: Path) -> None:
    before = sampled(tiny_llama(), 8)
    source = SelfGenerated(pool_size=8, length=12)
    module = fit(tmp_path, Recorder(tiny_llama(), lr=0.5), source)
    replayed = [row.tolist() for batch in module.batches for row in batch[-2:]]
    assert sorted(replayed) == sorted(before)  # four steps of two rows: each of the pool once
    assert source.seconds > 0


def test_per_task_anchors(tmp_path: Path) -> None:
    """With LoRA, "initial" is the adapters off and "previous_task" the adapters as they are when the task begins."""
    model = lora(tiny_llama())
    module = Recorder(model, lr=0.5)
    sources = [SelfGenerated(4, 12, seed=3), SelfGenerated(4, 12, anchor="previous_task", seed=3)]
    mixer = ReplayMixer(sources, rows_per_batch=2)
    for task in range(2):
        with model.disable_adapter():
            initial = sampled(model, 4, first=4 * task, seed=3)
        previous = sampled(model, 4, first=4 * task, seed=3)
        fit(tmp_path, module, sources[0], mixer=mixer)
        assert [row.content["input_ids"].tolist() for row in sources[0]._pool] == initial
        assert [row.content["input_ids"].tolist() for row in sources[1]._pool] == previous
    assert initial != previous


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_shows_the_progress_where_the_trainer_has_one(tmp_path: Path, capsys: Any, shown: bool) -> None:
    fit(tmp_path, PlainLM(tiny_llama()), SelfGenerated(8, 12), enable_progress_bar=shown)
    assert ("Generating 8 rows" in capsys.readouterr().err) is shown


def test_full_fine_tuning_keeps_the_initial_weights(tmp_path: Path) -> None:
    source = SelfGenerated(4, 12)
    mixer = ReplayMixer(source, rows_per_batch=2)
    module = Recorder(tiny_llama(), lr=0.5)
    for _ in range(2):
        fit(tmp_path, module, source, mixer=mixer)
    assert [row.content["input_ids"].tolist() for row in source._pool] == sampled(tiny_llama(), 4, first=4)


def test_once_is_once(tmp_path: Path) -> None:
    source = SelfGenerated(4, 12, refresh="once")
    mixer = ReplayMixer(source, rows_per_batch=2)
    module = Recorder(tiny_llama(), lr=0.5)
    for _ in range(2):
        fit(tmp_path, module, source, mixer=mixer)
    assert source._made == 4


def test_per_step_uses_each_row_once_and_samples_from_the_task_s_start(tmp_path: Path) -> None:
    source = SelfGenerated(4, 12, refresh="per_step", anchor="previous_task")
    module = fit(tmp_path, Recorder(tiny_llama(), lr=0.5), source)
    replayed = [tuple(row.tolist()) for batch in module.batches for row in batch[-2:]]
    assert len(set(replayed)) == 8
    assert sorted(replayed) == sorted(tuple(row) for row in sampled(tiny_llama(), 8))
    assert source._made == 8


def test_every_n_steps_and_reuse(tmp_path: Path) -> None:
    source = SelfGenerated(4, 12, refresh="every_n_steps", every_n_steps=2)
    fit(tmp_path, Recorder(tiny_llama()), source, max_steps=4)
    assert source._made == 8
    source = SelfGenerated(4, 12, reuse=2)
    fit(tmp_path, Recorder(tiny_llama()), source, max_steps=4)  # 8 draws = 2 uses of 4 rows
    assert source._made == 4
    source = SelfGenerated(4, 12, reuse=1)
    fit(tmp_path, Recorder(tiny_llama()), source, max_steps=4)
    assert source._made == 8


def test_given_prefixes_take_turns(tmp_path: Path) -> None:
    module = Recorder(tiny_llama())
    module.tokenizer = tiny_tokenizer()
    source = SelfGenerated(5, 12, prompts=["Once ", [1, 9, 9]])
    fit(tmp_path, module, source)
    once = module.tokenizer("Once ")["input_ids"]
    expected = [[once, [1, 9, 9]][i % 2] for i in range(5)]
    assert [
        row.content["input_ids"][: len(p)].tolist() for row, p in zip(source._pool, expected, strict=True)
    ] == expected


def test_rows_end_with_on_eos_stop(tmp_path: Path) -> None:
    module = Recorder(tiny_llama())
    module.model.generation_config.eos_token_id = list(range(2, 40))
    source = SelfGenerated(16, 12, on_eos="stop")
    fit(tmp_path, module, source)
    assert len({row.length for row in source._pool}) > 1
    assert all(int(row.content["input_ids"][-1]) < 40 for row in source._pool if row.length < 12)


class _Markov(torch.utils.data.Dataset):
    """Rows of a task: its token, one of three inputs, the input plus one, the end."""

    def __init__(self, token: int) -> None:
        self.rows = [[1, token, x, x + 1, 2] for x in (20, 30, 40)] * 8

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.rows[index])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def grammatical(row: Row, text: str | None) -> bool:
    ids = row.content["input_ids"].tolist()
    return len(ids) == 5 and ids[3] == ids[2] + 1


def test_past_tasks_are_replayed_without_a_stored_row(tmp_path: Path) -> None:
    model = tiny_llama()
    module = Recorder(model, lr=1e-2, optimizer="adamw")
    source = SelfGenerated(12, 8, prompts="past_tasks", parser=grammatical)
    mixer = ReplayMixer(source, rows_per_batch=3)
    for token in (10, 11):
        module.batches.clear()
        data = torch.utils.data.DataLoader(_Markov(token), batch_size=6)
        trainer(tmp_path, max_steps=40, max_epochs=-1, callbacks=[mixer]).fit(module, data)
        assert source._grammars[str(token - 10)].beginning == [1, token]
    first = torch.cat([batch[-3:] for batch in module.batches])
    assert first[:, :2].tolist() == [[1, 10]] * len(first)
    assert {tuple(row) for row in first[:, 2:].tolist()} <= {(20, 21, 2), (30, 31, 2), (40, 41, 2)}
    assert {row.task for row in source._pool} == {"0"}
    assert source.name == "SelfGenerated.past_tasks"


class _Choice(torch.utils.data.Dataset):
    """Rows of a task: its token, two inputs, a marker, one of two answers, the end; the inputs are learnt at a tenth."""

    def __init__(self, token: int) -> None:
        self.rows = [[1, token, x, y, 50, 60 + (x > y), 2] for x in (20, 30, 40) for y in (25, 35, 45)] * 8

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.rows[index])
        weight = torch.tensor([0.1] * 5 + [1.0] * 2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "loss_weight": weight}


class _Weighted(PlainLM):
    """Takes no notice of the weights, which say where answers begin."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step({k: v for k, v in batch.items() if k != "loss_weight"}, batch_idx)


def test_rows_without_the_form_of_their_task_are_dropped(tmp_path: Path) -> None:
    module = _Weighted(tiny_llama(), lr=1e-2, optimizer="adamw")
    source = SelfGenerated(24, 10, prompts="past_tasks")
    mixer = ReplayMixer(source, rows_per_batch=3)
    trainer(tmp_path, max_steps=25, max_epochs=-1, callbacks=[mixer]).fit(
        module, torch.utils.data.DataLoader(_Choice(10), batch_size=12)
    )
    half_learnt = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    trainer(tmp_path, max_steps=1, max_epochs=-1, callbacks=[mixer]).fit(
        module, torch.utils.data.DataLoader(_Choice(11), batch_size=12)
    )
    kept = [row.content["input_ids"].tolist() for row in source._pool]
    assert all(row[:2] == [1, 10] and row[-3] == 50 and row[-2] in (60, 61) and row[-1] == 2 for row in kept)
    # The rows that this pool was chosen from: the same numbers, from the same weights.
    model = tiny_llama()
    model.load_state_dict(half_learnt)
    engine = DecodeEngine(model, length=10, on_eos="stop", eos_token_ids=[2])
    made = [row.tolist() for row in engine.generate([[1, 10]] * source._made).rows]
    assert len(kept) < len(made)
    whole = [row for row in made if len(row) >= 7 and row[-3] == 50 and row[-2] in (60, 61) and row[-1] == 2]
    assert kept == whole[: len(kept)]


def test_no_grammatical_row_stops_with_the_reason(tmp_path: Path) -> None:
    source = SelfGenerated(4, 8, prompts="past_tasks", parser=lambda row, text: False)
    mixer = ReplayMixer(source, rows_per_batch=1)
    module = PlainLM(tiny_llama())
    data = torch.utils.data.DataLoader(_Markov(10), batch_size=6)
    trainer(tmp_path, max_steps=1, callbacks=[mixer]).fit(module, data)
    with pytest.raises(MisconfigurationException, match="None of 4 self-generated rows was grammatical"):
        trainer(tmp_path, max_steps=1, callbacks=[mixer]).fit(module, data)


def test_a_past_task_without_a_row_is_named(tmp_path: Path) -> None:
    module = PlainLM(tiny_llama(), lr=1e-2, optimizer="adamw")
    source = SelfGenerated(6, 8, prompts="past_tasks")
    mixer = ReplayMixer(source, rows_per_batch=1)

    def learn(token: int) -> None:
        data = torch.utils.data.DataLoader(_Markov(token), batch_size=6)
        trainer(tmp_path, max_steps=1, callbacks=[mixer]).fit(module, data)

    learn(10)
    source.parser = lambda row, text: True
    learn(11)
    source.parser = lambda row, text: row.task != "0"
    with pytest.warns(UserWarning, match=r"Past task '0' \(1 of 2\) has no row among the 6 replayed ones"):
        learn(12)


def test_the_yield_is_warned_of_and_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    seen: list[int] = []

    def one_in_twenty(row: Row, text: str | None) -> bool:
        seen.append(1)
        return len(seen) % 20 == 1

    source = SelfGenerated(8, 12, parser=one_in_twenty)
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="Only 3 of 56 self-generated rows were grammatical"):
        fit(tmp_path, PlainLM(tiny_llama()), source, logger=logger)
    logged = logger.experiment.metrics if logger.experiment.metrics else []
    text = Path(logger.log_dir, "metrics.csv").read_text() if not logged else str(logged)
    for name in ("cl/generation_seconds", "cl/generation_yield", "cl/generation_tokens_per_second"):
        assert name in text


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resumed_equals_unbroken(tmp_path: Path, stop_at: int) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(ckpt: Any = None, save: bool = False) -> Recorder:
        source = SelfGenerated(4, 12, refresh="per_step", anchor="previous_task", seed=1)
        callbacks: list[Any] = [ReplayMixer(source, rows_per_batch=2)]
        if save:
            callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop_at, save_top_k=-1))
        module = Recorder(tiny_llama(), lr=0.3)
        trainer(tmp_path, max_steps=7, callbacks=callbacks, enable_checkpointing=save).fit(
            module, loader(rows=32), ckpt_path=ckpt
        )
        return module

    whole = run(save=True)
    resumed = run(ckpt=tmp_path / f"step={stop_at}.ckpt")
    for a, b in zip(whole.batches[stop_at:], resumed.batches[-(7 - stop_at) :], strict=True):
        assert torch.equal(a[-2:], b[-2:])


def _two_ranks(rank: int, folder: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from lightning_cl.strategies import CLFSDPStrategy

    results = {}
    for name, strategy in (("ddp", DDPStrategy()), ("cl_fsdp", CLFSDPStrategy())):
        source = SelfGenerated(6, 12, refresh="per_step", anchor="previous_task")
        module = Recorder(lora(tiny_llama()), lr=0.5)
        callbacks = [ReplayMixer(source, rows_per_batch=1)]
        trainer(folder, devices=2, strategy=strategy, callbacks=callbacks, max_steps=6).fit(module, loader(rows=32))
        pool = [row.content["input_ids"].tolist() for row in source._pool]
        results[name] = {"rows": [b[-1].tolist() for b in module.batches], "pool": pool, "made": source._made}
    tensor_parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    plain = PlainLM(tiny_llama())
    plain.configure_model = lambda: None  # type: ignore[method-assign]
    run = trainer(folder, devices=2, strategy=tensor_parallel, callbacks=[ReplayMixer(SelfGenerated(4, 8))])
    with pytest.raises(MisconfigurationException) as refused:
        run.fit(plain, loader())
    results["tensor parallel"] = str(refused.value)
    spawn.save(folder, rank, results)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn.run(_two_ranks, 2, folder)
    return spawn.load(folder)


@pytest.mark.parametrize("strategy", ["ddp", "cl_fsdp"])
def test_two_ranks_make_disjoint_parts_of_the_same_rows(two_ranks: list[Any], strategy: str) -> None:
    first, second = (results[strategy] for results in two_ranks)
    assert first["made"] == 12
    assert first["pool"] == second["pool"]
    expected = sampled(lora(tiny_llama()), 12)
    assert sorted(first["rows"] + second["rows"]) == sorted(expected)


def test_tensor_parallelism_is_refused(two_ranks: list[Any]) -> None:
    for results in two_ranks:
        assert "`tensor_parallel_size=2` the ranks cannot generate different rows" in results["tensor parallel"]


class TestRefusals:
    """Bad input, each with its message."""

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"pool_size": 0}, r"`SelfGenerated\(pool_size=0\)`"),
            ({"length": 1}, r"`SelfGenerated\(length=1\)`: must be at least 2"),
            ({"refresh": "daily"}, r"`SelfGenerated\(refresh='daily'\)`"),
            ({"anchor": "now"}, r"`SelfGenerated\(anchor='now'\)`"),
            ({"on_eos": "skip"}, r"`SelfGenerated\(on_eos='skip'\)`"),
            ({"temperature": 0.0}, r"`SelfGenerated\(temperature=0.0\)`"),
            ({"prompts": "Once"}, r"`SelfGenerated\(prompts='Once'\)`: use \"bos\""),
            ({"prompts": [[]]}, "a row begins with at least one token"),
            ({"refresh": "every_n_steps"}, "belong together"),
            ({"every_n_steps": 5}, "belong together"),
            ({"refresh": "once", "reuse": 2}, "one pool serves for good"),
            ({"refresh": "per_step", "reuse": 2}, "each row is used once"),
            ({"prompts": "past_tasks", "anchor": "initial"}, "never learnt the past tasks"),
            ({"prompts": "past_tasks", "refresh": "once"}, "at the first task there is no past one"),
            ({"prompts": "past_tasks", "on_eos": "continue"}, "a row of a task is over at its end token"),
        ],
    )
    def test_arguments(self, kwargs: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SelfGenerated(**{"pool_size": 4, **kwargs})

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"length": 129}, "`length=129` is beyond the context"),
            ({"prompts": [list(range(4, 30))], "length": 20}, "A prompt has 26 tokens"),
            ({"prompts": ["Once"]}, "has texts but no tokenizer"),
            ({"pool_size": 1}, r"holds 1 rows, and one batch needs 2 \(2 on each of 1 ranks\)"),
        ],
    )
    def test_runs(self, tmp_path: Path, kwargs: Any, message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, PlainLM(tiny_llama()), SelfGenerated(**{"pool_size": 4, "length": 8, **kwargs}))

    def test_a_tokenizer_without_bos(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        module.tokenizer = tiny_tokenizer()
        module.tokenizer.bos_token = None
        with pytest.raises(MisconfigurationException, match=r"has no BOS token.*`prompts=\[\.\.\.\]`.*token id 1"):
            fit(tmp_path, module, SelfGenerated(4, 8))
        module.tokenizer = None
        module.model.config.bos_token_id = None
        with pytest.raises(MisconfigurationException, match="The model's config has no BOS token"):
            fit(tmp_path, module, SelfGenerated(4, 8))

    def test_no_end_token(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        module.model.config.eos_token_id = module.model.generation_config.eos_token_id = None
        with pytest.raises(MisconfigurationException, match="neither tokenizer nor model has an end token"):
            fit(tmp_path, module, SelfGenerated(4, 8, on_eos="stop"))

    def test_a_model_without_a_head(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="has no language-model head"):
            fit(tmp_path, PlainLM(tiny_llama().model), SelfGenerated(4, 8))

    def test_logits_that_are_not_finite(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        with torch.no_grad():
            module.model.lm_head.weight[3] = float("nan")
        with pytest.raises(RuntimeError, match="Generation stopped at position 1 of 8"):
            fit(tmp_path, module, SelfGenerated(4, 8))

    def test_a_task_without_a_shared_beginning(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        module.model.config.bos_token_id = None
        source = SelfGenerated(4, 8, prompts="past_tasks")
        with pytest.warns(UserWarning, match="share no first token"):
            fit(tmp_path, module, source)

    def test_past_tasks_without_learning_the_prompts(self, tmp_path: Path) -> None:
        module = PlainLM(tiny_llama())
        module.prompt_loss_weight = 0.0
        with pytest.warns(UserWarning, match="a model trained on answers alone cannot write the inputs"):
            fit(tmp_path, module, SelfGenerated(4, 8, prompts="past_tasks"))

    @pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
    def test_strategies(self, name: str) -> None:
        import lightning.pytorch.strategies as strategies

        from lightning_cl.replay.self_generated_checks import refuse_strategy

        cls = getattr(strategies, name)

        class FakeTrainer:
            strategy = cls.__new__(cls)

        with pytest.raises(MisconfigurationException, match=f"`{name}` cannot gather .* generate-replay"):
            refuse_strategy(FakeTrainer())


def test_composes_with_general_samples(tmp_path: Path) -> None:
    module = Recorder(tiny_llama())
    module.tokenizer = tiny_tokenizer()
    own = SelfGenerated(4, 12)
    general = GeneralSamples(["the sun rose", "rain fell on"], num_samples=2, max_tokens=50)
    fit(tmp_path, module, own, mixer=ReplayMixer([own, general], rows_per_batch=2))
    assert all(len(batch) == 6 for batch in module.batches)
