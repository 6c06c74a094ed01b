# SPDX-License-Identifier: Apache-2.0
"""Reference activations of a fixed set of rows: packed states by row, in memory or in one memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

# File layout: magic, length of the header (8 bytes, little endian), sha256 of the header (32 bytes), header (JSON),
# zeros up to a multiple of 64, then the blob: for each layer its thresholds and its rows, each part at a multiple of 64.
_MAGIC = b"CLSTATE1"
_PREFIX = len(_MAGIC) + 8 + 32
_ALIGN = 64
# Hashed in pieces of this size by several threads: one thread would take longer than the forward passes that it guards.
_PIECE = 1 << 24

_DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}


class StoreError(MisconfigurationException):
    """A store that cannot be used as it is: damaged, or made for something else."""


class LayerShape(NamedTuple):
    """What is kept of one layer: ``width`` entries of ``dtype`` a token, of ``dim`` hidden dimensions."""

    dtype: torch.dtype
    width: int
    dim: int


@dataclass(frozen=True)
class LayerStates:
    """What the store holds of one layer.

    Attributes:
        rows: ``[tokens of all rows, W]``: 2-bit states, four a byte (uint8), or activations (bfloat16).
        thresholds: ``[2, D]`` float32, lower and upper.
    """

    rows: Tensor
    thresholds: Tensor


class StateStore:
    """Reference states of a fixed set of rows, with a manifest that says of what they are the states.

    Build one with :meth:`build`, keep it in memory or :meth:`write` it and :meth:`open` the file. Opening maps the file
    and verifies every byte of it against the hashes that it carries.

    Attributes:
        manifest: what the states belong to, as plain values: weights, tokenizer, rows, layers, num_std, dtype, versions.
        layers: :class:`LayerStates` by layer name.
        digest: sha256 of header and blob; equal stores have equal digests.

    Example:
        >>> states = {"norm": LayerStates(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(2, 5))}
        >>> store = StateStore.build({"layers": ["norm"]}, {"a": 1, "b": 2}, states)
        >>> store.tokens("b"), store.batch("norm", ["b", "a"], width=4).shape
        (2, torch.Size([2, 4, 2]))
    """

    def __init__(self, header: dict[str, Any], blob: Tensor) -> None:
        self._header = header
        self._blob = blob
        self.manifest: dict[str, Any] = header["manifest"]
        self._place: dict[str, tuple[int, int]] = {}
        start = 0
        for row, tokens in header["rows"]:
            self._place[row] = (start, tokens)
            start += tokens
        self.layers = {entry["name"]: self._layer(entry, start) for entry in header["layers"]}

    @classmethod
    def empty(
        cls, manifest: Mapping[str, Any], tokens: Mapping[str, int], layers: Mapping[str, LayerShape]
    ) -> StateStore:
        """A store in memory to be filled: write into its :attr:`layers`, then :meth:`seal` it.

        Args:
            manifest: plain values (JSON) that say what the states belong to.
            tokens: number of tokens of each row, by row id, in the order in which the layers hold them.
            layers: what is kept, by layer name.

        Raises:
            ValueError: for a dtype that is not stored.
        """
        total = sum(tokens.values())
        entries: list[dict[str, Any]] = []
        end = 0
        for name, shape in layers.items():
            dtype = str(shape.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise ValueError(f"Layer {name!r} has states {dtype}, and a store holds one of {list(_DTYPES)}.")
            rows_at = end + _aligned(8 * shape.dim)
            entries.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "width": shape.width,
                    "dim": shape.dim,
                    "thresholds_at": end,
                    "rows_at": rows_at,
                }
            )
            end = rows_at + _aligned(total * shape.width * shape.dtype.itemsize)
        header = {
            "manifest": dict(manifest),
            "rows": [[row, count] for row, count in tokens.items()],
            "layers": entries,
            "bytes": end,
            "sha256": "",
        }
        # Through JSON and back, so that a store in memory and one from a file compare equal. Written to, so that the
        # system has found its pages before the states come.
        return cls(json.loads(json.dumps(header)), torch.empty(end, dtype=torch.uint8).zero_())

    def seal(self) -> StateStore:
        """Hash what was written; from here on the store is never changed."""
        self._header["sha256"] = _sha256(self._blob)
        return self

    @classmethod
    def build(
        cls, manifest: Mapping[str, Any], tokens: Mapping[str, int], layers: Mapping[str, LayerStates]
    ) -> StateStore:
        """A store in memory of states that are there already; arguments as those of :meth:`empty`.

        Raises:
            ValueError: If a layer has another number of tokens than the rows, or a dtype that is not stored.
        """
        total = sum(tokens.values())
        for name, states in layers.items():
            if len(states.rows) != total:
                raise ValueError(
                    f"Layer {name!r} has states of {len(states.rows)} tokens, the rows have {total}. Give one entry a"
                    " token."
                )
        shapes = {n: LayerShape(s.rows.dtype, s.rows.shape[1], s.thresholds.shape[1]) for n, s in layers.items()}
        store = cls.empty(manifest, tokens, shapes)
        for name, states in layers.items():
            store.layers[name].rows.copy_(states.rows)
            store.layers[name].thresholds.copy_(states.thresholds)
        return store.seal()

    @property
    def digest(self) -> str:
        """Content hash: the header carries the blob's."""
        return hashlib.sha256(_dump(self._header)).hexdigest()

    @property
    def rows(self) -> list[str]:
        """Ids of the rows, in order."""
        return list(self._place)

    def __contains__(self, row: str) -> bool:
        return row in self._place

    def tokens(self, row: str) -> int:
        """Number of tokens of a row when its states were taken."""
        return self._place[row][1]

    def put(self, layer: str, row: str, states: Tensor) -> None:
        """Write a row's states, ``[tokens, W]`` on the CPU, before the store is sealed."""
        start, tokens = self._place[row]
        _bytes(self.layers[layer].rows)[start : start + tokens] = _bytes(states)

    def batch(self, layer: str, rows: Sequence[str], width: int, pin_memory: bool = False) -> Tensor:
        """The states of some rows as they lie in a padded batch: ``[R, width, W]``, on the CPU, zero at the padding.

        Args:
            layer: name of the layer.
            rows: row ids.
            width: tokens of each row in the batch, at least as many as it has here.
            pin_memory: for a copy to a GPU that nothing waits for.
        """
        stored = self.layers[layer].rows
        out = torch.empty(len(rows), width, stored.shape[1], dtype=stored.dtype, pin_memory=pin_memory)
        to, origin = _bytes(out), _bytes(stored)
        for i, row in enumerate(rows):
            start, tokens = self._place[row]
            to[i, :tokens] = origin[start : start + tokens]
            to[i, tokens:] = 0
        return out

    def nbytes(self) -> int:
        """Size of thresholds and states in bytes."""
        return len(self._blob)

    def require(self, expected: Mapping[str, Any], remedy: str) -> None:
        """Refuse to serve anything but what the states were taken of.

        Args:
            expected: manifest entries of this run; entries that it does not name are not compared.
            remedy: how to go on, for the message.

        Raises:
            StoreError: with every entry that differs.
        """
        wanted = json.loads(json.dumps(dict(expected)))
        different = [
            f"{key}: stored {_short(self.manifest.get(key))}, this run {_short(value)}"
            for key, value in wanted.items()
            if self.manifest.get(key) != value
        ]
        if different:
            raise StoreError(
                f"The stored activation states belong to something else ({'; '.join(different)}), and a loss against"
                f" them would hold the model to the wrong reference. {remedy}"
            )

    def write(self, path: str | Path) -> None:
        """Write one file, all or nothing: a kill at any moment leaves what was at ``path`` before, or the new file.

        Raises:
            OSError: if the disk is full or not writable; what was at ``path`` is still there.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = _dump(self._header)
        temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
                file.write(bytes(-file.tell() % _ALIGN))
                file.write(self._blob.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> StateStore:
        """Map a file that :meth:`write` made.

        Raises:
            FileNotFoundError: if there is none.
            StoreError: if it is truncated, altered or no such file, with what is wrong and how to rebuild it.
        """
        path = Path(path)
        # Everything through one open file: another process may put a new one in its place at any moment.
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_PREFIX)
            if prefix[: len(_MAGIC)] != _MAGIC:
                raise _damaged(path, f"it does not begin with {_MAGIC!r}")
            length = int.from_bytes(prefix[len(_MAGIC) : len(_MAGIC) + 8], "little")
            text = file.read(min(length, size))
            if hashlib.sha256(text).digest() != prefix[-32:]:
                raise _damaged(path, "its header does not match its hash")
            header = json.loads(text)
            start = _PREFIX + length + -(_PREFIX + length) % _ALIGN
            if size != start + header["bytes"]:
                raise _damaged(path, f"it has {size} bytes instead of {start + header['bytes']}")
            # A private mapping: pages are read when a row is needed.
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        blob = torch.frombuffer(mapped, dtype=torch.uint8)[start:]
        if _sha256(blob) != header["sha256"]:
            raise _damaged(path, "its states do not match their hash")
        return cls(header, blob)

    def state_dict(self) -> dict[str, Any]:
        """The whole store as plain values and one uint8 tensor."""
        return {"header": json.dumps(self._header), "blob": self._blob}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StateStore:
        """A store in memory from :meth:`state_dict`."""
        return cls(json.loads(state["header"]), state["blob"])

    def _layer(self, entry: Mapping[str, Any], tokens: int) -> LayerStates:
        dtype = _DTYPES[entry["dtype"]]
        size = tokens * entry["width"] * dtype.itemsize
        rows = self._blob[entry["rows_at"] :][:size].view(dtype).view(tokens, entry["width"])
        thresholds = self._blob[entry["thresholds_at"] :][: 8 * entry["dim"]].view(torch.float32)
        return LayerStates(rows, thresholds.view(2, entry["dim"]))


def _bytes(tensor: Tensor) -> Any:
    """The tensor as bytes in NumPy, which copies in the calling thread.

    PyTorch would divide each small copy among all threads, and waits tens of milliseconds for them on a busy host, in the
    middle of a step.
    """
    return tensor.view(torch.uint8).numpy()


def _aligned(size: int) -> int:
    return size + -size % _ALIGN


def _sha256(data: Tensor) -> str:
    def piece(start: int) -> bytes:
        return hashlib.sha256(data[start : start + _PIECE].numpy().data).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, len(data), _PIECE)))).hexdigest()


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path} is no intact store of activation states: {what}. Delete it, and the states are collected again at the"
        " start of the next run from the reference model; or copy the file anew."
    )
