# SPDX-License-Identifier: Apache-2.0
"""What is known of a module's PEFT adapters: their configurations, and the names of their weights in PEFT's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.anatomy import name_of, peft_model, pretrained_model
from lightning_cl.weights import clean_name

_PREFIX = "base_model.model."


def describe(module: nn.Module) -> dict[str, Any]:
    """Plain values from which a checkpoint can be exported without the module.

    Returns:
        ``prefix`` (where the network lies in the module), ``base`` (its name or path), and ``configs`` (each adapter's
        PEFT configuration).
    """
    peft = peft_model(module)
    network = peft if peft is not None else pretrained_model(module)
    if network is None:
        return {"prefix": "", "base": None, "configs": {}}
    prefix = clean_name(f"{name_of(module, network)}.").lstrip(".")
    configs = {} if peft is None else {name: _plain(config) for name, config in peft.peft_config.items()}
    config = getattr(network, "config", None)
    base = getattr(config, "_name_or_path", None) or (config.get("_name_or_path") if isinstance(config, dict) else None)
    return {"prefix": prefix, "base": base or None, "configs": configs}


def split(
    weights: Mapping[str, Tensor], prefix: str, adapter: str, adapters: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort a module's trained weights for export.

    Args:
        weights: whole tensors by their name in the LightningModule.
        prefix: where the network lies in it, with its dot.
        adapter: the adapter that is wanted.
        adapters: all adapters' names (as keys).

    Returns:
        The adapter's tensors as PEFT names them in a file, and the other trained weights by their name in the base
        model. Weights of other adapters, and those outside of the network, are in neither.
    """
    mine: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split(".")
        found = next((a for a in adapters if a in parts and _is_adapter_weight(parts, a)), None)
        if found == adapter:
            mine[_peft_name(parts, adapter)] = tensor
        elif found is None and not any("original_module" in part for part in parts):
            base = ".".join(part for part in parts if part != "base_layer")
            rest[base.removeprefix(_PREFIX) if adapters else base] = tensor
    return mine, rest


def config_of(description: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        MisconfigurationException: if there is no such adapter.
    """
    configs = description["configs"]
    if adapter not in configs:
        there = ", ".join(configs) or "none: it was trained without PEFT"
        raise MisconfigurationException(
            f"There is no adapter {adapter!r} to export (adapters: {there}). Pass one of these as `adapter_name`"
            " (`--adapter`), or merge (`--merge`) to write whole weights."
        )
    return configs[adapter]


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _is_adapter_weight(parts: list[str], adapter: str) -> bool:
    before = parts[parts.index(adapter) - 1]
    return before.startswith("lora_") or before in ("modules_to_save", "trainable_tokens_delta")


def _peft_name(parts: list[str], adapter: str) -> str:
    at = parts.index(adapter)
    kept = parts[:at] + parts[at + 1 :]
    if "modules_to_save" in kept:
        kept.remove("modules_to_save")
    if "lora_magnitude_vector" in kept and kept[-1] == "weight":
        kept.pop()
    return ".".join(kept)
