# SPDX-License-Identifier: Apache-2.0
"""Guards that keep one test from reaching into the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# No test may look for a model or a data set on the network, and tiny models gain nothing from threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

# Set by libraries as they work, and harmless to the next test.
_MAY_CHANGE = {
    "PYTEST_CURRENT_TEST",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "KINETO_LOG_LEVEL",
    "CUDA_DEVICE_ORDER",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """The environment, the random state, the process group and the determinism flag are as they were."""
    before = dict(os.environ)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    leaked = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)} - _MAY_CHANGE
    os.environ.clear()
    os.environ.update(before)
    assert not leaked, f"the test changed environment variables: {sorted(leaked)}"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts what ``torch.compile`` makes: traced and differentiated, but without code, which would take a compiler."""
    from torch._dynamo.testing import CompileCounterWithBackend

    found = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **kwargs: compile(fn, backend=found, **kwargs))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests say why they are skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
