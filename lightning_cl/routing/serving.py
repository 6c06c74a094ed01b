# SPDX-License-Identifier: Apache-2.0
"""Routed models as files: PEFT folders, one small router file, and a loader that needs no Lightning run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl import anatomy
from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.routing.adapters import AdapterBank, peft_tensors
from lightning_cl.routing.features import Expansion
from lightning_cl.routing.forward import RoutedForward
from lightning_cl.routing.router import BASE, AnalyticRouter, RouteClass

__all__ = ["load_routed", "save_routed", "save_routed_state"]


def save_routed(
    folder: str | Path,
    router: AnalyticRouter,
    bank: AdapterBank,
    stored: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write ``folder/ADAPTER/`` (standard PEFT folders) and ``folder/router.safetensors``.

    Args:
        folder: Where; made if missing.
        router: The fitted router. Its feature layer is written as a name inside the base model.
        bank: The adapters.
        stored: Whole weights by adapter, where they were stored already; others are taken from the model (collective
            for a sharded model).
    """
    stem = anatomy.name_of(bank.module, bank.model.base_model.model)
    inside = router.feature_layer.removeprefix(f"{stem}.") if stem else router.feature_layer
    for adapter in {c.adapter for c in router.classes} - {BASE}:
        bank.export(adapter, Path(folder) / adapter, (stored or {}).get(adapter))
    AnalyticRouter(inside, router.expansion, router.classes, router.weight, router.seen, router.min_margin).save(folder)


def save_routed_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write the same folder from what `RLSRouterFitter` keeps in a checkpoint, without a model.

    Args:
        folder: Where; made if missing.
        state: ``checkpoint["callbacks"]["RLSRouterFitter"]["router"]``.

    Raises:
        MisconfigurationException: If no task had ended when the checkpoint was written, or the model had no adapters.
    """
    from safetensors.torch import save_file

    kept, about = state["statistics"], state["serving"]
    if not state["adapters"] or not about:
        raise MisconfigurationException(
            "The checkpoint's `RLSRouterFitter` has no finished task with an adapter, so there is nothing to serve. Use a"
            " checkpoint that was written after a task's end."
        )
    solver = RecursiveLeastSquares(kept["expansion_dim"])
    solver.load_state_dict(kept["total"])
    classes = [RouteClass(name, adapter) for name, adapter in kept["classes"]][: solver.num_classes]
    expansion = Expansion(kept["in_features"], kept["expansion_dim"], kept["seed"])
    seen = [bool(n) for n in solver.counts.tolist()]
    router = AnalyticRouter(about["feature_layer"], expansion, classes, solver.weight, seen, about["min_margin"])
    for adapter, whole in state["adapters"].items():
        path = Path(folder) / adapter
        path.mkdir(parents=True, exist_ok=True)
        save_file(peft_tensors(adapter, whole), path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(about["adapter_config"])
    router.save(folder)


def load_routed(model: Any, folder: str | Path, verify: bool = True) -> Any:
    """Load adapters and router into a base model; from then on it routes by itself, in calls and in ``generate``.

    Args:
        model: The Hugging Face model that the adapters were trained on, whole or in 4 bits, without adapters.
        folder: What `RLSRouterFitter.export` or `save_routed` wrote.
        verify: Refuse adapter files that are not as they were written; False for ones that were changed on purpose.

    Returns:
        The :class:`peft.PeftModel`, in evaluation mode. ``model.routed`` is its
        :class:`~lightning_cl.routing.RoutedForward`: ``model.routed.last`` tells the routes of the last call, and
        ``model.routed.detach()`` ends the routing.

    Raises:
        FileNotFoundError: If the folder lacks the router or an adapter.
        DamagedCheckpointError: If a file is truncated or altered.
        MisconfigurationException: If the model has no such feature layer (with the closest names), adapters already,
            or another width, or if an adapter reaches the feature layer.
    """
    from peft import PeftModel

    router = AnalyticRouter.load(folder, verify)
    if anatomy.has_lora(model):
        raise MisconfigurationException(
            "The model has adapter layers already, so names and layers could collide. Pass the base model without adapters."
        )
    anatomy.get_submodule(model, router.feature_layer)
    adapters = list(dict.fromkeys(c.adapter for c in router.classes if c.adapter != BASE))
    for adapter in adapters:
        path = Path(folder) / adapter
        if not (path / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"The router sends samples to {adapter!r}, but {str(path)!r} is no PEFT folder. Copy the whole folder that"
                " was exported."
            )
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), adapter_name=adapter)
        else:
            model = PeftModel.from_pretrained(model, str(path), adapter_name=adapter)
    stem = anatomy.name_of(model, model.base_model.model)
    feature_layer = f"{stem}.{router.feature_layer}"
    bank = AdapterBank(model, feature_layer, template=False)
    routed = RoutedForward(model, feature_layer, bank)
    routed.router = AnalyticRouter(
        feature_layer, router.expansion, router.classes, router.weight, router.seen, router.min_margin
    )
    model.eval()
    bank.offload()
    object.__setattr__(model, "routed", routed.attach())
    return model
