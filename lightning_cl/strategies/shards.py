# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints: a folder of safetensors, read back into any number of processes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cl.distributed import gather_objects
from lightning_cl.strategies.files import (
    DamagedCheckpointError,
    file_digest,
    load_file,
    save_file,
    sync_folder,
    to_safe,
)

#: Holds everything but the shards, and the index that names them; Lightning's sharded checkpoints have it too.
META = "meta.pt"
_INDEX = "lightning_cl_index"
_TAG = "__lightning_cl_stored__"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a sharded checkpoint, which reads itself, whole or a part, when asked.

    Attributes:
        folder: the checkpoint's folder.
        shape: the whole tensor's shape.
        dtype: its dtype.
        chunks: ``(file, key, offset, shape)`` of each stored part.
    """

    folder: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...]

    def read(self, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """The part of ``shape`` that begins at ``offset``; without arguments the whole tensor."""
        from safetensors import safe_open

        offset = tuple(offset) if offset is not None else (0,) * len(self.shape)
        shape = tuple(shape) if shape is not None else self.shape
        result = torch.empty(shape, dtype=self.dtype)
        for file, key, at, size in self.chunks:
            low = [max(o, a) for o, a in zip(offset, at, strict=True)]
            high = [min(o + s, a + z) for o, s, a, z in zip(offset, shape, at, size, strict=True)]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            source = tuple(slice(lo - a, h - a) for lo, h, a in zip(low, high, at, strict=True))
            target = tuple(slice(lo - o, h - o) for lo, h, o in zip(low, high, offset, strict=True))
            with safe_open(os.path.join(self.folder, file), "pt") as handle:
                part = handle.get_slice(key)
                result[target] = part[source] if source else handle.get_tensor(key)
        return result


def copy_into(target: Any, source: Tensor | StoredTensor) -> None:
    """Copy a whole (or stored) tensor's values into ``target``, of which a DTensor takes its own shard."""
    if not _is_dtensor(target):
        target.copy_(source.read() if isinstance(source, StoredTensor) else source)
        return
    offset, shape = local_part(target)
    local = target.to_local()
    if local.numel() == 0:
        return
    if isinstance(source, StoredTensor):
        local.copy_(source.read(offset, shape))
    else:
        local.copy_(source[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))])


def local_part(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of this rank's part of a DTensor, in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def like(reference: Any, source: Tensor | StoredTensor) -> Tensor:
    """The stored tensor in the form of ``reference``: a DTensor sharded the same way, or a plain one on its device."""
    if not _is_dtensor(reference):
        whole = source.read() if isinstance(source, StoredTensor) else source
        return whole.to(device=reference.device, copy=True)
    from torch.distributed.tensor import DTensor

    offset, shape = local_part(reference)
    if isinstance(source, StoredTensor):
        local = source.read(offset, shape)
    else:
        local = source[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))].clone()
    return DTensor.from_local(
        local.to(reference.to_local().device),
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def save_folder(checkpoint: dict[str, Any], path: str | os.PathLike[str], rank: int) -> None:
    """Write a sharded checkpoint; called by every rank.

    Each rank writes its parts of the DTensors to a safetensors file of its own, under a fresh name; rank 0 then writes
    the rest with the index that names them all. Until that file is replaced the folder is the old checkpoint.

    Args:
        checkpoint: nested plain values, tensors and DTensors (the same structure on all ranks).
        path: the folder.
        rank: this process's global rank.
    """
    from safetensors.torch import save_file as save_tensors

    folder = Path(path)
    token = gather_objects(secrets.token_hex(4))[0]
    name = f"{token}-{rank:05d}.safetensors"
    parts: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    rest = _split(checkpoint, "", parts, entries, name)
    error: str | None = None
    written: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if parts:
            temporary = folder / f".{name}.tmp"
            save_tensors(parts, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
            written[name] = file_digest(folder / name)
    except Exception as caught:
        error = f"rank {rank}: {caught}"
    gathered = gather_objects((entries, written, error))
    failures = [e for _, _, e in gathered if e]
    if not failures and rank == 0:
        try:
            _write_meta(folder, rest, gathered)
        except Exception as caught:
            error = f"rank 0: {caught}"
    failures = [e for e in gather_objects(error) if e] or failures
    if failures:
        for leftover in (folder / name, folder / f".{name}.tmp"):
            leftover.unlink(missing_ok=True)
        raise OSError(
            f"Could not write the sharded checkpoint {folder} ({'; '.join(sorted(set(failures)))}). The checkpoint that"
            " stood there before is untouched. Free space on the disk or make the folder writable, or give another folder."
        )


def load_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a sharded checkpoint after checking every file; sharded tensors come back as :class:`StoredTensor`."""
    meta = verify_folder(path)
    stored = {
        key: StoredTensor(
            str(path),
            tuple(entry["shape"]),
            getattr(torch, entry["dtype"]),
            tuple((c["file"], key, tuple(c["offset"]), tuple(c["shape"])) for c in entry["chunks"]),
        )
        for key, entry in meta.pop(_INDEX)["tensors"].items()
    }
    return _join(meta, stored)


def verify_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every file of a sharded checkpoint: ``meta.pt`` against its own checksum, the shards against its index.

    Returns:
        The contents of ``meta.pt``.
    """
    folder = Path(path)
    if not (folder / META).is_file():
        raise FileNotFoundError(f"{folder} is no sharded checkpoint: it has no {META}.")
    meta = load_file(folder / META)
    if not isinstance(meta, dict) or _INDEX not in meta:
        raise TypeError(
            f"{folder} was not written by `cl_fsdp`: its {META} has no index. A checkpoint of Lightning's"
            " `ModelParallelStrategy` holds pickled code, which is never run here; consolidate it first"
            " (`python -m lightning.pytorch.utilities.consolidate_checkpoint`)."
        )
    for name, digest in meta[_INDEX]["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise DamagedCheckpointError(
                f"The checkpoint {folder} is damaged: {name} is missing, truncated or altered. Nothing was loaded. Resume"
                ' from an older checkpoint, or remove this folder and pass `ckpt_path="last"`.'
            )
    return meta


def _write_meta(folder: Path, rest: dict[str, Any], gathered: list[Any]) -> None:
    files: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for entries, written, _ in gathered:
        files.update(written)
        for key, entry in entries.items():
            known = tensors.setdefault(key, {"shape": entry["shape"], "dtype": entry["dtype"], "chunks": []})
            known["chunks"].extend(entry["chunks"])
    save_file(to_safe({**rest, _INDEX: {"files": files, "tensors": tensors}}), folder / META)
    for old in folder.iterdir():
        if old.name not in files and old.name != META and old.suffix in (".safetensors", ".tmp"):
            old.unlink(missing_ok=True)
    sync_folder(folder)


def _split(value: Any, key: str, parts: dict[str, Tensor], entries: dict[str, dict[str, Any]], file: str) -> Any:
    if _is_dtensor(value):
        entry: dict[str, Any] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "chunks": [],
        }
        entries[key] = entry
        local = value.to_local()
        if local.numel() and _is_first_copy(value):
            offset, shape = local_part(value)
            parts[key] = local.detach().cpu().contiguous()
            entry["chunks"].append({"file": file, "offset": list(offset), "shape": list(shape)})
        return {_TAG: key}
    if isinstance(value, dict):
        return {k: _split(v, f"{key}/{k}", parts, entries, file) for k, v in value.items()}
    if isinstance(value, list):
        return [_split(v, f"{key}/{i}", parts, entries, file) for i, v in enumerate(value)]
    return value


def _join(value: Any, stored: dict[str, StoredTensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TAG}:
            return stored[value[_TAG]]
        return {k: _join(v, stored) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, stored) for v in value]
    return value


def _is_first_copy(tensor: Any) -> bool:
    # Of the copies on a replicating mesh dimension, the first one writes.
    coordinate = tensor.device_mesh.get_coordinate()
    return all(c == 0 or not p.is_replicate() for c, p in zip(coordinate, tensor.placements, strict=True))


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh") and hasattr(value, "placements")
