# SPDX-License-Identifier: Apache-2.0
"""The language-model head as one matrix, whatever wraps or shards it, and the tokens of the replay rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import anatomy, weights
from lightning_cl.replay.rows import layout_of
from lightning_cl.replay.stillness import evaluating

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_cl.step import Step


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """The head's present weight ``[V, D]`` and bias ``[V]``, with their graph.

    An adapter on the head is added to its weight while it is on, a copy made by ``modules_to_save`` stands for the head,
    and a weight that is sharded now is gathered (its gradient is averaged over the ranks on the way back).
    """
    off = bool(getattr(head, "_disable_adapters", False))
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        copies: Any = head.modules_to_save
        return head_parameters(head.original_module if off else copies[_active(head)[0]])
    base: Any = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight, bias = _whole(base.weight), None if getattr(base, "bias", None) is None else _whole(base.bias)
    if base is not head and not off and not getattr(head, "merged", False):
        for adapter in _active(head):
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def _active(part: Any) -> list[str]:
    active = part.active_adapters if hasattr(part, "active_adapters") else part.active_adapter
    return [active] if isinstance(active, str) else list(active)


def _whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    partial = [Partial("avg") for _ in tensor.placements]  # type: ignore[attr-defined]
    return tensor.full_tensor(grad_placements=partial)


def check_head(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Make sure that head and logit transform, applied to the backbone's output, give the model's own logits.

    A family that does more on the way would otherwise be distilled towards predictions that it never makes. Sharded
    models are not run for it.

    Raises:
        MisconfigurationException: if they differ.
    """
    model: Any = anatomy.pretrained_model(pl_module)
    head = anatomy.find_head(pl_module)[1]
    if weights.is_sharded(pl_module):
        return
    backbone, transform = anatomy.find_backbone(pl_module)[1], anatomy.logit_transform(pl_module)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, (tuple, list)) else output.last_hidden_state)

    handle = backbone.register_forward_hook(keep)
    tokens = torch.arange(1, 4, device=next(model.parameters()).device)[None]
    try:
        with evaluating(model), torch.no_grad(), trainer.precision_plugin.forward_context():
            expected = model(input_ids=tokens, use_cache=False).logits.float()
            logits = head(seen[0]).float()
    finally:
        handle.remove()
    found = logits if transform is None else transform(logits)
    scale = expected.abs().max().clamp_min(1e-3)
    if not bool((found - expected).abs().max() <= 0.02 * scale) and bool(expected.isfinite().all()):
        raise MisconfigurationException(
            f"`{type(model).__name__}` makes its logits otherwise than by its head on the backbone's output (largest"
            f" difference {float((found - expected).abs().max()):.3g}), so distilling through the head would hold other"
            " predictions than its own. This family is not supported yet; `ActivationMarginRegularizer` works on hidden"
            " states and needs no head."
        )


def replay_tokens(step: Step) -> Tensor:
    """Token ids of the replay rows ``[R, T]``."""
    if step.replay_batch is not None:
        return layout_of(step.replay_batch).leaves["input_ids"]
    return step.replay.select(layout_of(step.batch).leaves["input_ids"])
