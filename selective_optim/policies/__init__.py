"""Policies: who decays, how much, in which form, and towards what.

A policy maps a ``ParameterInfo`` to a ``Decay``. Write it as a name, a mapping, a
callable, or an expression in Python or as text. An expression has the functions
``exclude``, ``only``, ``scale``, ``fixed``, ``form``, ``towards``, ``first_match``,
``layerwise``, ``marked`` and ``named``, and ``*`` between them.

How a decision is made, by ``selective_optim.decisions.decider`` for an optimizer and by
``differences.decide_alone`` where there is none:

1. ``as_policy`` in ``named.py`` makes a policy of a name, a text, a mapping or a
   callable. What every policy can do is in ``selectors.py``, the verbs in ``rules.py``;
   other policies in ``layerwise.py`` and ``recipes.py``, the rules of other projects
   and authors.
2. ``decide.require_matches`` refuses a glob, regular expression or object that matches
   nothing in optimizer and model, unless its policy has ``missing_ok``.
3. ``policy.bind`` prepares: ``layerwise`` measures the model, whose layers
   ``blocks.py`` finds; ``marked`` and recipes ask each module for its list once.
4. ``decide.decide`` checks that names, modules and shapes are known as far as the
   policy needs them, and asks it about each parameter. Policies ask ``selectors.py``;
   the ready-made ones of ``predicates.py`` ask ``recognition.py``, which knows norms,
   biases, embeddings and weights. A user's callable is shown a strict view, which
   raises where it reads what is not known.
"""

from selective_optim.decay import Decay as Decay
from selective_optim.decay import Form as Form
from selective_optim.policies.differences import Difference as Difference
from selective_optim.policies.differences import Differences as Differences
from selective_optim.policies.differences import diff as diff
from selective_optim.policies.layerwise import layerwise as layerwise
from selective_optim.policies.named import PolicyName as PolicyName
from selective_optim.policies.named import WdPolicy as WdPolicy
from selective_optim.policies.named import as_policy as as_policy
from selective_optim.policies.named import named as named
from selective_optim.policies.named import parse as parse
from selective_optim.policies.predicates import everything as everything
from selective_optim.policies.predicates import is_bias as is_bias
from selective_optim.policies.predicates import is_embedding as is_embedding
from selective_optim.policies.predicates import is_hidden_matrix as is_hidden_matrix
from selective_optim.policies.predicates import is_hidden_weight as is_hidden_weight
from selective_optim.policies.predicates import is_layer_weight as is_layer_weight
from selective_optim.policies.predicates import is_norm as is_norm
from selective_optim.policies.predicates import is_output as is_output
from selective_optim.policies.predicates import is_token as is_token
from selective_optim.policies.predicates import is_vector as is_vector
from selective_optim.policies.recipes import exempt_ as exempt_
from selective_optim.policies.recipes import marked as marked
from selective_optim.policies.rules import exclude as exclude
from selective_optim.policies.rules import first_match as first_match
from selective_optim.policies.rules import fixed as fixed
from selective_optim.policies.rules import form as form
from selective_optim.policies.rules import only as only
from selective_optim.policies.rules import scale as scale
from selective_optim.policies.rules import towards as towards
from selective_optim.policies.selectors import Policy as Policy
from selective_optim.policies.selectors import Selector as Selector

# fmt: off
__all__ = [
    "Decay", "Difference", "Differences", "Form", "Policy", "PolicyName",
    "Selector", "WdPolicy", "as_policy", "diff", "everything", "exclude", "exempt_",
    "first_match", "fixed", "form", "is_bias", "is_embedding", "is_hidden_matrix",
    "is_hidden_weight", "is_layer_weight", "is_norm", "is_output", "is_token",
    "is_vector", "layerwise", "marked", "named", "only", "parse", "scale",
    "towards",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__
