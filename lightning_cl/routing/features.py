# SPDX-License-Identifier: Apache-2.0
"""What the router sees of a sample: the mean of its prompt's hidden states, expanded at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import anatomy

__all__ = ["Expansion", "find_feature_layer", "pool", "prompt_mask", "shallow_modules"]

IGNORED_LABEL = -100


class Expansion:
    """A fixed random expansion with ReLU: ``x = relu(h Phi / sqrt(D))``, arXiv 2503.13575, equation 5 (which has no ReLU
    in the released code, so that the expansion added nothing).

    ``Phi [D, E]`` is standard normal, made on the CPU from the seed: the same on every device, and never stored.

    Args:
        in_features: Width D of the pooled hidden states.
        expansion_dim: Width E of the features.
        seed: Seed of ``Phi``.

    Example:
        >>> expansion = Expansion(in_features=4, expansion_dim=6, seed=0)
        >>> expansion(torch.ones(2, 4)).shape
        torch.Size([2, 6])
    """

    def __init__(self, in_features: int, expansion_dim: int, seed: int = 0) -> None:
        self.in_features = in_features
        self.expansion_dim = expansion_dim
        self.seed = seed
        self._matrix: Tensor | None = None

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """``Phi / sqrt(D)`` in float32 on ``device``; kept for the next call."""
        device = torch.device(device)
        if self._matrix is None or self._matrix.device != device:
            generator = torch.Generator().manual_seed(self.seed)
            matrix = torch.randn(self.in_features, self.expansion_dim, generator=generator)
            self._matrix = (matrix / self.in_features**0.5).to(device)
        return self._matrix

    def fingerprint(self) -> list[float]:
        """The first entries of the matrix: another generator of random numbers would show here."""
        return [
            round(float(v), 6) for v in self.matrix(self._matrix.device if self._matrix is not None else "cpu")[0, :8]
        ]

    @torch.no_grad()
    def __call__(self, pooled: Tensor) -> Tensor:
        """Features ``[N, E]`` in float32 of pooled hidden states ``[N, D]``."""
        with torch.autocast(pooled.device.type, enabled=False):
            return torch.relu(pooled.float() @ self.matrix(pooled.device))


def pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens that ``mask`` marks, in float32.

    Args:
        hidden: ``[B, T, D]`` tokens, ``[B, C, H, W]`` (or more) maps, whose mean is over all places, or ``[B, D]``.
        mask: bool ``[B, T]``; None for all tokens. What lies outside may be anything, NaN included.

    Returns:
        ``[B, D]`` (``[B, C]``).

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [float("nan")]]])
        >>> pool(hidden, torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """
    hidden = hidden.detach()
    if hidden.ndim == 2:
        return hidden.float()
    if hidden.ndim > 3:
        return hidden.flatten(2).mean(dim=2, dtype=torch.float32)
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    kept = hidden.masked_fill(~mask.unsqueeze(-1), 0)
    # Float32 inside the reduction: the product with the mask stays in the hidden states' own type.
    return kept.sum(dim=1, dtype=torch.float32) / mask.sum(dim=1, keepdim=True).clamp_min(1)


def prompt_mask(attention_mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """The prompt's own tokens: attended, and before the row's first label. So an answer in the row is never seen.

    A row without a prompt (every attended token is a label, as in plain text) counts with all its attended tokens.

    Args:
        attention_mask: ``[B, T]``, nonzero at real tokens; None for all.
        labels: ``[B, T]``, -100 at tokens without loss; None at prediction.

    Returns:
        bool ``[B, T]``, or None if both arguments are None.

    Example:
        >>> prompt_mask(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[-100, -100, -100, 7]]))
        tensor([[False,  True,  True, False]])
    """
    if attention_mask is None and labels is None:
        return None
    if attention_mask is None:
        assert labels is not None
        attended = torch.ones_like(labels, dtype=torch.bool)
    else:
        attended = attention_mask.bool()
    if labels is None or labels.shape != attended.shape:
        return attended
    prompt = attended & ((labels != IGNORED_LABEL).cumsum(dim=1) == 0)
    return torch.where(prompt.any(dim=1, keepdim=True), prompt, attended)


def text_fields(batch: Any) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``labels`` and ``position_ids`` of a batch that is a mapping, where they are.

    A prompt whose tokens carry a small part of the loss (``loss_weight`` below 1) is still a prompt: no labels there.
    """
    if not isinstance(batch, Mapping):
        return {}
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    fields = {k: batch[k] for k in names if isinstance(batch.get(k), Tensor) and batch[k].ndim == 2}
    weight = batch.get("loss_weight")
    if "labels" in fields and isinstance(weight, Tensor) and weight.shape == fields["labels"].shape:
        fields["labels"] = fields["labels"].masked_fill(weight < 1, IGNORED_LABEL)
    return fields


def find_feature_layer(module: nn.Module, feature_layer: str | int = "auto") -> str:
    """Dotted name inside ``module`` of the layer whose output the router reads.

    Args:
        module: The LightningModule or network.
        feature_layer: ``"auto"`` for the block at an eighth of the depth (the paper's 4 of 32), a number of blocks L_f
            for the output of the first L_f, or any submodule by name. A network without a list of blocks counts its
            layers with weights.

    Raises:
        MisconfigurationException: If there is no such layer, with the closest names, or no layer is left above it.
    """
    if isinstance(feature_layer, str) and feature_layer != "auto":
        return anatomy.name_of(module, anatomy.get_submodule(module, feature_layer))
    blocks = _stages(module)
    count = max(1, round(len(blocks) / 8)) if feature_layer == "auto" else int(feature_layer)
    if not 1 <= count < len(blocks):
        raise MisconfigurationException(
            f"`feature_layer={feature_layer!r}` leaves no block for the adapters: the network has {len(blocks)} blocks, and"
            f" the router reads the output of the first {count}. Use a number from 1 to {len(blocks) - 1}, or a deeper"
            " network."
        )
    return blocks[count - 1]


def _stages(module: nn.Module) -> list[str]:
    """The blocks in order; for a network without a list of blocks (a CNN), its layers that have weights."""
    try:
        return anatomy.find_blocks(module)
    except MisconfigurationException:
        prefix, network = anatomy.find_backbone(module)
        leaves = [n for n, part in network.named_modules() if n and any(True for _ in part.parameters(recurse=False))]
        return [f"{prefix}.{name}" if prefix else name for name in leaves]


def shallow_modules(module: nn.Module, feature_layer: str) -> set[str]:
    """Names of the modules that the feature layer's output depends on: those registered before it, and its own parts.

    Modules are registered in the order of the forward pass in every network that this package knows.
    """
    found: set[str] = set()
    for name, _ in module.named_modules():
        inside = name == feature_layer or name.startswith(f"{feature_layer}.")
        if not inside and feature_layer in found:
            break
        if inside or not feature_layer.startswith(f"{name}." if name else ""):
            found.add(name)
    return found
