# SPDX-License-Identifier: Apache-2.0
"""Compare the methods on one stream of tasks: same model, same rows, same steps, several seeds.

python examples/benchmark/compare.py run --out runs/compare --jobs 4             # the core, resumable
python examples/benchmark/compare.py run --methods memory,i-lora --orders five --seeds 0 --out runs/compare
python examples/benchmark/compare.py cost --out runs/compare                     # step times, each method alone
python examples/benchmark/compare.py run --budget time --out runs/compare        # the steps that sequential's time buys
python examples/benchmark/compare.py tune --out runs/tune                        # learning rates and weights
python examples/benchmark/compare.py table runs/compare                          # tables and plots from what is there

compare/standard.yaml says what is compared. Each (method, order, seed) is one small run and one JSON, written when the
run is whole; finished runs are skipped. `lightning-cl report` reads the same files.
"""

from __future__ import annotations

import os

# Must be set before torch is imported: asking CUDA itself for devices would leave forked processes without it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import hashlib
import importlib
import io
import json
import logging
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import compare_data
import compare_table
import lightning.pytorch as pl
import torch
import yaml

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.data import Collator, Encoder
from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import results
from lightning_cl.report.provenance import provenance
from lightning_cl.report.row import routing

STANDARD = Path(__file__).parent / "compare" / "standard.yaml"


@dataclass(frozen=True)
class Job:
    """One run: what decides its result, and where that goes.

    Attributes:
        config: the YAML's content.
        method: name of the method.
        order: name of the order.
        seed: of the adapter's first weights, the order of the rows and what methods draw.
        out: folder of all results.
        rows: file of the encoded rows.
        settings: the method's own settings.
        max_steps: steps of each task; None: the recipe's epochs.
        jobs: processes that share the device with this one; wall times are no costs then.
        commit: the commit, where the folder is no git repository.
    """

    config: dict[str, Any] = field(repr=False)
    method: str
    order: str
    seed: int
    out: Path
    rows: Path
    settings: dict[str, Any]
    max_steps: int | None = None
    jobs: int = 1
    commit: str | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The method as the YAML has it."""
        return self.config["methods"][self.method]

    @property
    def recipe(self) -> dict[str, Any]:
        """The shared recipe with the method's own settings in it."""
        return {**self.config["recipe"], **self.settings}

    @property
    def tasks(self) -> list[str]:
        """The tasks in their order."""
        return self.config["orders"][self.order]

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return self.out / self.order / self.method / f"seed_{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether the result is there and whole."""
        try:
            return "comparison" in json.loads((self.folder / f"{results.STEM}.json").read_text())
        except (OSError, ValueError):
            return False


class Costs(pl.Callback):
    """Where a run's time goes; the first of the callbacks, so that the others' work lies between its hooks.

    Attributes:
        by_stage: seconds by stage and phase: ``prepare_seconds`` (before a task's first step: rows made, references
            taken), ``train_seconds``, ``finish_seconds`` (after its last step: a router fitted), ``evaluation_seconds``.
        step_seconds: of each training step but a task's first three.
        tokens: tokens, padding included, that went through the network in training steps, reference passes included.
        peak_bytes: most memory of the device in use between a task's set-up and its last step.
    """

    def __init__(self) -> None:
        self.by_stage: dict[int, dict[str, float]] = {}
        self.step_seconds: list[float] = []
        self.steps = self.tokens = self.peak_bytes = 0
        self._last = self._began = 0.0
        self._phase: str | None = None
        self._stage = -1
        self._hook: Any = None

    @property
    def seconds(self) -> dict[str, float]:
        """The sum over the stages, by phase."""
        names = ("prepare_seconds", "train_seconds", "finish_seconds", "evaluation_seconds")
        return {name: sum(stage.get(name, 0.0) for stage in self.by_stage.values()) for name in names}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        stream = trainer.datamodule
        self._stage = stream.current_index if stage == "fit" else stream.stage
        self._enter("prepare" if stage == "fit" else "evaluation")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._hook = pl_module.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._phase == "prepare":
            self._enter("train")
            self._began = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if trainer.global_step - self._began > 3:
            self.step_seconds.append(now - self._last)
        self._last = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.steps += trainer.global_step
        self.by_stage[self._stage]["steps"] = float(trainer.global_step)
        self._enter("finish")
        if torch.cuda.is_initialized():
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._hook.remove()
        self._enter(None)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._enter(None)

    def _count(self, module: Any, args: tuple[Any, ...]) -> None:
        if self._phase == "train":
            self.tokens += args[0].numel()

    def _enter(self, phase: str | None) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            cost = self.by_stage.setdefault(self._stage, {})
            cost[f"{self._phase}_seconds"] = cost.get(f"{self._phase}_seconds", 0.0) + now - self._entered
        self._phase, self._entered = phase, now


def build(spec: Any, settings: dict[str, Any]) -> Any:
    """The objects that a part of the YAML describes; ``$name`` is the setting of that name."""
    if isinstance(spec, str) and spec.startswith("$"):
        return settings[spec[1:]]
    if isinstance(spec, list):
        return [build(item, settings) for item in spec]
    if isinstance(spec, dict) and "class_path" in spec:
        module, _, name = spec["class_path"].rpartition(".")
        arguments = {key: build(value, settings) for key, value in spec.get("init_args", {}).items()}
        return getattr(importlib.import_module(module), name)(**arguments)
    return spec


def make_stream(job: Job, rows: dict[str, Any], pad_token_id: int) -> TaskStream:
    """The tasks and probes; for the upper bound one task of all rows, beside which the tasks are probes."""
    probes = [Task(name, test=test, role="probe", metric=metric) for name, (metric, test) in rows["probes"].items()]
    if job.spec.get("joint"):
        together = [row for task in job.tasks for row in rows["train"][task]]
        tasks = [Task("all", train=compare_data.shuffled(together, job.seed))]
        tasks += [Task(task, test=rows["test"][task], role="probe", metric="accuracy") for task in job.tasks]
    else:
        tasks = [Task(t, train=rows["train"][t], test=rows["test"][t], metric="accuracy") for t in job.tasks]
    recipe = job.recipe
    return TaskStream(
        [*tasks, *probes],
        batch_size=recipe["batch_size"],
        eval_batch_size=recipe["eval_batch_size"],
        seed=job.seed,
        collate_fn=Collator(pad_token_id),
        pin_memory=torch.cuda.is_available(),
    )


def make_model(recipe: dict[str, Any], model: str) -> CausalLMModule:
    """The model with its adapter, and one optimizer kernel a step where there is such a kernel."""
    fused = torch.cuda.is_available()
    return CausalLMModule(
        model,
        lora=recipe["lora"],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=recipe["lr"], weight_decay=0.0, fused=fused),
        schedule=recipe["schedule"],
        warmup=recipe["warmup"],
        prompt_loss_weight=recipe.get("prompt_loss_weight", 0.0),
        dtype="bfloat16" if recipe["precision"].startswith("bf16") else "float32",
    )


def run_one(job: Job) -> dict[str, Any]:
    """Train and evaluate one method on one order with one seed, and write its result."""
    warnings.filterwarnings("ignore", message=".*(num_workers|many workers|log_every_n_steps|is missing|empty).*")
    pl.seed_everything(job.seed, verbose=False)
    began = time.perf_counter()
    recipe = job.recipe
    rows = torch.load(job.rows, weights_only=False)
    model = make_model(recipe, job.config["model"])
    pad = Encoder(model.tokenizer).pad_token_id
    if recipe.get("prompt_loss_weight"):
        # These rows learn their prompts too, so they are other rows.
        encoder = make_encoder({**job.config, "recipe": recipe}, model.tokenizer)
        rows["train"] = compare_data.load(job.config, job.tasks, encoder)["train"]
    callbacks = build(job.spec.get("callbacks", []), job.settings)
    costs = Costs()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        strategy="cl_single_device",
        precision=recipe["precision"],
        max_epochs=-1 if job.max_steps else recipe["epochs"],
        max_steps=job.max_steps or -1,
        callbacks=[costs, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=50,
        default_root_dir=str(job.folder),
    )
    stream = make_stream(job, rows, pad)
    setup_seconds = time.perf_counter() - began
    matrix = fit_stream(trainer, model, stream)
    if job.spec.get("joint"):
        matrix = joint_matrix(stream, job.tasks)
    generators = [source for callback in callbacks for source in getattr(callback, "sources", None) or []]
    document = {
        "method": job.method,
        "order": job.order,
        "tasks": job.tasks,
        "seed": job.seed,
        "settings": job.settings,
        "recipe": job.config["recipe"],
        "budget": "epochs" if job.max_steps is None else f"{job.max_steps} steps",
        "jobs": job.jobs,
        "files": rows["sha256"],
        "cost": {
            **costs.seconds,
            "setup_seconds": setup_seconds,
            "generation_seconds": sum(getattr(source, "seconds", 0.0) for source in generators),
            "step_seconds": statistics.median(costs.step_seconds) if costs.step_seconds else None,
            "steps": costs.steps,
            "tokens": costs.tokens,
            "generated_tokens": generated_tokens(generators, len(job.tasks)),
            "peak_memory_bytes": costs.peak_bytes or None,
            "disk_bytes": disk_bytes(callbacks),
        },
    }
    made_by = provenance()
    made_by = {**made_by, "commit": made_by["commit"] or job.commit}
    parts = {"comparison": document, "provenance": made_by, "costs": costs.by_stage, "routing": routing(trainer)}
    results.write(job.folder, matrix, parts)
    (job.folder / "config.yaml").write_text(
        yaml.safe_dump({job.method: job.spec, "recipe": recipe, "order": job.tasks})
    )
    return document


def joint_matrix(stream: TaskStream, tasks: list[str]) -> TaskMatrix:
    """The upper bound's scores as a row after the last task, so that its average stands beside the others'."""
    probes = [task for task in stream.tasks if task.role == "probe" and task.name not in tasks]
    matrix = TaskMatrix(
        tasks=[*tasks, *(probe.name for probe in probes)],
        roles={probe.name: "probe" for probe in probes},
        modes={probe.name: probe.mode for probe in probes},
        metrics={task.name: task.metric for task in stream.tasks if task.metric},
    )
    for (stage, name), cell in sorted(stream.cells.items()):
        matrix.update(stage if stage < 0 else len(tasks) - 1, name, cell["value"], cell["rows"], cell.get("scores"))
    return matrix


def generated_tokens(sources: list[Any], tasks: int) -> int:
    """Tokens that were sampled: a pool for each task, but of past tasks none for the first."""
    made = [source for source in sources if hasattr(source, "pool_size")]
    pools = [1 if source.refresh == "once" else tasks - source.holds_past_tasks for source in made]
    return sum(source.pool_size * source.length * count for source, count in zip(made, pools, strict=True))


def disk_bytes(callbacks: list[Any]) -> int:
    """What a method adds to a checkpoint."""
    states = {type(callback).__name__: callback.state_dict() for callback in callbacks}
    file = io.BytesIO()
    torch.save(states, file)
    return file.tell()


# ------------------------------------------------------------------------------------------------- many runs


def read_config(path: Path, data: str | None = None) -> dict[str, Any]:
    """The YAML, with environment variables in it replaced.

    Raises:
        SystemExit: for a file that is missing or no YAML.
    """
    try:
        config = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf8")))
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"--config {path}: {error}") from error
    if data is not None:
        config["data"] = data
    return config


def make_encoder(config: dict[str, Any], tokenizer: Any) -> Encoder:
    """The encoder of the recipe."""
    recipe = config["recipe"]
    return Encoder(tokenizer, recipe["max_length"], recipe["template"], "left", recipe.get("prompt_loss_weight", 0.0))


def encoded_file(config: dict[str, Any], out: Path) -> Path:
    """Where the encoded rows of a configuration lie."""
    keys = ("max_length", "template", "train_rows", "test_rows")
    parts = [config["data"], config["model"], config.get("probes"), *(config["recipe"][key] for key in keys)]
    return out / "encoded" / f"{_digest(parts)}.pt"


def encode_rows(config: dict[str, Any], path: Path, tasks: set[str]) -> None:
    """Encode the rows of these tasks once for all runs."""
    if path.is_file() and tasks <= torch.load(path, weights_only=False)["train"].keys():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(compare_data.load(config, sorted(tasks), make_encoder(config, config["model"])), partial)
    partial.replace(path)


def choose(given: str | None, known: dict[str, Any] | list[Any], default: list[Any], what: str) -> list[Any]:
    """The names that were asked for.

    Raises:
        SystemExit: with those that do not exist, and those that do.
    """
    if given is None:
        return default
    chosen = [type(default[0])(name) for name in given.split(",")] if default else given.split(",")
    wrong = [name for name in chosen if known and name not in known]
    if wrong:
        raise SystemExit(f"{what} {wrong}: unknown. There are {', '.join(map(str, known))}.")
    return chosen


def run_jobs(jobs: list[Job], parallel: int) -> int:
    """Run what is not there yet, so many at a time; a run that fails stops no other. Gives the number of failures."""
    waiting = [replace(job, jobs=parallel) for job in jobs if not job.is_done]
    if len(jobs) > len(waiting):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already.", flush=True)
    if waiting:
        encode_rows(waiting[0].config, waiting[0].rows, {task for job in waiting for task in job.tasks})
    if parallel == 1:
        return sum(_attempt(job) for job in waiting)
    # Forked children start with what takes longest to import; where something has started CUDA already, they cannot.
    importlib.import_module("transformers.modeling_utils")
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    running: list[Any] = []
    failures = 0
    while waiting or running:
        while waiting and len(running) < parallel:
            process = context.Process(target=_child, args=(waiting.pop(0),))
            process.start()
            running.append(process)
        time.sleep(0.1)
        ended = [process for process in running if not process.is_alive()]
        failures += sum(process.exitcode != 0 for process in ended)
        running = [process for process in running if process not in ended]
    return failures


def _child(job: Job) -> None:
    torch.set_num_threads(1)
    sys.exit(_attempt(job))


def _attempt(job: Job) -> int:
    began = time.perf_counter()
    name = f"{job.order} {job.method} seed {job.seed}"
    try:
        document = run_one(job)
    except Exception:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf8")
        print(f"{name}: failed, see {job.folder / 'error.txt'}\n{traceback.format_exc(limit=-3)}", flush=True)
        return 1
    phases = ", ".join(
        f"{phase} {document['cost'][f'{phase}_seconds']:.1f}"
        for phase in ("setup", "prepare", "train", "finish", "evaluation")
    )
    print(f"{name}: {time.perf_counter() - began:.0f} s ({phases})", flush=True)
    return 0


def command_run(arguments: argparse.Namespace, config: dict[str, Any]) -> int:
    """Every (method, order, seed) that was asked for, the first seed of all methods first."""
    jobs = _jobs(arguments, config)
    if arguments.budget == "time":
        out, methods = arguments.out / "equal-time", [job.method for job in jobs]
        steps = {job.order: {} for job in jobs}
        for order in steps:
            steps[order] = compare_table.steps_of_equal_time(arguments.out, config, methods, order)
        jobs = [replace(job, out=out, max_steps=steps[job.order][job.method]) for job in jobs]
    return min(run_jobs(_shard(jobs, arguments.shard), arguments.jobs), 1)


def command_cost(arguments: argparse.Namespace, config: dict[str, Any]) -> int:
    """Each method alone, for some steps of two tasks, with few rows to evaluate."""
    config = {**config, "recipe": {**config["recipe"], "test_rows": 8}, "probes": {}}
    jobs = [
        replace(job, out=arguments.out / "cost", max_steps=arguments.steps) for job in _jobs(arguments, config, tasks=2)
    ]
    return min(run_jobs(jobs, 1), 1)


def command_tune(arguments: argparse.Namespace, config: dict[str, Any]) -> int:
    """Try each method's settings, one at a time, on the order that is kept for it, and say which won."""
    plan, rows = config["tune"], encoded_file(config, arguments.out)
    methods = choose(arguments.methods, config["methods"], config["groups"]["tuned"], "--methods")
    jobs = []
    for method in methods:
        spec = config["methods"][method]
        base = {"lr": config["recipe"]["lr"], **spec.get("settings", {})}
        grid = {"lr": plan["lr"], **spec.get("grid", {})}
        tried = [{**base, name: value} for name, values in grid.items() for value in values]
        for settings in {_digest(settings): settings for settings in [base, *tried]}.values():
            out = arguments.out / _digest(settings)
            jobs += [
                Job(config, method, plan["order"], seed, out, rows, settings, commit=arguments.commit)
                for seed in plan["seeds"]
            ]
    failures = run_jobs(_shard(jobs, arguments.shard), arguments.jobs)
    print(compare_table.chosen(arguments.out))
    return min(failures, 1)


def _shard(jobs: list[Job], shard: str | None) -> list[Job]:
    number, count = map(int, (shard or "0/1").split("/"))
    return jobs[number::count]


def _jobs(arguments: argparse.Namespace, config: dict[str, Any], tasks: int | None = None) -> list[Job]:
    methods = choose(arguments.methods, config["methods"], config["groups"]["core"], "--methods")
    orders = choose(arguments.orders, config["orders"], [next(iter(config["orders"]))], "--orders")
    seeds = choose(arguments.seeds, [], config["seeds"], "--seeds")
    if tasks is not None:
        config = {**config, "orders": {name: names[:tasks] for name, names in config["orders"].items()}}
        seeds = seeds[:1]
    rows = encoded_file(config, arguments.out)
    return [
        Job(config, m, o, s, arguments.out, rows, config["methods"][m].get("settings", {}), commit=arguments.commit)
        for o in orders
        for s in seeds
        for m in methods
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "cost", "tune"):
        command = commands.add_parser(name)
        command.add_argument("--config", type=Path, default=STANDARD)
        command.add_argument("--data", help="folder of the tasks; default: the YAML's")
        command.add_argument("--methods", help="comma-separated; default: the group `core`")
        command.add_argument("--orders", help="comma-separated; default: the first")
        command.add_argument("--seeds", help="comma-separated; default: the YAML's")
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--jobs", type=int, default=1, help="runs at a time on the device")
        command.add_argument("--shard", help="I/N: every N-th run from the I-th on, for several devices")
        command.add_argument("--budget", choices=["steps", "time"], default="steps")
        command.add_argument("--steps", type=int, default=15, help="steps of each task when costs are measured")
        command.add_argument("--commit", help="the commit, where the folder is no git repository")
    table = commands.add_parser("table")
    table.add_argument("out", type=Path)
    table.add_argument("--config", type=Path, default=STANDARD)
    table.add_argument("--results", type=Path, help="a Markdown file whose tables are replaced, plots beside it")
    arguments = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = read_config(arguments.config, getattr(arguments, "data", None))
    if arguments.command == "table":
        return compare_table.command(arguments.out, config, arguments.results)
    commands_by_name = {"run": command_run, "cost": command_cost, "tune": command_tune}
    return commands_by_name[arguments.command](arguments, config)


if __name__ == "__main__":
    raise SystemExit(main())
