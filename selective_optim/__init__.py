"""Drop-in SGD, Adam and AdamW that decide per parameter what decays.

Change one import line, and name a policy::

    from selective_optim import AdamW  # was: from torch.optim import AdamW

    optimizer = AdamW(model.parameters(), weight_decay=0.1, wd_policy="no_bias_norm")
    print(optimizer.decay_report())

``policies`` has the rules that decide which parameters decay. ``audit`` shows what a
policy does to a model, without an optimizer. ``decay_report`` shows what decays under
any optimizer. ``checkpoint`` converts state dicts of hand-split groups. ``schedules``
changes weight decay during training.
"""

from selective_optim import audit as audit
from selective_optim import checkpoint as checkpoint
from selective_optim import policies as policies
from selective_optim import schedules as schedules
from selective_optim.adam import Adam as Adam
from selective_optim.adamw import AdamW as AdamW
from selective_optim.any_class import selective as selective
from selective_optim.audit import decay_report as decay_report
from selective_optim.decay import Decay as Decay
from selective_optim.decisions.deciding_for import deciding_for as deciding_for
from selective_optim.groups import layerwise_groups as layerwise_groups
from selective_optim.groups import param_groups as param_groups
from selective_optim.groups import rate_groups as rate_groups
from selective_optim.groups import width_groups as width_groups
from selective_optim.parameters import ParameterInfo as ParameterInfo
from selective_optim.report import DecayReport as DecayReport
from selective_optim.routes.routed import Muon as Muon
from selective_optim.routes.routed import Routed as Routed
from selective_optim.schedules import WeightDecay as WeightDecay
from selective_optim.schedules import proportional_to_lr as proportional_to_lr
from selective_optim.sgd import SGD as SGD

__version__ = "0.2.0.dev0"

# fmt: off
__all__ = [
    "SGD", "Adam", "AdamW", "Decay", "DecayReport", "Muon", "ParameterInfo", "Routed",
    "WeightDecay", "audit", "checkpoint", "decay_report", "deciding_for",
    "layerwise_groups", "param_groups", "policies", "proportional_to_lr",
    "rate_groups", "schedules", "selective", "width_groups",
]
# fmt: on
