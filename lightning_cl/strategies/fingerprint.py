# SPDX-License-Identifier: Apache-2.0
"""A short digest of a frozen base, so that a checkpoint without the base can tell whether it meets the right one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.strategies.record import named_parameters, record_of, saved_names

# 1,024 values spread over a tensor: a base that was trained, even a little, differs in nearly all of its values.
_SAMPLES = 1024


def tensor_digest(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits for a tensor's shape and 1,024 values spread over it, rounded to bfloat16.

    Rounding makes a float32 model and the same model in bfloat16 agree.

    >>> tensor_digest(torch.ones(3)) == tensor_digest(torch.ones(3, dtype=torch.bfloat16))
    True
    >>> tensor_digest(torch.ones(3)) == tensor_digest(torch.ones(4))
    False
    """
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    sample = flat[::step].to(device="cpu")
    if sample.is_floating_point():
        # -0.0 and 0.0 are equal numbers; NaN patterns of packed 4-bit storage must not be normalised, so no arithmetic.
        sample = sample.to(torch.bfloat16).view(torch.int16)
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(module: nn.Module) -> dict[str, str]:
    """Digest of each parameter of the base (what a checkpoint leaves out), by name.

    It is taken once, from the full-precision values, before the first strategy quantizes or shards the module.

    Returns:
        ``{name: digest}``; empty when everything trains.
    """
    record = record_of(module)
    if record.fingerprint is None:
        kept = set(saved_names(module))
        record.fingerprint = {
            name: tensor_digest(p) for name, p in named_parameters(module).items() if name not in kept and not p.is_meta
        }
    return {name: digest for name, digest in record.fingerprint.items() if name not in record.trained}


def summary(fingerprint: Mapping[str, str]) -> str:
    """One short digest of a whole fingerprint, as messages show it.

    >>> summary({})
    'none'
    """
    if not fingerprint:
        return "none"
    return hashlib.sha256("".join(f"{k}={v};" for k, v in sorted(fingerprint.items())).encode()).hexdigest()[:12]


def check_base(module: nn.Module, expected: Mapping[str, str], path: str) -> None:
    """Refuse a checkpoint whose adapter weights were trained on another base.

    Raises:
        MisconfigurationException: with both fingerprints and the first differing parameters.
    """
    found = base_fingerprint(module)
    common = expected.keys() & found.keys()
    different = sorted(name for name in common if expected[name] != found[name])
    missing = sorted(expected.keys() - found.keys() - record_of(module).trained - set(saved_names(module)))
    if different or missing:
        shown = ", ".join((different or missing)[:3])
        what = "differ in value" if different else "are missing from the model"
        raise MisconfigurationException(
            f"The checkpoint {path} was trained on another base: its fingerprint is {summary(expected)}, this model's is"
            f" {summary(found)} ({len(different or missing)} of {len(expected)} base parameters {what}: {shown}). Its"
            " adapter weights mean nothing on this base. Load the base that the run started from, or pass"
            " `check_base=False` to the strategy if the difference is intended."
        )
