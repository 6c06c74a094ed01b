# SPDX-License-Identifier: Apache-2.0
"""Print pip constraints that hold every dependency of pyproject.toml at its lower bound: ``python .ci/oldest.py``."""

import re
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
if dependencies is None:
    raise SystemExit("pyproject.toml has no list `dependencies` that this script understands.")
for name, bound in re.findall(r'^\s*"([\w-]+)(?:\[\w+\])?>=([\d.]+)', dependencies[1], re.MULTILINE):
    print(f"{name}=={bound}")
