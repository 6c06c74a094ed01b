# SPDX-License-Identifier: Apache-2.0
"""Mode connectivity of two LoRA adapters: points between them, and loss and metric along the line that joins them."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_cl.functional import interpolation

if TYPE_CHECKING:
    from lightning_cl.modules import CausalLMModule

Mode = Literal["factors", "product"]
Scores = Mapping[str, Mapping[str, float]]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Adapter:
    """A PEFT LoRA adapter outside of any model.

    Attributes:
        config: its :class:`peft.LoraConfig`.
        tensors: its weights by their name in ``adapter_model.safetensors``.
    """

    config: Any
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read a PEFT adapter folder.

        Raises:
            FileNotFoundError: if a file of the folder is missing.
            ValueError: if it is no LoRA adapter.
        """
        from peft import PeftConfig
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {name}, so it is no PEFT adapter folder. Write one with `lightning-cl export`, with"
                    " `LoRAInterpolator(export=...)` or with `PeftModel.save_pretrained`."
                )
        config = PeftConfig.from_pretrained(str(folder))
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ValueError(
                f"{folder} is an adapter of the kind {config.peft_type}, and only the factors of LoRA have a line between"
                " them. Give LoRA adapters."
            )
        return cls(config, load_file(folder / _WEIGHTS))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as a PEFT folder, which ``PeftModel.from_pretrained`` loads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, folder / _WEIGHTS, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def scalings(self) -> dict[str, float]:
        """What PEFT multiplies each module's product BA with, by the module's name."""
        from peft.utils.other import get_pattern_key

        found = {}
        for name, tensor in self.tensors.items():
            module, kind = interpolation.lora_factor(name)
            if kind != "A":
                continue
            plain = module.removeprefix("base_model.model.")
            pattern = self.config.alpha_pattern or {}
            alpha = float(pattern.get(get_pattern_key(list(pattern), plain), self.config.lora_alpha))
            rank = tensor.shape[0]
            found[module] = alpha / (math.sqrt(rank) if self.config.use_rslora else rank)
        return found


def interpolate_adapters(
    a: Adapter | str | os.PathLike[str],
    b: Adapter | str | os.PathLike[str],
    alpha: float,
    mode: Mode = "factors",
    output: str | os.PathLike[str] | None = None,
) -> Adapter:
    """The adapter at ``alpha`` on the line from ``a`` (0) to ``b`` (1): interpolation after the fact.

    Args:
        a: an adapter or its PEFT folder.
        b: the other.
        alpha: place on the line.
        mode: ``"factors"`` interpolates A and B themselves; ``"product"`` the update BA, as an adapter of rank
            ``r_a + r_b`` (see :func:`lightning_cl.functional.interpolate_adapters`).
        output: folder to write the result to.

    Returns:
        The adapter.

    Raises:
        ValueError: if the adapters do not have the same modules, or shapes or scalings that the mode cannot join.

    Example:
        >>> from peft import LoraConfig
        >>> names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
        >>> a = Adapter(LoraConfig(r=1, lora_alpha=2), {names[0]: torch.zeros(1, 2), names[1]: torch.zeros(2, 1)})
        >>> b = Adapter(LoraConfig(r=1, lora_alpha=2), {names[0]: torch.ones(1, 2), names[1]: torch.ones(2, 1)})
        >>> interpolate_adapters(a, b, 0.5).tensors[names[0]]
        tensor([[0.5000, 0.5000]])
        >>> interpolate_adapters(a, b, 0.5, mode="product").config.r
        2
    """
    a = a if isinstance(a, Adapter) else Adapter.load(a)
    b = b if isinstance(b, Adapter) else Adapter.load(b)
    scaling_a, scaling_b = a.scalings(), b.scalings()
    if mode == "factors":
        # Names and ranks first: an adapter of other modules has other scalings too, and that would be the lesser reason.
        tensors = interpolation.interpolate_adapters(a.tensors, b.tensors, alpha)
        differing = [m for m in scaling_a if not math.isclose(scaling_a[m], scaling_b[m])]
        if differing:
            module = differing[0]
            raise ValueError(
                f"The adapters scale their updates differently ({module}: {scaling_a[module]:g} and"
                f" {scaling_b[module]:g}), so points between their factors have no scaling. Use `mode='product'`."
            )
        result = Adapter(copy.deepcopy(a.config), tensors)
    else:
        tensors = interpolation.interpolate_adapters(a.tensors, b.tensors, alpha, mode, scaling_a, scaling_b)
        result = Adapter(_joined_config(a.config, tensors), tensors)
    if output is not None:
        result.save(output)
    return result


def _joined_config(config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A configuration with each module's own rank and scaling 1: the scalings are in the factors."""
    joined = copy.deepcopy(config)
    ranks = {}
    for name, tensor in tensors.items():
        module, kind = interpolation.lora_factor(name)
        if kind == "A":
            ranks[module.removeprefix("base_model.model.")] = tensor.shape[0]
    joined.r = joined.lora_alpha = max(ranks.values())
    # `lora_alpha` equals the rank everywhere, and the patterns name each module that has another rank.
    joined.rank_pattern = {f"^{module}": rank for module, rank in ranks.items() if rank != joined.r}
    joined.alpha_pattern = dict(joined.rank_pattern)
    joined.use_rslora = False
    return joined


@dataclass
class Connectivity:
    """Scores along the line between two adapters.

    Attributes:
        mode: what was interpolated.
        alphas: places on the line, 0 to 1.
        scores: for each task, in the order of learning, each score's values at the alphas. ``"loss"`` is better lower,
            any other score higher.
        names: what ``a`` and ``b`` are called.
    """

    mode: Mode
    alphas: list[float]
    scores: dict[str, dict[str, list[float]]]
    names: tuple[str, str] = ("a", "b")
    extra: dict[str, Any] = field(default_factory=dict)

    def barrier(self, task: str, score: str = "loss") -> float:
        """How much worse the worst point is than the straight line between the ends; 0 or below is no barrier.

        ``max over a of [L(a) - ((1 - a) L(0) + a L(1))]`` for a loss, with the opposite sign for other scores.

        Example:
            >>> line = Connectivity("factors", [0.0, 0.5, 1.0], {"t": {"loss": [1.0, 2.5, 2.0]}})
            >>> line.barrier("t")
            1.0
        """
        return barrier(self.alphas, self.scores[task][score], lower_is_better=score == "loss")

    def earlier(self) -> dict[str, list[float]]:
        """Means over all tasks but the last, of the scores that each of them has."""
        tasks = list(self.scores.values())[:-1]
        shared = [score for score in (tasks[0] if tasks else {}) if all(score in task for task in tasks)]
        return {s: [sum(t[s][i] for t in tasks) / len(tasks) for i in range(len(self.alphas))] for s in shared}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        return {
            "mode": self.mode,
            "a": self.names[0],
            "b": self.names[1],
            "alphas": self.alphas,
            "tasks": self.scores,
            "barriers": {task: {s: self.barrier(task, s) for s in scores} for task, scores in self.scores.items()},
            "current": list(self.scores)[-1],
            "earlier": self.earlier(),
            "best_for_all": self.best(),
            **self.extra,
        }

    def best(self) -> float:
        """The place with the lowest loss on average over all tasks."""
        losses = [sum(task["loss"][i] for task in self.scores.values()) for i in range(len(self.alphas))]
        return self.alphas[losses.index(min(losses))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw each score of each task, and the mean of the earlier ones, along the line."""
        # Figures made without pyplot need no display and stay out of its global state.
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(score for task in self.scores.values() for score in task))
        figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
        earlier, current = self.earlier(), list(self.scores)[-1]
        for position, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), position + 1)
            for task, scores in self.scores.items():
                if name in scores:
                    label = f"{task} (current)" if task == current and len(self.scores) > 1 else task
                    axes.plot(self.alphas, scores[name], marker="o", markersize=3, label=label)
            if name in earlier and len(self.scores) > 2:
                axes.plot(self.alphas, earlier[name], "k--", label="mean of earlier tasks")
            axes.set_xlabel(f"{self.names[0]} → {self.names[1]}")
            axes.set_ylabel(name)
            if name in self.scores[current]:
                axes.set_title(f"{current}: barrier {self.barrier(current, name):.3g}", fontsize="medium")
            axes.legend(fontsize="small")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def barrier(alphas: Sequence[float], values: Sequence[float], lower_is_better: bool = True) -> float:
    """The largest rise above the straight line between the first and last value (fall below it, for higher-is-better).

    Example:
        >>> barrier([0.0, 0.5, 1.0], [0.8, 0.6, 0.6], lower_is_better=False)
        0.1
    """
    sign = 1.0 if lower_is_better else -1.0
    gaps = (v - ((1 - a) * values[0] + a * values[-1]) for a, v in zip(alphas, values, strict=True))
    return round(max(sign * gap for gap in gaps), 12)


def mode_connectivity(
    model: nn.Module,
    a: Adapter | str | os.PathLike[str],
    b: Adapter | str | os.PathLike[str],
    evaluate: Callable[[nn.Module], Scores],
    points: int = 11,
    mode: Mode = "factors",
) -> Connectivity:
    """Scores at evenly spaced points of the line from adapter ``a`` to adapter ``b``.

    The analysis of I-LoRA (arXiv 2402.18865, section 3): ``b`` is trained from ``a`` on a new task; a valley of low loss
    between them, for the new and the earlier tasks, is what an average of the two can use.

    Args:
        model: the base model, without adapters; it is the same again afterwards.
        a: the adapter before the new task, or its PEFT folder.
        b: the adapter after it.
        evaluate: gives the scores of a model by task, ``{"task": {"loss": 1.2, "accuracy": 0.7}}``; called at each point
            with the model in evaluation mode, without gradients. The last task is the new one.
        points: number of points, both ends included.
        mode: ``"factors"`` or ``"product"``, see :func:`interpolate_adapters`.

    Raises:
        ValueError: if ``points`` is below 2, a task has no ``"loss"``, or the adapters cannot be joined.
    """
    if points < 2:
        raise ValueError(f"`points` must be at least 2, the two ends; found {points}.")
    first, last = (x if isinstance(x, Adapter) else Adapter.load(x) for x in (a, b))
    names = [Path(x).name if not isinstance(x, Adapter) else default for x, default in ((a, "a"), (b, "b"))]
    alphas = [i / (points - 1) for i in range(points)]
    scores: dict[str, dict[str, list[float]]] = {}
    was_training = model.training
    with _adapted(model, interpolate_adapters(first, last, 0.0, mode)) as (adapted, put_in):
        for alpha in alphas:
            put_in(interpolate_adapters(first, last, alpha, mode))
            adapted.eval()
            with torch.no_grad():
                found = evaluate(adapted)
            for task, values in found.items():
                if "loss" not in values:
                    raise ValueError(f"`evaluate` gave no 'loss' for task {task!r}, only {sorted(values)}. Add it.")
                for name, value in values.items():
                    scores.setdefault(task, {}).setdefault(name, []).append(float(value))
    model.train(was_training)
    return Connectivity(mode, alphas, scores, (names[0], names[1]))


@contextmanager
def _adapted(model: nn.Module, first: Adapter) -> Iterator[tuple[nn.Module, Callable[[Adapter], None]]]:
    """The model with an adapter of the shape of ``first``, and a function that sets its values."""
    from peft import get_peft_model, set_peft_model_state_dict

    gradients = [(p, p.requires_grad) for p in model.parameters()]
    # PEFT's own `unload` would leave the trained copies of `modules_to_save` in the base.
    children = [(part, dict(part._modules)) for part in model.modules()]
    config = copy.deepcopy(first.config)
    config.inference_mode = True
    # How the weights were initialised is of no use here, and some ways (PiSSA) would change the base.
    config.init_lora_weights = True
    adapted: Any = get_peft_model(model, config)

    def put_in(adapter: Adapter) -> None:
        result: Any = set_peft_model_state_dict(adapted, adapter.tensors)
        if result.unexpected_keys:
            raise ValueError(
                f"The adapter has weights for {result.unexpected_keys[0]!r}, which {type(model).__name__} does not have."
                " Give the base model that it was trained on."
            )

    try:
        yield adapted, put_in
    finally:
        for part, before in children:
            part._modules.update(before)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        if hasattr(model, "peft_config"):
            del model.peft_config


def text_evaluation(
    module: CausalLMModule,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Callable[[nn.Module], Scores]:
    """An ``evaluate`` for :func:`mode_connectivity` on text tasks: the answers' loss, and a metric.

    Args:
        module: a :class:`~lightning_cl.CausalLMModule` around the base model, with its tokenizer.
        tasks: rows of each task, in the order of learning (see :func:`lightning_cl.data.read_rows`).
        metric: ``"accuracy"`` (by option likelihood), ``"exact_match"``, ``"rouge_l"``, ``"token_f1"`` (of generated
            answers) or ``"loss"`` for the loss alone; None takes accuracy where every row has options.
        batch_size: rows of a batch.
        max_length: longest row in tokens.

    Raises:
        DataError: if rows cannot be scored by the metric.
    """
    from torch.utils.data import DataLoader

    from lightning_cl.data import Collator, EncodedDataset, Encoder, check_metric

    encoder = Encoder(module.tokenizer, max_length=max_length)
    collate = Collator(encoder.pad_token_id)

    def loaders(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[DataLoader, DataLoader | None, str]:
        chosen = metric or ("accuracy" if all(row.get("options") for row in rows) else "loss")
        losses = DataLoader(EncodedDataset(rows, encoder, "train"), batch_size, collate_fn=collate)
        if chosen == "loss":
            return losses, None, chosen
        check_metric(rows, chosen, name)
        scored = EncodedDataset(rows, encoder, "eval", metric=chosen)
        return losses, DataLoader(scored, batch_size, collate_fn=collate), chosen

    prepared = {name: loaders(name, rows) for name, rows in tasks.items()}

    def evaluate(model: nn.Module) -> Scores:
        device = next(model.parameters()).device
        before = module.model
        module.model = model
        try:
            found: dict[str, dict[str, float]] = {}
            for name, (losses, scored, chosen) in prepared.items():
                found[name] = {"loss": _loss(module, losses, device)}
                if scored is not None:
                    found[name][chosen] = _metric(module, scored, chosen, device)
            return found
        finally:
            module.model = before

    return evaluate


def _loss(module: CausalLMModule, loader: Any, device: torch.device) -> float:
    """Mean over all answer tokens of all rows."""
    total = weight = 0.0
    for batch in loader:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        counts = module.row_weights(batch)
        total += float((module.per_row_loss(batch) * counts).sum())
        weight += float(counts.sum())
    return total / max(weight, 1.0)


def _metric(module: CausalLMModule, loader: Any, metric: str, device: torch.device) -> float:
    from lightning_cl.modules.text_scores import TEXT_SCORES

    scores: list[float] = []
    for index, batch in enumerate(loader):
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        for row in module.predict_step(batch, index):
            right = row["prediction"] == row["reference"]
            scores.append(
                float(right) if metric == "accuracy" else TEXT_SCORES[metric](row["prediction"], row["reference"])
            )
    return sum(scores) / max(len(scores), 1)
