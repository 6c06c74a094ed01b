# SPDX-License-Identifier: Apache-2.0
"""Whether two sources hold the same rows, told from a few of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cl.stream.loader import is_iterable

_ROWS = 16


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Number of rows (None for a stream without length) and a hash of up to 16 rows spread over the source.

    Rows that change from one reading to the next (random augmentation) and streams are known by their number alone.

    Example:
        >>> fingerprint([1, 2, 3]) == fingerprint([1, 2, 3]), fingerprint([1, 2, 3]) == fingerprint([1, 2, 4])
        (True, False)
    """
    rows = sized_len(dataset)
    if is_iterable(dataset) or not rows:
        return {"rows": rows, "content": None}
    with isolate_rng():
        picks = sorted({round(i * (rows - 1) / max(1, _ROWS - 1)) for i in range(_ROWS)})
        first, again = (_digest([dataset[i] for i in picks]) for _ in range(2))
    return {"rows": rows, "content": first if first == again else None}


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two fingerprints, in words, or None."""
    if saved["rows"] != now["rows"]:
        return f"{saved['rows']} rows in the checkpoint, {now['rows']} now"
    if None not in (saved["content"], now["content"]) and saved["content"] != now["content"]:
        return f"{now['rows']} rows as in the checkpoint, but with other content"
    return None


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    # Every value is preceded by its kind and size, so that no two structures give the same bytes.
    if isinstance(value, Mapping):
        digest.update(f"map {len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"tensor {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (str, bytes, int, float, bool, complex, np.generic)) or value is None:
        data = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{type(value).__name__} {len(data)};".encode())
        digest.update(data)
    else:
        # An object of the user's may print its address: its class is all that is stable.
        digest.update(f"object {type(value).__qualname__};".encode())
