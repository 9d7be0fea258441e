"""Policies and recipes on every model of torchvision, timm and transformers.

Without more ado one model in thirty; all of them, in ten minutes, with
``EVERY_MODEL=1 python -m pytest tests/test_every_model.py``.
"""

import logging
import os

import pytest

from selective_optim.groups import layerwise_groups
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import named
from tests import projects, zoo
from tests.judgement import disagreements

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SAMPLE = 1 if os.environ.get("EVERY_MODEL") else 30


# Models of timm that say nothing of their layers, which timm then groups by the
# head's name alone, and this library by structure.
WITHOUT_MATCHER = {"MetaFormer", "PoolingVisionTransformer", "CSATv2"}
WITHOUT_MATCHER |= {"MobileNetV5Encoder"}


def exempt(infos):
    policy = named("no_bias_norm")
    return {info.name for info in infos if not policy(info).multiplier}


def differences(model):
    """List the recipes that decay otherwise than their project's own code."""
    infos = ModuleIndex(model).everyone()
    return [
        recipe
        for recipe in projects.installed()
        if projects.decayed_by(model, recipe, infos)
        != projects.PROJECTS[recipe][1](model)
    ]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.Logger, "handle", lambda *args: None)


def models(library):
    """Build the models of a library, and check that few cannot be."""
    names, unbuilt = zoo.names(library, SAMPLE), []
    for name in names:
        try:
            model = zoo.build(library, name)
        except Exception:
            unbuilt.append(name)
        else:
            if next(model.parameters(), None) is not None:
                yield name, model
    assert set(unbuilt) <= set(zoo.NOT_ALONE)
    assert len(unbuilt) < 0.1 * len(names)


@pytest.mark.parametrize("library", zoo.LIBRARIES)
def test_no_bias_norm_agrees_with_the_judgement_on_every_model(library):
    pytest.importorskip(library)
    found = {}
    for name, model in models(library):
        infos = ModuleIndex(model).everyone()
        found[name] = disagreements(infos, exempt(infos))

    assert {name: pairs for name, pairs in found.items() if pairs} == {}


@pytest.mark.parametrize("library", zoo.LIBRARIES)
def test_recipes_decay_what_their_projects_decay_on_every_model(library):
    pytest.importorskip(library)
    found = {
        name: differences(model)
        for name, model in models(library)
        if any(p.requires_grad for p in model.parameters())  # or torch refuses
    }

    assert {name: recipes for name, recipes in found.items() if recipes} == {}


def scales(groups, key):
    """Map every parameter to the factor on its rate."""
    return {id(p): group[key] for group in groups for p in group["params"]}


def test_layerwise_groups_equal_layer_decay_of_timm_on_every_model():
    pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    found, silent = [], set()
    for name, model in models("timm"):
        if not hasattr(model, "group_matcher"):
            silent.add(type(model).__name__)
            continue
        theirs = scales(param_groups_layer_decay(model, layer_decay=0.5), "lr_scale")
        ours = scales(layerwise_groups(model, lr=1.0, rate=0.5), "lr")
        found += [name] if ours != theirs else []

    assert found == []
    assert silent <= WITHOUT_MATCHER
