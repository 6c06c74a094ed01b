# SPDX-License-Identifier: Apache-2.0
"""The three forms a row of text may have, and what makes one unusable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning_cl.data.errors import DataError

Example = dict[str, Any]
"""``{"text"}``, ``{"prompt", "answer", "options"?}`` or ``{"messages", "tools"?}``; other keys are dropped."""

ExampleKind = Literal["messages", "prompt", "text"]

_KEYS: dict[ExampleKind, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt": ("prompt", "answer", "options"),
    "text": ("text",),
}
GENERATION_METRICS = ("exact_match", "rouge_l", "token_f1")
METRICS = ("accuracy", *GENERATION_METRICS, "loss")


def example_kind(row: Any) -> ExampleKind | None:
    """The form of a row by its keys, or None when it is none of the three.

    A row with the keys of several forms counts as the first of ``messages``, ``prompt`` and ``text``, as in public
    instruction sets that keep the first prompt beside the conversation.

    Example:
        >>> example_kind({"prompt": "2+2=", "answer": "4"}), example_kind({"input_ids": [1]})
        ('prompt', None)
    """
    if not isinstance(row, Mapping):
        return None
    if row.get("messages") is not None:
        return "messages"
    if row.get("prompt") is not None and "answer" in row:
        return "prompt"
    return "text" if isinstance(row.get("text"), str) else None


def example_problem(row: Any) -> str | None:
    """What makes a row unusable, in words that follow the row's place, or None for a good row.

    Example:
        >>> example_problem({"prompt": "a or b?", "answer": "c", "options": ["a", "b"]})
        "the answer 'c' is not among the options ['a', 'b']"
    """
    if not isinstance(row, Mapping):
        return f"found {_kind_name(row)} where a row (a JSON object) is needed"
    kind = example_kind(row)
    if kind is None:
        return (
            f"found the keys {sorted(map(str, row))}, but a row needs `text`, or `prompt` and `answer` "
            "(and maybe `options`), or `messages`"
        )
    return {"messages": _messages_problem, "prompt": _prompt_problem, "text": _text_problem}[kind](row)


def clean_example(row: Any, where: str) -> Example:
    """The row with the keys of its form alone; None values of optional keys are dropped.

    Args:
        row: the row as read.
        where: the row's place for the error, such as ``"train.jsonl, line 3"``.

    Raises:
        DataError: for a row that :func:`example_problem` refuses.
    """
    problem = example_problem(row)
    if problem is not None:
        raise DataError(f"{where}: {problem}.")
    kind = example_kind(row)
    assert kind is not None
    cleaned = {key: row[key] for key in _KEYS[kind] if row.get(key) is not None}
    if kind == "messages":
        # Columnar formats give every message all keys of the column, absent ones as None; templates test for presence.
        cleaned["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    return cleaned


def clean_examples(rows: Iterable[Any], source: str, unit: str = "row", first: int = 0) -> list[Example]:
    """All rows cleaned; up to five unusable ones are reported together.

    Args:
        rows: the rows as read.
        source: the name of the source for the error.
        unit: what a row is called in its place, ``"row"`` or ``"line"``.
        first: the number of the first row.

    Raises:
        DataError: when any row is unusable or there is no row at all.
    """
    cleaned: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=first):
        try:
            cleaned.append(clean_example(row, f"{source}, {unit} {number}"))
        except DataError as error:
            problems.append(str(error))
            if len(problems) == 5:
                break
    raise_problems(problems)
    if not cleaned:
        raise DataError(f"{source}: no rows. A task needs at least one row: check the file, the split or the filter.")
    return cleaned


def raise_problems(problems: list[str]) -> None:
    """Raises one DataError with all problems, one a line, if there are any."""
    if problems:
        raise DataError("\n".join(problems))


def metric_problem(row: Mapping[str, Any], metric: str | None) -> str | None:
    """Why a row cannot be scored by a metric, or None.

    Args:
        row: a cleaned row.
        metric: ``"accuracy"``, ``"exact_match"``, ``"rouge_l"``, ``"token_f1"``, ``"loss"``, the class path of a
            torchmetrics metric, or None, which means ``"loss"``.

    Example:
        >>> metric_problem({"text": "a"}, "accuracy")
        "the metric 'accuracy' needs `prompt`, `answer` and `options`, found only ['text']"
    """
    if metric is None or metric == "loss":
        return None
    if metric not in METRICS and "." not in metric:
        return f"unknown metric {metric!r}: use one of {list(METRICS)} or the class path of a torchmetrics metric"
    if metric == "accuracy" and "options" not in row:
        return f"the metric 'accuracy' needs `prompt`, `answer` and `options`, found only {sorted(row)}"
    if "text" in row:
        return f"the metric {metric!r} needs an answer to compare with, but the row has only `text`; use 'loss'"
    if "messages" in row and row["messages"][-1]["role"] != "assistant":
        return f"the metric {metric!r} needs an assistant's turn at the end of `messages`, to compare with"
    return None


def check_metric(rows: Iterable[Mapping[str, Any]], metric: str | None, source: str) -> None:
    """Raises when a row cannot be scored by the metric.

    Raises:
        DataError: with the first five such rows.
    """
    problems: list[str] = []
    for number, row in enumerate(rows):
        problem = metric_problem(row, metric)
        if problem is not None:
            problems.append(f"{source}, row {number}: {problem}.")
            if len(problems) == 5:
                break
    raise_problems(problems)


def example_characters(row: Mapping[str, Any]) -> int:
    """Number of characters of a row: a measure of its length that costs no tokenizing."""
    kind = example_kind(row)
    if kind == "messages":
        return sum(len(str(message.get("content") or "")) for message in row["messages"])
    if kind == "prompt":
        return len(row["prompt"]) + len(row["answer"])
    return len(row["text"]) if kind == "text" else 0


def _kind_name(value: Any) -> str:
    return {list: "a list", str: "a string", int: "a number", float: "a number", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _text_problem(row: Mapping[str, Any]) -> str | None:
    return None if row["text"].strip() else "`text` is empty"


def _prompt_problem(row: Mapping[str, Any]) -> str | None:
    for key in ("prompt", "answer"):
        if not isinstance(row[key], str):
            return f"`{key}` must be a string, found {_kind_name(row[key])} ({row[key]!r})"
    if not row["answer"].strip():
        return "`answer` is empty: there is nothing to learn or to score"
    options = row.get("options")
    if options is None:
        return None
    if not isinstance(options, (list, tuple)) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        return f"`options` must be a list of at least two strings, found {options!r}"
    if len(set(options)) < len(options):
        return f"`options` holds an option twice: {list(options)!r}"
    if row["answer"] not in options:
        return f"the answer {row['answer']!r} is not among the options {list(options)!r}"
    return None


def _messages_problem(row: Mapping[str, Any]) -> str | None:
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not messages:
        return f"`messages` must be a list of turns, found {messages!r}"
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"turn {turn} of `messages` must be an object with a `role`, found {message!r}"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"turn {turn} of `messages` ({message['role']}) has neither `content` nor `tool_calls`"
    if not any(message["role"] == "assistant" for message in messages):
        roles = [message["role"] for message in messages]
        return f"`messages` has no turn of the role 'assistant', so nothing to learn; found the roles {roles}"
    return None
