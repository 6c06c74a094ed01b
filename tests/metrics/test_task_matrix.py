# SPDX-License-Identifier: Apache-2.0
"""The task matrix against plain Python, and everything it refuses."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cl.metrics import TaskMatrix, bootstrap_interval
from tests.helpers import spawn

FIGURES = {"average", "backward_transfer", "forward_transfer", "forgetting", "intransigence", "learning_accuracy"}


def naive(r: dict[tuple[int, int], float], tasks: int, reference: dict[int, float]) -> dict[str, float | None]:
    """The definitions, written with loops over a dict of (stage, task)."""
    last = tasks - 1

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "average": mean([r[last, j] for j in range(tasks)]),
        "backward_transfer": mean([r[last, j] - r[j, j] for j in range(tasks - 1)]),
        "forward_transfer": mean([r[j - 1, j] - r[-1, j] for j in range(1, tasks)]),
        "forgetting": mean([max(r[i, j] for i in range(j, last)) - r[last, j] for j in range(tasks - 1)]),
        "learning_accuracy": mean([r[j, j] for j in range(tasks)]),
        "intransigence": mean([reference[j] - r[j, j] for j in range(tasks) if j in reference]),
    }


@st.composite
def matrices(draw):
    tasks = draw(st.integers(1, 5))
    scores = st.floats(-10, 10)
    cells = {(i, j): draw(scores) for i in range(-1, tasks) for j in range(tasks)}
    reference = {j: draw(scores) for j in range(tasks) if draw(st.booleans())}
    return tasks, cells, reference


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(["max", "min"]), st.randoms(use_true_random=False))
def test_figures_equal_the_definitions_in_any_order_of_arrival(drawn, mode, random) -> None:
    tasks, cells, reference = drawn
    names = [f"t{j}" for j in range(tasks)]
    matrix = TaskMatrix(
        tasks=names, modes=dict.fromkeys(names, mode), reference={names[j]: v for j, v in reference.items()}
    )
    order = list(cells)
    random.shuffle(order)
    for i, j in order:
        matrix.update(i, names[j], torch.tensor(cells[i, j]) if random.random() < 0.5 else cells[i, j])
    sign = 1 if mode == "max" else -1
    # float32 tensors carry float32 values: compare with what was really passed in.
    seen = {cell: sign * matrix.score(cell[0], names[cell[1]]).value for cell in cells}
    expected = naive(seen, tasks, {j: sign * v for j, v in reference.items()})
    got = matrix.compute()
    assert set(got) == FIGURES
    for name, value in expected.items():
        if value is None:
            assert got[name] is None
            assert matrix.reasons[name]
        else:
            assert got[name] == pytest.approx(value, abs=1e-9)
            assert name not in matrix.reasons


def filled(**kwargs) -> TaskMatrix:
    """Tasks a, b, c with R[-1] = 10, 20, 30; R[0] = 80, 25, 30; R[1] = 70, 90, 40; R[2] = 75, 60, 95."""
    matrix = TaskMatrix(tasks=["a", "b", "c", *kwargs.pop("more", [])], **kwargs)
    for stage, row in {-1: (10, 20, 30), 0: (80, 25, 30), 1: (70, 90, 40), 2: (75, 60, 95)}.items():
        for task, value in zip("abc", row, strict=True):
            matrix.update(stage, task, value)
    return matrix


def test_worked_example() -> None:
    got = filled(reference={"a": 85, "c": 95}).compute()
    assert got["average"] == pytest.approx((75 + 60 + 95) / 3)
    assert got["backward_transfer"] == pytest.approx((-5 - 30) / 2)
    assert got["forgetting"] == pytest.approx((80 - 75 + 90 - 60) / 2)
    assert got["forward_transfer"] == pytest.approx((5 + 10) / 2)
    assert got["learning_accuracy"] == pytest.approx((80 + 90 + 95) / 3)
    assert got["intransigence"] == pytest.approx((5 + 0) / 2)


def test_names_are_learnt_in_order_of_arrival() -> None:
    matrix = TaskMatrix()
    for stage, row in {-1: (10, 20), 0: (80, 25), 1: (70, 90)}.items():
        for task, value in zip(("second", "first"), row, strict=True):
            matrix.update(stage, task, value)
    assert matrix.tasks == ["second", "first"]
    assert matrix.compute()["backward_transfer"] == pytest.approx(-10)


def test_a_later_score_replaces_an_earlier_one() -> None:
    matrix = filled()
    matrix.update(2, "a", 0.0, scores=[0.0, 0.0])
    assert matrix.compute()["average"] == pytest.approx((0 + 60 + 95) / 3)
    assert len(matrix.scores()) == 12


def test_probes_stay_out_of_the_six_and_change_by_themselves() -> None:
    matrix = filled(more=["news", "quiz"], roles={"news": "probe", "quiz": "probe"}, modes={"news": "min"})
    before = {name: value for name, value in matrix.compute().items() if name != "general_change"}
    for stage, news, quiz in ((-1, 3.2, 40.0), (2, 3.5, 44.0)):
        matrix.update(stage, "news", news)
        matrix.update(stage, "quiz", quiz)
    after = matrix.compute()
    assert {name: value for name, value in after.items() if name != "general_change"} == before
    assert after["general_change"] == {"news": pytest.approx(-0.3), "quiz": pytest.approx(4.0)}
    assert matrix.probes == ["news", "quiz"]


def test_probe_without_a_score_before_the_first_task() -> None:
    matrix = filled(more=["news"], roles={"news": "probe"})
    matrix.update(2, "news", 3.0)
    assert matrix.compute()["general_change"] == {"news": None}
    assert matrix.reasons["general_change/news"] == "probe 'news' was not measured before the first task"


@pytest.mark.parametrize(
    ("missing", "undefined"),
    [
        ((-1, "b"), {"forward_transfer"}),
        ((-1, "a"), set()),
        ((1, "a"), {"forgetting"}),
        ((0, "a"), {"backward_transfer", "forgetting", "learning_accuracy"}),
        ((2, "b"), {"average", "backward_transfer", "forgetting"}),
        ((0, "c"), set()),
    ],
)
def test_a_missing_score_undoes_exactly_the_figures_that_need_it(missing, undefined) -> None:
    full = filled()
    matrix = TaskMatrix(tasks=["a", "b", "c"])
    for (stage, task), score in full.scores().items():
        if (stage, task) != missing:
            matrix.update(stage, task, score.value)
    got = matrix.compute()
    assert {name for name, value in got.items() if value is None} == undefined | {"intransigence"}
    for name in undefined:
        assert f"task {missing[1]!r} was not measured" in matrix.reasons[name]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_gives_no_figure(value) -> None:
    matrix = filled()
    matrix.update(2, "b", value)
    assert matrix.compute()["average"] is None
    assert matrix.reasons["average"] == f"the score of task 'b' after stage 2 is {value}"
    assert matrix.compute()["learning_accuracy"] is not None


def test_nothing_and_one_task() -> None:
    with pytest.warns(UserWarning, match="called before"):
        assert set(TaskMatrix().compute().values()) == {None}
    matrix = TaskMatrix(tasks=["only"])
    matrix.update(0, "only", 0.5)
    got = matrix.compute()
    assert (got["average"], got["learning_accuracy"]) == (0.5, 0.5)
    assert matrix.reasons["backward_transfer"] == "it compares tasks, and there is only one so far"


def test_stages_without_their_tasks_give_no_figure() -> None:
    matrix = TaskMatrix()
    for stage in range(3):
        matrix.update(stage, "the only loader", 0.5)
    assert matrix.compute()["average"] is None
    assert matrix.reasons["average"] == "there are scores after stage 2, but of 1 training task(s) only"


def test_running_figures_take_the_tasks_learnt_so_far() -> None:
    matrix = filled()
    at = matrix.at(1)
    assert at["average"] == pytest.approx((70 + 90) / 2)
    assert at["backward_transfer"] == pytest.approx(-10)
    assert matrix.at(2) == matrix.compute()
    assert set(matrix.at(-1).values()) == {None}
    assert matrix.reasons["average"] == "no task has been learnt yet"
    with pytest.raises(ValueError, match=r"at\(3\)`: the stages go from -1 to 2"):
        matrix.at(3)


def test_unlike_metrics_are_not_averaged() -> None:
    matrix = filled(metrics={"a": "accuracy", "b": "accuracy", "c": "rouge_l"})
    got = matrix.compute()
    assert got["average"] is None
    assert "unlike metrics (accuracy (max) of 'a', rouge_l (max) of 'c')" in matrix.reasons["average"]
    # Backward transfer reads tasks a and b alone, which share a metric.
    assert got["backward_transfer"] == pytest.approx(-17.5)
    assert filled(modes={"c": "min"}).compute()["average"] is None


def test_normalise_puts_unlike_metrics_on_one_scale() -> None:
    matrix = TaskMatrix(
        tasks=["a", "b"],
        metrics={"a": "accuracy", "b": "loss"},
        modes={"b": "min"},
        normalise={"a": (0, 100), "b": [4.0, 0.0]},
        reference={"a": 90, "b": 1.0},
    )
    for stage, row in {-1: (10, 4.0), 0: (80, 3.0), 1: (60, 1.0)}.items():
        for task, value in zip("ab", row, strict=True):
            matrix.update(stage, task, value)
    got = matrix.compute()
    assert got["average"] == pytest.approx((0.6 + 0.75) / 2)
    assert got["backward_transfer"] == pytest.approx(-0.2)
    assert got["forward_transfer"] == pytest.approx(0.25)
    assert got["intransigence"] == pytest.approx((0.1 + 0.0) / 2)
    assert filled(normalise=(0, 100)).compute()["average"] == pytest.approx(230 / 300)


def test_intervals_come_from_the_rows() -> None:
    torch.manual_seed(0)
    rows = (torch.rand(200) < 0.7).double()
    matrix = TaskMatrix(tasks=["a"])
    matrix.update(0, "a", rows.mean(), scores=rows)
    low, high = matrix.score(0, "a").interval
    assert (low, high) == bootstrap_interval(rows)
    half = 1.96 * (0.7 * 0.3 / 200) ** 0.5
    assert low == pytest.approx(float(rows.mean()) - half, abs=0.015)
    assert high == pytest.approx(float(rows.mean()) + half, abs=0.015)
    assert matrix.score(0, "a").rows == 200


def test_figure_intervals_pair_the_rows_of_a_task() -> None:
    rows = (torch.arange(100) % 10 < 6).double()
    matrix = TaskMatrix(tasks=["a", "b"])
    # The same rows right and wrong before and after: no choice of rows changes the difference.
    for stage in (0, 1):
        matrix.update(stage, "a", rows.mean(), scores=rows)
        matrix.update(stage, "b", rows.mean(), scores=rows)
    intervals = matrix.figure_intervals()
    assert intervals["backward_transfer"] == pytest.approx((0.0, 0.0), abs=1e-12)
    low, high = intervals["average"]
    assert low < 0.6 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.24 / 200) ** 0.5, rel=0.15)
    assert intervals["forward_transfer"] is None
    matrix.update(1, "b", 0.6, rows=100)
    assert matrix.figure_intervals()["average"] is None


def test_figure_interval_of_a_probe() -> None:
    matrix = TaskMatrix(tasks=["a", "p"], roles={"p": "probe"})
    matrix.update(0, "a", 1.0)
    for stage, values in ((-1, [1.0, 2.0, 3.0, 4.0]), (0, [2.0, 3.0, 4.0, 5.0])):
        matrix.update(stage, "p", sum(values) / 4, scores=values)
    assert matrix.figure_intervals()["general_change/p"] == pytest.approx((1.0, 1.0))


def test_state_survives_checkpoint_pickle_json_and_clone() -> None:
    matrix = filled(more=["p"], roles={"p": "probe"}, modes={"p": "min"}, metrics={"p": "loss"}, reference={"a": 80})
    matrix.update(-1, "p", 3.0, scores=[2.5, 3.5])
    matrix.update(2, "p", 3.1, rows=7)
    expected = (matrix.compute(), matrix.reasons, matrix.scores()[-1, "p"].interval)
    loaded = filled(more=["p"], roles={"p": "probe"}, modes={"p": "min"}, metrics={"p": "loss"}, reference={"a": 80})
    loaded.load_state_dict(matrix.state_dict())
    plain = TaskMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    for copy in (loaded, plain, pickle.loads(pickle.dumps(matrix)), matrix.clone()):
        assert (copy.compute(), copy.reasons, copy.scores()[-1, "p"].interval) == expected
        assert copy.score(2, "p").rows == 7
    short = TaskMatrix.from_dict(matrix.to_dict(row_scores=False))
    assert short.score(-1, "p").interval == pytest.approx(expected[2])
    assert short.score(-1, "p").scores is None
    learnt = TaskMatrix()
    learnt.update(0, "ä name/with: signs", 1.0)
    again = TaskMatrix.from_dict(learnt.to_dict())
    assert again.tasks == ["ä name/with: signs"]
    again.reset()
    again.update(0, "new", 0.25)
    assert again.compute()["average"] == 0.25


def test_matrix_inside_a_module_is_in_its_checkpoint() -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = TaskMatrix(tasks=["a"])

    module, other = Module(), Module()
    module.matrix.update(0, "a", 0.5)
    other.load_state_dict(module.state_dict())
    assert other.matrix.compute()["average"] == 0.5


def test_forward_gives_the_figures_so_far() -> None:
    matrix = TaskMatrix(tasks=["a"])
    assert matrix(0, "a", 0.5)["average"] == 0.5
    assert matrix(0, "a", 0.75)["average"] == 0.75
    assert matrix.compute()["average"] == 0.75


def _ranks(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    same = TaskMatrix(tasks=["a", "b"])
    for stage, row in {0: (0.8, 0.1), 1: (0.6, 0.9)}.items():
        for task, value in zip("ab", row, strict=True):
            same.update(stage, task, value, rows=30)
    parts = TaskMatrix()
    if rank == 0:
        parts.update(0, "a", 0.5, scores=[1.0, 0.0])
    else:
        parts.update(0, "a", 1.0, scores=[1.0] * 6)
    lonely = TaskMatrix()
    if rank == 1:
        lonely.update(0, "seen by one rank", 0.25)
    spawn.save(folder, rank, [same.compute(), parts.compute()["average"], lonely.compute()["average"], lonely.tasks])


def test_two_processes_join_their_scores(tmp_path: Path) -> None:
    spawn.run(_ranks, 2, str(tmp_path))
    for same, parts, lonely, names in spawn.load(tmp_path):
        assert same["backward_transfer"] == pytest.approx(-0.2)
        assert same["average"] == pytest.approx(0.75)
        assert parts == pytest.approx(7 / 8)
        assert lonely == 0.25
        assert names in ([], ["seen by one rank"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": ["a", "a"]}, r"two tasks of one name: \['a'\]"),
        ({"tasks": ["a"], "roles": {"b": "probe"}}, "roles names the task 'b', which is not among `tasks`"),
        ({"tasks": ["news"], "modes": {"nwes": "min"}}, "Did you mean 'news'"),
        ({"roles": {"a": "judge"}}, "role 'judge' of task 'a'. Roles are 'train' and 'probe'"),
        ({"modes": {"a": "lower"}}, "mode 'lower' of task 'a'"),
        ({"reference": {"a": math.nan}}, "reference nan of task 'a' is not finite"),
        ({"normalise": {"a": (1, 1)}}, "two different finite numbers"),
        ({"normalise": 100}, "got 100 for all tasks"),
        ({"modes": {"a": "min"}, "normalise": {"a": (0, 1)}}, "its mode is 'min'. Turn the range round"),
    ],
)
def test_bad_arguments(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        TaskMatrix(**kwargs)


def test_bad_updates() -> None:
    matrix = TaskMatrix(tasks=["a", "p"], roles={"p": "probe"})
    with pytest.raises(TypeError, match="got a single string"):
        TaskMatrix(tasks="abc")
    for stage in (-2, 0.5, True):
        with pytest.raises(ValueError, match="stages are whole numbers"):
            matrix.update(stage, "a", 0.5)
    with pytest.raises(ValueError, match="1 training tasks make the stages -1 to 0"):
        matrix.update(1, "a", 0.5)
    with pytest.raises(ValueError, match="update names the task 'b'"):
        matrix.update(0, "b", 0.5)
    with pytest.raises(ValueError, match=r"value of shape \(2,\) for task 'a'"):
        matrix.update(0, "a", torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="1 scores that are not finite among 2"):
        matrix.update(0, "a", 0.5, scores=[1.0, math.nan])
    assert matrix.scores() == {}
