"""Policies as text, drawn: any expression is read back, any text read or refused."""

from __future__ import annotations

import contextlib
import re

import pytest
from torch import nn

from selective_optim.policies import (
    everything,
    exclude,
    first_match,
    fixed,
    form,
    is_bias,
    is_norm,
    is_vector,
    layerwise,
    marked,
    named,
    parse,
    scale,
    towards,
)
from selective_optim.policies.selectors import as_selector
from tests.test_policy_text import LlamaStyleNorm

pytest.importorskip("hypothesis", reason="hypothesis draws these cases")
from hypothesis import given
from hypothesis import strategies as st

globs = st.text("ab.*?[]'\"\\{}é ", min_size=1).map(as_selector)
leaves = st.one_of(
    globs,
    st.sampled_from([is_bias, is_norm, is_vector, everything]),
    st.sampled_from([nn.LayerNorm, nn.Linear, LlamaStyleNorm]).map(as_selector),
    st.sampled_from(["a|b", r"\.bias$", "'"]).map(re.compile).map(as_selector),
)
selectors = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)
numbers = st.floats(0, 1e9, allow_nan=False)
factors = st.one_of(
    st.builds(exclude, selectors, selectors, missing_ok=st.booleans()),
    st.builds(scale, selectors, by=numbers),
    st.builds(fixed, st.floats(0, 1e6), selectors),
    st.builds(towards, st.floats(-1e6, 1e6) | st.just("init"), selectors),
    st.builds(form, st.sampled_from(["independent", "cautious"]), selectors),
    st.builds(layerwise, numbers),
    st.dictionaries(selectors, numbers, min_size=1).map(first_match),
    st.sampled_from([marked(), named("dinov2"), form("l2")]),
)
expressions = st.recursive(
    factors, lambda inner: st.builds(lambda a, b: a * b, inner, inner), max_leaves=4
)


@given(expressions)
def test_any_expression_is_read_back(policy):
    assert parse(repr(policy)) == policy


@given(st.text("exclude(is_bias)*'\"\\.[]{}|&~, 0.5=é\nn"))
def test_any_text_is_read_or_refused_with_words(text):
    with contextlib.suppress(ValueError):
        parse(text)  # no other error, and nothing is run
