# SPDX-License-Identifier: Apache-2.0
"""Text scores against the packages that define them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

from lightning_cl.modules.text_scores import exact_match, rouge_l, token_f1

SENTENCES = st.lists(st.sampled_from(["the", "Cat", "sat.", "on", "a", "mat,", "42", "it's"]), max_size=8).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(SENTENCES, SENTENCES)
def test_rouge_l_is_the_reference_implementations(prediction, reference):
    expected = RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(SENTENCES, SENTENCES)
def test_token_f1_is_squads(prediction, reference):
    scores = squad(
        [{"prediction_text": prediction, "id": "1"}],
        [{"answers": {"answer_start": [0], "text": [reference]}, "id": "1"}],
    )
    assert token_f1(prediction, reference) == pytest.approx(float(scores["f1"]) / 100, abs=1e-6)


def test_words_of_any_alphabet_count():
    assert rouge_l("мама мыла раму", "мама мыла окно") == pytest.approx(2 / 3)
    assert token_f1("größer als", "größer") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("4", "4", 1), (" 4\n", "4", 1), ("4.", "4", 0), ("New  York", "New York", 1), ("Yes", "yes", 0), ("", "x", 0)],
)
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected
