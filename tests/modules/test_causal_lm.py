# SPDX-License-Identifier: Apache-2.0
"""CausalLMModule in real Trainers."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate

from lightning_cl.data import Collator, EncodedDataset, Encoder, EvalSampler
from lightning_cl.modules import CausalLMModule
from tests.helpers.models import PlainLM, lora, tiny_llama, tiny_tokenizer
from tests.helpers.models import trainer as make_trainer

WORDS = ["red", "blue", "green", "old"]
ROWS = [
    {"prompt": f"{w} {i}?", "answer": w, "options": ["red", "blue", "green", "old"]} for i in range(3) for w in WORDS
]
TEXTS = [{"text": "some words to read " + "again " * i} for i in range(4)]


class TwoValues(CharErrorRate):
    def compute(self):
        return {"low": super().compute(), "high": super().compute()}


def module(**arguments):
    arguments = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), "lr": 1e-2, **arguments}
    return CausalLMModule(**arguments)


def loader(pl_module, rows=ROWS, mode="train", metric=None, batch_size=4, **options):
    encoder = Encoder.for_module(pl_module, template="none", **options)
    dataset = EncodedDataset(rows, encoder, mode, metric)
    sampler = EvalSampler(dataset.lengths()) if mode == "eval" else None
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=Collator(encoder.pad_token_id))


# ------------------------------------------------------------------ training


def test_training_step_equals_the_library_loss(tmp_path):
    """With whole answers the loss, and so the weights after training, are those of an ordinary module."""
    ours, plain = module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), PlainLM(tiny_llama(), lr=0.1)
    for candidate in (ours, plain):
        torch.manual_seed(0)
        make_trainer(tmp_path, max_steps=3).fit(candidate, loader(ours))
    for (name, a), (_, b) in zip(ours.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_overfits_answers_and_logs_the_loss(tmp_path):
    pl_module = module(lr=1e-2)
    trainer = make_trainer(tmp_path, max_steps=60)
    trainer.fit(pl_module, loader(pl_module, ROWS[:4]))
    assert float(trainer.callback_metrics["train_loss"]) < 0.2
    trainer.validate(pl_module, loader(pl_module, ROWS[:4], "eval", "accuracy"), verbose=False)
    assert float(trainer.callback_metrics["val_accuracy"]) == 1.0
    trainer.validate(pl_module, loader(pl_module, ROWS[:4], "eval", "exact_match"), verbose=False)
    assert float(trainer.callback_metrics["val_exact_match"]) == 1.0
    predictions = trainer.predict(pl_module, loader(pl_module, ROWS[:4], "eval", "exact_match"))
    assert all(row["prediction"] == row["reference"] for batch in predictions for row in batch)


def test_per_row_loss_and_row_weights():
    pl_module = module()
    batch = next(iter(loader(pl_module)))
    rows, weights = pl_module.per_row_loss(batch), pl_module.row_weights(batch)
    assert rows.shape == weights.shape == (4,)
    assert rows.requires_grad
    for i in range(4):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        torch.testing.assert_close(rows[i], pl_module.model(**alone).loss)
    assert weights.tolist() == [(row != -100).sum() for row in batch["labels"]]


def test_prompt_loss_weight_changes_the_loss():
    pl_module = module(prompt_loss_weight=0.5)
    batch = next(iter(loader(pl_module)))
    assert "loss_weight" in batch
    logits = pl_module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    weight = (batch["loss_weight"] * (batch["labels"] != -100))[:, 1:].flatten()
    torch.testing.assert_close(pl_module.training_step(batch, 0), (nll * weight).sum() / weight.sum())


def test_rows_without_labels_have_no_loss_and_no_gradient():
    pl_module = module()
    batch = next(iter(loader(pl_module)))
    expected = pl_module.training_step({key: value[:3] for key, value in batch.items()}, 0)
    batch["labels"][3] = -100
    torch.testing.assert_close(pl_module.training_step(batch, 0), expected)
    assert pl_module.per_row_loss(batch)[3] == 0
    batch["labels"][:] = -100
    loss = pl_module.training_step(batch, 0)
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is None or not p.grad.any() for p in pl_module.parameters())


def test_network_is_put_in_training_mode():
    model = tiny_llama().eval()
    assert CausalLMModule(model).model.training


@pytest.mark.parametrize("as_object", [False, True])
def test_lora_alone_is_trained(tmp_path, as_object):
    from peft import LoraConfig

    given = LoraConfig(r=2) if as_object else {"r": 2}
    pl_module = module(lora=given)
    before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
    make_trainer(tmp_path, max_steps=2).fit(pl_module, loader(pl_module))
    changed = {name for name, p in pl_module.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in before if "lora_" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if as_object:
        assert given.target_modules is None  # the user's object stays as it was


def test_schedules(tmp_path):
    from lightning.pytorch.callbacks import LearningRateMonitor

    class Rates(LearningRateMonitor):
        seen: ClassVar[list[float]] = []

        def on_train_batch_start(self, trainer, *args, **kwargs):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    Rates.seen = []
    pl_module = module(lr=1.0, schedule="linear", warmup=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    make_trainer(tmp_path, max_steps=4, callbacks=[Rates()], logger=True).fit(
        pl_module, loader(pl_module, batch_size=2)
    )
    assert Rates.seen == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_own_scheduler(tmp_path):
    pl_module = module(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1),
    )
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=2)
    trainer.fit(pl_module, loader(pl_module))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


# ------------------------------------------------------------------ evaluation


def test_each_loader_logs_its_own_metric(tmp_path):
    pl_module = module(max_new_tokens=4)
    metrics = ["accuracy", "loss", "exact_match", "rouge_l", "token_f1"]
    rows = [ROWS, TEXTS, ROWS, ROWS, ROWS]
    loaders = [loader(pl_module, r, "eval", metric) for r, metric in zip(rows, metrics, strict=True)]
    trainer = make_trainer(tmp_path)
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        results = run(pl_module, loaders, verbose=False)
        names = [next(iter(result)) for result in results]
        assert names == [f"{stage}_{metric}/dataloader_idx_{i}" for i, metric in enumerate(metrics)]
        for i, result in enumerate(results):
            scores = pl_module.row_scores[i]
            assert len(scores) == len(rows[i])
            assert next(iter(result.values())) == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_one_loader_logs_the_bare_name(tmp_path):
    pl_module = module()
    (result,) = make_trainer(tmp_path).validate(pl_module, loader(pl_module, TEXTS, "eval", "loss"), verbose=False)
    assert set(result) == {"val_loss"}


def test_loss_is_the_mean_over_rows_whatever_the_batches(tmp_path):
    pl_module = module()
    encoder = Encoder.for_module(pl_module)
    expected = []
    for row in TEXTS:
        encoded = {key: value[None] for key, value in encoder.encode_train(row).items()}
        expected.append(float(pl_module.model(**encoded).loss))
    for batch_size in (1, 3, 4):
        data = loader(pl_module, TEXTS, "eval", "loss", batch_size)
        (result,) = make_trainer(tmp_path).validate(pl_module, data, verbose=False)
        assert result["val_loss"] == pytest.approx(sum(expected) / 4, rel=1e-5)
        assert sorted(pl_module.row_scores[0]) == pytest.approx(sorted(expected), rel=1e-5)


def test_scores_keep_their_digits_in_half_precision(tmp_path):
    """Three rows of four are 0.75 in any dtype, a mean loss is not: it is kept in float32 under bf16-true too."""
    pl_module = module()
    trainer = make_trainer(tmp_path, precision="bf16-true")
    (result,) = trainer.validate(pl_module, loader(pl_module, TEXTS, "eval", "loss", 1), verbose=False)
    scores = pl_module.row_scores[0]
    assert result["val_loss"] == pytest.approx(sum(scores) / len(scores), rel=1e-6)
    pl_module.generate_text = lambda batch: ["red red blue"] * len(batch["reference"])
    data = loader(pl_module, [{"prompt": "Q", "answer": "red green"}], "eval", "rouge_l")
    (result,) = trainer.validate(pl_module, data, verbose=False)
    assert result["val_rouge_l"] == pytest.approx(0.4, rel=1e-6)


def test_accuracy_equals_one_row_at_a_time(tmp_path):
    pl_module = module()
    encoder = Encoder.for_module(pl_module, template="none")
    right = []
    for row in ROWS:
        losses = []
        for option in row["options"]:
            encoded = encoder.encode_train({"prompt": row["prompt"], "answer": option})
            batch = {key: value[None] for key, value in encoded.items()}
            losses.append(float(pl_module.model(**batch).loss * (encoded["labels"] != -100).sum()))
        right.append(float(row["options"][losses.index(min(losses))] == row["answer"]))
    make_trainer(tmp_path).validate(pl_module, loader(pl_module, mode="eval", metric="accuracy"), verbose=False)
    assert pl_module.row_scores[0] == right  # in the order of the data set, though batches are sorted by length


def test_row_scores_begin_anew(tmp_path):
    pl_module = module()
    trainer = make_trainer(tmp_path)
    data = loader(pl_module, mode="eval", metric="accuracy")
    for _ in range(2):
        trainer.validate(pl_module, data, verbose=False)
        assert len(pl_module.row_scores[0]) == len(ROWS)


def test_fillers_do_not_count(tmp_path):
    pl_module = module(max_new_tokens=2)
    encoder = Encoder.for_module(pl_module)
    for metric, rows in (("accuracy", ROWS), ("loss", TEXTS), ("exact_match", ROWS)):
        dataset = EncodedDataset(rows, encoder, "eval", metric)
        order = [*range(len(rows)), -1, -2]
        data = DataLoader(dataset, batch_size=3, sampler=order, collate_fn=Collator(0))
        trainer = make_trainer(tmp_path)
        (result,) = trainer.validate(pl_module, data, verbose=False)
        scores = pl_module.row_scores[0]
        assert len(scores) == len(rows)
        assert next(iter(result.values())) == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_metric_by_class_path(tmp_path):
    pl_module = module(max_new_tokens=3)
    paths = ["torchmetrics.text.CharErrorRate", "torchmetrics.classification.MulticlassF1Score"]
    loaders = [loader(pl_module, ROWS, "eval", path) for path in paths]
    results = make_trainer(tmp_path).validate(pl_module, loaders, verbose=False)
    assert [next(iter(r)) for r in results] == [
        "val_CharErrorRate/dataloader_idx_0",
        "val_MulticlassF1Score/dataloader_idx_1",
    ]
    assert pl_module.row_scores == {}
    from torchmetrics.functional.classification import multiclass_f1_score

    batch = next(iter(loader(pl_module, ROWS, "eval", paths[1], batch_size=len(ROWS))))
    expected = multiclass_f1_score(pl_module.option_scores(batch).argmax(-1), batch["answer_index"], 4)
    assert next(iter(results[1].values())) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torchmetrics.text.Nonsense", r"'torchmetrics.text.Nonsense' cannot be imported"),
        ("no.such.Module", "'no.such.Module' cannot be imported"),
        ("torch.nn.Linear", "'torch.nn.Linear' is no torchmetrics metric"),
        ("torchmetrics.MetricCollection", "cannot be built without arguments|is no torchmetrics metric"),
        (f"{__name__}.TwoValues", r"TwoValues' gives several values \(low, high\)"),
        ("torchmetrics.regression.MeanSquaredError", "cannot be fed with generated texts and references"),
    ],
)
def test_bad_class_paths(tmp_path, path, message):
    pl_module = module(max_new_tokens=1)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path).validate(pl_module, loader(pl_module, ROWS[:2], "eval", path), verbose=False)


def test_generation_stops_at_the_end_and_ignores_padding():
    pl_module = module(max_new_tokens=6)
    together = pl_module.generate_text(next(iter(loader(pl_module, ROWS, "eval", "rouge_l", batch_size=len(ROWS)))))
    apart = [pl_module.generate_text(b)[0] for b in loader(pl_module, ROWS, "eval", "rouge_l", batch_size=1)]
    assert together == apart


def test_generation_stays_within_the_context():
    pl_module = module(model=tiny_llama(max_position_embeddings=16), max_new_tokens=64)
    batch = next(iter(loader(pl_module, ROWS, "eval", "rouge_l")))
    width = batch["input_ids"].shape[1]
    assert max(len(text) for text in pl_module.generate_text(batch)) <= 16 - width + len("<|im_start|>")


def test_predictions_of_options_and_texts(tmp_path):
    pl_module = module()
    (batch,) = make_trainer(tmp_path).predict(pl_module, loader(pl_module, ROWS[:4], "eval", "accuracy"))
    for row in batch:
        assert row["prediction"] == WORDS[row["scores"].index(max(row["scores"]))]
        assert len(row["scores"]) == 4
    (batch,) = make_trainer(tmp_path).predict(pl_module, loader(pl_module, TEXTS, "eval", "loss"))
    assert all(math.isfinite(row["loss"]) for row in batch)


# ------------------------------------------------------------------ checkpoints


def test_checkpoint_holds_plain_values_alone(tmp_path):
    pl_module = module(lora={"r": 2})
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(pl_module, loader(pl_module))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lora"] == {"r": 2}
    assert "model" not in checkpoint["hyper_parameters"]
    fresh = CausalLMModule.load_from_checkpoint(
        tmp_path / "a.ckpt", model=tiny_llama(), tokenizer=tiny_tokenizer(), weights_only=True
    )
    for a, b in zip(fresh.parameters(), pl_module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_model_and_tokenizer_by_path(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    pl_module = CausalLMModule(str(tmp_path / "m"), dtype="bfloat16")
    assert pl_module.tokenizer.eos_token == "<|im_end|>"
    assert {p.dtype for p in pl_module.parameters()} == {torch.bfloat16}
    assert pl_module.hparams["model"] == str(tmp_path / "m")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"`lr=0.0`: must be above 0"),
        ({"schedule": "step"}, r"`schedule='step'`: unknown. Use 'constant', 'linear' or 'cosine'"),
        ({"warmup": 1.0}, r"`warmup=1.0`: must be a fraction"),
        ({"schedule": "linear", "lr_scheduler": lambda o: o}, r"`lr_scheduler` and `schedule`.*give one of them"),
        ({"prompt_loss_weight": -1.0}, r"`prompt_loss_weight=-1.0`: must lie between"),
        ({"option_length": "max"}, r"`option_length='max'`: unknown"),
        ({"max_new_tokens": 0}, r"`max_new_tokens=0`: must be 1 or more"),
        ({"model": torch.nn.Linear(2, 2)}, r"`model` is Linear, but must be a path, a name, or"),
        ({"model": lora(tiny_llama()), "lora": {"r": 2}}, r"has adapters already \(\['default'\]\)"),
        ({"lora": {"rank": 2}}, r"`lora=\{'rank': 2\}`: .*unexpected keyword.*See `peft.LoraConfig`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        module(**arguments)


def test_bad_paths(tmp_path):
    with pytest.raises(MisconfigurationException, match="no tokenizer at"):
        CausalLMModule(str(tmp_path / "nothing"))
    with pytest.raises(MisconfigurationException, match=r"no causal language model at '.*nothing'"):
        CausalLMModule(str(tmp_path / "nothing"), tokenizer=tiny_tokenizer())


def test_frozen_model_is_refused(tmp_path):
    model = tiny_llama().requires_grad_(False)
    pl_module = module(model=model)
    with pytest.raises(MisconfigurationException, match="has no parameter that requires grad: the model is frozen"):
        make_trainer(tmp_path).fit(pl_module, loader(pl_module))


def test_batches_of_other_kinds_are_refused(tmp_path):
    pl_module = module()
    data = DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 3)), batch_size=2)
    with pytest.raises(MisconfigurationException, match=r"needs batches with `input_ids` and `labels`, found list"):
        make_trainer(tmp_path).fit(pl_module, data)
    with pytest.raises(MisconfigurationException, match=r"needs batches with `input_ids` and `labels`, found list"):
        make_trainer(tmp_path).validate(pl_module, data, verbose=False)


def test_generation_without_a_tokenizer_is_refused():
    pl_module = CausalLMModule(tiny_llama())
    batch = next(iter(loader(module(), ROWS, "eval", "rouge_l")))
    with pytest.raises(MisconfigurationException, match="generating text needs a tokenizer"):
        pl_module.generate_text(batch)


def test_schedule_without_a_number_of_steps_is_refused(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    from lightning_cl.data import EncodedIterableDataset

    pl_module = module(schedule="cosine")
    dataset = EncodedIterableDataset(Endless(), Encoder.for_module(pl_module))
    data = DataLoader(dataset, batch_size=4, collate_fn=Collator(0))
    with pytest.raises(
        MisconfigurationException, match=r"`schedule='cosine'` with `warmup=0.0` needs the number of steps"
    ):
        make_trainer(tmp_path, max_steps=-1, max_epochs=1).fit(pl_module, data)
