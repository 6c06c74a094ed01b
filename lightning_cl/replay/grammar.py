# SPDX-License-Identifier: Apache-2.0
"""What the rows of a task have in common, learnt from the rows themselves: how they begin, and how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cl.replay.prompting import shared_beginning

# Rows after which what they all share is taken as known.
_ENOUGH = 512
# More different answers than this, or than a quarter of the rows, are free text and not a choice.
_MOST_ANSWERS = 64


class RowGrammar:
    """Learn the form of a task's rows, to begin new ones by it and to drop those that break it.

    All rows share a beginning (the task's instruction). Where a row says which of its tokens are the answer (the only
    ones with a label, or those with ``loss_weight`` 1 after others with less), the prompts share an ending too
    ("Answer:"), and if the answers are few, they are a choice. A row of this form begins like the others, has a prompt no
    shorter than theirs, the prompts' ending before its answer, and an answer that has been seen where they are a choice.

    Example:
        >>> grammar = RowGrammar()
        >>> rows = [[1, 5, 7, 9, 2], [1, 6, 8, 7, 9, 2]] * 4  # 1: instruction, 7: "Answer:", 9: an answer, 2: the end
        >>> for row in rows:
        ...     ids = torch.tensor(row)
        ...     grammar.learn({"input_ids": ids, "labels": torch.where(ids.cumsum(0) > sum(row[:-2]), ids, -100)})
        >>> grammar.beginning, grammar.accepts([1, 4, 4, 7, 9, 2]), grammar.accepts([1, 4, 4, 9, 2])
        ([1], True, False)
    """

    def __init__(self) -> None:
        self.rows = 0
        self._beginning: list[int] | None = None
        self._ending: list[int] | None = None  # the last token first
        self._answers: set[tuple[int, ...]] = set()
        self._shortest: int | None = None  # prompt, in tokens
        # False once a row did not say which tokens are its answer.
        self._answered = True

    @property
    def beginning(self) -> list[int]:
        """The tokens that all rows begin with."""
        return list(self._beginning or [])

    @property
    def complete(self) -> bool:
        """Whether more rows would teach nothing."""
        return self.rows >= _ENOUGH or self._beginning == []

    def learn(self, content: Mapping[str, Tensor]) -> None:
        """Take in one row of the task: ``input_ids [T]``, and ``labels`` and ``loss_weight`` if it has them."""
        tokens = content["input_ids"].tolist()
        self.rows += 1
        self._beginning = _shared(self._beginning, tokens)
        start = _answer_start(content)
        if start is None:
            self._answered = False
            return
        self._ending = _shared(self._ending, tokens[:start][::-1])
        self._shortest = start if self._shortest is None else min(start, self._shortest)
        if len(self._answers) <= _MOST_ANSWERS:
            self._answers.add(tuple(tokens[start:]))

    def begin_with(self, token: int) -> None:
        """Let rows that share no beginning begin with this token."""
        self._beginning = [token]

    def merge(self, other: RowGrammar) -> None:
        """Take in what another rank has learnt."""
        self.rows += other.rows
        self._beginning = _shared(self._beginning, other._beginning)
        self._ending = _shared(self._ending, other._ending)
        self._answers |= other._answers
        self._shortest = min((n for n in (self._shortest, other._shortest) if n is not None), default=None)
        self._answered = self._answered and other._answered

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether a whole row has this form."""
        begin, found = self.beginning, list(tokens)
        if found[: len(begin)] != begin:
            return False
        if not self._answered or self._ending is None or self._shortest is None:
            return True
        if 0 < len(self._answers) <= min(_MOST_ANSWERS, self.rows // 4):
            starts = [len(found) - len(answer) for answer in self._answers if tuple(found[-len(answer) :]) == answer]
        else:
            starts = list(range(len(found)))
        ending = self._ending[::-1]
        first = max(self._shortest, len(begin) + len(ending))
        return any(start >= first and found[start - len(ending) : start] == ending for start in starts)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types."""
        return {
            "rows": self.rows,
            "beginning": self._beginning,
            "ending": self._ending,
            "answers": sorted(self._answers),
            "shortest": self._shortest,
            "answered": self._answered,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RowGrammar:
        """The grammar that a checkpoint held."""
        grammar = cls()
        grammar.rows, grammar._answered = state["rows"], state["answered"]
        grammar._beginning, grammar._ending = state["beginning"], state["ending"]
        grammar._answers = {tuple(answer) for answer in state["answers"]}
        grammar._shortest = state["shortest"]
        return grammar


def _shared(a: list[int] | None, b: list[int] | None) -> list[int] | None:
    """What two sequences begin with; None is no sequence yet."""
    return b if a is None else a if b is None else shared_beginning([a, b])


def _answer_start(content: Mapping[str, Tensor]) -> int | None:
    """Where a row's answer begins: the tokens from there on, and only these, carry the full loss."""
    if "loss_weight" in content:
        learned = content["loss_weight"] == 1
    elif "labels" in content:
        # The first token is never predicted, so it has no label in some rows that are learnt whole.
        learned = content["labels"] != -100
        learned[0] = learned[1:2].all()
    else:
        return None
    if bool(learned.all()) or not bool(learned.any()):
        return None
    start = int(torch.argmax(learned.int()))
    return start if bool(learned[start:].all()) else None
