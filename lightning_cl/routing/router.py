# SPDX-License-Identifier: Apache-2.0
"""The fitted router: from pooled hidden states to one adapter a sample."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.routing.features import Expansion
from lightning_cl.strategies.files import DamagedCheckpointError, file_digest, write_atomically

__all__ = ["BASE", "AnalyticRouter", "RouteClass", "Routes"]

#: PEFT's name for "no adapter".
BASE = "__base__"
_FILE = "router.safetensors"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class RouteClass:
    """One column of the router: what it is called, and the adapter that answers for it."""

    name: str
    adapter: str


@dataclass(frozen=True)
class Routes:
    """Where the samples of one batch go.

    Attributes:
        names: class of each sample (a task's name, or ``"general"``).
        adapters: adapter of each sample; ``"__base__"`` where the base model answers.
        margin: best minus second best score, ``[B]``.
        scores: ``[B, K]``; about 1 for the right class and 0 for the others on samples like those of the fit.
    """

    names: list[str]
    adapters: list[str]
    margin: Tensor
    scores: Tensor


class AnalyticRouter:
    """Routes by ``argmax x W``, where W is the ridge solution on the features of all tasks (arXiv 2503.13575).

    Args:
        feature_layer: Name of the module whose output is pooled.
        expansion: The random expansion.
        classes: One entry a column of ``weight``.
        weight: ``[E, K]``, from `lightning_cl.functional.RecursiveLeastSquares`.
        seen: Per column, whether any row was fitted; a column without rows is never chosen. None: all.
        min_margin: Below this margin the base model answers. None: never.

    Example:
        >>> router = AnalyticRouter("layer", Expansion(4, 8), [RouteClass("a", "task_0")], torch.ones(8, 1))
        >>> router.route(torch.ones(2, 4)).adapters
        ['task_0', 'task_0']
    """

    def __init__(
        self,
        feature_layer: str,
        expansion: Expansion,
        classes: Sequence[RouteClass],
        weight: Tensor,
        seen: Sequence[bool] | None = None,
        min_margin: float | None = None,
    ) -> None:
        if weight.shape != (expansion.expansion_dim, len(classes)):
            raise ValueError(
                f"The router's weight has shape {list(weight.shape)}, but `expansion_dim={expansion.expansion_dim}` with"
                f" {len(classes)} classes wants [{expansion.expansion_dim}, {len(classes)}]. Pass one column a class."
            )
        self.feature_layer = feature_layer
        self.expansion = expansion
        self.classes = list(classes)
        self.weight = weight
        self.seen = [True] * len(self.classes) if seen is None else list(seen)
        self.min_margin = min_margin

    @torch.no_grad()
    def scores(self, pooled: Tensor) -> Tensor:
        """Scores ``[B, K]`` of pooled hidden states ``[B, D]``; minus infinity for classes without rows.

        Raises:
            ValueError: For another width than the router was fitted on.
        """
        if pooled.shape[1] != self.expansion.in_features:
            raise ValueError(
                f"The feature layer {self.feature_layer!r} gives {pooled.shape[1]} numbers a sample, but the router was"
                f" fitted on {self.expansion.in_features}. Use the model and `feature_layer` that it was fitted with."
            )
        features = self.expansion(pooled)
        # Small ridges make large weights that cancel: float64, except on devices that have none.
        kind = torch.float32 if features.device.type == "mps" else torch.float64
        if self.weight.device != features.device or self.weight.dtype != kind:
            self.weight = self.weight.to(features.device, kind)
        scores = features.to(kind) @ self.weight
        for column, seen in enumerate(self.seen):
            if not seen:
                scores[:, column] = -torch.inf
        return scores

    def route(self, pooled: Tensor) -> Routes:
        """Choose a class and an adapter for each row of pooled hidden states ``[B, D]``.

        Raises:
            ValueError: If hidden states are NaN or infinite, or of another width.
        """
        scores = self.scores(pooled)
        best = scores.topk(min(2, scores.shape[1]), dim=1)
        second = best.values[:, 1] if scores.shape[1] > 1 else torch.zeros_like(best.values[:, 0])
        # With one class there is nothing to be second: the distance to "not this class", whose score is 0, counts.
        margin = best.values[:, 0] - second.masked_fill(second == -torch.inf, 0.0)
        # One transfer for both: this is the only point at which the pass waits for the device.
        index, margins = torch.stack([best.indices[:, 0].to(margin.dtype), margin]).tolist()
        bad = [row for row, value in enumerate(margins) if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"The hidden states of {len(bad)} of {len(margins)} samples hold NaN or infinity at the feature layer"
                f" {self.feature_layer!r} (first: sample {bad[0]}), so they have no route. Leave those samples out, or run"
                " the model in a wider type (bfloat16 or float32 in place of float16)."
            )
        chosen = [self.classes[int(i)] for i in index]
        limit = -torch.inf if self.min_margin is None else self.min_margin
        adapters = [BASE if m < limit else c.adapter for c, m in zip(chosen, margins, strict=True)]
        return Routes([c.name for c in chosen], adapters, margin, scores)

    def save(self, folder: str | Path) -> None:
        """Write one small file, ``router.safetensors``: W, how to rebuild the features, and the adapter files' sums."""
        from safetensors.torch import save

        folder = Path(folder)
        weight = self.weight.detach().to("cpu", torch.float64).contiguous()
        adapters = [f"{c.adapter}/{name}" for c in self.classes for name in _ADAPTER_FILES]
        about = {
            "format": 1,
            "feature_layer": self.feature_layer,
            "in_features": self.expansion.in_features,
            "expansion_dim": self.expansion.expansion_dim,
            "seed": self.expansion.seed,
            "fingerprint": self.expansion.fingerprint(),
            "classes": [[c.name, c.adapter] for c in self.classes],
            "seen": self.seen,
            "min_margin": self.min_margin,
            "weight_sha256": _sha256(weight.numpy().tobytes()),
            "files": {name: file_digest(folder / name) for name in adapters if (folder / name).is_file()},
        }
        text = json.dumps(about)
        metadata = {"router": text, "sha256": _sha256(text.encode())}
        write_atomically(folder / _FILE, lambda file: file.write(save({"weight": weight}, metadata)))

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> AnalyticRouter:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            verify: Check the adapters' files too.

        Raises:
            FileNotFoundError: If the folder holds no router.
            DamagedCheckpointError: If a file of it is truncated or altered.
            MisconfigurationException: If this PyTorch makes other random numbers from the seed.
        """
        from safetensors import safe_open

        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no `{_FILE}`, so there is no router to load. Pass a folder that `save_routed` or"
                " `RLSRouterFitter.export` wrote."
            )
        try:
            with safe_open(path, framework="pt") as file:
                text, digest = (file.metadata()[key] for key in ("router", "sha256"))
                weight = file.get_tensor("weight")
            about: dict[str, Any] = json.loads(text)
            whole = digest == _sha256(text.encode()) and about["weight_sha256"] == _sha256(weight.numpy().tobytes())
        except Exception as error:
            raise _damaged(path, f"it cannot be read ({type(error).__name__}: {error})") from error
        if not whole:
            raise _damaged(path, "its contents do not fit its checksum")
        for name, expected in about["files"].items():
            file_path = Path(folder) / name
            if verify and file_path.is_file() and file_digest(file_path) != expected:
                raise _damaged(file_path, "it was altered or cut since the router was written beside it")
        expansion = Expansion(about["in_features"], about["expansion_dim"], about["seed"])
        if expansion.fingerprint() != about["fingerprint"]:
            raise MisconfigurationException(
                f"`seed={about['seed']}` gives other random numbers here than where {str(folder)!r} was written"
                f" (PyTorch {torch.__version__}): the router's features would be noise. Use the PyTorch release that"
                " wrote it, or fit the router anew."
            )
        classes = [RouteClass(name, adapter) for name, adapter in about["classes"]]
        return cls(about["feature_layer"], expansion, classes, weight, about["seen"], about["min_margin"])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged: {why}. Nothing of it was loaded. Export the folder anew, or copy it again; for a file that was"
        " changed on purpose, `verify=False`."
    )
