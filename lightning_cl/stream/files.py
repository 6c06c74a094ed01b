# SPDX-License-Identifier: Apache-2.0
"""The files of a run: task folders, checkpoints found and checked, the row of scores beside each checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cl.strategies.checkpoint import AtomicCheckpointIO, verify_checkpoint
from lightning_cl.strategies.files import check_safe, load_file

#: Written by ``fit_stream`` when a task's training has ended.
TASK_END = "task_end.ckpt"
#: Written on SIGTERM.
INTERRUPTED = "interrupted.ckpt"
ROW = "row.json"
RUN = "run.json"
_META = "meta.pt"


def task_folder(index: int, name: str) -> str:
    """The folder of a task's files.

    Example:
        >>> task_folder(2, "news: politics")
        'task_2_news__politics'
    """
    return f"task_{index}_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run: the logger's (where Lightning puts checkpoints too), else ``default_root_dir``."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole. Reads it once; nothing in it is executed."""
    if path.is_dir():
        if not (path / _META).is_file():
            return f"the folder has no `{_META}`"
        if not (path / ".metadata").is_file():
            # Our own sharded folders carry checksums instead of torch's index.
            return _checksum_damage(path)
        return _zip_damage(path / _META)
    if not path.is_file():
        return "there is no such file"
    return _zip_damage(path)


def _checksum_damage(path: Path) -> str | None:
    try:
        verify_checkpoint(path)
    except Exception as error:
        return str(error)
    return None


def _zip_damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            if bad is not None:
                return f"its part {bad!r} does not match its checksum"
        load_file(path)
    except Exception as error:
        return (
            f"it cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
        )
    return None


def peek(path: str | os.PathLike[str] | None, verify: bool = True) -> dict[str, Any]:
    """A checkpoint's content, tensors left on disk; of a sharded one, all but weights and optimizer.

    Args:
        path: the checkpoint.
        verify: check its sum first, where it has one. Only tensors and plain types are built either way.
    """
    file = Path(str(path))
    found: dict[str, Any] = load_file(file / _META if file.is_dir() else file, verify=verify)
    return found


def warn_of_unreadable(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Warn of an entry that only running code could give back, which a resume never does."""
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        return  # refuses it while writing, or leaves it out
    try:
        check_safe(checkpoint)
    except TypeError as error:
        rank_zero_warn(
            f"`fit_stream` will not be able to resume from this run's checkpoints: {error} Or use"
            ' `strategy="cl_single_device"`, which leaves such hyperparameters out.'
        )


def find_last(trainer: pl.Trainer, key: str, extra: Iterable[Path] = ()) -> Path | None:
    """The whole checkpoint that is furthest in the stream; damaged ones are skipped with a warning.

    Looks into the run's folder, the folders of ModelCheckpoint, and, when the logger counts its versions, the earlier
    versions beside the run's folder (the newest that has a checkpoint). "Furthest" is told from the state inside, never
    from a file's time: a clock that jumped back changes nothing. Where a folder holds two runs, or a run that went on
    from an older checkpoint, the one begun last counts.

    Args:
        trainer: the Trainer.
        key: the stream's key in a checkpoint.
        extra: further candidates.
    """
    folders = [run_folder(trainer)]
    folders += [Path(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    found = _furthest([p for folder in folders for p in _checkpoints(folder)] + list(extra), key)
    if found is not None or not trainer.loggers:
        return found
    version = re.fullmatch(r"version_(\d+)", folders[0].name)
    if version is None:
        return None
    siblings = sorted(
        (int(match[1]), entry)
        for entry in (folders[0].parent.iterdir() if folders[0].parent.is_dir() else ())
        if (match := re.fullmatch(r"version_(\d+)", entry.name)) and int(match[1]) < int(version[1])
    )
    for _, sibling in reversed(siblings):
        found = _furthest(_checkpoints(sibling), key)
        if found is not None:
            return found
    return None


def find_last_in(folder: Path, key: str) -> Path | None:
    """The whole checkpoint of a run folder that is furthest in the stream."""
    return _furthest(_checkpoints(folder), key)


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [*folder.glob("*.ckpt"), *folder.glob("task_*/*.ckpt"), *folder.glob("checkpoints/task_*/*.ckpt")]


def _furthest(candidates: list[Path], key: str) -> Path | None:
    ranked: list[tuple[Any, ...]] = []
    for path in dict.fromkeys(candidates):
        try:
            # Sums are checked for the furthest alone: a folder may hold hundreds of gigabytes.
            place = _place(path, peek(path, verify=False), key)
        except Exception as error:
            _warn_damaged(path, f"it cannot be read ({type(error).__name__})")
            continue
        if place is not None:
            ranked.append((*place, str(path)))
    for *_, name in sorted(ranked, reverse=True):
        problem = damage(Path(name))
        if problem is None:
            return Path(name)
        _warn_damaged(Path(name), problem)
    return None


def _place(path: Path, checkpoint: dict[str, Any], key: str) -> tuple[int, ...] | None:
    """Where in its folder's runs a checkpoint stands; None if it is of no stream."""
    state = checkpoint.get(key)
    if state is None:
        return None
    steps = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    done = steps.get("total", {}).get("processed", 0)
    # A later save at the same batch stands later in Lightning's order of hooks.
    order = ("in_step", "batch_end", "between", "validation_end", "epoch_start", "epoch_end").index(state["point"])
    return _begun(path, state["run_id"]), int(state["current_index"]), int(done), order, int(path.name == TASK_END)


def _warn_damaged(path: Path, problem: str) -> None:
    rank_zero_warn(f"The checkpoint {path} is damaged and skipped: {problem}. The next older one is taken.")


def _begun(path: Path, run_id: str) -> int:
    """Which run of its folder a checkpoint belongs to: 0 for the first that was begun there."""
    for folder in path.parents[:3]:
        if (folder / RUN).is_file():
            try:
                runs = json.loads((folder / RUN).read_text())["runs"]
                return runs.index(run_id) if run_id in runs else -1
            except (OSError, ValueError, KeyError, TypeError):
                return -1
    return -1


def note_run(folder: Path, run_id: str) -> None:
    """Write down that a run begins in this folder (or goes on there)."""
    runs: list[str] = []
    if (folder / RUN).is_file():
        try:
            runs = list(json.loads((folder / RUN).read_text())["runs"])
        except (ValueError, KeyError, TypeError):
            rank_zero_warn(f"{folder / RUN} cannot be read and is written anew.")
    if run_id in runs:
        runs.remove(run_id)
    write_json(folder / RUN, {"runs": [*runs, run_id]})


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written before training, not after it.

    Raises:
        MisconfigurationException: with the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MisconfigurationException(
            f"The run's folder {folder} cannot be written ({error.strerror or error}), so checkpoints and scores would be"
            " lost. Make it writable, or choose another by `Trainer(default_root_dir=...)` or the logger's `save_dir`."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or none: a kill in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class RunLock:
    """Holds a run's folder for this process; the system frees it when the process dies, however it dies.

    A record lock, which a forked process does not inherit: a loader's worker that outlives its killed parent for some
    seconds does not hold the folder any more. Network file systems know it too; one that does not is written without.

    Args:
        folder: the run's folder.

    Raises:
        MisconfigurationException: by :meth:`acquire`, if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lightning_cl.lock"
        self._file: Any = None

    def acquire(self) -> None:
        """Take the folder, or refuse."""
        try:
            import fcntl
        except ImportError:  # Windows has no advisory locks of this kind
            return
        file = open(self._path, "a+")  # noqa: SIM115 - held until `release`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            raise MisconfigurationException(
                f"Another process{f' ({holder})' if holder else ''} is writing the run's folder {self._path.parent}. Two"
                " would overwrite each other's checkpoints. Wait for it or end it, or use another `default_root_dir`."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None
