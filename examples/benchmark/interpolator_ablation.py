# SPDX-License-Identifier: Apache-2.0
"""Which parts of LoRAInterpolator help: teachers, decays, the set that is evaluated, the form of the term.

python examples/benchmark/interpolator_ablation.py --data FOLDER --model FOLDER --runs RUNS                # all, in turn
python examples/benchmark/interpolator_ablation.py --data FOLDER --model FOLDER --runs RUNS --worker 0/8   # a share
python examples/benchmark/interpolator_ablation.py --runs RUNS --table                                     # of what is there
python examples/benchmark/interpolator_ablation.py --tiny --runs RUNS --configurations default             # two CPU cores

Three text tasks are learnt in a row; FOLDER holds NAME.train.jsonl[.gz] and NAME.test.jsonl[.gz]. Each configuration and
seed is one run and one file of RUNS, and a run whose file is there is not made again; workers share RUNS. The runs are
small and bound by kernel launches, so that several fit on one GPU at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from training import DEVICE, SHAPES, quiet

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream, weights
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.connectivity import text_evaluation
from lightning_cl.data import read_rows
from lightning_cl.metrics import TaskMatrix
from lightning_cl.replay import EpisodicMemory
from lightning_cl.report.provenance import provenance

FIGURES = ("average", "backward_transfer", "learning_accuracy")


class FrozenTeacher(LoRAInterpolator):
    """The weights as they stood when the task began, which never move: a distillation from the previous model."""

    def on_task_start(self, trainer: Any, pl_module: Any) -> None:
        self.reset()
        super().on_task_start(trainer, pl_module)

    def should_update(self, step_idx: int) -> bool:
        return False


class BaseTeacher(LoRAInterpolator):
    """The model without its adapter."""

    def on_task_start(self, trainer: Any, pl_module: Any) -> None:
        self._network = pl_module
        super().on_task_start(trainer, pl_module)

    def teacher(self) -> AbstractContextManager[None]:
        return weights.adapters_disabled(self._network)


#: What runs besides the training: None trains on the tasks alone, the others on a memory of past tasks too.
CONFIGURATIONS: dict[str, Callable[[], list[Any]] | None] = {
    "sequential": None,
    "memory": list,
    "average-alone": lambda: [LoRAInterpolator(consistency_weight=0)],
    "default": lambda: [LoRAInterpolator()],
    "fast": lambda: [LoRAInterpolator(evaluate_with="fast")],
    "teacher-frozen": lambda: [FrozenTeacher(evaluate_with="fast")],
    "teacher-base": lambda: [BaseTeacher(evaluate_with="fast")],
    "decay-0.25": lambda: [LoRAInterpolator(decay=0.25)],
    "decay-0.99": lambda: [LoRAInterpolator(decay=0.99)],
    "decay-0.999": lambda: [LoRAInterpolator(decay=0.999)],
    "one-sided": lambda: [LoRAInterpolator(consistency="one_sided")],
    "as-released": lambda: [LoRAInterpolator(decay=0.25, consistency="one_sided", layers="all", evaluate_with="fast")],
}

#: The rows of the table: configuration, set of weights, what it is.
TABLE = [
    ("sequential", "trained", "sequential"),
    ("memory", "trained", "memory (replay alone)"),
    ("average-alone", "trained", "memory + average, no consistency"),
    ("default", "trained", "defaults: slow evaluated and carried on"),
    ("fast", "trained", "working average as teacher, fast carried on and evaluated"),
    ("fast", "slow", "the same runs, slow evaluated"),
    ("teacher-frozen", "trained", "frozen previous-task teacher, fast evaluated"),
    ("teacher-base", "trained", "base teacher, fast evaluated"),
    ("decay-0.25", "trained", "decay 0.25"),
    ("decay-0.99", "trained", "decay 0.99"),
    ("decay-0.999", "trained", "decay 0.999"),
    ("one-sided", "trained", "one-sided consistency"),
    ("as-released", "trained", "released settings, but working"),
]


class OtherSet(pl.Callback):
    """Scores the slow weights too after each task, in a run that evaluates the fast ones."""

    def __init__(self, average: LoRAInterpolator, evaluate: Callable[[Any], Any], tasks: list[str]) -> None:
        self.average, self.evaluate, self.matrix, self.stage = average, evaluate, TaskMatrix(tasks), 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad(), self.average.teacher():
            scores = self.evaluate(pl_module.model)
        pl_module.train()
        for task, values in scores.items():
            self.matrix.update(self.stage, task, values["accuracy"])
        self.stage += 1


def tiny_assets(folder: Path, tasks: list[str]) -> Path:
    """A random model, a tokenizer of characters and rows of nothing, for a run without meaning."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *[chr(c) for c in range(32, 127)]]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for task in tasks:
        for split in ("train", "test"):
            rows = [
                {"prompt": f"{task} {i}?", "answer": ("yes", "no")[i % 2], "options": ["yes", "no"]} for i in range(8)
            ]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def rows_of(folder: Path, task: str, split: str, count: int, seed: int) -> list[Any]:
    """``count`` rows of a split, chosen by the seed."""
    path = next(p for p in (folder / f"{task}.{split}.jsonl", folder / f"{task}.{split}.jsonl.gz") if p.exists())
    rows: Any = read_rows(str(path))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]


def one_run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train the tasks in turn and score all of them after each."""
    pl.seed_everything(seed, verbose=False)
    tests = {task: rows_of(args.data, task, "test", args.test_rows, 0) for task in args.tasks}
    tasks = [
        Task(
            task,
            train=rows_of(args.data, task, "train", args.train_rows, seed),
            test=tests[task],
            metric="accuracy",
        )
        for task in args.tasks
    ]
    stream = TaskStream(
        tasks, batch_size=args.batch, eval_batch_size=4 * args.batch, max_length=args.max_length, seed=seed
    )
    module = CausalLMModule(
        str(args.model),
        lora={"r": 16, "lora_alpha": 32},
        lr=args.lr,
        dtype="bfloat16" if DEVICE == "cuda" else "float32",
    )
    callbacks: list[Any] = []
    other: OtherSet | None = None
    make = CONFIGURATIONS[name]
    if make is not None:
        callbacks = [ReplayMixer(EpisodicMemory(args.capacity, seed=seed), rows_per_batch=args.memory_rows), *make()]
    if name == "fast":
        evaluate = text_evaluation(module, tests, "accuracy", 4 * args.batch, args.max_length)
        other = OtherSet(callbacks[-1], evaluate, args.tasks)
        callbacks.append(other)
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    figures = {"trained": percent(fit_stream(trainer, module, stream))}
    if other is not None:
        figures["slow"] = percent(other.matrix)
    settings = ("tasks", "train_rows", "test_rows", "epochs", "batch", "memory_rows", "capacity", "max_length", "lr")
    return {
        "configuration": name,
        "seed": seed,
        **figures,
        "seconds": time.perf_counter() - start,
        "settings": {key: getattr(args, key) for key in settings},
        **provenance(),
    }


def percent(matrix: TaskMatrix) -> dict[str, float]:
    """The matrix's figures, in percent."""
    found = matrix.compute()
    return {key: 100 * float(found[key]) for key in FIGURES}


def table(folder: Path) -> str:
    """What the runs in the folder found, as Markdown: mean and standard deviation over the seeds."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = ["| configuration | average | BWT | learning accuracy | seeds |", "| --- | --- | --- | --- | --- |"]
    for name, which, title in TABLE:
        found = [run[which] for run in runs if run["configuration"] == name and which in run]
        if not found:
            continue
        cells = []
        for key in FIGURES:
            values = [values[key] for values in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {title} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs' files")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that are there")
    parser.add_argument("--tiny", action="store_true", help="a random model and rows of nothing")
    parser.add_argument("--data", type=Path, help="folder of NAME.train.jsonl[.gz] and NAME.test.jsonl[.gz]")
    parser.add_argument("--model", type=Path, default=Path("examples/assets/smollm2-135m-instruct"))
    parser.add_argument("--worker", default="0/1", help="I/N: every N-th run from the I-th on")
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["dbpedia", "amazon", "agnews"])
    parser.add_argument("--train-rows", type=int, default=640)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--memory-rows", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(seeds=1, train_rows=8, test_rows=4, batch=4, memory_rows=2, capacity=8)
    if args.data is None and not (args.tiny or args.table):
        parser.error("name the folder of the tasks with --data")
    return args


def main(argv: list[str] | None = None) -> int:
    """Make this worker's runs, then print the table of all that are there."""
    args = parse(argv)
    quiet()
    if not args.table:
        args.runs.mkdir(parents=True, exist_ok=True)
        index, count = map(int, args.worker.split("/"))
        # All configurations with the first seed come first: a campaign that is cut short has a row of each.
        todo = [(name, seed) for seed in range(args.seeds) for name in args.configurations][index::count]
        with tempfile.TemporaryDirectory() as temporary:
            if args.tiny:
                args.data = args.model = tiny_assets(Path(temporary), args.tasks)
            for name, seed in todo:
                path = args.runs / f"{name}-{seed}.json"
                if path.exists():
                    continue
                found = one_run(name, seed, args)
                path.write_text(json.dumps(found, indent=2) + "\n")
                print(
                    name, seed, {key: found[key] for key in ("trained", "slow", "seconds") if key in found}, flush=True
                )
    print(table(args.runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
