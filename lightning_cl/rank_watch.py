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
from contextlib import suppress

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cl.distributed import gather_objects, rank, world_size

log = logging.getLogger(__name__)

#: Seconds between two looks at the others.
INTERVAL = 1.0
#: Seconds that a process has to end by itself once it knows that another has failed.
GRACE = 30.0
#: Looks, one each :data:`INTERVAL`, without a new sign of life after which a process counts as gone. Looks and not time:
#: where all are held up alike (a suspended job), none of them looks.
SILENCE = 120
_SHORT = 1000

_OVER = "over"

_watches: weakref.WeakKeyDictionary[pl.Trainer, RankWatch] = weakref.WeakKeyDictionary()
_started = 0


def start(trainer: pl.Trainer) -> None:
    """Watch the other processes while this Trainer runs; once per run, on all ranks."""
    global _started
    if world_size() > 1 and trainer not in _watches:
        if _started == 0:
            _show_versions()
        _started += 1
        _watches[trainer] = RankWatch(str(_started), GRACE, SILENCE)


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
    if isinstance(error, SIGTERMException):
        # A run that a scheduler ends does not fail: all processes end together.
        watch.stop()
        return
    other = watch.report(error)
    watch.stop()
    _end_if_stuck(trainer, other or f"its own {type(error).__name__}: {str(error)[:_SHORT]}")
    if other is not None:
        log.error("This process (rank %d) ends because another one did: %s", rank(), other)
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"This process ends because another one did: {other}")


def stop(trainer: pl.Trainer) -> None:
    """The run has ended well."""
    watch = _watches.pop(trainer, None)
    if watch is not None:
        watch.stop(well=True)


def _end_if_stuck(trainer: pl.Trainer, message: str) -> None:
    """End this process if Lightning still takes the failed Trainer apart after the grace.

    It moves the model to the CPU, which waits for the device, and that for a collective kernel of NCCL whose partner is
    gone. A process that has caught the error goes on.
    """
    failed_one, grace = weakref.ref(trainer), GRACE

    def look() -> None:
        time.sleep(grace)
        left = failed_one()
        # Lightning forgets the stage when it is done.
        if left is not None and left.state.status == TrainerStatus.INTERRUPTED and left.state.stage is not None:
            _end_process(grace, message)

    threading.Thread(target=look, name="rank-watch-end", daemon=True).start()


def _end_process(seconds: float, message: str) -> None:
    log.error("This process (rank %d) has waited %.0f s and is ended: %s", rank(), seconds, message)
    logging.shutdown()
    os._exit(1)


class RankWatch:
    """One process's eye on the others, through the store at which the process group has met.

    Every process gives a sign of life each second. The first one that fails leaves its message; the others' collective
    calls end with an error at once (gloo) or hang until the process group's timeout (NCCL), which can be half an hour. So
    a process that knows of a failure and has not ended by itself after :data:`GRACE` seconds is ended, with the message.
    A process that was killed leaves none: the one before it in a ring misses its signs, and says so for it.

    Args:
        name: tells this run of a process group from the others; the same on all ranks.
        grace: seconds, see :data:`GRACE`.
        silence: looks, see :data:`SILENCE`.
    """

    def __init__(self, name: str, grace: float, silence: int) -> None:
        # A store's own lock would make this thread wait for a collective call of the main one, so it gets a copy.
        self._main = dist.PrefixStore(f"lightning_cl/watch/{name}", _default_store())
        self._store = dist.PrefixStore(f"lightning_cl/watch/{name}", _default_store(clone=True))
        self._rank, self._ranks = rank(), world_size()
        self._grace, self._silence = grace, silence
        # The first sign: one that dies before the next is missed too.
        self._main.set(f"alive/{self._rank}", "0")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def stop(self, well: bool = False) -> None:
        """Look no more; where the run has ended ``well``, nobody shall miss this process."""
        self._over.set()
        self._thread.join(5 * INTERVAL)
        if well:
            with suppress(RuntimeError, ValueError):
                self._main.set(f"alive/{self._rank}", _OVER)

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

    def _signs(self) -> dict[int, str | None]:
        return {r: self._sign_of(self._main, r) for r in range(self._ranks)}

    @staticmethod
    def _sign_of(store: dist.Store, rank: int) -> str | None:
        key = f"alive/{rank}"
        return store.get(key).decode() if store.check([key]) else None

    def _wait_for_readers(self) -> None:
        """If this process keeps the store, the message would be gone with it."""
        end = time.monotonic() + 3 * INTERVAL
        others = [f"read/{r}" for r in range(self._ranks) if r != self._rank]
        while time.monotonic() < end and not all(self._main.check([key]) for key in others):
            time.sleep(0.05)

    def _watch(self) -> None:
        sign, lost, missed = 0, 0, 0
        next_rank = (self._rank + 1) % self._ranks
        last = None
        message = None
        while message is None:
            if self._over.wait(INTERVAL):
                return
            sign += 1
            try:
                self._store.set(f"alive/{self._rank}", str(sign))
                now = self._sign_of(self._store, next_rank)
                missed = missed + 1 if now is not None and now == last and now != _OVER else 0
                last = now
                if missed >= self._silence:
                    self._store.compare_set("failure", "", _gone([next_rank]))
                if self._store.check(["failure"]):
                    message = self._store.get("failure").decode()
                    self._store.set(f"read/{self._rank}", "1")
                lost = 0
            except (RuntimeError, ValueError):
                lost += 1
                if lost >= 3:
                    message = _gone([0])
        if not self._over.wait(self._grace):
            _end_process(self._grace, message)


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
