# SPDX-License-Identifier: Apache-2.0
"""One run of the comparison: a method, an order and a seed; its result and what it cost."""

from __future__ import annotations

import functools
import importlib
import io
import json
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compare_data
import lightning.pytorch as pl
import torch
import yaml
from compare_graphs import GraphedBlocks

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.callbacks import RLSRouterFitter
from lightning_cl.data import Collator, Encoder
from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import results
from lightning_cl.report.provenance import provenance
from lightning_cl.strategies import CLSingleDeviceStrategy


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
        max_steps: most steps of each task; None: no limit but the epochs.
        max_epochs: epochs of each task; None: the recipe's.
        jobs: processes that share the device with this one; wall times are no costs then.
        commit: the commit, where git does not know it.
    """

    config: dict[str, Any] = field(repr=False)
    method: str
    order: str
    seed: int
    out: Path
    rows: Path
    settings: dict[str, Any]
    max_steps: int | None = None
    max_epochs: int | None = None
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
    def own_steps(self) -> list[int]:
        """Steps of each task over the recipe's epochs."""
        rows, recipe = read_rows(self.rows)["train"], self.recipe
        return [-(-len(rows[task]) // recipe["batch_size"]) * recipe["epochs"] for task in self.tasks]

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
        by_stage: seconds by stage and phase: ``prepare_seconds`` (until :class:`Begin` ends it: rows made, references
            taken), ``train_seconds``, ``finish_seconds`` (after its last step: a router fitted), ``evaluation_seconds``;
            ``steps`` and ``step_seconds``, the median.
        step_seconds: of each training step but a task's first three.
        tokens: tokens, padding included, that went through the network in training, reference passes included.
        peak_bytes: most memory of the device in use between a task's set-up and its last step.
    """

    def __init__(self) -> None:
        self.by_stage: dict[int, dict[str, float]] = {}
        self.step_seconds: list[float] = []
        self.steps = self.tokens = self.peak_bytes = 0
        self._last = self._began = 0.0
        self._earlier_steps = 0
        self._phase: str | None = None
        self._counting = False
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
        self._counting = True

    def begin(self, step: int) -> None:
        """The preparation is over, if it was not yet."""
        if self._phase == "prepare":
            self._enter("train")
            self._began = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._phase == "train" and trainer.global_step - self._began > 3:
            self.step_seconds.append(now - self._last)
        self._last = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.steps += trainer.global_step
        self._enter("finish")
        own = self.step_seconds[self._earlier_steps :] or [
            self.by_stage[self._stage]["train_seconds"] / max(trainer.global_step, 1)
        ]
        self._earlier_steps = len(self.step_seconds)
        self.by_stage[self._stage] |= {"steps": trainer.global_step, "step_seconds": statistics.median(own)}
        self._counting = False
        if torch.cuda.is_initialized():
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._hook.remove()
        self._enter(None)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._enter(None)

    def _count(self, module: Any, args: tuple[Any, ...]) -> None:
        if self._counting:
            self.tokens += args[0].numel()

    def _enter(self, phase: str | None) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            cost = self.by_stage.setdefault(self._stage, {})
            cost[f"{self._phase}_seconds"] = cost.get(f"{self._phase}_seconds", 0.0) + now - self._entered
        self._phase, self._entered = phase, now


class Begin(pl.Callback):
    """The last of the callbacks, so that what the others do before a task's first step is over when it runs."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.costs.begin(trainer.global_step)


class BoundedStream(TaskStream):
    """Evaluates what the tables need: a task from its own stage on, and probes before the first task and after the last.

    The cells that are left out stand in ``missing`` with that reason.
    """

    def restart(self, run_id: str) -> None:
        """Stand before the first task, with no scores but those that will not be asked for."""
        super().restart(run_id)
        last = len(self.train_tasks) - 1
        for stage in range(-1, last + 1):
            left_out = [task for task in self.train_tasks[stage + 1 :] if task.test is not None]
            if 0 <= stage < last:
                left_out += [task for task in self.tasks if task.role == "probe"]
            for task in left_out:
                self.missing[stage, task.name] = "left out, to bound the evaluation"


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


def make_encoder(config: dict[str, Any], tokenizer: Any) -> Encoder:
    """The encoder of the recipe."""
    recipe = config["recipe"]
    return Encoder(tokenizer, recipe["max_length"], recipe["template"], "left", recipe.get("prompt_loss_weight", 0.0))


@functools.cache
def read_rows(path: Path) -> dict[str, Any]:
    """The encoded rows of a file; read once, since processes that are forked afterwards have them too."""
    return torch.load(path, weights_only=False)


def make_stream(job: Job, rows: dict[str, Any], pad_token_id: int) -> BoundedStream:
    """The tasks and probes; for the upper bound one task of all rows, beside which the tasks are probes."""
    wanted = job.config["tune"]["probes"] if job.order == job.config["tune"]["order"] else rows["probes"]
    probes = [Task(name, test=rows["probes"][name][1], role="probe", metric=rows["probes"][name][0]) for name in wanted]
    if job.spec.get("joint"):
        together = [row for task in job.tasks for row in rows["train"][task]]
        tasks = [Task("all", train=compare_data.shuffled(together, job.seed))]
        tasks += [Task(task, test=rows["test"][task], role="probe", metric="accuracy") for task in job.tasks]
    else:
        tasks = [Task(t, train=rows["train"][t], test=rows["test"][t], metric="accuracy") for t in job.tasks]
    recipe = job.recipe
    return BoundedStream(
        [*tasks, *probes],
        batch_size=recipe["batch_size"],
        eval_batch_size=recipe["eval_batch_size"],
        seed=job.seed,
        collate_fn=Collator(pad_token_id),
    )


def make_model(recipe: dict[str, Any], model: str) -> CausalLMModule:
    """The model with its adapter, and one optimizer kernel a step where there is such a kernel.

    Under ``bf16-mixed`` the frozen base is in bfloat16 and the adapters in float32: bfloat16 has 8 bits, so that it would
    lose the small updates of a low learning rate.
    """
    fused = torch.cuda.is_available()
    module = CausalLMModule(
        model,
        lora=recipe["lora"],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=recipe["lr"], weight_decay=0.0, fused=fused),
        schedule=recipe["schedule"],
        warmup=recipe["warmup"],
        prompt_loss_weight=recipe.get("prompt_loss_weight", 0.0),
        dtype="bfloat16" if recipe["precision"].startswith("bf16") else "float32",
    )
    if recipe["precision"].endswith("mixed"):
        for layer in module.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = False  # to float32 and, by autocast, back: two kernels for nothing
    return module


def run_one(job: Job) -> dict[str, Any]:
    """Train and evaluate one method on one order with one seed, and write its result."""
    warnings.filterwarnings("ignore", message=".*(num_workers|many workers|log_every_n_steps|is missing|empty).*")
    pl.seed_everything(job.seed, verbose=False)
    began = time.perf_counter()
    recipe = job.recipe
    rows = read_rows(job.rows)
    model = make_model(recipe, job.config["model"])
    pad = Encoder(model.tokenizer).pad_token_id
    if recipe.get("prompt_loss_weight"):
        # These rows learn their prompts too, so they are other rows.
        encoder = make_encoder({**job.config, "recipe": recipe}, model.tokenizer)
        rows = {**rows, "train": {task: compare_data.train_rows(job.config, task, encoder) for task in job.tasks}}
    callbacks = build(job.spec.get("callbacks", []), job.settings)
    costs = Costs()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        strategy=CLSingleDeviceStrategy(),
        precision=recipe["precision"],
        max_epochs=job.max_epochs or recipe["epochs"],
        max_steps=job.max_steps or -1,
        callbacks=[costs, *callbacks, *([GraphedBlocks()] if graphed(recipe) else []), Begin(costs)],
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
    made_by = {**made_by, "commit": job.commit or made_by["commit"]}
    routing = [callback.confusion.document() for callback in callbacks if isinstance(callback, RLSRouterFitter)]
    parts = {
        "comparison": document,
        "provenance": made_by,
        "costs": costs.by_stage,
        "routing": next(iter(routing), None),
    }
    results.write(job.folder, matrix, parts)
    (job.folder / "config.yaml").write_text(
        yaml.safe_dump({job.method: job.spec, "recipe": recipe, "order": job.tasks})
    )
    return document


def graphed(recipe: dict[str, Any]) -> bool:
    """Whether training steps run from CUDA graphs: on a GPU, if asked for."""
    return bool(recipe.get("graphs")) and torch.cuda.is_available()


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
