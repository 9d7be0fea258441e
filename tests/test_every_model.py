"""``"no_bias_norm"`` on every model of torchvision, timm and transformers.

Without more ado one model in thirty; all of them, in four minutes, with
``EVERY_MODEL=1 python -m pytest tests/test_every_model.py``.
"""

import logging
import os

import pytest

from selective_optim._model_index import ModuleIndex
from selective_optim.policies import named
from tests import zoo
from tests.judgement import disagreements

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SAMPLE = 1 if os.environ.get("EVERY_MODEL") else 30


def exempt(infos):
    policy = named("no_bias_norm")
    return {info.name for info in infos if not policy(info).multiplier}


@pytest.mark.parametrize("library", zoo.LIBRARIES)
def test_no_bias_norm_agrees_with_the_judgement_on_every_model(library, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setattr(logging.Logger, "handle", lambda *args: None)
    found, unbuilt = {}, []
    for name in zoo.names(library, SAMPLE):
        try:
            model = zoo.build(library, name)
        except Exception:
            unbuilt.append(name)
            continue
        infos = ModuleIndex(model).everyone()
        found[name] = disagreements(infos, exempt(infos))

    assert {name: pairs for name, pairs in found.items() if pairs} == {}
    assert set(unbuilt) <= set(zoo.NOT_ALONE)
    assert len(found) > 0.9 * len(zoo.names(library, SAMPLE))
