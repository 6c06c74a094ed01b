# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the comparison, from the results that are there."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cl.report import results
from lightning_cl.report.run import ReportError, Run, load_run

BEGIN, END = "<!-- compare.py table: begin -->", "<!-- compare.py table: end -->"
# Half-widths of a 95 % interval of a mean in standard errors, by number of values (Student's t).
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

COLUMNS = {
    "average": "average",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
    "news": "general loss change",
    "mmlu": "MMLU change",
    "harmonic": "harmonic mean",
}


@dataclass(frozen=True)
class Mean:
    """The mean over seeds with its 95 % interval's half-width (None for one seed).

    Example:
        >>> Mean.of([1.0, 2.0, 3.0])
        Mean(value=2.0, half=2.484338...)
    """

    value: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        half = None
        if len(values) > 1:
            half = _T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), half)

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Such as ``76.0 ± 1.2``."""
        value = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return value if self.half is None else f"{value} ± {self.half:.{digits}f}"


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """The whole results below a folder, and what is wrong with the others.

    Raises:
        SystemExit: if there is no whole result.
    """
    runs, problems = [], []
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist. Give the folder that `compare.py run --out` wrote to.")
    for file in sorted(folder.rglob(f"{results.STEM}.json")):
        try:
            run = load_run(file)
        except ReportError as error:
            problems.append(str(error))
            continue
        if "comparison" in run.document:
            runs.append(run)
        else:
            problems.append(f"{file} is no result of compare.py (it has no `comparison`), so it is left out.")
    if not runs:
        found = "".join(f"\n- {problem}" for problem in problems)
        raise SystemExit(
            f"There are zero finished runs in {folder}. Wait for the first, or start some with `compare.py run`.{found}"
        )
    return runs, problems


def part(run: Run) -> dict[str, Any]:
    """What compare.py wrote into a result."""
    return run.document["comparison"]


def origin(run: Run) -> str:
    """Hardware, versions and recipe: results that differ here are shown apart and never averaged together."""
    made, comparison = run.made_by, part(run)
    versions = ", ".join(f"{name} {version}" for name, version in sorted((made.get("versions") or {}).items()))
    shared = json.dumps([switched_on(comparison["recipe"]), comparison["tasks"], comparison["files"]], sort_keys=True)
    digest = hashlib.sha256(shared.encode()).hexdigest()[:8]
    return f"{made.get('hardware') or 'unknown hardware'}; {versions or 'unknown versions'}; recipe {digest}"


def switched_on(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe or settings; a switch that is off is as if it were not there, as in results from before there was one."""
    return {key: value for key, value in values.items() if value is not False}


# ------------------------------------------------------------------------------------------------- one run's figures


def figures(run: Run) -> dict[str, float | None]:
    """The columns of one run, in points but for the change of a loss."""
    matrix, comparison = run.matrix, part(run)
    found = matrix.compute()
    row: dict[str, float | None] = {
        name: None if found[name] is None else 100 * found[name]
        for name in ("average", "backward_transfer", "forgetting", "learning_accuracy")
    }
    last = len(comparison["tasks"]) - 1
    for probe in matrix.probes:
        before, after = matrix.score(-1, probe), matrix.score(last, probe)
        scale = 1.0 if matrix.mode_of(probe) == "min" else 100.0
        row[probe] = None if before is None or after is None else scale * (after.value - before.value)
        row[f"{probe} after"] = None if after is None else scale * after.value
    average, general = row["average"], row.get("mmlu after")
    row["harmonic"] = 2 * average * general / (average + general) if average and general else None
    return row


def seconds_of_stream(rounds: Sequence[Run], tasks: int, steps: int) -> float:
    """What training on that many tasks and steps takes alone, from the cost pass: all but the evaluation.

    A replay of past tasks begins with the second one, so later tasks cost what the second did. What a task does once
    (rows made, references taken) counts once, whatever its steps; of the first task only what lies before
    and after its steps, since a process's own start lies in them.

    Args:
        rounds: one method's runs of the cost pass; the median counts.
        tasks: number of tasks.
        steps: of all tasks together.
    """
    return statistics.median(_seconds_of_stream(run, tasks, steps) for run in rounds)


def _seconds_of_stream(run: Run, tasks: int, steps: int) -> float:
    stages = run.document["costs"]
    first, *later = (stages[str(k)] for k in (0, 1) if str(k) in stages)
    each = steps / tasks if later else steps  # else all tasks at once
    total = first["prepare_seconds"] + each * first["step_seconds"] + first["finish_seconds"]
    for second in later:
        once = max(0.0, second["train_seconds"] - second["steps"] * second["step_seconds"])
        around = second["prepare_seconds"] + once + second["finish_seconds"]
        total += (tasks - 1) * (around + each * second["step_seconds"])
    return total


Costs = dict[str, list[Run]]


def costs_of(folder: Path) -> Costs:
    """The runs of the cost pass by method, one for each round; none if there was none.

    Those of earlier versions, without a step's time for each task, do not count.
    """
    found: Costs = {}
    if (folder / "cost").is_dir():
        for run in read(folder / "cost")[0]:
            if all("step_seconds" in stage for stage in run.document["costs"].values() if "steps" in stage):
                found.setdefault(part(run)["method"], []).append(run)
    return found


def steps_of_equal_time(
    folder: Path, config: dict[str, Any], methods: Iterable[str], own_steps: Sequence[int]
) -> dict[str, int]:
    """The steps that each method makes in the time of sequential training: at most so many in each task.

    Args:
        folder: where the cost pass wrote to.
        config: the YAML's content.
        methods: their names.
        own_steps: what sequential training makes in each task. No method makes more in it; all at once makes as many
            together.

    Raises:
        SystemExit: if the cost pass has not measured one of them.
    """
    costs, methods = costs_of(folder), set(methods)
    missing = sorted((methods | {"sequential"}) - costs.keys())
    if missing:
        raise SystemExit(f"`--budget time` needs the costs of {missing}. Run `compare.py cost --methods ...` first.")
    tasks, every = len(own_steps), sum(own_steps)
    time = seconds_of_stream(costs["sequential"], tasks, every)
    found = {}
    for method in methods:
        limits = [every] if config["methods"][method].get("joint") else own_steps
        totals = {steps: sum(min(steps, limit) for limit in limits) for steps in range(max(limits), 0, -1)}
        fitting = (steps for steps in totals if seconds_of_stream(costs[method], tasks, totals[steps]) <= time)
        found[method] = next(fitting, 1)
    return found


# ------------------------------------------------------------------------------------------------- tables


@dataclass
class Line:
    """A method's line of a table: its runs over the seeds."""

    method: str
    runs: list[Run]

    def mean(self, column: str) -> Mean | None:
        values = [figures(run).get(column) for run in self.runs]
        known = [value for value in values if value is not None]
        return Mean.of(known) if len(known) == len(values) else None


def lines_of(runs: list[Run], methods: Iterable[str]) -> list[Line]:
    """The lines in the YAML's order; a method whose settings differ between its runs has a line for each."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = part(run)["method"], json.dumps([switched_on(part(run)["settings"]), part(run)["budget"]], sort_keys=True)
        groups.setdefault(key, []).append(run)
    several = [method for method, _ in groups]
    known = list(methods)
    order = sorted(groups, key=lambda key: (known.index(key[0]) if key[0] in known else len(known), key))
    return [
        Line(key[0] if several.count(key[0]) == 1 else f"{key[0]} ({_told(groups[key][0])})", groups[key])
        for key in order
    ]


def _told(run: Run) -> str:
    """A run's settings in words, such as ``lr 0.001, weight 3.0``."""
    recipe, settings, budget = (part(run)[key] for key in ("recipe", "settings", "budget"))
    told = {"lr": recipe.get("lr"), **switched_on(settings)}
    return ", ".join([*(f"{name} {value}" for name, value in told.items()), *([budget] if budget != "epochs" else [])])


def table(lines: list[Line], costs: Costs) -> str:
    """One Markdown table: figures over the seeds, and the costs relative to sequential training."""
    names = [*COLUMNS.values(), "wall time", "extra tokens", "peak memory", "disk", "seeds"]
    rows = [f"| method | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    base = next((line for line in lines if line.method == "sequential"), None)
    for line in lines:
        cells = []
        for column in COLUMNS:
            mean = line.mean(column)
            digits, sign = (3 if column == "news" else 1), column in ("news", "mmlu", "backward_transfer")
            cells.append("-" if mean is None else mean.text(digits, sign))
        cells += cost_cells(line, base, costs)
        cells.append(str(len(line.runs)))
        rows.append(f"| {line.method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def cost_cells(line: Line, base: Line | None, costs: Costs) -> list[str]:
    """Wall time and memory (from the cost pass) and tokens against sequential training, and bytes kept."""
    own = part(line.runs[0])["cost"]
    wall = relative_time(line, costs, base)
    cells = ["-" if wall is None else f"{wall:.2f}x"]
    plain = None if base is None else part(base.runs[0])["cost"]
    extra = (own["tokens"] + own["generated_tokens"]) / plain["tokens"] - 1 if plain and plain["tokens"] else None
    cells.append("-" if extra is None else f"{100 * extra:+.0f} %")
    both = [_peak_memory(one, costs) for one in (line, base)]
    cells.append(f"{both[0] / both[1]:.2f}x" if both[0] and both[1] else "-")
    cells.append(f"{own['disk_bytes'] / 1e6:.1f} MB")
    return cells


def _peak_memory(line: Line | None, costs: Costs) -> int | None:
    """Bytes, from the cost pass; or from the runs themselves, where all methods ran alike: without graphs."""
    if line is None:
        return None
    first = part(line.runs[0])
    if first["method"] in costs:
        return part(costs[first["method"]][0])["cost"]["peak_memory_bytes"]
    return None if costs or first["recipe"].get("graphs") else first["cost"]["peak_memory_bytes"]


def relative_time(line: Line, costs: Costs, base: Line | None = None) -> float | None:
    """The time of the whole stream without evaluation, against sequential training's; None where it is not known.

    Sequential training makes the steps of ``base``, if given, else as many as this method.
    """
    first = part(line.runs[0])
    method, tasks, steps = first["method"], len(first["tasks"]), first["cost"]["steps"]
    if method not in costs or "sequential" not in costs:
        return None
    plain_steps = steps if base is None else part(base.runs[0])["cost"]["steps"]
    return seconds_of_stream(costs[method], tasks, steps) / seconds_of_stream(costs["sequential"], tasks, plain_steps)


def missing(runs: list[Run], config: dict[str, Any], orders: Iterable[str]) -> list[str]:
    """What the configuration names and is not there, a line for each order: methods, with seeds where some are there."""
    there = {(part(run)["method"], part(run)["order"], part(run)["seed"]) for run in runs}
    found = []
    for order in orders:
        if order not in {name for _, name, _ in there}:
            found.append(f"{order}: no run")
            continue
        gaps = []
        for method in config["methods"]:
            seeds = [str(seed) for seed in config["seeds"] if (method, order, seed) not in there]
            if seeds:
                is_whole = len(seeds) == len(config["seeds"])
                gaps.append(
                    method if is_whole else f"{method} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})"
                )
        if gaps:
            found.append(f"{order}: {', '.join(gaps)}")
    return found


def document(folder: Path, config: dict[str, Any], plots: Path | None) -> str:
    """All tables as Markdown: by origin and order; then what is missing or could not be read."""
    runs, problems = read(folder)
    runs = [run for run in runs if "cost" not in run.folder.relative_to(folder).parts]
    costs = costs_of(folder)
    # Orders in which sequential training alone was run, for the table of equal time.
    untimed = [run for run in runs if not _is_equal_time(run)]
    several = {part(run)["order"] for run in untimed if part(run)["method"] != "sequential"}
    only_compared = {part(run)["order"] for run in runs if _is_equal_time(run)} - several
    parts = []
    origins = list(dict.fromkeys(origin(run) for run in runs))
    if len({where.split("; recipe")[0] for where in origins}) > 1:
        parts.append("These results are of several versions or machines: each has tables of its own, none is averaged.")
    for where in origins:
        group = [run for run in runs if origin(run) == where]
        orders = list(dict.fromkeys((part(run)["order"], _is_equal_time(run)) for run in group))
        for order, equal_time in orders:
            if not equal_time and order in only_compared:
                continue
            # Sequential training's time is what the others were given, so its own runs stand beside them.
            chosen = [
                run
                for run in group
                if part(run)["order"] == order
                and _is_equal_time(run) == (equal_time and part(run)["method"] != "sequential")
            ]
            here = hardware_of(chosen[0])
            same = {name: rounds for name, rounds in costs.items() if {hardware_of(run) for run in rounds} == {here}}
            lines = lines_of(chosen, config["methods"])
            commits = ", ".join(sorted({commit_of(run) for run in chosen}))
            title = f"### {order}: {', '.join(part(chosen[0])['tasks'])}" + (" (equal time)" if equal_time else "")
            parts += [title, f"{where}; commit {commits}.", table(lines, same)]
            if plots is not None and not equal_time:
                name = f"{plots.stem.lower()}_{order}.png"
                if pareto(lines, same, plots.with_name(name), order):
                    parts.append(
                        f"![Learning against forgetting, and forgetting against cost where that is known]({name})"
                    )
    gaps = missing(untimed, config, [order for order in _reported_orders(config) if order not in only_compared])
    if gaps:
        parts.append("Not run: " + "; ".join(gaps) + ".")
    if problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)


def _is_equal_time(run: Run) -> bool:
    return "equal-time" in run.folder.parts


def commit_of(run: Run) -> str:
    """The commit of a run in short, and whether the files were other than the commit's."""
    commit, _, changed = str(run.made_by.get("commit") or "unknown").partition("-")
    return f"{commit[:7]}-{changed}" if changed else commit[:7]


def hardware_of(run: Run) -> str:
    """The hardware of a run."""
    return str(run.made_by.get("hardware"))


def _reported_orders(config: dict[str, Any]) -> list[str]:
    return [order for order in config["orders"] if order != config.get("tune", {}).get("order")]


def pareto(lines: list[Line], costs: Costs, path: Path, order: str) -> bool:
    """Forgetting against cost and learning against forgetting; False where no method has these figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lightning_cl.report import display

    shown = [line for line in lines if line.mean("forgetting") is not None]
    if not shown:
        return False
    timed = any(relative_time(line, costs) is not None for line in shown)
    figure = Figure(figsize=(11 if timed else 7.5, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + timed, squeeze=False)[0]
    for index, line in enumerate(shown):
        colour = display.COLOURS[index % len(display.COLOURS)]
        marker = "os^Dvp*"[index // len(display.COLOURS) % 7]
        forgetting, learning = line.mean("forgetting"), line.mean("learning_accuracy")
        assert forgetting is not None
        time = relative_time(line, costs)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "", "capsize": 2, "alpha": 0.9}
        if time is not None:
            axes[0].errorbar(time, forgetting.value, yerr=forgetting.half, **style)
        if learning is not None:
            axes[-1].errorbar(
                forgetting.value, learning.value, learning.half, forgetting.half, label=line.method, **style
            )
    if timed:
        axes[0].set(xlabel="wall time, relative to sequential training", ylabel="forgetting, points (lower is better)")
    axes[-1].set(xlabel="forgetting, points (lower is better)", ylabel="learning accuracy, points")
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{order}: mean and 95 % interval over seeds", fontsize=11)
    figure.savefig(path)
    return True


def chosen(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The best settings of each method: within one point of the best average, the least change of the general loss.

    Returns:
        What was tried as a Markdown table, and the settings that won by method.
    """
    by_settings: dict[str, dict[str, list[Run]]] = {}
    for run in read(folder)[0]:
        settings = json.dumps(part(run)["settings"], sort_keys=True)
        by_settings.setdefault(part(run)["method"], {}).setdefault(settings, []).append(run)
    rows = ["| method | settings | average | general loss change |", "| --- | --- | --- | --- |"]
    winners = {}
    for method, groups in by_settings.items():
        tried = [(Line(method, runs), settings) for settings, runs in groups.items()]
        best = max(_value(line, "average") for line, _ in tried)
        near = [pair for pair in tried if _value(pair[0], "average") >= best - 1]
        winner = min(near, key=lambda pair: _value(pair[0], "news"))[1]
        winners[method] = json.loads(winner)
        for line, settings in tried:
            mark = " **chosen**" if settings == winner else ""
            rows.append(
                f"| {method} | {settings}{mark} | {_value(line, 'average'):.1f} | {_value(line, 'news'):+.3f} |"
            )
    return "\n".join(rows), winners


def _value(line: Line, column: str) -> float:
    mean = line.mean(column)
    return math.nan if mean is None else mean.value


def command(folder: Path, config: dict[str, Any], results_file: Path | None) -> int:
    """Print the tables, or put them into a Markdown file between its marks."""
    text = document(folder, config, results_file)
    if results_file is None:
        print(text)
        return 0
    old = results_file.read_text(encoding="utf8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"--results {results_file} has no place for the tables: add the lines {BEGIN} and {END}.")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    results_file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf8")
    print(f"Wrote the tables into {results_file}.")
    return 0
