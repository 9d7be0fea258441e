"""Policies: who decays, how much, in which form, and towards what.

A policy maps a :class:`~selective_optim.ParameterInfo` to a :class:`Decay`. Write it as
a name, a mapping, a callable, or an expression, in Python or as text, of
:func:`exclude`, :func:`only`, :func:`scale`, :func:`form`, :func:`towards`,
:func:`first_match`, :func:`layerwise`, :func:`marked`, :func:`named` and ``*``.

How a verdict comes about. ``selective_optim._decider`` goes this way for an optimizer,
``decide.decide_alone`` where there is none:

1. ``as_policy`` in ``named.py`` makes a policy of what the user wrote. A name is looked
   up; any other text is read by ``parser.py``; a mapping becomes a ``FirstMatch``, a
   callable a ``Function``. Both are in ``rules.py`` with the verbs, and what every
   policy can do in ``base.py``. Others are in ``layerwise.py``, ``markers.py`` and
   ``recipes.py``, which has the rules of other projects.
2. ``unmatched.py`` refuses a glob, regular expression or object that matches nothing in
   optimizer and model, unless its policy has ``missing_ok``.
3. ``policy.bind`` prepares for the questions to come: ``layerwise`` measures the model,
   whose layers ``blocks.py`` finds; :func:`marked` and recipes will ask each module for
   its list once (``no_weight_decay.py``).
4. ``decide.py`` asks about each parameter, after it has checked that what the policy
   needs is known: names, modules, shapes. Most policies ask ``selectors.py``: globs,
   classes, modules, predicates, and these joined. What is a norm, a bias, an embedding
   or a weight is known to ``recognition.py``: by the names of attributes and classes,
   by a functional norm that a method hands the parameter to, and by short tables. A
   user's callable is shown a strict view (``callables.py``), where to read what is not
   known raises.
5. The answer is a ``Verdict``: a decay and the reason, in the policy's own words. With
   what was known of the parameter it is a ``Decision`` (``selective_optim.decay``).

``differences.py`` compares what two policies decide. Nothing here imports an optimizer;
to which tensor a decision applies later is found by ``selective_optim._decider``.
"""

from selective_optim.decay import Decay as Decay
from selective_optim.decay import Form as Form
from selective_optim.policies.base import Policy as Policy
from selective_optim.policies.differences import Difference as Difference
from selective_optim.policies.differences import Differences as Differences
from selective_optim.policies.differences import diff as diff
from selective_optim.policies.layerwise import layerwise as layerwise
from selective_optim.policies.markers import exempt_ as exempt_
from selective_optim.policies.markers import marked as marked
from selective_optim.policies.named import PolicyName as PolicyName
from selective_optim.policies.named import WdPolicy as WdPolicy
from selective_optim.policies.named import as_policy as as_policy
from selective_optim.policies.named import named as named
from selective_optim.policies.named import parse as parse
from selective_optim.policies.rules import exclude as exclude
from selective_optim.policies.rules import first_match as first_match
from selective_optim.policies.rules import form as form
from selective_optim.policies.rules import only as only
from selective_optim.policies.rules import scale as scale
from selective_optim.policies.rules import towards as towards
from selective_optim.policies.selectors import Selector as Selector
from selective_optim.policies.selectors import everything as everything
from selective_optim.policies.selectors import is_bias as is_bias
from selective_optim.policies.selectors import is_embedding as is_embedding
from selective_optim.policies.selectors import is_layer_weight as is_layer_weight
from selective_optim.policies.selectors import is_norm as is_norm
from selective_optim.policies.selectors import is_token as is_token
from selective_optim.policies.selectors import is_vector as is_vector

__all__ = [
    "Decay",
    "Difference",
    "Differences",
    "Form",
    "Policy",
    "PolicyName",
    "Selector",
    "WdPolicy",
    "as_policy",
    "diff",
    "everything",
    "exclude",
    "exempt_",
    "first_match",
    "form",
    "is_bias",
    "is_embedding",
    "is_layer_weight",
    "is_norm",
    "is_token",
    "is_vector",
    "layerwise",
    "marked",
    "named",
    "only",
    "parse",
    "scale",
    "towards",
]


def __dir__() -> list[str]:
    return __all__
