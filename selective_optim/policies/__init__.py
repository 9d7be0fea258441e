"""Policies: who decays, how much and in which form.

A policy maps a :class:`~selective_optim.ParameterInfo` to a :class:`Decay`. Write
it as a name, a mapping, a callable, or an expression of :func:`exclude`,
:func:`only`, :func:`scale`, :func:`form`, :func:`towards` and ``*``.

How a verdict comes about, in the order of time:

1. ``as_policy`` (``named``) makes a policy of what the user wrote: a name is looked
   up, a text that is more is read (``parser``), a mapping becomes ``first_match``, a
   callable a ``Function``.
2. Selectors (``selectors``) are what a policy asks: globs, classes, modules,
   predicates. The predicates rest on ``recognition``: a bias by the name of the
   attribute, a norm by the class of the module that holds it, or by a functional
   norm that the module hands it to.
3. ``require_matches`` (``unmatched``) refuses a glob that matches no parameter.
4. ``policy.bind`` gives policies that look at the whole model (``layerwise``,
   ``marked``) a look at it, once.
5. ``decide`` (``decide``) asks about each parameter. It first checks that what the
   policy needs is known: names, modules, shapes. A callable is shown a strict view
   of the parameter (``callables``), so that it cannot decide on what is not there.
6. The answer is a ``Verdict``: a decay and the reason, in the policy's own words.
   With what was known of the parameter it becomes a ``Decision``.

Nothing here knows an optimizer; to which tensor a decision applies at a step is
the business of ``selective_optim._decision_table``.
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
