# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.routing.tools import Setup


@pytest.fixture
def ready() -> Setup:
    return Setup()
