# SPDX-License-Identifier: Apache-2.0
"""Run a function in several gloo processes, the way Lightning expects processes that it did not launch itself."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(rank: int, fn: Callable[..., Any], nprocs: int, port: int, args: tuple[Any, ...]) -> None:
    # With these set, Lightning takes the processes as given and does not start pytest again.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        RANK=str(rank),
        WORLD_SIZE=str(nprocs),
        LOCAL_WORLD_SIZE=str(nprocs),
        GROUP_RANK="0",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    faulthandler.enable()  # a process that a signal ends says where it was
    try:
        fn(rank, *args)
        if torch.distributed.is_initialized():
            # A rank that leaves first would cut off the other in the middle of its last collective call.
            torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    # Its work done, a process was now and then aborted while Python came down: a native thread was still there.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(fn: Callable[..., Any], nprocs: int = 2, *args: Any) -> None:
    """Run ``fn(rank, *args)`` in ``nprocs`` fresh processes; an exception in any of them is raised here.

    ``fn`` must be importable (defined at module level). Results travel through files under a ``tmp_path`` argument
    (see :func:`save` and :func:`load`).
    """
    mp.spawn(_enter, args=(fn, nprocs, _free_port(), args), nprocs=nprocs, join=True)


def save(folder: Path, rank: int, value: Any) -> None:
    """Write a rank's result where :func:`load` finds it."""
    torch.save(value, Path(folder) / f"rank{rank}.pt")


def load(folder: Path, nprocs: int = 2) -> list[Any]:
    """Read the results of all ranks."""
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(nprocs)]
