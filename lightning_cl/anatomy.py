# SPDX-License-Identifier: Apache-2.0
"""Find the parts of a network that the methods need: backbone, final norm, blocks, head, adapters."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

# Hugging Face config fields that change the logits after the head, with what the family does with them.
_SOFT_CAP = "final_logit_softcapping"  # Gemma 2 and 3: cap * tanh(logits / cap)
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
#: What Hugging Face models call the keys and values of earlier tokens, in the versions that are supported.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def _instances(module: nn.Module, library: str, class_path: str) -> list[nn.Module]:
    # If nobody has imported the library, no module can be an instance of its classes: asking must not import it.
    if library not in sys.modules:
        return []
    import importlib

    package, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(package), name)
    return [m for m in module.modules() if isinstance(m, cls)]


def pretrained_model(module: nn.Module) -> Any | None:
    """The outermost Hugging Face model inside ``module``, or None."""
    found = _instances(module, "transformers", "transformers.modeling_utils.PreTrainedModel")
    return found[0] if found else None


def peft_model(module: nn.Module) -> Any | None:
    """The outermost :class:`peft.PeftModel` inside ``module``, or None."""
    found = _instances(module, "peft", "peft.PeftModel")
    return found[0] if found else None


def adapter_layers(module: nn.Module) -> list[Any]:
    """All PEFT adapter layers inside ``module`` (also those of a model that PEFT changed in place)."""
    return _instances(module, "peft", "peft.tuners.tuners_utils.BaseTunerLayer")


def has_lora(module: nn.Module) -> bool:
    """Whether ``module`` holds any PEFT adapter layer."""
    return bool(adapter_layers(module))


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name (a PEFT model is asked for what it wraps)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters


def cache_name(model: Any) -> str:
    """What the model's family and the installed transformers call the keys and values of earlier tokens."""
    return "cache" if accepts(model, "cache") else "past_key_values"


def name_of(module: nn.Module, part: nn.Module) -> str:
    """The dotted name of ``part`` inside ``module`` (the empty string for ``module`` itself)."""
    for name, candidate in module.named_modules():
        if candidate is part:
            return name
    raise ValueError(f"{type(part).__name__} is not a submodule of {type(module).__name__}")


def get_submodule(module: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``.

    Raises:
        MisconfigurationException: if there is none, with the closest names that exist.
    """
    names = dict(module.named_modules())
    if name in names:
        return names[name]
    # Users name a layer as they see it in their model; a suffix that fits exactly one module is what they mean.
    ends = [n for n in names if n.endswith(f".{name}")]
    if len(ends) == 1:
        return names[ends[0]]
    close = ends or difflib.get_close_matches(name, names, n=5, cutoff=0.3)
    raise MisconfigurationException(
        f"No submodule is called {name!r} in `{type(module).__name__}`. Closest names: {', '.join(close) or 'none'}."
        " Pass one of the names that `dict(module.named_modules())` lists."
    )


def find_backbone(module: nn.Module, layer: str | None = None) -> tuple[str, nn.Module]:
    """The network whose forward maps inputs to hidden states, without a language-model head where there is one.

    A Hugging Face model gives its backbone (``LlamaForCausalLM`` gives ``LlamaModel``), so that a pass through it
    computes no logits. Any other module gives itself if it defines ``forward``, else its only child with parameters, or
    the one that holds ``layer``.

    Raises:
        MisconfigurationException: if several children could be the network.
    """
    model = pretrained_model(module)
    if model is not None:
        backbone = model.base_model if model.get_output_embeddings() is not None else model
        return name_of(module, backbone), backbone
    if _defines_forward(module):
        return "", module
    children = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
    if len(children) > 1 and layer is not None:
        part = get_submodule(module, layer)
        children = [(n, c) for n, c in children if any(inner is part for inner in c.modules())]
    if len(children) == 1:
        return children[0]
    raise MisconfigurationException(
        f"`{type(module).__name__}` defines no `forward` and has {len(children)} children with parameters"
        f" ({', '.join(n for n, _ in children) or 'none'}), so its network cannot be guessed. Define `forward`, or name"
        " a layer of the network that is meant (`layers=[...]`, `feature_layer=...`)."
    )


def _defines_forward(module: nn.Module) -> bool:
    import lightning.pytorch as pl

    if isinstance(module, pl.LightningModule):
        return is_overridden("forward", module, parent=pl.LightningModule)
    return type(module).forward is not nn.Module.forward


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated blocks (decoder layers) in order.

    Raises:
        MisconfigurationException: if no list of equal blocks exists.
    """
    prefix, backbone = find_backbone(module)
    lists = [
        (name, part)
        for name, part in backbone.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 0 and len({type(block) for block in part}) == 1
    ]
    if not lists:
        raise MisconfigurationException(
            f"`{type(module).__name__}` has no list of equal blocks. Name the layers yourself (`layers=[...]`)."
        )
    # The outermost list is the stack of blocks; lists inside a block (experts, heads) lie deeper.
    depth = min(name.count(".") for name, _ in lists)
    name, blocks = max(((n, b) for n, b in lists if n.count(".") == depth), key=lambda item: len(item[1]))
    stem = f"{prefix}.{name}" if prefix else name
    return [f"{stem}.{i}" for i in range(len(blocks))]


def find_final_norm(module: nn.Module) -> str:
    """Name of the last normalisation of the backbone: what the head reads.

    Raises:
        MisconfigurationException: if the backbone has none outside its blocks.
    """
    prefix, backbone = find_backbone(module)
    inside_lists = [name + "." for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList)]
    norms = [
        name
        for name, part in backbone.named_modules()
        if name and "norm" in type(part).__name__.lower() and not name.startswith(tuple(inside_lists))
    ]
    # Norms of the embeddings come first and the final one last, in every family's order of registration.
    norms = [n for n in norms if "emb" not in n.lower()] or norms
    if not norms:
        raise MisconfigurationException(
            f"`{type(backbone).__name__}` has no final norm. Pass `layers=` with the name of the module to watch."
        )
    return f"{prefix}.{norms[-1]}" if prefix else norms[-1]


def find_head(module: nn.Module) -> tuple[str, nn.Module]:
    """The language-model head: the module with the ``weight`` of shape ``[vocabulary, hidden]``.

    Raises:
        MisconfigurationException: if the model has none.
    """
    model = pretrained_model(module)
    head = model.get_output_embeddings() if model is not None else None
    if head is None:
        kind = type(model).__name__ if model is not None else type(module).__name__
        raise MisconfigurationException(
            f"`{kind}` has no language-model head (`get_output_embeddings()` gives None), which this method needs."
            " Use a causal language model of Hugging Face transformers."
        )
    return name_of(module, head), head


def logit_transform(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What the model family does to the head's output (soft cap, scale), or None for nothing."""
    model = pretrained_model(module)
    if model is None:
        return None
    config = model.config.get_text_config()
    cap = getattr(config, _SOFT_CAP, None)
    scale = 1.0
    for field in _MULTIPLIERS:
        scale *= getattr(config, field, None) or 1.0
    for field in _DIVISORS:
        scale /= getattr(config, field, None) or 1.0
    if cap is None and scale == 1.0:
        return None

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else cap * (logits / cap).tanh()

    return transform
