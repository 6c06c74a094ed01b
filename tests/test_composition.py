# SPDX-License-Identifier: Apache-2.0
"""Each cell of the table of callbacks against each other is a real run, and the table says what the runs show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import callbacks
from tests.helpers import cases
from tests.test_compatibility import IN_PROCESS, REFUSED, SPAWNED

README = (Path(__file__).parent.parent / "callbacks" / "README.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRAInterpolator.*slow weights keep", "ignore:.*initial state")


@pytest.fixture(scope="module")
def weights_of() -> dict[tuple[str, str, str], dict[str, torch.Tensor]]:
    """Weights that a pair has trained, for the pair in the other order."""
    return {}


@pytest.mark.parametrize("case", [*cases.PAIRS, *cases.VARIANTS], ids=str)
def test_two_callbacks_in_one_trainer(case: cases.Case, tmp_path: Path, weights_of: Any) -> None:
    """Both do their work over two tasks, and as the table has it the order changes nothing; or the run is refused."""
    torch.manual_seed(0)
    made = case.callbacks()
    if case.outcome == "refused":
        with pytest.raises(Exception, match=case.match):
            cases.run(tmp_path, made)
        return
    lm, trainer = cases.run(tmp_path, made)
    for callback in made:
        cases.check(callback, lm, trainer)
    weights_of[case.first, case.second, case.name] = cases.whole(lm)
    reverse = weights_of.get((case.second, case.first, case.name))
    for name, value in weights_of[case.first, case.second, case.name].items() if reverse else ():
        torch.testing.assert_close(reverse[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["LoRAInterpolator", "RLSRouterFitter"])
@pytest.mark.parametrize("monitor_first", [False, True])
def test_restore_beside_weights_of_another_callbacks_own_is_refused(
    tmp_path: Path, name: str, monitor_first: bool
) -> None:
    monitor = callbacks.ForgettingMonitor("val_loss", mode="min", max_forgetting=0.1, on_exceed="restore")
    made = [cases.make(name), monitor]
    with pytest.raises(MisconfigurationException, match=f"`{name}` keeps weights of its own"):
        cases.run(tmp_path, made[::-1] if monitor_first else made)


# --------------------------------------------------------------------------- the page


def _table(heading: str) -> dict[tuple[str, str], str]:
    lines = [line for line in README.split(f"## {heading}")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    parsed = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    columns = parsed[0][1:]
    return {(row[0], column): cell for row in parsed[2:] for column, cell in zip(columns, row[1:], strict=True)}


def test_the_table_of_pairs_is_what_the_cases_say() -> None:
    expected = {(c.first, c.second): c.outcome + (f" [{c.note}]" if c.note else "") for c in cases.PAIRS}
    assert _table("Against each other") == expected
    assert len(expected) == len(cases.NAMES) ** 2
    letters = {c.note for c in [*cases.PAIRS, *cases.VARIANTS] if c.note}
    assert all(f"- [{letter}] " in README for letter in letters)


def test_the_table_of_strategies_is_what_the_tests_run() -> None:
    table = _table("Against strategies")
    assert set(table) == {(name, strategy) for name in cases.NAMES for strategy in cases.STRATEGIES}
    untested = {cell for cell, text in table.items() if text == "untested"}
    assert len(untested) <= len(table) / 5
    assert not {strategy for _, strategy in untested} & cases.NEVER_UNTESTED
    run = {(name, s) for name in cases.NAMES for s in (*IN_PROCESS, *SPAWNED)} - REFUSED
    assert {cell for cell, text in table.items() if text == "works"} == run
    assert {cell for cell, text in table.items() if text.startswith("refused")} == REFUSED


def test_every_link_and_every_test_named_on_the_page_exists() -> None:
    folder = Path(cases.__file__).parents[2] / "callbacks"
    links = {(folder / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", README)}
    assert all(link.is_file() for link in links)
    text = "".join(link.read_text() for link in links if link.suffix == ".py")
    assert all(f"def {name}(" in text for name in re.findall(r"`(test_\w+)`", README))
