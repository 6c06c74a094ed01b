# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.strategies.checkpoint import AtomicCheckpointIO


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Holds a step only while the checkpoint's tensors are copied to host memory; a thread writes the file.

    Files and guarantees are those of :class:`AtomicCheckpointIO`. What is removed waits its turn behind what is written:
    a kill at any moment leaves the new checkpoint or the one that it replaces. (Lightning's ``AsyncCheckpointIO``
    removes at once, and a kill while the first file is being written leaves none.) One file at a time: a save waits for
    the one before, so host memory holds one copy of a checkpoint, which the next one overwrites. The end of a fit waits
    for all of them, and a write that failed is raised by the next save or that end.

    Example:
        >>> import tempfile
        >>> io = BackgroundCheckpointIO()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weight = torch.ones(2)
        ...     io.save_checkpoint({"state_dict": {"w": weight}}, f"{folder}/a.ckpt")
        ...     _ = weight.zero_()
        ...     io.load_checkpoint(f"{folder}/a.ckpt")["state_dict"]["w"]
        tensor([1., 1.])

    YAML::

        trainer:
          strategy:
            class_path: lightning_cl.strategies.CLSingleDeviceStrategy
            init_args:
              checkpoint_io: {class_path: lightning_cl.strategies.BackgroundCheckpointIO}
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._memory = _HostMemory()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy the checkpoint and have it written.

        Raises:
            TypeError: if an entry could not be read back safely.
            OSError: if the disk was full or read-only in the write before.
        """
        self.wait()
        self._submit(self._write, self._memory.copy(self._checked(checkpoint, path, storage_options)), path)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint once everything is written."""
        self.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint after everything before it is written; not at all if that failed."""
        self._submit(super().remove_checkpoint, path)

    @override
    def teardown(self) -> None:
        """Wait for everything to be written."""
        try:
            self.wait()
        finally:
            self._memory = _HostMemory()
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def wait(self) -> None:
        """Return when everything is written and removed.

        Raises:
            OSError: if a write failed.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _submit(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        earlier = list(self._pending)

        def run() -> None:
            if all(future.exception() is None for future in earlier):
                call(*arguments)

        self._pending.append(self._thread.submit(run))


class _HostMemory:
    """Copies of a checkpoint's tensors, which training cannot change any more, in the memory of the copies before.

    In fresh memory the copy would cost several times as much, since the system clears each page at its first touch. A
    GPU's tensors go to pinned memory, as a transfer at full speed must.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, list[Tensor]] = {}

    def copy(self, value: Any) -> Any:
        """The value with every tensor copied, each once; what the copies before held is gone."""
        free, self._kept = self._kept, {}
        copies: dict[int, Tensor] = {}

        def put(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided:
                return tensor.detach().to("cpu", copy=True)
            kind = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cuda
            fitting = free.get(kind)
            buffer = fitting.pop() if fitting else torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept.setdefault(kind, []).append(buffer)
            return buffer.copy_(tensor, non_blocking=True)

        def copy(part: Any) -> Any:
            if isinstance(part, Tensor):
                if id(part) not in copies:
                    copies[id(part)] = put(part)
                return copies[id(part)]
            if isinstance(part, dict):
                return type(part)((key, copy(entry)) for key, entry in part.items())
            if type(part) in (list, tuple):
                return type(part)(copy(entry) for entry in part)
            return part

        with torch.inference_mode(False), torch.no_grad():
            copied = copy(value)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copied
