# SPDX-License-Identifier: Apache-2.0
"""Compare the methods on one stream of tasks: same model, same rows, same steps, several seeds.

python examples/benchmark/compare.py run --out runs/compare --jobs 4             # the core, resumable
python examples/benchmark/compare.py run --methods memory,i-lora --orders five --seeds 0 --out runs/compare
python examples/benchmark/compare.py cost --out runs/compare                     # step times, each method alone
python examples/benchmark/compare.py run --budget time --out runs/compare        # the steps that sequential's time buys
python examples/benchmark/compare.py tune --out runs/tune                        # learning rates and weights
python examples/benchmark/compare.py run --settings runs/tune/chosen.yaml --out runs/compare       # with those
python examples/benchmark/compare.py table runs/compare                          # tables and plots from what is there

compare/standard.yaml says what is compared. Each (method, order, seed) is one small run and one JSON, written when the
run is whole; finished runs are skipped, and so are those that another process is at, so that the same command may run
once on each device. `lightning-cl report` reads the same files.
"""

from __future__ import annotations

import os

# Must be set before torch is imported: asking CUDA itself for devices would leave forked processes without it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import fcntl
import hashlib
import importlib
import json
import logging
import multiprocessing
import re
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare_data
import compare_table
import torch
import yaml
from compare_run import Job, make_encoder, read_rows, run_one

STANDARD = Path(__file__).parent / "compare" / "standard.yaml"


def read_config(path: Path, data: str | None = None, settings: Path | None = None) -> dict[str, Any]:
    """The YAML, with environment variables in it replaced and each method's settings put together.

    Args:
        path: the YAML.
        data: the folder of the tasks, if not the YAML's.
        settings: a YAML of settings by method, which go over the methods' own: what ``tune`` has chosen.

    Raises:
        SystemExit: for a file that is missing or no YAML.
    """
    config = _read_yaml(path, "--config")
    if data is not None:
        config["data"] = data
    chosen = {} if settings is None else _read_yaml(settings, "--settings")
    unknown = sorted(chosen.keys() - config["methods"].keys())
    if unknown:
        raise SystemExit(f"--settings {settings}: there is no method {unknown[0]!r} in {path}. Take it out, or add it.")
    found = {name: settings_of(config["methods"], name, chosen) for name in config["methods"]}
    for name, spec in config["methods"].items():
        spec["settings"] = found[name]
    return config


def settings_of(methods: dict[str, Any], name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """A method's settings: what it has in common with the method that was tuned for it, its own, what was chosen."""
    spec = methods[name]
    shared = settings_of(methods, spec["tuned_as"], chosen) if "tuned_as" in spec else {}
    used = {"lr", *re.findall(r"\$(\w+)", json.dumps(spec.get("callbacks", [])))}
    shared = {key: value for key, value in shared.items() if key in used}
    return {**shared, **spec.get("settings", {}), **chosen.get(name, {})}


def _read_yaml(path: Path, option: str) -> dict[str, Any]:
    try:
        return yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf8")))
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{option} {path}: {error}") from error


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


def run_jobs(jobs: list[Job], parallel: int, apart: bool = False) -> int:
    """Run what is not there yet; a run that fails stops no other.

    Args:
        jobs: the runs.
        parallel: how many at a time.
        apart: each in a process of its own, also where it is one at a time.

    Returns:
        The number of failures.
    """
    waiting = [replace(job, jobs=parallel) for job in jobs if not job.is_done]
    if len(jobs) > len(waiting):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already.", flush=True)
    if waiting:
        encode_rows(waiting[0].config, waiting[0].rows, {task for job in waiting for task in job.tasks})
        read_rows(waiting[0].rows)  # once, for all forked children
    if parallel == 1 and not apart:
        return sum(_attempt(job) for job in waiting)
    _import_for_children()
    # Where something has started CUDA already, children cannot be forked.
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


def _import_for_children() -> None:
    """Forked children start with what takes longest to import.

    No device is visible meanwhile: bitsandbytes, which peft imports, would start CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        for name in ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft"):
            importlib.import_module(name)
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _child(job: Job) -> None:
    torch.set_num_threads(1)
    sys.exit(_attempt(job))


def _attempt(job: Job) -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system opens it again, however the process ends
        except BlockingIOError:
            return 0  # another process is at this run
        return 0 if job.is_done else _run(job)


def _run(job: Job) -> int:
    began = time.perf_counter()
    name = f"{job.order} {job.method} seed {job.seed}"
    try:
        document = run_one(job)
    except Exception:
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
        # Sequential training's own runs are what the others are compared with.
        jobs = [job for job in jobs if job.method != "sequential"]
        out, methods = arguments.out / "equal-time", [job.method for job in jobs]
        if not jobs:
            print("Nothing to run: the time of sequential training is what other methods are given.")
            return 0
        encode_rows(config, jobs[0].rows, {task for job in jobs for task in job.tasks})
        steps = {
            order: compare_table.steps_of_equal_time(arguments.out, config, methods, own_steps)
            for order, own_steps in {job.order: job.own_steps for job in jobs}.items()
        }
        jobs = [replace(job, out=out, max_steps=steps[job.order][job.method]) for job in jobs]
    return min(run_jobs(_shard(jobs, arguments.shard), arguments.jobs), 1)


def command_cost(arguments: argparse.Namespace, config: dict[str, Any]) -> int:
    """Each method alone, for some steps of two tasks, with few rows to evaluate, and all without graphs.

    One round after the other: a host that is faster or slower for a while is so for all methods alike.
    """
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds {arguments.rounds}: costs are measured at least once. Give 1 or more.")
    config = {**config, "recipe": {**config["recipe"], "test_rows": 8, "graphs": False}, "probes": {}}
    jobs = [
        replace(job, out=arguments.out / "cost" / f"round_{number}", max_steps=arguments.steps, max_epochs=-1)
        for number in range(arguments.rounds)
        for job in _jobs(arguments, config, tasks=2)
    ]
    return min(run_jobs(jobs, 1, apart=True), 1)  # a run's memory must not count for the next


def command_tune(arguments: argparse.Namespace, config: dict[str, Any]) -> int:
    """Try each method's settings, one at a time, on the order that is kept for it, and say which won."""
    plan, rows = config["tune"], encoded_file(config, arguments.out)
    methods = choose(arguments.methods, config["methods"], config["groups"]["tuned"], "--methods")
    numbered = []
    for method in methods:
        spec = config["methods"][method]
        base = {"lr": config["recipe"]["lr"], **spec["settings"]}
        grid = {"lr": plan["lr"], **spec.get("grid", {})}
        tried = [{**base, name: value} for name, values in grid.items() for value in values]
        for number, settings in enumerate({_digest(settings): settings for settings in [base, *tried]}.values()):
            out = arguments.out / _digest(settings)
            numbered += [
                (number, Job(config, method, plan["order"], seed, out, rows, settings, commit=arguments.commit))
                for seed in plan["seeds"]
            ]
    # Every method's rates come before any method's further settings.
    jobs = [job for _, job in sorted(numbered, key=lambda pair: pair[0])]
    failures = run_jobs(_shard(jobs, arguments.shard), arguments.jobs)
    text, chosen = compare_table.chosen(arguments.out)
    print(text)
    (arguments.out / "chosen.yaml").write_text(yaml.safe_dump(chosen), encoding="utf8")
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
        Job(config, m, o, s, arguments.out, rows, config["methods"][m]["settings"], commit=arguments.commit)
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
        command.add_argument("--settings", type=Path, help="YAML of settings by method, as `tune` writes it")
        command.add_argument("--methods", help="comma-separated; default: the group `core`")
        command.add_argument("--orders", help="comma-separated; default: the first")
        command.add_argument("--seeds", help="comma-separated; default: the YAML's")
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--jobs", type=int, default=1, help="runs at a time on the device")
        command.add_argument("--shard", help="I/N: every N-th run from the I-th on, for several devices")
        command.add_argument("--budget", choices=["steps", "time"], default="steps")
        command.add_argument("--steps", type=int, default=15, help="steps of each task when costs are measured")
        command.add_argument("--rounds", type=int, default=3, help="times that each cost is measured, in turns")
        command.add_argument("--commit", help="the commit, where git does not know it")
    table = commands.add_parser("table")
    table.add_argument("out", type=Path)
    table.add_argument("--config", type=Path, default=STANDARD)
    table.add_argument("--results", type=Path, help="a Markdown file whose tables are replaced, plots beside it")
    arguments = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = read_config(arguments.config, getattr(arguments, "data", None), getattr(arguments, "settings", None))
    if arguments.command == "table":
        return compare_table.command(arguments.out, config, arguments.results)
    commands_by_name = {"run": command_run, "cost": command_cost, "tune": command_tune}
    return commands_by_name[arguments.command](arguments, config)


if __name__ == "__main__":
    raise SystemExit(main())
