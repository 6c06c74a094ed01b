# SPDX-License-Identifier: Apache-2.0
"""Rows from files, the Hugging Face hub and objects."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset, IterableDataset

from lightning_cl.data.errors import DataError
from lightning_cl.data.examples import Example, clean_example, clean_examples, example_kind, raise_problems

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_HUB_NAME = re.compile(r"hf://(?P<path>[^:]+)(?::(?P<split>.+))?")
_TRACE_SPLITS = {"train": ("train",), "val": ("eval", "val", "dev"), "test": ("test",)}


def read_rows(source: Any) -> list[Example] | Dataset[Any] | Any:
    """The rows of a source, checked where that costs no pass of its own.

    Args:
        source: the path of a ``.jsonl`` or ``.json`` file, plain or ``.gz`` (a ``.json`` file holds one list, the form
            of the TRACE benchmark); ``hf://owner/name[/config][:split]`` (split ``train`` unless given); a list of
            rows; a Hugging Face ``datasets`` object; any map-style or iterable dataset.

    Returns:
        A list of rows for files, hub names, lists and Hugging Face map datasets of text rows; every other dataset
        itself. Rows are dicts of one of the forms ``{"text"}``, ``{"prompt", "answer", "options"?}`` and
        ``{"messages", "tools"?}``.

    Raises:
        DataError: for a file that does not exist or parse (with the line), rows without the needed keys, an option list
            without the answer, or no rows at all.

    Example:
        >>> read_rows([{"prompt": "2+2=", "answer": "4", "author": "me"}])
        [{'prompt': '2+2=', 'answer': '4'}]
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return read_hub(name) if name.startswith("hf://") else read_file(name)
    if _is_hub_mapping(source):
        raise DataError(
            f"found a `datasets.DatasetDict` with the splits {sorted(source)}, but a source is one split. "
            f"Give one of them, for example `dataset[{sorted(source)[0]!r}]`."
        )
    if _is_hub_dataset(source):
        return _hub_rows(source, "the datasets.Dataset")
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        if source and isinstance(source[0], str):
            return clean_examples(({"text": text} for text in source), "the list of texts")
        return clean_examples(source, "the list of rows")
    if hasattr(source, "__iter__") or (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        return source
    raise DataError(
        f"found {type(source).__name__} as a source of rows. "
        "Give a path, `hf://owner/name`, a list of rows or a dataset."
    )


def read_file(path: str | os.PathLike[str]) -> list[Example]:
    """The rows of a ``.jsonl`` or ``.json`` file, plain or compressed with gzip.

    Raises:
        DataError: with the file, the line and what was found; up to five lines at once.
    """
    name = os.fspath(path)
    if not name.endswith(_FILE_SUFFIXES):
        raise DataError(f"{name}: unknown kind of file. Rows are read from {', '.join(_FILE_SUFFIXES)}.")
    if not Path(name).is_file():
        raise DataError(_missing_file(name))
    if ".jsonl" in name[-9:]:
        return _read_jsonl(name)
    text = "\n".join(line for _, line in _lines(name))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: found {type(rows).__name__} at the top of the file, but a `.json` file holds one list of rows. "
            "Use `.jsonl` for a row a line."
        )
    return clean_examples(rows, name, unit="row", first=0)


def read_hub(name: str) -> Any:
    """The rows of ``hf://owner/name[/config][:split]``, by ``datasets.load_dataset``.

    A folder of that relative name in the working directory is used first, as ``load_dataset`` does;
    ``hf:///absolute/folder`` and ``hf://./folder`` name a local copy outright. The split is ``train`` unless given and
    may be a slice such as ``train[:1000]``.

    Raises:
        DataError: for a malformed name, one that cannot be loaded (with the reason), or rows of no known form.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name!r} is not a hub name. Write `hf://owner/name`, `hf://owner/name/config:split`.")
    path, config = match["path"], None
    if not path.startswith(("/", "./", "../")):
        parts = path.strip("/").split("/")
        if len(parts) > 3 or not all(parts):
            raise DataError(f"{name!r} is not a hub name. Write `hf://owner/name`, `hf://owner/name/config:split`.")
        path, config = "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)
    import datasets

    try:
        dataset = datasets.load_dataset(path, config, split=match["split"] or "train")
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {error}). "
            "Check owner, name, configuration, split and the network, or give a local file."
        ) from error
    return _hub_rows(dataset, name)


def read_trace(folder: str | os.PathLike[str]) -> dict[str, list[Example]]:
    """The splits of one task of the TRACE benchmark: a folder with ``train.json``, ``eval.json`` and ``test.json``.

    Each file is one JSON list of ``{"prompt": ..., "answer": ...}``.

    Returns:
        ``{"train": rows, "val": rows, "test": rows}`` with the splits that are there, so that
        ``Task(name, **read_trace(folder))`` is the task.

    Raises:
        DataError: when the folder holds none of the files, or a file does not parse.
    """
    root = Path(folder)
    found = {}
    for split, stems in _TRACE_SPLITS.items():
        for stem in stems:
            candidates = [root / f"{stem}.json", root / f"{stem}.json.gz"]
            path = next((candidate for candidate in candidates if candidate.is_file()), None)
            if path is not None:
                found[split] = read_file(path)
                break
    if not found:
        raise DataError(f"{root}: found none of train.json, eval.json, test.json, the files of a task of TRACE.")
    return found


def _read_jsonl(name: str) -> list[Example]:
    rows: list[Example] = []
    problems: list[str] = []
    for number, line in _lines(name):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            rows.append(clean_example(json.loads(line), where))
        except json.JSONDecodeError as error:
            shown = line.strip()
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            problems.append(f"{where}: not JSON ({error.msg}, column {error.colno}), found {shown!r}.")
        except DataError as error:
            problems.append(str(error))
        if len(problems) == 5:
            break
    raise_problems(problems)
    if not rows:
        raise DataError(f"{name}: no rows. A task needs at least one row.")
    return rows


def _lines(name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}, line {number}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}, after line {number}: no gzip file, or damaged ({error}). Fetch it again.") from None


def _missing_file(name: str) -> str:
    folder = Path(name).parent
    if not folder.is_dir():
        return f"{name}: no such file, and its folder does not exist either."
    import difflib

    names = [entry.name for entry in folder.iterdir()]
    close = difflib.get_close_matches(Path(name).name, names, n=3)
    return f"{name}: no such file." + (f" Did you mean {', '.join(close)}?" if close else "")


def _is_hub_dataset(source: Any) -> bool:
    # By name, so that a project without the datasets package never imports it.
    return any(cls.__module__.startswith("datasets.") and cls.__name__ == "Dataset" for cls in type(source).__mro__)


def _is_hub_mapping(source: Any) -> bool:
    return isinstance(source, Mapping) and type(source).__module__.startswith("datasets.")


def _hub_rows(dataset: Any, name: str) -> Any:
    if not _is_hub_dataset(dataset):
        return dataset
    if len(dataset) == 0:
        raise DataError(f"{name}: no rows. A task needs at least one row: check the file, the split or the filter.")
    columns = list(dataset.column_names)
    kind = example_kind(dict.fromkeys(columns, ""))
    if kind is None:
        dtypes = {getattr(feature, "dtype", None) for feature in dataset.features.values()}
        if not dtypes & {"string", "large_string"}:
            return dataset  # token ids, images, numbers: rows for the user's own module
        raise DataError(
            f"{name}: found the columns {columns}, but rows need `text`, or `prompt` and `answer` (and maybe "
            "`options`), or `messages`. Rename the columns (`dataset.rename_column`) and give the dataset object."
        )
    if kind != "text":
        return clean_examples(_plain(dataset), name)
    # Public text sets keep a document's empty lines as rows of their own.
    rows = [row for row in _plain(dataset) if isinstance(row["text"], str) and row["text"].strip()]
    if len(rows) < len(dataset):
        rank_zero_warn(f"{name}: {len(dataset) - len(rows)} of {len(dataset)} rows hold no text and are left out.")
    return clean_examples(rows, name)


def _plain(dataset: Any) -> Iterable[Any]:
    for batch in dataset.with_format(None).iter(batch_size=1000):
        keys = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(keys, values, strict=True))
