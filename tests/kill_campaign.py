# SPDX-License-Identifier: Apache-2.0
"""Kill a run with SIGKILL at random points, resume it each time, and compare its end with the unbroken run's.

    python tests/kill_campaign.py                 # 20 kills of a 4-task stream with every callback but the router
    python tests/kill_campaign.py --setup router  # one adapter a task, and the router among them
    python tests/kill_campaign.py --kills 3 --setup plain --seed 1
    python tests/kill_campaign.py --points checkpoint@1.fit.2.0+812 validation@2.fit.3.1+90

An unbroken run writes down when each phase took place: the fetch between steps, a step, a validation, a checkpoint being
written, states being collected, rows being generated, the router being fitted, the boundary between tasks. The points are
drawn from these, each phase in turn, a random number of function calls into it. A point reads
``PHASE@TASK.PART.STEP.OCCURRENCE+CALLS/RANK``. Prints each point, and what differs in the end: nothing, bit for bit, or
the campaign fails with exit status 1.

With ``--setup sharded`` two processes train under ``cl_fsdp`` and one of them is killed: the other must end by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.kill_worker import PARTS, SETUPS, Point  # noqa: E402

#: Seconds in which the other process must have ended after one was killed.
GRACE = 120


def start(folder: Path, setup: str, resume: bool, point: Point | None) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "kill_worker.py"), str(folder), "--setup", setup]
    command += ["--ckpt", "last"] if resume else []
    command += ["--point", str(point)] if point is not None else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["HF_HUB_OFFLINE"] = "1"
    processes = []
    port = _free_port()
    for rank in range(ranks_of(setup)):
        if ranks_of(setup) > 1:
            env = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            env["GROUP_RANK"] = "0"
        with open(folder / f"log{rank}.txt", "ab") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def ranks_of(setup: str) -> int:
    """Processes of a setup."""
    return 2 if setup == "sharded" else 1


def finish(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> bool:
    """Wait for the processes of a run.

    Returns:
        Whether one was killed at its point; False if the run came to its end.
    """
    while all(process.poll() is None for process in processes):
        time.sleep(0.02)
    end = time.monotonic() + GRACE
    try:
        codes = [process.wait(max(0.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise SystemExit(f"a process was still running {GRACE} s after another had ended:\n{_logs(folder)}") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if -signal.SIGKILL in codes:
        return True
    if any(codes):
        raise SystemExit(f"the run failed with {codes}:\n{_logs(folder)}")
    return False


def choose(timeline: list[list[Any]], kills: int, chance: random.Random, ranks: int) -> list[Point]:
    """Points in the order of the run: as many of each phase as can be, then more of any."""
    by_phase: dict[str, list[int]] = {}
    for index, entry in enumerate(timeline):
        by_phase.setdefault(entry[0], []).append(index)
    chosen: list[int] = []
    while len(chosen) < min(kills, len(timeline)):
        for phase in chance.sample(sorted(by_phase), len(by_phase)):
            free = [index for index in by_phase[phase] if index not in chosen]
            if free and len(chosen) < kills:
                chosen.append(chance.choice(free))
    points = []
    for index in sorted(chosen):
        *place, calls = timeline[index]
        points.append(Point(*place, calls=chance.randint(0, max(0, calls - 1)), rank=chance.randrange(ranks)))
    return points


def campaign(setup: str, kills: int, points: list[Point], seed: int, folder: Path) -> int:
    """Run it; returns how many things differ, with each point that was not reached."""
    whole, killed = folder / "whole", folder / "killed"
    finish(start(whole, setup, False, None), whole)
    timeline = json.loads((whole / "timeline0.json").read_text())
    points = points or choose(timeline, kills, random.Random(seed), ranks_of(setup))
    done = 0
    for point in points:
        if not finish(start(killed, setup, done > 0, point), killed):
            print(f"not reached: {point}", flush=True)
            break
        done += 1
        print(f"kill {done:2d}: {point}", flush=True)
    if done == len(points):
        finish(start(killed, setup, True, Point("none", 0, PARTS[0], 0, 0, 0)), killed)
    different: list[str] = []
    for rank in range(ranks_of(setup)):
        ends = [torch.load(run / f"end{rank}.pt", weights_only=False) for run in (whole, killed)]
        different += compare("end" if rank == 0 else f"end of rank {rank}", *ends)
    for place in different[:20]:
        print(f"differs: {place}")
    verdict = "equal to the unbroken run's, bit for bit" if not different else f"different in {len(different)} places"
    print(
        f"{setup}: {done} kills in {len({p.phase for p in points[:done]})} phases, seed {seed}; weights, optimizer, random"
        f" state, callbacks, matrix and files are {verdict}."
    )
    return len(different) + len(points) - done


def compare(path: str, ours: Any, theirs: Any) -> list[str]:
    """The places at which two nested values differ."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [path]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            return [f"{path} (keys {sorted(map(str, ours.keys() ^ theirs.keys()))})"]
        # How long something took is the clock's, not the run's.
        keys = [key for key in ours if "second" not in str(key)]
        return [found for key in keys for found in compare(f"{path}.{key}", ours[key], theirs[key])]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{path} (length {len(ours)} and {len(theirs)})"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for i, (a, b) in pairs for found in compare(f"{path}[{i}]", a, b)]
    same = ours == theirs or (ours != ours and theirs != theirs)
    return [] if same else [f"{path} ({ours!r} and {theirs!r})"]


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("log*.txt")))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=SETUPS, default="callbacks")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--points", type=Point.parse, nargs="*", default=[], help="the points, in the run's order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs' files here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        return int(campaign(args.setup, args.kills, args.points, args.seed, folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
