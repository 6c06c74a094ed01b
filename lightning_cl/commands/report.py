# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl report``: one HTML page of a run or of several, a Markdown summary, and an exit code for CI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_cl.report import display
from lightning_cl.report.html import page
from lightning_cl.report.markdown import summary
from lightning_cl.report.run import ReportError, Run, add_external, find_runs
from lightning_cl.strategies.files import write_atomically


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        0; 1 if a threshold is not met; 2 for input that cannot be used or a figure that a threshold needs and no run has.
    """
    arguments = _parser().parse_args(argv)
    try:
        runs, problems = find_runs(arguments.runs)
        for given in arguments.external:
            stage, path = _external(given)
            for run in runs:
                add_external(run, path, stage)
        checks, code = _check(runs, arguments.fail_below, arguments.fail_above)
        out = arguments.out or (arguments.runs[0] if arguments.runs[0].is_dir() else Path()) / "report.html"
        _write(out, page(runs, problems, arguments.title))
        text = summary(runs, problems, checks)
        if arguments.markdown is not None and str(arguments.markdown) != "-":
            _write(arguments.markdown, text)
    except (ReportError, OSError) as error:
        print(f"lightning-cl report: {error}", file=sys.stderr)
        return 2
    if str(arguments.markdown) == "-":
        print(text)
    print(f"Wrote {out}", file=sys.stderr)
    for line in [*problems, *checks]:
        print(line, file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl report",
        description="Write one self-contained HTML page of the runs: task matrices, curves, loss terms, costs and origin.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or a folder that holds runs"
    )
    parser.add_argument("--out", type=Path, help="where the page goes; default: report.html in the first RUN_DIR")
    parser.add_argument("--title", default="Forgetting report", help="the page's title")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a Markdown summary; - prints it")
    parser.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="[STAGE:]results.json",
        help="scores of an outside harness, added as probes to the given stage (before the first task:"
        " --external=-1:results.json; default: the last); may be repeated",
    )
    for name, what in (("--fail-below", "below"), ("--fail-above", "above")):
        parser.add_argument(
            name,
            action="append",
            default=[],
            metavar="FIGURE=NUMBER",
            help=f"exit with 1 if the figure is {what} the number, in the unit that the report shows (points for scores"
            " between 0 and 1): average, bwt, fwt, forgetting, intransigence, learning_accuracy or general_change/PROBE",
        )
    return parser


def _external(given: str) -> tuple[int | None, Path]:
    stage, colon, path = given.partition(":")
    if colon and stage.lstrip("-").isdigit():
        return int(stage), Path(path)
    return None, Path(given)


def _check(runs: Sequence[Run], below: Sequence[str], above: Sequence[str]) -> tuple[list[str], int]:
    lines, code = [], 0
    for given, sign in [*((g, 1) for g in below), *((g, -1) for g in above)]:
        key, limit = _threshold(given)
        for run in runs:
            rows = display.figures_of(run.matrix, display.last_stage(run.matrix))
            figures = {name: (value, why) for name, _, value, why in rows}
            if key not in figures:
                raise ReportError(
                    f"Run {run.name!r} has no figure {key!r}. It has {', '.join(figures)}; `bwt`, `fwt`, `acc` and `la` are"
                    " short names."
                )
            value, reason = figures[key]
            if value is None:
                lines.append(f"{run.name}: {key} is undefined ({reason}), so `{given}` cannot be checked")
                code = 2
                continue
            shown = value * display.scale_of_figure(run.matrix, key)
            failed = sign * shown < sign * limit
            relation = {
                (1, True): "is below",
                (1, False): "is at least",
                (-1, True): "is above",
                (-1, False): "is at most",
            }
            lines.append(
                f"{run.name}: {key} {shown:.4g} {relation[sign, failed]} {limit:g}{': FAILED' if failed else ''}"
            )
            code = max(code, 1) if failed else code
    return lines, code


def _threshold(given: str) -> tuple[str, float]:
    name, equals, number = given.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = float("nan")
    if not equals or limit != limit:
        raise ReportError(f"`--fail-below {given}` is no FIGURE=NUMBER. Write it as `--fail-below bwt=-2`.")
    return display.ALIASES.get(name.strip().lower(), name.strip()), limit


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: _put(file, text))


def _put(file: object, text: str) -> None:
    file.write(text.encode("utf-8"))  # type: ignore[attr-defined]


if __name__ == "__main__":
    raise SystemExit(main())
