# SPDX-License-Identifier: Apache-2.0
"""Four algorithmic tasks in a row: a small model forgets three of them, and with its own samples none.

The toy sequence of arXiv 2605.26097 (add, reverse, sort, modular add; figures of the paper: 21 / 0.6 / 1.3 / 100 % without
replay, about 100 % each with self-generated labels), and the paper's other questions at the same scale:

    python examples/selfgenerated_toy.py --out toy.json                      # the sequence, with and without replay
    python examples/selfgenerated_toy.py --study width --out width.json      # forgetting over model width
    python examples/selfgenerated_toy.py --study tokens --out tokens.json    # ... over pre-training tokens a parameter
    python examples/selfgenerated_toy.py --study rate --out rate.json        # ... against steps to one new-task score

The studies take 2 to 12 minutes each on one CPU core, the sequence longer; ``--tiny`` is a check of the script itself that
takes seconds. Every study writes a plot beside its JSON file. Seconds include the time that generation takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_cl.callbacks import ReplayDistillation, ReplayMixer
from lightning_cl.replay import Row, SelfGenerated
from lightning_cl.report.provenance import provenance

PAD, BOS, EOS, SEPARATOR, DIGITS = 0, 1, 2, 3, 4
TASKS = ("add", "reverse", "sort", "modular add")
FIRST_TASK_TOKEN = DIGITS + 10
VOCABULARY = FIRST_TASK_TOKEN + len(TASKS)


@dataclass
class Size:
    """How large everything is."""

    width: int = 128
    layers: int = 2
    digits: int = 1
    steps: int = 800
    batch: int = 128
    rate: float = 2e-3
    pool: int = 4096
    weight: float = 4.0


TINY = Size(width=32, digits=1, steps=30, batch=16, pool=32)


def _as_digits(numbers: Tensor, count: int) -> Tensor:
    """``[N]`` to ``[N, count]``, the lowest digit first: then carries go the way that the model writes."""
    return torch.stack([numbers // 10**i % 10 for i in range(count)], dim=1)


def make_rows(task: str, count: int, digits: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Rows of one task ``[count, length]``, and how many of their tokens are the question.

    Modular addition is digit by digit, modulo 10: the old addition without its carries.
    """
    if task in ("add", "modular add"):
        a, b = (torch.randint(10**digits, (count,), generator=generator) for _ in range(2))
        question = torch.cat([_as_digits(a, digits), _as_digits(b, digits)], dim=1)
        carried = _as_digits(a + b, digits + 1)
        answer = carried if task == "add" else (_as_digits(a, digits) + _as_digits(b, digits)) % 10
    else:
        question = torch.randint(10, (count, 2 * digits), generator=generator)
        answer = question.flip(1) if task == "reverse" else question.sort(dim=1).values

    def column(token: int) -> Tensor:
        return torch.full((count, 1), token)

    begin = torch.cat([column(BOS), column(FIRST_TASK_TOKEN + TASKS.index(task)), question + DIGITS], dim=1)
    rows = torch.cat([begin, column(SEPARATOR), answer + DIGITS, column(EOS)], dim=1)
    return rows, begin.shape[1] + 1


class Stream(torch.utils.data.IterableDataset):
    """Endless fresh batches of a task, or of several in turn."""

    def __init__(self, tasks: tuple[str, ...], size: Size, seed: int) -> None:
        self.tasks, self.size, self.seed = tasks, size, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            share = self.size.batch // len(self.tasks)
            parts = [make_rows(task, share, self.size.digits, generator)[0] for task in self.tasks]
            width = max(part.shape[1] for part in parts)
            rows = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=PAD) for part in parts])
            mask = rows != PAD
            # Every token carries loss, the question's too: a model that cannot write inputs cannot replay a task.
            yield {"input_ids": rows, "attention_mask": mask.long(), "labels": rows.masked_fill(~mask, -100)}


class Toy(pl.LightningModule):
    """A two-layer Llama in an ordinary LightningModule, which knows nothing of replay."""

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        self.size = size
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=size.width,
                intermediate_size=4 * size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=max(1, size.width // 16),
                max_position_embeddings=64,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                tie_word_embeddings=False,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.size.rate, weight_decay=0.01, fused=fused)
        steps, warm = self.trainer.max_steps, max(1, self.trainer.max_steps // 20)

        def factor(step: int) -> float:
            return min((step + 1) / warm, 1.0) * max(0.02, 1 - step / steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def accuracy(model: Toy, task: str, rows: int = 512) -> float:
    """Share of held-out questions whose whole answer the model writes, taking the likeliest token each time."""
    device = model.device
    truth, question = make_rows(task, rows, model.size.digits, torch.Generator().manual_seed(10**6))
    tokens = truth[:, :question].to(device)
    for _ in range(truth.shape[1] - question):
        logits = model.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return float((tokens == truth.to(device)).all(1).float().mean())


@torch.no_grad()
def loss_of(model: Toy, tasks: tuple[str, ...], rows: int = 1024) -> float:
    """Held-out loss in nats a token, of all tokens but the one that names the task.

    That one is a guess at what comes next: with a fourth task in the mixture it costs ln 4 where it cost ln 3, and nothing
    is forgotten.
    """
    device, total = model.device, []
    for task in tasks:
        data = make_rows(task, rows, model.size.digits, torch.Generator().manual_seed(10**6))[0].to(device)
        labels = data.clone()
        labels[:, 1] = -100
        total.append(float(model.model(input_ids=data, labels=labels).loss))
    return sum(total) / len(total)


def grammatical(row: Row, text: str | None) -> bool:
    """Whether a sampled row is a question of its task with an answer: the parser that drops the others."""
    ids = row.content["input_ids"].tolist()
    body = ids[2:-1]
    return (
        ids[-1] == EOS and body.count(SEPARATOR) == 1 and all(i == SEPARATOR or DIGITS <= i < DIGITS + 10 for i in body)
    )


def replay(size: Size, objective: str, seed: int, prompts: Any = "past_tasks") -> list[Any]:
    """The two callbacks: the model's own rows in every batch, and what is done with them."""
    longest = 4 * size.digits + 5
    source = SelfGenerated(
        pool_size=size.pool,
        length=longest,
        prompts=prompts,
        anchor="auto",
        on_eos="stop",
        parser=grammatical if prompts == "past_tasks" else None,
        batch_size=min(size.pool, 4096),
        seed=seed,
    )
    mixer = ReplayMixer(source, rows_per_batch=max(1, size.batch // 2), layout="joined")
    return [mixer, ReplayDistillation(weight=size.weight, objective=objective)]


def train(model: Toy, tasks: tuple[str, ...], size: Size, seed: int, callbacks: list[Any], device: str) -> float:
    """One fit; gives its wall time, generation included."""
    trainer = pl.Trainer(
        max_steps=size.steps,
        max_epochs=-1,
        accelerator=device,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(model, torch.utils.data.DataLoader(Stream(tasks, size, seed), batch_size=None))
    seconds = time.perf_counter() - began
    model.to(trainer.strategy.root_device)
    model.eval()
    return seconds


METHODS = ("none", "labels", "distillation")


def run_sequence(
    size: Size, seed: int, device: str, tasks: tuple[str, ...] = TASKS, methods: tuple[str, ...] = METHODS
) -> dict[str, Any]:
    """All tasks in a row by each method: accuracy on every task after every stage."""
    results: dict[str, Any] = {}
    for method in methods:
        model = Toy(size, seed)
        callbacks = [] if method == "none" else replay(size, method, seed)
        seconds, matrix = 0.0, []
        for stage, task in enumerate(tasks):
            model.train()
            seconds += train(model, (task,), size, 100 * seed + stage, callbacks, device)
            matrix.append({name: accuracy(model, name) for name in tasks})
        generation = callbacks[0].sources[0].seconds if callbacks else 0.0
        results[method] = {"final": matrix[-1], "stages": matrix, "seconds": seconds, "generation_seconds": generation}
        shown = "  ".join(f"{name} {100 * value:.1f} %" for name, value in matrix[-1].items())
        print(f"{method:>12}: {shown}   ({seconds:.0f} s, {generation:.1f} of them generation)", flush=True)
    return results


OLD, NEW = TASKS[:3], TASKS[3]


def _pretrained(size: Size, steps: int, seed: int, device: str) -> Toy:
    model = Toy(size, seed)
    train(model, OLD, Size(**{**vars(size), "steps": steps}), seed, [], device)
    return model


class _UntilScore(Callback):
    """Ends the fit when the new task's held-out loss reaches a score."""

    def __init__(self, score: float, every: int) -> None:
        self.score, self.every, self.reached = score, every, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.every == 0 and loss_of(pl_module, (NEW,), 256) <= self.score:
            self.reached = trainer.should_stop = True


def _tuned(size: Size, start: dict[str, Tensor], with_replay: bool, seed: int, device: str, extra: list[Any]) -> Any:
    """Fine-tune a pre-trained model on the new task: forgetting of the old ones in nats a token, seconds, the model."""
    model = Toy(size, seed)
    model.load_state_dict(start)
    before = loss_of(model, OLD)
    callbacks = [*(replay(size, "distillation", seed, prompts="bos") if with_replay else []), *extra]
    model.train()
    seconds = train(model, (NEW,), size, seed + 7, callbacks, device)
    return loss_of(model, OLD) - before, seconds, model


def run_width(size: Size, seed: int, device: str, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Forgetting over model width."""
    rows = []
    for width in widths:
        wide = Size(**{**vars(size), "width": int(width)})
        start = _pretrained(wide, size.steps, seed, device).state_dict()
        for with_replay in (False, True):
            forgetting, seconds, model = _tuned(wide, start, with_replay, seed, device, [])
            parameters = sum(p.numel() for p in model.parameters())
            rows.append({"x": parameters, "replay": with_replay, "forgetting": forgetting, "seconds": seconds})
            print(rows[-1], flush=True)
    return rows


def run_tokens(size: Size, seed: int, device: str, fractions: tuple[float, ...]) -> list[dict[str, Any]]:
    """Forgetting over pre-training tokens a parameter."""
    rows = []
    for fraction in fractions:
        steps = max(1, int(size.steps * fraction))
        pretrained = _pretrained(size, steps, seed, device)
        tokens = steps * size.batch * (4 * size.digits + 4) / sum(p.numel() for p in pretrained.parameters())
        for with_replay in (False, True):
            forgetting, seconds, _ = _tuned(size, pretrained.state_dict(), with_replay, seed, device, [])
            rows.append({"x": tokens, "replay": with_replay, "forgetting": forgetting, "seconds": seconds})
            print(rows[-1], flush=True)
    return rows


def run_rate(size: Size, seed: int, device: str, rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """Forgetting against the steps (and seconds) that the new task takes to one score, for each learning rate."""
    start = _pretrained(size, size.steps, seed, device).state_dict()
    best = _tuned(size, start, False, seed, device, [])[2]
    score = loss_of(best, (NEW,)) + 0.05
    rows = []
    for rate in rates:
        for with_replay in (False, True):
            stop = _UntilScore(score, every=max(1, size.steps // 100))
            tuned = Size(**{**vars(size), "rate": rate, "steps": 2 * size.steps})
            forgetting, seconds, model = _tuned(tuned, start, with_replay, seed, device, [stop])
            steps = model.trainer.global_step if stop.reached else None
            rows.append({"x": steps, "rate": rate, "replay": with_replay, "forgetting": forgetting, "seconds": seconds})
            print(rows[-1], flush=True)
    return rows


# How a study runs, its points, and those of a check of the script.
_STUDIES: dict[str, tuple[Any, tuple[float, ...], tuple[float, ...]]] = {
    "width": (run_width, (16, 32, 64, 128, 256), (16, 32)),
    "tokens": (run_tokens, (0.1, 0.3, 1.0, 3.0), (0.1, 1.0)),
    "rate": (run_rate, (2e-4, 5e-4, 1e-3, 2e-3, 4e-3), (1e-3, 4e-3)),
}
_AXES = {
    "width": "parameters",
    "tokens": "pre-training tokens a parameter",
    "rate": "steps to one score on the new task\n(beside each point: learning rate, seconds with generation)",
}


def plot_sequence(results: dict[str, Any], path: Path) -> None:
    """Accuracy on each task after each stage, a panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (method, result) in zip(panels, results.items(), strict=True):
        names = list(result["final"])
        for first, name in enumerate(names):
            learnt = range(first, len(names))
            axes.plot(learnt, [100 * result["stages"][stage][name] for stage in learnt], "o-", label=name)
        axes.set_title("no replay" if method == "none" else f"self-generated, {method}", fontsize=9)
        axes.set_xticks(range(len(names)), [f"after\n{name}" for name in names], fontsize=7)
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("accuracy (%)")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def plot(study: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Forgetting over the study's axis, with and without replay."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
    for with_replay, label in ((False, "no replay"), (True, "self-generated, KL")):
        points = [row for row in rows if row["replay"] == with_replay and row["x"] is not None]
        axes.plot([p["x"] for p in points], [p["forgetting"] for p in points], "o-", label=label)
        for point in points if study == "rate" else ():
            note = f" {point['rate']:g}, {point['seconds']:.2g} s"
            axes.annotate(note, (point["x"], point["forgetting"]), fontsize=6)
    # Forgetting spans decades, and with replay it can be below nothing.
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log", xlabel=_AXES[study], ylabel="forgetting of three tasks\nwhile the fourth is learnt (nats a token)"
    )
    # Over a decade or two matplotlib would write numbers as powers of ten, and over one another.
    axes.xaxis.set_minor_formatter(NullFormatter())
    if study != "width":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> Any:
    """Run one study and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("sequence", *_AXES), default="sequence")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write; the plot goes beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="steps a task")
    parser.add_argument("--digits", type=int, default=None, help="digits of a number (default: 1)")
    parser.add_argument("--method", choices=METHODS, default=None, help="only this one of the sequence (default: all)")
    parser.add_argument("--points", type=float, nargs="+", help="only these points of the study's axis (a part of it)")
    parser.add_argument("--device", default="auto", help="Lightning's accelerator")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to check the script")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = TINY if options.tiny else Size()
    given = {name: getattr(options, name) for name in ("steps", "digits") if getattr(options, name) is not None}
    size = Size(**{**vars(size), **given})
    common = (size, options.seed, options.device)
    result: Any
    if options.study == "sequence":
        result = run_sequence(*common, methods=METHODS if options.method is None else (options.method,))
    else:
        run, default, tiny = _STUDIES[options.study]
        result = run(*common, tuple(options.points or (tiny if options.tiny else default)))
    if options.out is not None:
        options.out.write_text(
            json.dumps({**provenance(), "study": options.study, "size": vars(size), "result": result}, indent=1)
        )
        picture = options.out.with_suffix(".png")
        if options.study == "sequence":
            plot_sequence(result, picture)
        else:
            plot(options.study, result, picture)
    return result


if __name__ == "__main__":
    main()
