# SPDX-License-Identifier: Apache-2.0
"""The form of a task's rows, learnt from rows whose form is known."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from lightning_cl.replay.grammar import RowGrammar

MARK, YES, NO, END = 50, 60, 61, 2


def row(inputs: list[int], answer: int, how: str) -> dict[str, torch.Tensor]:
    """Instruction 1 5, inputs, a marker, an answer, the end."""
    ids = torch.tensor([1, 5, *inputs, MARK, answer, END])
    answered = torch.arange(len(ids)) >= len(ids) - 2
    if how == "weights":
        return {"input_ids": ids, "labels": ids, "loss_weight": torch.where(answered, 1.0, 0.25)}
    labels = torch.where(answered, ids, -100) if how == "answers alone" else ids.clone()
    labels[0] = -100
    return {"input_ids": ids, "labels": labels} if how != "no labels" else {"input_ids": ids}


def learnt(how: str, answers: int = 2, rows: int = 40, first: int = 0) -> RowGrammar:
    grammar = RowGrammar()
    for i in range(first, first + rows):
        grammar.learn(row([20 + i % 7, 30 + i % 5][: 1 + i % 2], YES + i % answers, how))
    return grammar


@pytest.mark.parametrize("how", ["weights", "answers alone"])
def test_a_choice_of_answers(how: str) -> None:
    grammar = learnt(how)
    assert grammar.beginning == [1, 5]
    assert grammar.accepts([1, 5, 99, 98, 97, MARK, NO, END])
    assert grammar.accepts([1, 5, 99, MARK, YES, END])
    for broken in (
        [1, 5, 99, MARK, 62, END],  # an answer that is none
        [1, 5, 99, YES, END],  # no marker
        [1, 5, 99, MARK, YES],  # no end
        [1, 5, 99, MARK, YES, END, 99],
        [1, 5, MARK, YES, END],  # no input at all
        [1, 6, 99, MARK, YES, END],  # another instruction
        [MARK, YES, END],
    ):
        assert not grammar.accepts(broken)


def test_free_answers_need_only_the_marker() -> None:
    grammar = learnt("weights", answers=30)
    assert grammar.accepts([1, 5, 99, MARK, 7, 8, 9, END])
    assert not grammar.accepts([1, 5, 99, 7, 8, 9, END])
    assert not grammar.accepts([1, 5, 99, MARK])  # nothing after it


def test_prompts_without_a_common_ending() -> None:
    grammar = RowGrammar()
    for i in range(8):
        ids = torch.tensor([1, 5, 20 + i, YES, END])
        grammar.learn({"input_ids": ids, "labels": torch.where(torch.arange(5) > 2, ids, -100)})
    assert grammar.accepts([1, 5, 99, YES, END])
    assert not grammar.accepts([1, 5, YES, END])
    assert not grammar.accepts([1, 5, 99, NO, END])


@pytest.mark.parametrize("how", ["all tokens", "no labels"])
def test_without_known_answers_only_the_beginning_counts(how: str) -> None:
    grammar = learnt(how)
    assert grammar.accepts([1, 5, 99])
    assert not grammar.accepts([1, 99])


def test_one_row_that_does_not_say_opens_the_form() -> None:
    grammar = learnt("weights")
    grammar.learn(row([20], YES, "no labels"))
    assert grammar.accepts([1, 5, 99])


def test_parts_of_ranks_merge_to_the_whole() -> None:
    whole, merged = learnt("weights", answers=3, rows=60), RowGrammar()
    for part in (RowGrammar(), learnt("weights", 3, 25), learnt("weights", 3, 35, first=25), RowGrammar()):
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert merged.state_dict() == whole.state_dict()


def test_state_continues() -> None:
    half = learnt("weights", 2, 20)
    again: Any = RowGrammar.from_state(half.state_dict())
    for i in range(20, 40):
        again.learn(row([20 + i % 7, 30 + i % 5][: 1 + i % 2], YES + i % 2, "weights"))
    assert again.state_dict() == learnt("weights", 2, 40).state_dict()


def test_enough_is_enough() -> None:
    assert not learnt("weights", rows=511).complete
    assert learnt("weights", rows=512).complete
    apart = learnt("weights", rows=1)
    apart.learn({"input_ids": torch.tensor([9, 9])})
    assert apart.complete
    apart.begin_with(1)
    assert apart.beginning == [1]
