# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of what training changes: weights that train, persistent buffers, Lightning's state, the base's digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_cl.strategies import shards
from lightning_cl.strategies.adapters import describe
from lightning_cl.strategies.files import (
    DamagedCheckpointError,
    aside,
    check_safe,
    drop_unsafe,
    load_file,
    save_file,
    to_safe,
    verify_file,
)
from lightning_cl.strategies.fingerprint import base_fingerprint, check_base
from lightning_cl.strategies.record import (
    extra_states,
    named_parameters,
    note_trainable,
    persistent_buffers,
    record_of,
    saved_names,
)
from lightning_cl.weights import clean_name

__all__ = ["AtomicCheckpointIO", "DamagedCheckpointError", "load_checkpoint", "verify_checkpoint"]

#: Version of the layout below ``METADATA``; a reader refuses layouts that it does not know.
FORMAT = 1
METADATA = "lightning_cl"
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


class AtomicCheckpointIO(CheckpointIO):
    """Writes one file atomically with a checksum, and reads it back without ever running code from it.

    The file is an ordinary torch file: ``torch.load(path, weights_only=True)`` reads it too. Our strategies use this
    plugin by default; it can be given to any other strategy (``Trainer(plugins=AtomicCheckpointIO())``), and inside
    Lightning's ``AsyncCheckpointIO`` to write in the background.

    Example:
        >>> import tempfile
        >>> io = AtomicCheckpointIO()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, f"{folder}/a.ckpt")
        ...     io.load_checkpoint(f"{folder}/a.ckpt")["state_dict"]["w"]
        tensor([1., 1.])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, a local path, whole or not at all.

        Raises:
            TypeError: if ``storage_options`` is given, or an entry could not be read back safely.
            OSError: if the disk is full or read-only; the old file is untouched.
        """
        self._write(self._checked(checkpoint, path, storage_options), path)

    def _checked(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None) -> dict[str, Any]:
        """The checkpoint as it can be written and read back, or the error that says why it cannot."""
        _refuse_options(storage_options)
        _refuse_remote(path)
        safe: dict[str, Any] = to_safe(checkpoint)
        check_safe(safe)
        return safe

    def _write(self, checkpoint: dict[str, Any], path: Any) -> None:
        with aside(Path(path) if os.path.isdir(path) else None):
            save_file(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint file (with its checksum checked) or a sharded folder; tensors stay on disk until used.

        Args:
            path: a local file or folder.
            map_location: not used: tensors are read to the CPU.
            weights_only: not used: code is never run from a file.
        """
        _refuse_remote(path)
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint file or folder."""
        fs = get_filesystem(path)
        if fs.exists(path):
            fs.rm(str(path), recursive=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of our strategies, one file or a sharded folder.

    Returns:
        The checkpoint as Lightning knows it. In a folder's, large tensors are :class:`~shards.StoredTensor` that read
        themselves when asked.

    Raises:
        FileNotFoundError: if there is none.
        DamagedCheckpointError: if it is truncated or altered.
    """
    checkpoint = shards.load_folder(path) if os.path.isdir(path) else load_file(path)
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(f"The checkpoint {path} holds a {type(checkpoint).__name__}, not a checkpoint.")
    _check_format(checkpoint, path)
    return checkpoint


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Check a checkpoint's checksums without loading it.

    Raises:
        FileNotFoundError: if there is none.
        DamagedCheckpointError: naming the file that is truncated or altered.
    """
    if os.path.isdir(path):
        shards.verify_folder(path)
    elif os.path.isfile(path):
        verify_file(path)
    else:
        raise FileNotFoundError(f"Checkpoint not found: {path}")


@dataclass
class CheckpointContents:
    """Decides what of a module goes into a checkpoint and puts it back; used by both strategies.

    Attributes:
        save_base: keep the frozen base in the checkpoint as well.
        check_base: refuse a checkpoint of another base.
    """

    save_base: bool = False
    check_base: bool = True

    def prepare(self, module: nn.Module) -> None:
        """Before anything changes the weights' form: remember what trains and the base's digests."""
        note_trainable(module)
        base_fingerprint(module)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """What the checkpoint's ``state_dict`` holds, by clean name; shards stay shards."""
        note_trainable(module)
        parameters = named_parameters(module)
        names = list(parameters) if self.save_base else saved_names(module)
        state: dict[str, Tensor] = {name: parameters[name].detach() for name in names}
        state.update(persistent_buffers(module))
        for key, part in extra_states(module).items():
            state[key] = part.get_extra_state()
        if self.save_base:
            from lightning_cl.strategies.quantization import quantization_states

            state.update(quantization_states(module))
        return state

    def metadata(self, module: nn.Module) -> dict[str, Any]:
        """The entry that makes a checkpoint of ours recognisable."""
        import lightning_cl

        return {
            "format": FORMAT,
            "versions": {
                "lightning_cl": lightning_cl.__version__,
                "torch": str(torch.__version__),
                "lightning": pl.__version__,
            },
            "save_base": self.save_base,
            "base_fingerprint": base_fingerprint(module),
            "trained": sorted(record_of(module).trained),
            "saved": saved_names(module),
            "adapters": describe(module),
        }

    def finish(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Add the metadata and leave out hyperparameters that could not be read back safely."""
        checkpoint[METADATA] = self.metadata(module)
        for key in _HYPER_PARAMETERS:
            if key in checkpoint:
                values = checkpoint[key] = to_safe(dict(checkpoint[key]))
                if dropped := drop_unsafe(values):
                    rank_zero_warn(
                        f"The checkpoint leaves out the hyperparameters {', '.join(f'`{n}`' for n in dropped)}: a file"
                        " could give such objects back only by running code. Pass them to `load_from_checkpoint`, or"
                        " `save_hyperparameters(ignore=[...])`."
                    )
        checkpoint.pop("hparams_type", None)

    def restore(self, module: nn.Module, checkpoint: Mapping[str, Any], strict: bool, path: str) -> None:
        """Copy a checkpoint's weights into the module, each rank its own shard.

        Raises:
            MisconfigurationException: if the base is another one, or names or shapes do not fit.
        """
        metadata = checkpoint.get(METADATA)
        state: Mapping[str, Any] = checkpoint["state_dict"]
        if metadata is not None:
            record_of(module).trained.update(n for n in metadata["trained"] if n in named_parameters(module))
            if self.check_base:
                check_base(module, metadata["base_fingerprint"], path)
        _restore_weights(module, state, strict=strict, path=path, ours=metadata is not None)


def _restore_weights(module: nn.Module, state: Mapping[str, Any], strict: bool, path: str, ours: bool) -> None:
    from lightning_cl.strategies.quantization import restore_quantization_states

    targets: dict[str, Tensor] = {**named_parameters(module), **persistent_buffers(module)}
    extra = extra_states(module)
    state = restore_quantization_states(module, {clean_name(k): v for k, v in state.items()}, path)
    missing = [n for n in (*saved_names(module), *persistent_buffers(module), *extra) if n not in state]
    aliases = {clean_name(n) for n, _ in module.named_parameters(remove_duplicate=False)} - targets.keys()
    unexpected = [n for n in state if n not in targets and n not in extra and n not in aliases]
    shapes = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(targets[n].shape)}"
        for n in targets
        if n in state and tuple(state[n].shape) != tuple(targets[n].shape)
    ]
    if shapes or (strict and (missing or unexpected)):
        parts = [
            f"{len(names)} {what} (first: {', '.join(names[:3])})"
            for what, names in (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes))
            if names
        ]
        raise MisconfigurationException(
            f"The checkpoint {path} does not fit this model: of its weights, {'; '.join(parts)}. Build the model as in"
            " the run that wrote the checkpoint (adapters included), or set `strict_loading = False` on the module to"
            " load what fits by name."
        )
    with torch.no_grad():
        for name, target in targets.items():
            if name in state:
                shards.copy_into(target, state[name])
    for key, part in extra.items():
        if key in state:
            part.set_extra_state(state[key])
    if not ours and not any(n in state for n in targets):
        raise MisconfigurationException(f"The checkpoint {path} holds none of this model's weights.")


def _check_format(checkpoint: Mapping[str, Any], path: Any) -> None:
    metadata = checkpoint.get(METADATA)
    if metadata is None:
        return
    import lightning_cl

    if metadata["format"] != FORMAT:
        raise MisconfigurationException(
            f"The checkpoint {path} has format {metadata['format']}, written by lightning-cl"
            f" {metadata['versions']['lightning_cl']}; this is lightning-cl {lightning_cl.__version__}, which reads"
            f" format {FORMAT}. Install the version that wrote it, or export its weights there with `lightning-cl export`."
        )
    written = metadata["versions"]["lightning_cl"]
    if written != lightning_cl.__version__:
        rank_zero_warn(
            f"The checkpoint {path} was written by lightning-cl {written}; this is {lightning_cl.__version__}. The format"
            " is the same; callbacks may have changed what their state means."
        )


def _refuse_options(storage_options: Any | None) -> None:
    if storage_options is not None:
        raise TypeError(
            f"`storage_options={storage_options!r}` was given, but checkpoints are written to a local path, atomically,"
            " and nothing would read the options. Leave them out, or give the strategy another `checkpoint_io`."
        )


def _refuse_remote(path: Any) -> None:
    if "://" in str(path) and not str(path).startswith("file://"):
        raise MisconfigurationException(
            f"The checkpoint path {path} is remote, where a file cannot be renamed atomically. Save to a local or mounted"
            " folder, or give the strategy `checkpoint_io=TorchCheckpointIO()`."
        )
