# SPDX-License-Identifier: Apache-2.0
"""Each cell of the table of callbacks against each other is a real run, and the table says what the runs show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl import callbacks
from tests.helpers import cases, models
from tests.test_compatibility import IN_PROCESS, REFUSED, SPAWNED

README = (Path(__file__).parent.parent / "callbacks" / "README.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRAInterpolator.*slow weights keep", "ignore:.*initial state")


@pytest.fixture(scope="module")
def weights_of() -> dict[tuple[str, str, str], dict[str, torch.Tensor]]:
    """Weights that a pair has trained, for the pair in the other order."""
    return {}


def _params() -> list[Any]:
    known = pytest.mark.xfail(reason="a known fault, which the README tells", strict=True)
    all_cases = [*cases.PAIRS, *cases.VARIANTS]
    return [pytest.param(c, id=str(c), marks=[known] if c.outcome == "fails" else []) for c in all_cases]


@pytest.mark.parametrize("case", _params())
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


@pytest.mark.xfail(reason="a known fault, which the README's footnote d tells", strict=True)
@pytest.mark.parametrize("name", ["LoRAInterpolator", "RLSRouterFitter"])
def test_the_monitor_puts_back_what_it_says(tmp_path: Path, name: str) -> None:
    """After ``on_exceed="restore"`` the module gives the scores that the matrix holds."""
    other: Any = (
        callbacks.LoRAInterpolator(half_life=0.01, consistency_weight=0)
        if name == "LoRAInterpolator"
        else callbacks.RLSRouterFitter(expansion_dim=16, ridge=1e6, max_tasks=2, seed=1)
    )
    monitor = callbacks.ForgettingMonitor(
        "val_loss", mode="min", max_forgetting=0.002, on_exceed="restore", print_table=False, plots=False
    )
    lm = cases.module()
    rows = [models.loader(rows=4, seed=10 + i) for i in range(2)]
    for task in range(2):
        trainer = models.trainer(tmp_path, max_steps=-1, max_epochs=4, callbacks=[other, monitor])
        trainer.fit(lm, rows[task], rows)
    if [event["action"] for event in monitor.events] != ["restore"]:
        pytest.fail("the limit was meant to be exceeded once")
    lm.eval()
    with torch.no_grad():
        found = [float(lm.model(**next(iter(loader))).loss) for loader in rows]
    cells = monitor.matrix.scores()
    assert found == pytest.approx([cells[1, f"task_{i}"].value for i in range(2)], abs=1e-4)


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
