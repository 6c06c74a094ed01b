# SPDX-License-Identifier: Apache-2.0
"""What `RLSRouterFitter` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.callbacks import RLSRouterFitter
from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import fit, fitter, mixed, module
from tests.helpers import models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expansion_dim": 0}, "`expansion_dim=0` of `RLSRouterFitter` leaves no features"),
        ({"ridge": 0.0}, r"`ridge=0\.0` of `RLSRouterFitter`: the router's system needs a ridge above 0"),
        ({"ridge": -1.0}, r"`ridge=-1\.0` of `RLSRouterFitter`"),
        ({"ridge": "best"}, "`ridge='best'` of `RLSRouterFitter`"),
        ({"min_margin": -0.1}, r"`min_margin=-0\.1` of `RLSRouterFitter` can never be undercut"),
        ({"max_tasks": 0}, "`max_tasks=0` of `RLSRouterFitter` allocates no adapter"),
        ({"evaluate_with": "best"}, "`evaluate_with='best'` of `RLSRouterFitter` is unknown"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        RLSRouterFitter(**arguments)


def test_bad_models_and_tasks_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'model\.layers\.9'"):
        fit(tmp_path, fitter(feature_layer="model.layers.9"), module(), 0)
    with pytest.raises(MisconfigurationException, match=r"`layers_to_transform=\[0, 1, 2\]`"):
        fit(tmp_path, fitter(), module(layers_to_transform=[0, 1, 2]), 0)
    lm, router = module(), fitter(max_tasks=1)
    fit(tmp_path, router, lm, 0)
    with pytest.raises(MisconfigurationException, match=r"Task 1 \(the 2th\) has no adapter: `max_tasks=1`"):
        fit(tmp_path, router, lm, 1)
    trained = module()
    trained.model.get_base_model().model.embed_tokens.requires_grad_(True)
    with pytest.raises(
        MisconfigurationException, match=r"embed_tokens.* is at or below the feature layer .* is trained"
    ):
        fit(tmp_path, fitter(), trained, 0)
    head = module()
    head.model.get_base_model().lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters outside the adapters are trained .*lm_head"):
        fit(tmp_path, fitter(), head, 0)


def test_features_with_nan_and_layers_that_are_not_called_are_named(tmp_path):
    broken = module()
    broken.model.get_base_model().model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="Features hold NaN or infinity in 16 of 16 rows"):
        fit(tmp_path, fitter(), broken, 0)
    unused = module()
    unused.model.get_base_model().model.layers[0].spare = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(
        MisconfigurationException, match=r"No features of task 0 were seen: the feature layer '.*spare'"
    ):
        fit(tmp_path, fitter(feature_layer="spare"), unused, 0)


def test_an_adapter_that_has_diverged_is_not_stored(tmp_path):
    lm, router = module(lr=float("inf")), fitter()
    with pytest.raises(
        ValueError, match=r"After its task the adapter 'task_0' holds NaN or infinity in \d+ of \d+ weights"
    ):
        fit(tmp_path, router, lm, 0)
    assert router._stored == {}


def test_use_before_a_fit_is_named():
    router = fitter()
    assert router.router is None
    with pytest.raises(RuntimeError, match="has seen no module yet"):
        router.route(mixed())
    with pytest.raises(MisconfigurationException, match="`evaluate_with='x'`"), router.evaluating_with("x"):
        pass


def test_route_before_the_first_task_has_ended(tmp_path):
    lm, router = module(), fitter()
    models.trainer(tmp_path, callbacks=[router]).validate(lm, tools.loader(0), verbose=False)
    with pytest.raises(RuntimeError, match="No task has ended yet, so there is no router"):
        router.route(mixed())
