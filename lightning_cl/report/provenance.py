# SPDX-License-Identifier: Apache-2.0
"""What made a result: command, versions, commit and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import lru_cache
from typing import Any

_PACKAGES = ("lightning-cl", "torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics")


@lru_cache(maxsize=1)
def provenance() -> dict[str, Any]:
    """Command, versions, commit and hardware of this process, in plain types.

    Example:
        >>> sorted(provenance())
        ['command', 'commit', 'hardware', 'versions']
    """
    return {
        "command": [_program(sys.argv[0]), *sys.argv[1:]],
        "commit": _commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """Installed versions of what a result can depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The accelerator, or the processor, in words."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def _program(path: str) -> str:
    """What was started, without the folders of this machine."""
    folder, name = os.path.split(path)
    return f"python -m {os.path.basename(folder)}" if name == "__main__.py" else name or "python"


def _commit() -> str | None:
    # With `-dirty` where tracked files have changed since: then the commit alone would not give the result again. On a
    # work tree that takes too long to read, the commit alone.
    for command in ("describe --always --abbrev=40 --exclude=* --dirty", "rev-parse HEAD"):
        try:
            found = subprocess.run(["git", *command.split()], capture_output=True, text=True, timeout=5, check=False)
        except OSError:
            return None
        except subprocess.TimeoutExpired:
            continue
        return found.stdout.strip() if found.returncode == 0 else None
    return None
