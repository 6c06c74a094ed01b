# SPDX-License-Identifier: Apache-2.0
"""A process that dies takes the others of its run down, with its message, instead of leaving them to wait."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cl.distributed import gather_objects, rank, world_size

log = logging.getLogger(__name__)

#: Seconds between two looks at the others.
INTERVAL = 1.0
#: Seconds that a process has to end by itself once it knows that another has failed.
GRACE = 30.0
_SHORT = 1000

_watches: weakref.WeakKeyDictionary[pl.Trainer, RankWatch] = weakref.WeakKeyDictionary()
_started = 0


def start(trainer: pl.Trainer) -> None:
    """Watch the other processes while this Trainer runs; once per run, on all ranks."""
    global _started
    if world_size() > 1 and trainer not in _watches:
        if _started == 0:
            _show_versions()
        _started += 1
        _watches[trainer] = RankWatch(str(_started), GRACE)


def _show_versions() -> None:
    """Warn where the ranks have other versions of what a result can depend on. Collective."""
    from lightning_cl.report.provenance import versions

    found = gather_objects({"host": socket.gethostname(), **versions()})
    for package in sorted({name for entry in found for name in entry} - {"host"}):
        by_version: dict[str, list[str]] = {}
        for r, entry in enumerate(found):
            by_version.setdefault(entry.get(package, "none"), []).append(f"{r} on {entry['host']}")
        if len(by_version) > 1:
            listed = "; ".join(f"{version} (rank {', '.join(ranks)})" for version, ranks in by_version.items())
            rank_zero_warn(
                f"The processes of this run have other versions of {package}: {listed}. Gradients are averaged over them"
                " all the same, and results may differ from those of one version. Install the same on every machine."
            )


def failed(trainer: pl.Trainer, error: BaseException) -> None:
    """This process ends with ``error``: tell the others, or say which of them failed first."""
    watch = _watches.pop(trainer, None)
    if watch is None:
        return
    # A run that a scheduler ends does not fail: all processes end together.
    other = None if isinstance(error, SIGTERMException) else watch.report(error)
    watch.stop()
    if other is not None:
        log.error("This process (rank %d) ends because another one did: %s", rank(), other)
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"This process ends because another one did: {other}")


def stop(trainer: pl.Trainer) -> None:
    """The run has ended well."""
    watch = _watches.pop(trainer, None)
    if watch is not None:
        watch.stop()


class RankWatch:
    """One process's eye on the others, through the store at which the process group has met.

    Every process gives a sign of life each second. The first one that fails leaves its message; the others' collective
    calls end with an error at once (gloo) or hang until the process group's timeout (NCCL), which can be half an hour. So
    a process that knows of a failure and has not ended by itself after :data:`GRACE` seconds is ended, with the message.

    Args:
        name: tells this run of a process group from the others; the same on all ranks.
        grace: seconds, see :data:`GRACE`.
    """

    def __init__(self, name: str, grace: float) -> None:
        # A store's own lock would make this thread wait for a collective call of the main one, so it gets a copy.
        self._main = dist.PrefixStore(f"lightning_cl/watch/{name}", _default_store())
        self._store = dist.PrefixStore(f"lightning_cl/watch/{name}", _default_store(clone=True))
        self._rank, self._ranks = rank(), world_size()
        self._grace = grace
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join(5 * INTERVAL)

    def report(self, error: BaseException) -> str | None:
        """Leave this process's error, unless another failed before.

        Returns:
            What the other has left, or which processes are gone without a word; None if this is the first.
        """
        mine = f"rank {self._rank} on {socket.gethostname()}: {type(error).__name__}: {str(error)[:_SHORT]}"
        cause = None
        try:
            if _is_connection(error):
                # The consequence of another's end, whose message is there by now or will never be.
                cause = self._who_is_gone()
            first = self._main.compare_set("failure", "", cause or mine).decode()
            if first == mine:
                self._wait_for_readers()
                return None
            return first
        except (RuntimeError, ValueError):
            # The process that keeps the store is gone.
            return _gone([0])

    def _who_is_gone(self) -> str | None:
        before = self._signs()
        end = time.monotonic() + 3 * INTERVAL
        while time.monotonic() < end:
            if self._main.check(["failure"]):
                return None
            time.sleep(0.1)
        silent = [r for r, sign in self._signs().items() if sign == before[r] and r != self._rank]
        return _gone(silent) if silent else None

    def _signs(self) -> dict[int, bytes | None]:
        keys = [f"alive/{r}" for r in range(self._ranks)]
        return {r: self._main.get(key) if self._main.check([key]) else None for r, key in enumerate(keys)}

    def _wait_for_readers(self) -> None:
        """If this process keeps the store, the message would be gone with it."""
        end = time.monotonic() + 3 * INTERVAL
        others = [f"read/{r}" for r in range(self._ranks) if r != self._rank]
        while time.monotonic() < end and not all(self._main.check([key]) for key in others):
            time.sleep(0.05)

    def _watch(self) -> None:
        sign, lost = 0, 0
        message = None
        while message is None:
            if self._over.wait(INTERVAL):
                return
            sign += 1
            try:
                self._store.set(f"alive/{self._rank}", str(sign))
                if self._store.check(["failure"]):
                    message = self._store.get("failure").decode()
                    self._store.set(f"read/{self._rank}", "1")
                lost = 0
            except (RuntimeError, ValueError):
                lost += 1
                if lost >= 3:
                    message = _gone([0])
        if self._over.wait(self._grace):
            return
        log.error("This process (rank %d) has waited %.0f s and is ended: %s", self._rank, self._grace, message)
        logging.shutdown()
        os._exit(1)


def _default_store(clone: bool = False) -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if clone and hasattr(store, "clone") else store


def _gone(ranks: Iterable[int]) -> str:
    named = ", ".join(map(str, ranks))
    return f"rank {named} is gone without a message (killed, out of memory, or its machine is down)"


def _is_connection(error: BaseException) -> bool:
    kinds = tuple(getattr(dist, name) for name in ("DistBackendError", "DistNetworkError", "DistStoreError"))
    text = str(error)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "onnection"))
    )
