# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl connectivity``: loss and metric of text tasks along the line between two LoRA adapters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        0, or 1 after printing what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (MisconfigurationException, OSError, ValueError) as error:
        print(f"lightning-cl connectivity: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from lightning_cl.connectivity import Adapter, mode_connectivity, text_evaluation
    from lightning_cl.data import read_rows
    from lightning_cl.modules import CausalLMModule

    if arguments.points < 2:
        raise ValueError(f"`--points {arguments.points}` must be at least 2, the two ends.")
    a, b = Adapter.load(arguments.a), Adapter.load(arguments.b)
    base = arguments.model or a.config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{arguments.a} does not say which base model it belongs to. Give its folder or name with `--model`."
        )
    names = _task_names(arguments.tasks)
    tasks: dict[str, Any] = {}
    for name, path in zip(names, arguments.tasks, strict=True):
        rows: Any = read_rows(path)
        tasks[name] = list(rows)[: arguments.rows]
    module = CausalLMModule(base, tokenizer=arguments.tokenizer or base, dtype=arguments.dtype)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = module.model.to(device).eval()
    evaluate = text_evaluation(module, tasks, arguments.metric, arguments.batch_size, arguments.max_length)
    out = Path(arguments.out)
    for mode in ("factors", "product") if arguments.mode == "both" else (arguments.mode,):
        result = mode_connectivity(network, a, b, evaluate, arguments.points, mode)
        result.names = (arguments.a.name, arguments.b.name)
        result.extra = {"base": str(base), "rows": {name: len(rows) for name, rows in tasks.items()}}
        stem = "connectivity" if arguments.mode != "both" else f"connectivity_{mode}"
        result.save(out / f"{stem}.json")
        result.plot(out / f"{stem}.png")
        print(_table(result))
        print(f"Wrote {out / stem}.json and {stem}.png")


def _task_names(paths: list[str]) -> list[str]:
    names = [Path(path).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") for path in paths]
    names = [name.removesuffix(".test") for name in names]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise ValueError(f"Two files of `--tasks` would both be called {double[0]!r}. Rename one of them.")
    return names


def _table(result: Any) -> str:
    """The scores by point, a Markdown table with the barriers below."""
    columns = [(task, score) for task, scores in result.scores.items() for score in scores]
    lines = [
        "| alpha | " + " | ".join(f"{task} {score}" for task, score in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for i, alpha in enumerate(result.alphas):
        cells = " | ".join(f"{result.scores[task][score][i]:.4f}" for task, score in columns)
        lines.append(f"| {alpha:.2f} | {cells} |")
    barriers = " | ".join(f"{result.barrier(task, score):.4f}" for task, score in columns)
    return "\n".join([*lines, f"| barrier ({result.mode}) | {barriers} |"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl connectivity",
        description="Loss and metric of text tasks at points of the line between two LoRA adapters of one base (mode"
        " connectivity), with the barrier, as a table, JSON and a plot.",
    )
    parser.add_argument("--a", type=Path, required=True, help="PEFT folder of the adapter before the new task")
    parser.add_argument("--b", type=Path, required=True, help="PEFT folder of the adapter after it")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="JSONL files to score, in the order of learning; the last is the new task",
    )
    parser.add_argument("--model", help="folder or name of the base (default: the one that adapter a names)")
    parser.add_argument("--tokenizer", help="folder or name of the tokenizer (default: the base's)")
    parser.add_argument("--points", type=int, default=11, help="points on the line, both ends included (default: 11)")
    parser.add_argument(
        "--mode",
        choices=("factors", "product", "both"),
        default="factors",
        help="interpolate the factors A and B (the paper), or the update BA (default: factors)",
    )
    parser.add_argument(
        "--metric",
        choices=("accuracy", "exact_match", "rouge_l", "token_f1", "loss"),
        help="score beside the loss (default: accuracy where every row has options, else none)",
    )
    parser.add_argument("--rows", type=int, default=200, help="rows of each file that are scored (default: 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--max-length", type=int, help="longest row in tokens (default: 1024, or the tokenizer's)")
    parser.add_argument("--dtype", default="auto", help="dtype of the base, such as bfloat16 (default: the file's)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument("--out", default="connectivity", help="folder for JSON and plot (default: connectivity)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
