# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cl.functional import RecursiveLeastSquares

METHODS = ["cholesky", "woodbury"]


def joint_ridge(features: torch.Tensor, labels: torch.Tensor, ridge: float, classes: int | None = None) -> np.ndarray:
    """The normal equations, written down in numpy."""
    x = features.double().numpy()
    y = np.zeros((len(x), classes or int(labels.max()) + 1))
    y[np.arange(len(x)), labels.numpy()] = 1.0
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


def problem(rows: int = 60, width: int = 12, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return features, torch.randint(classes, (rows,), generator=generator)


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 10_000),
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    classes=st.integers(1, 6),
    ridge=st.sampled_from([0.05, 1.0, 30.0]),
)
@settings(max_examples=25, deadline=None)
def test_any_order_any_blocks_and_widening_anywhere_equal_the_joint_solution(method, seed, order, cuts, classes, ridge):
    features, labels = problem(classes=classes, seed=seed)
    shuffled = list(range(60))
    order.shuffle(shuffled)
    features, labels = features[shuffled], labels[shuffled]
    learner = RecursiveLeastSquares(12, ridge=ridge, method=method)
    edges = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        learner.update(features[start:stop], labels[start:stop])
    assert error(learner.weight, joint_ridge(features, labels, ridge)) < 1e-10
    assert torch.equal(learner.counts, torch.bincount(labels, minlength=learner.num_classes))


@pytest.mark.parametrize("method", METHODS)
def test_a_label_that_never_came_is_a_zero_column(method):
    features, _ = problem(rows=20)
    learner = RecursiveLeastSquares(12, method=method)
    learner.update(features, torch.full((20,), 3))
    assert learner.weight.shape == (12, 4)
    assert bool((learner.weight[:, :3] == 0).all())
    assert error(learner.weight[:, 3:], joint_ridge(features, torch.zeros(20, dtype=torch.int64), 1.0)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 60))
@settings(max_examples=15, deadline=None)
def test_two_halves_merged_are_the_whole(method, seed, cut):
    features, labels = problem(seed=seed)
    left, right = RecursiveLeastSquares(12, method=method), RecursiveLeastSquares(12, method=method)
    left.update(features[:cut], labels[:cut])
    right.update(features[cut:], labels[cut:])
    left.merge(right)
    assert error(left.weight, joint_ridge(features, labels, 1.0)) < 1e-10
    left.update(features[:5], labels[:5])  # and it goes on
    again = torch.cat([features, features[:5]]), torch.cat([labels, labels[:5]])
    assert error(left.weight, joint_ridge(*again, 1.0)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 1000), gone=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_task_taken_out_was_never_seen(method, seed, gone):
    features, labels = problem(seed=seed)
    learner = RecursiveLeastSquares(12, method=method)
    learner.update(features, labels)
    there = labels == gone
    learner.downdate(features[there], labels[there])
    expected = joint_ridge(features[~there], labels[~there], 1.0, classes=learner.num_classes)
    assert error(learner.weight, expected) < 1e-10
    assert int(learner.counts[gone]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_the_sums_and_stay_symmetric(method, monkeypatch):
    monkeypatch.setattr("lightning_cl.functional.gram._TILE", 5)  # several tiles, the last one short
    features, labels = problem(rows=200)
    learner = RecursiveLeastSquares(12, method=method)
    for rows, wanted in zip(features.split(17), labels.split(17), strict=True):
        learner.update(rows, wanted)
    assert torch.equal(learner.gram, learner.gram.T)
    torch.testing.assert_close(learner.gram, features.T @ features)
    torch.testing.assert_close(learner.cross, features.T @ torch.nn.functional.one_hot(labels).double())
    assert error(learner.weight, joint_ridge(features, labels, 1.0)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_state_goes_on_where_it_stopped_to_the_bit(method):
    features, labels = problem()
    whole, first = RecursiveLeastSquares(12, method=method), RecursiveLeastSquares(12, method=method)
    for learner in (whole, first):
        learner.update(features[:30], labels[:30])
    second = RecursiveLeastSquares(12, method=method)
    second.load_state_dict(first.state_dict())
    for learner in (whole, second):
        learner.update(features[30:], labels[30:])
    assert torch.equal(whole.weight, second.weight)
    assert first.state_dict()["matrix"].numel() == 12 * 13 // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("ridge", "scale", "limit"), [(0.1, 1.0, 1e-9), (1e-3, 30.0, 1e-3)])
def test_hard_numerics_stay_within_the_promised_error(method, ridge, scale, limit):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(24, 200, generator=generator)
    features = scale * torch.relu(torch.randn(400, 24, generator=generator) @ mix)  # rank far below the width
    labels = torch.randint(8, (400,), generator=generator)
    learner = RecursiveLeastSquares(200, ridge=ridge, method=method)
    for rows, wanted in zip(features.split(25), labels.split(25), strict=True):
        learner.update(rows, wanted)
    expected = joint_ridge(features, labels, ridge)
    assert float(np.linalg.norm(learner.weight.numpy() - expected) / np.linalg.norm(expected)) < limit


def test_float32_products_in_float64_blocks_stay_close_to_float64():
    generator = torch.Generator().manual_seed(2)
    features = torch.relu(torch.randn(3000, 64, generator=generator))
    labels = torch.randint(3, (3000,), generator=generator)
    exact = RecursiveLeastSquares(64, products="float64")
    quick = RecursiveLeastSquares(64, products="float32")
    for learner in (exact, quick):
        learner.update(features, labels)
    assert quick.gram.dtype == torch.float64
    assert float((quick.gram - exact.gram).norm() / exact.gram.norm()) < 1e-6
    assert float((quick.weight - exact.weight).norm() / exact.weight.norm()) < 1e-5
    assert not torch.equal(quick.gram, exact.gram)


def test_leave_one_out_equals_leaving_each_row_out():
    features, labels = problem(rows=30, classes=3)
    learner = RecursiveLeastSquares(12)
    learner.update(features, labels)
    ridges = [0.01, 1.0, 100.0]
    expected = []
    for ridge in ridges:
        squares = []
        for i in range(30):
            keep = torch.arange(30) != i
            weight = joint_ridge(features[keep], labels[keep], ridge, classes=3)
            squares.append((np.eye(3)[int(labels[i])] - features[i].numpy() @ weight) ** 2)
        expected.append(np.mean(squares))
    np.testing.assert_allclose(learner.leave_one_out(features, labels, ridges).numpy(), expected, rtol=1e-9)


def test_generalized_cross_validation_is_its_formula_and_needs_no_rows():
    features, labels = problem(rows=30, classes=3)
    learner = RecursiveLeastSquares(12)
    learner.update(features, labels)
    ridges = [0.01, 1.0, 100.0]
    expected = []
    x, y = features.numpy(), np.eye(3)[labels.numpy()]
    for ridge in ridges:
        hat = x @ np.linalg.solve(x.T @ x + ridge * np.eye(12), x.T)
        expected.append(30 * np.sum((y - hat @ y) ** 2) / (30 - np.trace(hat)) ** 2)
    np.testing.assert_allclose(learner.generalized_cross_validation(ridges).numpy(), expected, rtol=1e-9)


def test_generalized_cross_validation_with_fewer_rows_than_features_is_its_formula():
    features, labels = problem(rows=10, width=30, classes=3)
    learner = RecursiveLeastSquares(30)
    learner.update(features, labels)
    x, y = features.numpy(), np.eye(3)[labels.numpy()]
    ridges = [1e-3, 1.0, 100.0]
    hats = [x @ np.linalg.solve(x.T @ x + ridge * np.eye(30), x.T) for ridge in ridges]
    expected = [10 * np.sum((y - hat @ y) ** 2) / (10 - np.trace(hat)) ** 2 for hat in hats]
    np.testing.assert_allclose(learner.generalized_cross_validation(ridges).numpy(), expected, rtol=1e-6)
    assert float(RecursiveLeastSquares(30).generalized_cross_validation([1.0])[0]) == math.inf


def test_choose_ridge_takes_the_best_of_the_grid_and_resolves():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 2 * torch.randn(40, generator=generator) > 0).long()  # noisy: needs a strong ridge
    learner = RecursiveLeastSquares(30, ridge=1e-6)
    learner.update(features, labels)
    before = learner.weight
    grid = [1e-6, 1.0, 50.0]
    assert learner.choose_ridge(grid) == 50.0
    assert learner.choose_ridge(grid, features, labels) == 50.0
    assert learner.ridge == 50.0
    assert error(learner.weight, joint_ridge(features, labels, 50.0)) < 1e-10
    assert not torch.allclose(learner.weight, before)
    assert learner.choose_ridge() > 0


def test_predict_gives_scores_in_any_float_type():
    features, labels = problem()
    learner = RecursiveLeastSquares(12)
    learner.update(features.float(), labels)
    assert learner.predict(features.bfloat16()).shape == (60, 4)
    assert learner.predict(features).dtype == torch.float64


def test_failed_factorisation_names_a_ridge_that_works():
    features = 1e6 * torch.ones(50, 40)  # rank one: float32 statistics lose the small ridge altogether
    features[:, 0] += torch.arange(50)
    learner = RecursiveLeastSquares(40, ridge=1e-3, dtype=torch.float32)
    learner.update(features, torch.zeros(50, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`ridge=0.001` is too small to factorise .* Use `ridge=") as caught:
        _ = learner.weight
    learner.ridge = float(str(caught.value).split("Use `ridge=")[1].split("`")[0])
    assert bool(torch.isfinite(learner.weight).all())
    with pytest.raises(ValueError, match=r"No ridge of .* gives a finite leave-one-out error"):
        learner.choose_ridge([1e-3])


def test_empty_updates_change_nothing():
    learner = RecursiveLeastSquares(12)
    learner.update(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64))
    learner.downdate(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64))
    learner.merge(RecursiveLeastSquares(12))
    assert learner.weight.shape == (12, 0)
    assert learner.predict(torch.zeros(2, 12)).shape == (2, 0)
    assert learner.gram.shape == (12, 12)
    assert learner.cross.shape == (12, 0)
    with pytest.raises(ValueError, match="No rows were seen, so there is no ridge to choose"):
        learner.choose_ridge()


def test_to_moves_and_state_of_an_empty_learner_loads():
    learner = RecursiveLeastSquares(12)
    assert learner.to("cpu") is learner
    learner.load_state_dict(RecursiveLeastSquares(12, ridge=3.0).state_dict())
    assert learner.ridge == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, r"`in_features=0`: a feature row has at least one entry"),
        ({"ridge": 0.0}, r"`ridge=0.0`: without a positive, finite ridge"),
        ({"ridge": -1.0}, r"`ridge=-1.0`: without a positive, finite ridge"),
        ({"ridge": math.nan}, r"`ridge=nan`: without a positive, finite ridge"),
        ({"method": "qr"}, r"`method='qr'` is unknown. Use 'cholesky' or 'woodbury'"),
        ({"dtype": torch.bfloat16}, r"`dtype=torch.bfloat16` cannot hold the statistics"),
        ({"products": "int8"}, r"`products='int8'` is unknown"),
        ({"max_classes": 0}, r"`max_classes=0` leaves no class"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecursiveLeastSquares(**{"in_features": 4, **arguments})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("features", "labels", "kind", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, r"shape \[2, 3\], but `in_features=4` wants \[N, 4\]"),
        (torch.zeros(4), torch.tensor([0]), ValueError, r"shape \[4\], but `in_features=4`"),
        (torch.zeros(2, 4), torch.tensor([0]), ValueError, r"2 feature rows came with labels of shape \[1\]"),
        (torch.zeros(2, 4), torch.tensor([0, -100]), ValueError, r"Label -100 is out of range"),
        (torch.zeros(2, 4), torch.tensor([0, 9]), ValueError, r"Label 9 is out of range.*below `max_classes=5`"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), TypeError, r"Labels have type torch.float32"),
        (torch.full((2, 4), math.nan), torch.tensor([0, 1]), ValueError, r"NaN or infinity in 2 of 2 rows"),
        (torch.full((1, 4), math.inf), torch.tensor([0]), ValueError, r"NaN or infinity in 1 of 1 rows \(first: row 0"),
    ],
)
def test_bad_rows_are_refused_and_leave_the_statistics_alone(method, features, labels, kind, message):
    learner = RecursiveLeastSquares(4, method=method, max_classes=5)
    learner.update(torch.eye(4), torch.tensor([0, 1, 2, 3]))
    before = learner.weight.clone()
    with pytest.raises(kind, match=message):
        learner.update(features, labels)
    assert torch.equal(learner.weight, before)


def test_other_misuse_is_refused():
    learner, recursion = RecursiveLeastSquares(4), RecursiveLeastSquares(4, method="woodbury")
    for one in (learner, recursion):
        one.update(torch.eye(4), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"cannot change it\. Use `method='cholesky'`"):
        recursion.ridge = 2.0
    with pytest.raises(ValueError, match="`in_features=5` into `in_features=4`"):
        learner.merge(RecursiveLeastSquares(5))
    with pytest.raises(ValueError, match=r"`ridge=2.0` into `ridge=1.0`"):
        recursion.merge(RecursiveLeastSquares(4, ridge=2.0, method="woodbury"))
    with pytest.raises(ValueError, match="Cannot take out 2 rows of label 1: only 1 were seen"):
        learner.downdate(torch.eye(4)[:2], torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="Cannot take out 1 rows of label 7: only 0 were seen"):
        learner.downdate(torch.eye(4)[:1], torch.tensor([7]))
    before = learner.weight
    learner.all_reduce()  # alone, it is the sum already
    assert torch.equal(learner.weight, before)
    with pytest.raises(ValueError, match="The recursion's state cannot be summed over ranks"):
        recursion.all_reduce()
    with pytest.raises(ValueError, match="were not part of the fit"):
        recursion.downdate(5 * torch.eye(4)[:1], torch.tensor([0]))
    with pytest.raises(ValueError, match="made with `in_features=4`, but this object has `in_features=5`"):
        RecursiveLeastSquares(5).load_state_dict(learner.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["cholesky", "woodbury"])
def test_the_fit_on_the_device_is_that_of_the_cpu(method):
    features, labels = torch.randn(300, 40), torch.arange(300) % 3
    here, there = RecursiveLeastSquares(40, method=method), RecursiveLeastSquares(40, method=method)
    for rows, wanted in zip(features.split(70), labels.split(70), strict=True):
        here.update(rows, wanted)
        there.update(rows.cuda(), wanted.cuda())
    assert there.weight.is_cuda
    torch.testing.assert_close(there.weight.cpu(), here.weight, atol=1e-10, rtol=1e-8)
    if method == "cholesky":
        assert there.choose_ridge() == pytest.approx(here.choose_ridge(), rel=1e-9)
