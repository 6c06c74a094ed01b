# SPDX-License-Identifier: Apache-2.0
"""Which of the metrics that Lightning logged is a task's score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SUFFIX = re.compile(r"^(?P<name>.+)/dataloader_idx_(?P<index>\d+)$")
_PREFIX = re.compile(r"^(val|valid|validation|test)([_/])")


def logged_for(names: Iterable[str], loader: int, loaders: int) -> dict[str, str]:
    """The metrics logged for one loader: name without Lightning's suffix -> full name.

    With one loader Lightning adds no suffix, and then every name belongs to it. With several, a name without suffix
    belongs to none (it was logged with ``add_dataloader_idx=False``, or it is a training metric).

    Example:
        >>> logged_for(["acc/dataloader_idx_0", "acc/dataloader_idx_1", "loss"], 1, 2)
        {'acc': 'acc/dataloader_idx_1'}
        >>> logged_for(["acc"], 0, 1)
        {'acc': 'acc'}
    """
    found = {}
    for name in names:
        match = _SUFFIX.match(name)
        if match is not None and int(match["index"]) == loader:
            found[match["name"]] = name
        elif match is None and loaders == 1:
            found[name] = name
    return found


def find_score(
    logged: Mapping[str, object],
    loader: int,
    loaders: int,
    task: str,
    metric: str | None = None,
    task_metric: str | None = None,
) -> tuple[str | None, str]:
    """The name under which a task's score was logged, or the reason why there is none.

    In this order: ``metric`` (the monitor's; ``{task}`` in it stands for the task's name and ``{metric}`` for the
    task's own metric), the same name with the other loop's prefix (``val_acc`` in a test loop is ``test_acc``), the
    task's own metric (``accuracy`` matches ``accuracy``, ``val_accuracy`` and ``test/accuracy``), and, where no
    ``metric`` is asked for, the only metric logged for the loader.

    Args:
        logged: what Lightning logged, by name.
        loader: the task's ``dataloader_idx``.
        loaders: number of loaders in this evaluation.
        task: the task's name.
        metric: the name that was asked for.
        task_metric: the task's own metric.

    Returns:
        The full name, or None; and a reason, empty where a name was found.

    Example:
        >>> logged = {"acc/dataloader_idx_0": 0.5, "acc/dataloader_idx_1": 0.7, "loss/dataloader_idx_1": 2.0}
        >>> find_score(logged, 1, 2, "news", metric="acc")
        ('acc/dataloader_idx_1', '')
        >>> find_score(logged, 1, 2, "news")[1]
        "several metrics were logged for 'news' (acc, loss): name one"
    """
    own = logged_for(logged, loader, loaders)
    fitting = [name for name in own if task_metric is not None and _fits(name, task_metric)]
    if metric is not None:
        wanted = metric.replace("{task}", task).replace("{metric}", task_metric or "")
        for name in (wanted, _twin(wanted)):
            if name in own:
                return own[name], ""
            if "{task}" in metric and name in logged:
                return name, ""
        if len(fitting) == 1:
            return own[fitting[0]], ""
        return None, f"nothing logs {wanted!r} for {task!r} (logged: {', '.join(sorted(own)) or 'nothing'})"
    if len(fitting) == 1:
        return own[fitting[0]], ""
    if len(own) == 1:
        return next(iter(own.values())), ""
    if not own:
        return None, f"nothing was logged for {task!r}"
    return None, f"several metrics were logged for {task!r} ({', '.join(sorted(own))}): name one"


def label_of(name: str, task: str) -> str:
    """What a logged metric is called whatever loop logs it: without Lightning's suffix, the loop and the task.

    Example:
        >>> label_of("val_acc/dataloader_idx_3", "news"), label_of("test/news/rouge_l", "news")
        ('acc', 'rouge_l')
    """
    match = _SUFFIX.match(name)
    bare = _PREFIX.sub("", match["name"] if match else name)
    return re.sub(rf"(^|[_/]){re.escape(task)}(?=$|[_/])", "", bare).strip("/_") or bare


def _twin(name: str) -> str:
    match = _PREFIX.match(name)
    if match is None:
        return name
    return f"{'test' if match[1].startswith('val') else 'val'}{match[2]}{name[match.end() :]}"


def _fits(name: str, metric: str) -> bool:
    return name == metric or name.endswith(("_" + metric, "/" + metric))
