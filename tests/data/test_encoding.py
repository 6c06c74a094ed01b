# SPDX-License-Identifier: Apache-2.0
"""Rows as ids and labels: plain prompts, texts, weights, and rows that are too long."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.data import DataError, Encoder, count_truncated, report_truncated
from tests.data.tokenizers_of_families import family
from tests.helpers.models import tiny_llama, tiny_tokenizer

WORDS = st.text(alphabet="abc xyz", min_size=1, max_size=60).filter(lambda text: text.strip())


def learned(encoder, row):
    return encoder.tokenizer.decode(row["labels"][row["labels"] != -100])


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("Q:", "a", "Q: a"),
        ("Q: ", "a", "Q: a"),
        ("Q:  ", "a", "Q: a"),
        ("Q:\n", "a", "Q:\na"),
        ("Q:", " a", "Q: a"),
        ("Q:", "\na", "Q:\na"),
        ("", "a", "a"),
    ],
)
def test_plain_rows_join_with_one_space(prompt, answer, text):
    encoder = Encoder(tiny_tokenizer(), template="none")
    row = encoder.encode_train({"prompt": prompt, "answer": answer})
    assert encoder.tokenizer.decode(row["input_ids"]) == text + "<|im_end|>"
    expected = text[len(prompt.rstrip(" ")) :] + "<|im_end|>"
    assert learned(encoder, row) == (expected if prompt else expected[1:])  # nothing predicts the first token


def test_text_rows_are_learned_whole():
    encoder = Encoder(tiny_tokenizer())
    row = encoder.encode_train({"text": "abc"})
    assert encoder.tokenizer.decode(row["input_ids"]) == "abc"
    assert learned(encoder, row) == "bc"
    with_bos = Encoder(family("llama3")).encode_train({"text": "abc"})
    assert with_bos["input_ids"].tolist()[0] == family("llama3").bos_token_id
    assert len(with_bos["input_ids"]) == 4


def test_one_bos_whoever_writes_it():
    for name in ("llama3", "gemma", "chatml_bos"):
        tokenizer = family(name)
        for template in ("auto", "none"):
            encoder = Encoder(tokenizer, template=template)
            for ids in (
                encoder.encode_train({"prompt": "Q", "answer": "a"})["input_ids"],
                encoder.encode_eval({"prompt": "Q", "answer": "a", "options": ["a", "b"]}, "accuracy")["input_ids"],
                encoder.encode_eval({"prompt": "Q", "answer": "a"}, "rouge_l")["input_ids"],
            ):
                assert ids[0] == tokenizer.bos_token_id
                assert (ids == tokenizer.bos_token_id).sum() == 1


def test_prompt_loss_weight():
    row = {"prompt": "Q:", "answer": "a"}
    tokenizer = tiny_tokenizer(chat=False)
    light = Encoder(tokenizer, prompt_loss_weight=0.25).encode_train(row)
    assert light["labels"].tolist() == [-100, *light["input_ids"].tolist()[1:]]
    assert light["loss_weight"].tolist() == [0.25, 0.25, 1.0, 1.0, 1.0]
    assert Encoder(tokenizer, prompt_loss_weight=0.25).encode_train({"text": "ab"})["loss_weight"].tolist() == [
        1.0,
        1.0,
    ]
    full = Encoder(tokenizer, prompt_loss_weight=1.0).encode_train(row)
    assert set(full) == {"input_ids", "attention_mask", "labels"}
    assert full["labels"].tolist() == light["labels"].tolist()
    # Evaluation is over the answer alone, whatever the training weighs.
    evaluated = Encoder(tokenizer, prompt_loss_weight=0.25).encode_eval(row, "loss")
    assert (evaluated["labels"] != -100).tolist() == [False, False, True, True, True]
    assert "loss_weight" not in evaluated


def test_options_that_begin_alike_keep_the_prompt():
    encoder = Encoder(tiny_tokenizer(chat=False))
    row = encoder.encode_eval({"prompt": "Q:", "answer": "no", "options": ["no", "not yet"]}, "accuracy")
    assert encoder.tokenizer.decode(row["input_ids"]) == "Q:"
    assert [encoder.tokenizer.decode(ids) for ids in row["option_ids"]] == [" no<|im_end|>", " not yet<|im_end|>"]
    assert row["answer_index"] == 0
    assert row["reference_length"] == 4


def test_class_path_metrics_take_options_or_texts():
    encoder = Encoder(tiny_tokenizer(chat=False))
    row = {"prompt": "Q:", "answer": "b", "options": ["a", "b"]}
    assert "option_ids" in encoder.encode_eval(row, "torchmetrics.classification.MulticlassF1Score")
    assert "option_ids" not in encoder.encode_eval(row, "torchmetrics.text.CharErrorRate")
    assert "option_ids" not in encoder.encode_eval(row, "exact_match")


# ------------------------------------------------------------------ rows that are too long


@settings(max_examples=60, deadline=None)
@given(WORDS, st.text(alphabet="123", min_size=1, max_size=6), st.integers(24, 60), st.sampled_from(["left", "right"]))
def test_long_prompts_lose_their_own_words_alone(prompt, answer, max_length, side):
    for template, name in (("none", "chatml_bos"), ("none", "chatml"), ("auto", "gemma")):
        tokenizer = family(name)
        encoder = Encoder(tokenizer, max_length=max_length, template=template, truncation_side=side)
        free = Encoder(tokenizer, max_length=10_000, template=template)
        row = {"prompt": prompt, "answer": answer}
        whole, cut = free.encode_train(row), encoder.encode_train(row)
        assert len(cut["input_ids"]) == min(len(whole["input_ids"]), max_length)
        assert learned(encoder, cut) == learned(free, whole)  # the answer stays whole
        if len(whole["input_ids"]) > max_length:
            # What is left is the whole row with one stretch of the prompt's words taken out at the chosen side.
            text, rest = tokenizer.decode(whole["input_ids"]), tokenizer.decode(cut["input_ids"])
            words = prompt.rstrip(" ") if template == "none" else prompt.strip()
            place = text.index(words)
            gone = len(text) - len(rest)
            lost = (
                slice(place, place + gone) if side == "left" else slice(place + len(words) - gone, place + len(words))
            )
            assert rest == text[: lost.start] + text[lost.stop :]


@settings(max_examples=40, deadline=None)
@given(WORDS, st.integers(40, 70), st.sampled_from(["left", "right"]), st.sampled_from(["auto", "none"]))
def test_the_prompt_is_cut_alike_in_training_scoring_and_generation(prompt, max_length, side, template):
    encoder = Encoder(family("llama3"), max_length=max_length, truncation_side=side, template=template)
    row = {"prompt": prompt, "answer": "no", "options": ["no", "certainly"]}
    train, scoring = encoder.encode_train(row), encoder.encode_eval(row, "accuracy")
    start = int((train["labels"] != -100).nonzero()[0])
    prompts = [train["input_ids"][:start], scoring["input_ids"], encoder.encode_eval(row, "rouge_l")["input_ids"]]
    assert prompts[0].tolist() == prompts[1].tolist() == prompts[2].tolist()
    assert all(len(prompts[1]) + len(ids) <= max_length for ids in scoring["option_ids"])
    assert encoder.tokenizer.decode(scoring["option_ids"][1]).strip() == "certainly<|eot_id|>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_conversations_and_texts(side):
    tokenizer = family("chatml")
    encoder = Encoder(tokenizer, max_length=70, truncation_side=side)
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "u" * 90},
        {"role": "assistant", "content": "ok"},
    ]
    text = tokenizer.decode(encoder.encode_train({"messages": turns})["input_ids"])
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nuuu")
    assert text.endswith("uuu<|im_end|>\n<|im_start|>assistant\nok<|im_end|>")
    letters = "".join(chr(97 + i % 26) for i in range(100))
    cut = tokenizer.decode(encoder.encode_train({"text": letters})["input_ids"])
    assert cut == (letters[-70:] if side == "left" else letters[:70])


def test_an_answer_that_is_too_long_is_cut_at_its_end():
    encoder = Encoder(tiny_tokenizer(chat=False), max_length=10)
    row = encoder.encode_train({"prompt": "abc", "answer": "0123456789012"})
    assert encoder.tokenizer.decode(row["input_ids"]) == " 012345678"
    row = encoder.encode_eval({"prompt": "abc", "answer": "0" * 20, "options": ["0" * 20, "1"]}, "accuracy")
    assert len(row["input_ids"]) + len(row["option_ids"][0]) <= 10


def test_truncation_is_counted_and_reported(recwarn):
    encoder = Encoder(tiny_tokenizer(chat=False), max_length=8)
    rows = [{"text": "a" * 5}, {"text": "a" * 10}, {"prompt": "a" * 8, "answer": "bc"}]
    report = count_truncated(rows, encoder)
    assert (report.rows, report.truncated, report.tokens_cut, report.longest, report.total) == (3, 2, 2 + 4, 12, 3)
    sampled = count_truncated(rows * 100, encoder, limit=30)
    assert (sampled.rows, sampled.truncated, sampled.total) == (30, 20, 300)
    with pytest.warns(
        UserWarning, match=r"task a: 2 of 3 rows are longer than `max_length=8` .* 12\) and lose 6 tokens"
    ):
        report_truncated(rows, encoder, "task a")
    recwarn.clear()
    report_truncated(rows[:1], encoder, "task a")
    assert not recwarn.list


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "chatml"}, r"`template='chatml'`: unknown. Use 'auto' or 'none'"),
        ({"truncation_side": "middle"}, r"`truncation_side='middle'`: unknown"),
        ({"prompt_loss_weight": 1.5}, r"`prompt_loss_weight=1.5`: must lie between 0"),
        ({"max_length": 1}, r"`max_length=1`: a row needs room for two tokens"),
        ({"max_length": 200}, r"`max_length=200`: the model reads 128 tokens at most.*Use `max_length=128` or less"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Encoder(tiny_tokenizer(), **arguments)


def test_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"no tokenizer at '.*empty' \(.*Give a folder saved by"):
        Encoder(str(tmp_path / "empty"))


def test_tokenizer_by_path(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    row = {"prompt": "Q:", "answer": "a"}
    assert Encoder(tmp_path).encode_train(row)["input_ids"].tolist() == (
        Encoder(tiny_tokenizer()).encode_train(row)["input_ids"].tolist()
    )


def test_for_module():
    class Module:
        tokenizer = tiny_tokenizer()
        prompt_loss_weight = 0.5
        model = tiny_llama(max_position_embeddings=64)

    assert Encoder.for_module(Module()).prompt_loss_weight == 0.5
    assert Encoder.for_module(Module()).max_length == 64
    assert Encoder.for_module(None, tiny_tokenizer()).max_length == 128
    with pytest.raises(MisconfigurationException, match=r"`max_length=100`: the model's context is 64 tokens"):
        Encoder.for_module(Module(), max_length=100)
    with pytest.raises(
        MisconfigurationException, match=r"no tokenizer: `tokenizer` is None and object has no attribute"
    ):
        Encoder.for_module(object())


def test_rows_that_a_metric_cannot_score():
    encoder = Encoder(tiny_tokenizer())
    with pytest.raises(DataError, match="a row of evaluation: the metric 'accuracy' needs"):
        encoder.encode_eval({"text": "abc"}, "accuracy")


def test_pad_token_falls_back_to_eos_and_zero():
    tokenizer = tiny_tokenizer()
    assert Encoder(tokenizer).pad_token_id == 0
    tokenizer.pad_token = None
    assert Encoder(tokenizer).pad_token_id == tokenizer.eos_token_id


def test_dtypes():
    row = Encoder(tiny_tokenizer(), prompt_loss_weight=0.5).encode_train({"prompt": "Q", "answer": "a"})
    assert {key: value.dtype for key, value in row.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "loss_weight": torch.float32,
    }
