# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files that are written whole or not at all, carry their own checksum and never run code when read."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from torch import Tensor

# A torch file is a zip archive; the checksum stands in the archive's comment, so the file stays a valid torch file.
_MAGIC = b"lightning-cl sha256:"
_TRAILER = len(_MAGIC) + 64
_END_OF_ARCHIVE = b"PK\x05\x06"
_NUMPY = "__lightning_cl_numpy__"
_BYTES = "__lightning_cl_bytes__"
_BLOCK = 1 << 22
_END = 22  # bytes of a zip archive's end record without its comment
_AHEAD = 1 << 25


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is truncated or altered; nothing of it was loaded."""


def save_file(value: Any, path: str | os.PathLike[str]) -> None:
    """Write ``value`` as a torch file with a checksum, atomically: a kill leaves the old file or the new one.

    Args:
        value: anything that ``torch.load(weights_only=True)`` can read back (see :func:`to_safe`).
        path: a local path; its folder is created.

    Raises:
        TypeError: if a part of ``value`` could only be read back by running code.
        OSError: with what to do about it, if the disk is full or the folder is read-only. The old file is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"x": torch.arange(3)}, f"{folder}/a.ckpt")
    ...     load_file(f"{folder}/a.ckpt")["x"]
    tensor([0, 1, 2])
    """
    check_safe(value)

    def write(file: BinaryIO) -> None:
        torch.save(value, file)

    write_atomically(path, write, checksum=True)


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], checksum: bool = False) -> None:
    """Write a file through a temporary one beside it, with fsync of the file and of its folder.

    Args:
        path: the final path.
        write: writes the contents to the open binary file.
        checksum: put the sha256 of the (zip) contents into the archive's comment.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            if checksum:
                # Read at a place of its own (`os.pread` is not there on Windows), and never ahead of what is final.
                with open(temporary, "rb", buffering=0) as reader, _Summed(file, reader, target) as summed:
                    write(summed)  # type: ignore[arg-type]
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(error, RuntimeError) and number is None and "write" not in str(error).lower():
            raise
        raise OSError(
            number,
            f"Could not write {target} ({error}). What stood there before is untouched, and no partial file is left."
            " Free space on the disk or make the folder writable, or give another folder (`dirpath` of"
            " `ModelCheckpoint`, `default_root_dir` of the Trainer).",
        ) from error
    finally:
        # Where the folder is no folder, removing fails too and must not hide why writing did.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def aside(old: Path | None) -> Iterator[None]:
    """Keep a checkpoint of the other kind (file or folder) beside the new one's place until that is written.

    Args:
        old: what is to be replaced, or None for nothing.
    """
    if old is None:
        yield
        return
    kept = old.with_name(f".{old.name}.replaced")
    os.replace(old, kept)
    try:
        yield
    except BaseException:
        if not old.exists():
            os.replace(kept, old)
        raise
    if kept.is_dir():
        shutil.rmtree(kept)
    else:
        kept.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_file(path: str | os.PathLike[str], mmap: bool = True, verify: bool = True) -> Any:
    """Read a torch file after checking its checksum; only tensors and plain values are built, never code run.

    Args:
        path: a file of :func:`save_file`, or any torch file (then there is no checksum to check).
        mmap: leave tensors on disk until they are used.
        verify: read the whole file once for its checksum; False for a look at what is checked before it is used.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedCheckpointError: if the file is truncated or altered.
        TypeError: if the file holds objects that only running code could rebuild.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    has_checksum = verify and verify_file(path)
    try:
        return from_safe(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise TypeError(
                f"The checkpoint {path} holds objects that can only be rebuilt by running code from the file, which is"
                f" never done here ({_first_line(error)}). If you trust the file, load it with"
                " `torch.load(path, weights_only=False)` yourself and save the weights anew."
            ) from error
        if has_checksum:
            raise
        raise DamagedCheckpointError(_damaged(path, _first_line(error))) from error


def verify_file(path: str | os.PathLike[str]) -> bool:
    """Check a file's own checksum.

    Returns:
        Whether it carries one (a file of stock Lightning does not).

    Raises:
        DamagedCheckpointError: if the contents do not fit the checksum, or the file is cut short.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < 22 + 4:
            raise DamagedCheckpointError(_damaged(path, f"{size} bytes are too few for a checkpoint"))
        start = file.read(4)
        file.seek(max(0, size - _TRAILER))
        trailer = file.read()
        if not trailer.startswith(_MAGIC):
            # Our files have a comment, stock ones none: a zip file without its end was cut.
            file.seek(max(0, size - 22))
            if start[:2] == b"PK" and not file.read(4) == _END_OF_ARCHIVE:
                raise DamagedCheckpointError(_damaged(path, "its end is missing"))
            if _MAGIC[:12] in trailer:
                raise DamagedCheckpointError(_damaged(path, "its checksum is damaged"))
            return False
        file.seek(0)
        found = _digest(file, size - _TRAILER)
    expected = trailer[len(_MAGIC) :].decode("ascii", errors="replace")
    if found != expected:
        raise DamagedCheckpointError(_damaged(path, f"sha256 {found[:12]} instead of {expected[:12]}"))
    return True


def file_digest(path: Path) -> str:
    """The sha256 of a whole file."""
    with open(path, "rb") as file:
        return _digest(file, path.stat().st_size)


def to_safe(value: Any) -> Any:
    """Copy nested containers into types that ``torch.load(weights_only=True)`` reads, tensors and numbers unchanged.

    NumPy arrays and bytes become tagged tensors, NumPy numbers and enumerations plain ones, paths strings.

    >>> from pathlib import Path
    >>> to_safe({"folder": Path("a/b"), "order": deque([1, 2])})
    {'folder': 'a/b', 'order': [1, 2]}
    """
    if isinstance(value, bytes | bytearray):
        return {_BYTES: torch.tensor(list(value), dtype=torch.uint8)}
    if isinstance(value, Tensor | str | bool | int | float | complex | type(None)):
        if isinstance(value, Enum):
            return value.value
        return value
    if isinstance(value, Mapping):
        items = {to_safe(k) if isinstance(k, Enum) else k: to_safe(v) for k, v in value.items()}
        return OrderedDict(items) if type(value) is OrderedDict else items
    if isinstance(value, tuple):
        # A named tuple would need its class to be read back; its fields are what matters.
        return value if isinstance(value, torch.Size) else tuple(to_safe(v) for v in value)
    if isinstance(value, list | deque):
        return [to_safe(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy":
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            return value.item()
        if getattr(value, "dtype", None) is not None and value.dtype.kind in "biufc":
            return {_NUMPY: torch.from_numpy(value.copy()) if value.flags.writeable else torch.tensor(value)}
    return value


def from_safe(value: Any) -> Any:
    """Undo the tags of :func:`to_safe`."""
    if isinstance(value, dict):
        if value.keys() == {_NUMPY}:
            return value[_NUMPY].numpy().copy()
        if value.keys() == {_BYTES}:
            return value[_BYTES].numpy().tobytes()
        for key in value:
            value[key] = from_safe(value[key])
        return value
    if type(value) is tuple:
        return tuple(from_safe(v) for v in value)
    if type(value) is list:
        return [from_safe(v) for v in value]
    return value


def check_safe(value: Any) -> None:
    """Refuse values that ``torch.load(weights_only=True)`` would refuse later.

    Raises:
        TypeError: naming the entry and its type.
    """
    if _readable(_without_tensors(value)):
        return
    where, kind = _first_unreadable(_without_tensors(value), "checkpoint")
    raise TypeError(
        f"`{where}` is a `{kind}`, which a checkpoint could give back only by running code from the file. Keep tensors,"
        " numbers, strings, lists and dicts in `state_dict`, or leave the entry out"
        " (`save_hyperparameters(ignore=[...])`)."
    )


def drop_unsafe(value: dict[str, Any]) -> list[str]:
    """Remove the entries of a dict that cannot be read back safely.

    Returns:
        Their names.
    """
    names = [key for key, entry in value.items() if not _readable(_without_tensors(entry))]
    for name in names:
        del value[name]
    return names


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if type(value) in (Tensor, torch.nn.Parameter) else _Opaque(type(value).__name__)
    if isinstance(value, dict):
        plain = {key: _without_tensors(v) for key, v in value.items()}
        return OrderedDict(plain) if type(value) is OrderedDict else plain
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(v) for v in value)
    return value


class _Opaque:
    """Stands for a tensor subclass, which cannot be read back."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _readable(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        return False
    return True


def _first_unreadable(value: Any, where: str) -> tuple[str, str]:
    children: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        children = [(f"{where}.{key}", v) for key, v in value.items()]
    elif isinstance(value, list | tuple):
        children = [(f"{where}[{i}]", v) for i, v in enumerate(value)]
    for name, child in children:
        if not _readable(child):
            return _first_unreadable(child, name)
    return where, value.kind if isinstance(value, _Opaque) else type(value).__name__


class _Summed:
    """A zip archive on its way into a file, with its sha256 put into its comment at the end.

    One thread sums, another brings to the disk what is written already, so that neither comes on top of the writing.
    """

    def __init__(self, file: BinaryIO, reader: io.FileIO, path: Path) -> None:
        self._file, self._reader, self._path = file, reader, path
        self._size = self._handed = self._summed = 0
        self._digest = hashlib.sha256()
        self._summing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")
        self._syncing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fsync")
        self._parts: list[Future[None]] = []

    def __enter__(self) -> _Summed:
        return self

    def write(self, data: Any) -> int:
        """Append; only that, since what was summed must not change."""
        self._size += (written := self._file.write(data))
        # The end may still get its comment.
        if self._size - _END - self._handed >= _AHEAD:
            self._hand_over(self._size - _END)
        return written

    def flush(self) -> None:
        """Part of what makes a file."""
        self._file.flush()

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for thread in (self._summing, self._syncing):
                thread.shutdown(cancel_futures=True)

    def _finish(self) -> None:
        file, size = self._file, self._size
        file.seek(max(0, size - _END))
        if file.read(4) != _END_OF_ARCHIVE:
            raise RuntimeError(f"{self._path}: torch wrote a file with an end that is not a zip archive's")
        # The length of the comment comes first, since it belongs to what is summed.
        file.seek(size - 2)
        file.write(struct.pack("<H", _TRAILER))
        self._hand_over(size)
        for part in self._parts:
            part.result()
        file.seek(size)
        file.write(_MAGIC + self._digest.hexdigest().encode())

    def _hand_over(self, end: int) -> None:
        self._file.flush()
        self._handed = end
        self._parts.append(self._summing.submit(self._sum, end))
        self._parts.append(self._syncing.submit(os.fsync, self._file.fileno()))

    def _sum(self, end: int) -> None:
        while self._summed < end:
            block = self._reader.read(min(_BLOCK, end - self._summed))
            self._digest.update(block)
            self._summed += len(block)


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    left = size
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> str:
    return (
        f"The checkpoint {path} is damaged: {why}. Nothing of it was loaded. Resume from an older checkpoint, or remove"
        ' this file and pass `ckpt_path="last"`.'
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
