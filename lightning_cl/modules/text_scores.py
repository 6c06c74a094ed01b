# SPDX-License-Identifier: Apache-2.0
"""Scores of one generated text against its reference, each between 0 and 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import torch

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_WORD = re.compile(r"[\W_]+")


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal, white space at the ends and its amount between words aside.

    Example:
        >>> exact_match(" New  York ", "New York"), exact_match("new york", "New York")
        (1.0, 0.0)
    """
    return float(prediction.split() == reference.split())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, as SQuAD counts them.

    Lower case, without punctuation and the articles a, an, the; two texts without any word are equal.

    Example:
        >>> round(token_f1("the old man", "An old man and the sea"), 4)
        0.6667
    """
    predicted, expected = _squad_words(prediction), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure: the longest common subsequence of words, by ``torchmetrics``, without stemming.

    Words are those of any alphabet (the common implementations keep ASCII letters alone).

    Example:
        >>> round(rouge_l("the cat sat", "the cat sat down"), 4)
        0.8571
    """
    from torchmetrics.functional.text import rouge_score

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # in a bf16-true step it is bfloat16, and so would the score be
    try:
        scores = rouge_score(prediction, reference, rouge_keys="rougeL", normalizer=_normal, tokenizer=str.split)
    finally:
        torch.set_default_dtype(default)
    return float(scores["rougeL_fmeasure"])


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
}


def _normal(text: str) -> str:
    return _NO_WORD.sub(" ", text.lower())


def _squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()
