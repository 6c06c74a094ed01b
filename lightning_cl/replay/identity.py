# SPDX-License-Identifier: Apache-2.0
"""What rows and weights are, in a hash: by it a reference knows what it was taken of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl import anatomy, weights
from lightning_cl.functional.fingerprint import tensor_fingerprint
from lightning_cl.replay.rows import Row


def row_key(row: Row) -> str:
    """The row's id as ``step.replay.ids`` shows it."""
    return f"{row.source}:{row.id}"


def rows_digest(rows: Sequence[Row]) -> str:
    """A hash of ids and inputs of all rows, in order: what the network would read, whatever made it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row).encode())
        for path, value in sorted(row.content.items()):
            if path == "labels":
                continue
            digest.update(path.encode())
            if isinstance(value, Tensor):
                digest.update(str((value.dtype, tuple(value.shape))).encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def weights_fingerprint(module: nn.Module, adapters: bool = True) -> str:
    """A hash of every bit of a network's parameters and persistent buffers, independent of how they are sharded.

    Args:
        module: the network.
        adapters: whether PEFT adapter weights count. Without them, a LoRA model has its base's fingerprint.

    Returns:
        64 hexadecimal digits. Collective for a sharded module.
    """
    skipped: set[int] = set()
    for layer in anatomy.adapter_layers(module):
        base = {id(p) for p in layer.get_base_layer().parameters()}
        skipped |= {id(p) for p in layer.parameters() if id(p) not in base}
    if adapters:
        skipped.clear()
    sharded = weights.is_sharded(module)
    names, marks = [], []
    for name, tensor in _persistent(module):
        if id(tensor) in skipped:
            continue
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if sharded and whole is tensor and isinstance(tensor, nn.Parameter):
            whole = weights.gather(module, {name: weights.local(tensor)}, {name: tensor}, everywhere=True)[name]
        shape = tuple(whole.shape)
        names.append(f"{weights.clean_name(name).replace('_orig_mod.', '').replace('base_layer.', '')}{shape}")
        marks.append(tensor_fingerprint(whole))
    # one transfer for all of them
    device = marks[0].device if marks else torch.device("cpu")
    values = torch.stack([mark.to(device) for mark in marks]).tolist() if marks else []
    text = ";".join(sorted(f"{name}={value}" for name, value in zip(names, values, strict=True)))
    return hashlib.sha256(text.encode()).hexdigest()


def _persistent(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=True)
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
