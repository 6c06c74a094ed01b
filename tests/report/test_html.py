# SPDX-License-Identifier: Apache-2.0
"""The HTML page: what it holds, and (in headless Chromium) what it shows."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_cl.report import svg
from lightning_cl.report.html import page
from lightning_cl.report.run import find_runs, load_run
from tests.report.runs import LOSSES, SCORES, TASKS, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROUTING = {
    "stages": {"0": {"red": {"red": 5}}, "1": {"red": {"red": 9, "green": 1}, "green": {"green": 8, "base": 2}}},
    "learnt": {"0": ["red"], "1": ["red", "green"]},
}


class Marks(HTMLParser):
    """Every element with ``data-`` attributes, by its class or tag; and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.marks: list[dict[str, str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if any(key.startswith("data-") for key in given):
            self.marks.append({"tag": tag, **given})
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Any]:
    write_run(tmp_path / "plain", shift=0.1)
    write_run(tmp_path / "replay", routing=ROUTING)
    (tmp_path / "replay" / "config.yaml").write_text("model:\n  weight: <b>&amp;\n")
    return find_runs([tmp_path / "plain", tmp_path / "replay"])[0]


def test_page_is_well_formed_and_needs_no_network(two_runs: list[Any]) -> None:
    text = page(two_runs)
    parsed = Marks(text)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "link", "img", "iframe", "object", "base")]
    for _, given in parsed.tags:
        assert not {"src", "href", "onload", "onclick"} & set(given)
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "default-src 'none'" in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_heat_map_cells_carry_scores_and_intervals(two_runs: list[Any]) -> None:
    parsed = Marks(page([two_runs[1]]))
    cells = {
        (int(m["data-stage"]), m["data-task"]): m
        for m in parsed.marks
        if m.get("class") == "cell" and "data-stage" in m
    }
    assert len(cells) == 16
    for stage, row in SCORES.items():
        for task, value in zip(TASKS, row, strict=True):
            assert float(cells[stage, task]["data-value"]) == value
            assert cells[stage, task]["data-rows"] == "200"
            assert float(cells[stage, task]["data-low"]) < value < float(cells[stage, task]["data-high"])
        assert float(cells[stage, "news"]["data-value"]) == LOSSES[stage]
        assert cells[stage, "news"]["data-low"] == ""


def test_figures_reasons_terms_costs_and_routing_are_there(two_runs: list[Any]) -> None:
    text = page(two_runs)
    parsed = Marks(text)
    figures = {(m["data-run"], m["data-figure"]): m["data-value"] for m in parsed.marks if m.get("class") == "figure"}
    assert float(figures["plain", "backward_transfer"]) == pytest.approx(-0.25)
    assert float(figures["replay", "backward_transfer"]) == pytest.approx(-0.15)
    assert float(figures["replay", "general_change/news"]) == pytest.approx(-0.25)
    assert figures["replay", "intransigence"] == ""
    assert "none: no reference scores were given" in text
    points = {}
    for mark in parsed.marks:
        if mark["tag"] == "circle":
            points.setdefault(mark["data-series"], []).append((float(mark["data-x"]), float(mark["data-y"])))
    assert points["cl/kl_ratio"][:3] == [(10, 0.25), (20, 0.2), (30, 0.1)]
    assert points["red"] == [(-1, 10), (0, 90), (1, 70), (2, pytest.approx(60)), (-1, 10), (0, 90), (1, 80), (2, 70)]
    seconds = [float(m["data-value"]) for m in parsed.marks if m.get("class") == "bar" and m["data-part"] == "training"]
    assert seconds == [30.0, 31.0, 30.0, 31.0]
    sent = {(m["data-task"], m["data-sent"]): int(m["data-count"]) for m in parsed.marks if "data-sent" in m}
    assert sent["red", "green"] == 1
    assert sent["green", "base"] == 2
    assert "c0ffee" in text
    assert "fit --x" in text


def test_runs_side_by_side_have_a_chart_per_task(two_runs: list[Any]) -> None:
    parsed = Marks(page(two_runs))
    for run, last in (("plain", 60), ("replay", 70)):
        mine = [float(m["data-y"]) for m in parsed.marks if m.get("data-series") == run]
        assert mine[:4] == [10, 90, 80 if run == "replay" else 70, pytest.approx(last)]
    assert "Runs side by side" not in page(two_runs[:1])


def test_many_runs_have_a_row_each_and_no_bands(tmp_path: Path) -> None:
    for index in range(5):
        write_run(tmp_path / f"run{index}", shift=index / 100)
    runs, _ = find_runs([tmp_path])
    few, many = page(runs[:4]), page(runs)
    first_column = re.findall(r"<tr><td>([^<]*)", many[: many.index("Runs side by side")])
    assert first_column == [f"run{index}" for index in range(5)]
    figures = {m["data-run"]: m["data-value"] for m in Marks(many).marks if m.get("data-figure") == "backward_transfer"}
    assert [float(figures[f"run{index}"]) for index in range(5)] == pytest.approx([-0.15 - i / 100 for i in range(5)])

    def bands(text: str) -> int:
        beside = text[text.index("Runs side by side") :]
        return beside[: beside.index("<section")].count("<polygon")

    assert bands(few) == 4 * 3  # of each task's rows; the probe's are not known here
    assert bands(many) == 0
    # A figure that no run has is said once, not in a column.
    assert many.count("no reference scores were given") == 1
    assert "intransigence: none (no reference scores were given" in many


def test_lines_of_many_runs_can_be_told_apart(tmp_path: Path) -> None:
    for index in range(16):
        write_run(tmp_path / f"run{index:02}")
    text = page(find_runs([tmp_path])[0])
    beside = text[text.index("Runs side by side") : text.index("<section")]
    legend, first = beside.split("</svg>")[:2]

    def looks(marks: list[str]) -> list[tuple[str, bool]]:
        return [(re.search(r'stroke="(#\w+)"', mark).group(1), "dasharray" in mark) for mark in marks]

    drawn = looks(re.findall(r"<polyline[^>]*>", first))
    assert len(set(drawn)) == len(drawn) == 16
    # One legend for all charts, which have none of their own.
    assert looks(re.findall(r"<line[^>]*>", legend)) == drawn
    assert re.findall(r">(run\d\d)<", legend) == [f"run{index:02}" for index in range(16)]
    assert "run00</text>" not in first


def test_names_of_stages_are_tilted_where_the_legend_leaves_too_little_room() -> None:
    lines = [svg.Line(name, [(0, 1.0), (2, 2.0)]) for name in ("short", "a name of many characters")]
    ticks = {0: "before it all", 1: "after it all", 2: "and once more"}
    wide, narrow = (svg.chart(lines, ticks, "points", width=430, legend=legend) for legend in (False, True))
    assert "rotate" not in wide
    assert "rotate" in narrow


@pytest.mark.parametrize("points", [[(2, 1.0)], [(1, 1.0), (2, 2.0)], []])
def test_stages_without_a_score_have_their_place_too(points: list[tuple[float, float]]) -> None:
    """A task that was first scored at the last stage: labels neither on one spot nor outside of the picture."""
    ticks = dict(enumerate(["before", "red", "green"], start=-1)) | {2: "blue"}
    drawn = svg.chart([svg.Line("run", points)], ticks, "points", width=430, legend=False)
    places = [float(x) for x in re.findall(r'<text x="([\d.-]+)"[^>]*>(?:before|red|green|blue)<', drawn)]
    assert len(places) == 4
    assert places[0] > 58
    assert places[-1] < 430
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert min(gaps) == pytest.approx(max(gaps), abs=0.2)
    assert min(gaps) > 50


def test_time_spent_fitting_is_shown_where_there_is_some(tmp_path: Path) -> None:
    write_run(tmp_path / "a", costs={"0": {"train_seconds": 30.0, "finish_seconds": 2.5}})
    write_run(tmp_path / "b")
    routed, plain = (page([find_runs([tmp_path / name])[0][0]]) for name in "ab")
    assert "fitting: 2.5 s" in routed
    assert [m["data-value"] for m in Marks(routed).marks if m.get("data-part") == "fitting"] == ["2.5"]
    assert "fitting:" not in plain


def test_origins_that_differ_are_said_and_nothing_is_averaged(tmp_path: Path) -> None:
    from tests.report.runs import PROVENANCE

    write_run(tmp_path / "a")
    write_run(tmp_path / "b", provenance={**PROVENANCE, "hardware": "1 x H100", "versions": {"torch": "2.11.0"}})
    runs, _ = find_runs([tmp_path])
    text = page(runs)
    assert "not made alike, so nothing is averaged" in text
    assert "hardware: CPU, 2 cores (a); 1 x H100 (b)" in text
    assert "torch: 2.13.0 (a); 2.11.0 (b)" in text
    assert "not made alike" not in page(runs[:1])


def test_events_and_problems_stand_at_the_top(tmp_path: Path) -> None:
    event = {"stage": 1, "task": "green", "in_fit": False, "forgetting": 0.12, "action": "restore"}
    run = load_run(write_run(tmp_path / "a", events=[event]))
    text = page([run], problems=["x/task_matrix.json is cut short"])
    assert "forgetting of 0.12 after task 1 (green) exceeded the limit; the weights were put back" in text
    assert text.index("cut short") < text.index("<h2>Figures")


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    from lightning_cl.metrics import TaskMatrix
    from lightning_cl.report import results
    from lightning_cl.report.markdown import summary

    made = TaskMatrix(TASKS)
    for stage in (-1, 0, 1):
        for task in TASKS:
            made.update(stage, task, 0.5)
    results.write(tmp_path / "half", made, {})
    run = load_run(tmp_path / "half")
    assert "half: 2 of 3 tasks learnt so far; the figures are of these" in page([run])
    assert "half: 2 of 3 tasks learnt so far" in summary([run])


def test_least_there_can_be(tmp_path: Path) -> None:
    from lightning_cl.metrics import TaskMatrix
    from lightning_cl.report import results

    made = TaskMatrix()
    made.update(0, "only", float("nan"))
    results.write(tmp_path, made, {})
    Marks(page([load_run(tmp_path)]))


# A copy of the page without its policy, with a script that writes down where the marks are on the screen.
_MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, r.width, r.height]; };
const found = {
  cells: [...document.querySelectorAll('g.cell[data-stage]')].map(e => [e.dataset.stage, e.dataset.task,
    getComputedStyle(e.querySelector('rect')).fill, e.querySelector('text').textContent, ...box(e.querySelector('rect'))]),
  points: [...document.querySelectorAll('section circle')].map(e =>
    [e.dataset.series, +e.dataset.x, +e.dataset.y, ...box(e)]),
  bars: [...document.querySelectorAll('rect.bar')].map(e => [+e.dataset.value, ...box(e)]),
  overflow: [...document.querySelectorAll('svg text')].filter(e => {
    const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
    return t.left < s.left - 1 || t.right > s.right + 1 || t.bottom > s.bottom + 1; }).map(e => e.textContent),
  width: document.documentElement.scrollWidth,
};
document.body.innerHTML = '<pre id="measured"></pre>';
document.getElementById('measured').textContent = JSON.stringify(found);
</script></body>"""


def chromium(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium with a profile of its own and without its background traffic."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1240,2400",
    ]
    assert CHROMIUM is not None
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package `chromium`)")
def test_chromium_renders_the_right_values(tmp_path: Path, two_runs: list[Any]) -> None:
    text = page([two_runs[1]])
    measured = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", _MEASURE)
    (tmp_path / "measured.html").write_text(measured)
    shown = chromium(tmp_path, "--dump-dom", (tmp_path / "measured.html").as_uri()).stdout
    import html

    found = json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', shown, re.DOTALL)[1]))

    # The heat map: a grid of cells with the scores written in them, darker where the score is better.
    cells = {(int(stage), task): rest for stage, task, *rest in found["cells"]}
    assert cells[1, "green"][1] == "95.0"
    assert cells[2, "news"][1] == "3.250"
    darkness = {cell: 765 - sum(map(int, re.findall(r"\d+", values[0])[:3])) for cell, values in cells.items()}
    ranked = sorted(
        ((stage, task) for stage in SCORES for task in TASKS), key=lambda c: SCORES[c[0]][TASKS.index(c[1])]
    )
    assert [darkness[c] for c in ranked] == sorted(darkness[c] for c in ranked)
    for stage in SCORES:
        rows = {cells[stage, task][3] for task in TASKS}
        assert len(rows) == 1
    assert cells[-1, "red"][3] < cells[0, "red"][3] < cells[2, "red"][3]
    assert all(values[4] > 20 and values[5] > 20 for values in cells.values())

    # The curves: heights on the screen are linear in the values, with one scale for all tasks of a panel.
    points = [(x, y, left, top) for series, x, y, left, top, *_ in found["points"] if series in TASKS]
    assert len(points) == 12
    (_, low, _, at_low), (_, high, _, at_high) = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    for x, y, left, top in points:
        assert top == pytest.approx(at_low + (at_high - at_low) * (y - low) / (high - low), abs=0.6)
        same = [other[2] for other in points if other[0] == x]
        assert max(same) - min(same) < 0.6
        assert left > 0
    assert at_high < at_low

    # The bars: widths proportional to seconds.
    widths = [width / value for value, _, _, width, _ in found["bars"]]
    assert max(widths) == pytest.approx(min(widths), rel=0.02)
    assert found["overflow"] == []
    assert found["width"] <= 1240


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package `chromium`)")
def test_chromium_paints_the_page_under_its_own_policy(tmp_path: Path, two_runs: list[Any]) -> None:
    from PIL import Image

    (tmp_path / "report.html").write_text(page(two_runs))
    picture = tmp_path / "report.png"
    chromium(tmp_path, f"--screenshot={picture}", (tmp_path / "report.html").as_uri())
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 24)}
    # The page's style applies, and lines in two runs' colours are painted.
    assert {(243, 245, 247), (255, 255, 255), (0, 114, 178), (213, 94, 0)} <= colours
