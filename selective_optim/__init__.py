"""Drop-in SGD, Adam and AdamW that decide per parameter what decays."""

from selective_optim import policies as policies
from selective_optim.adam import Adam as Adam
from selective_optim.adamw import AdamW as AdamW
from selective_optim.any_class import selective as selective
from selective_optim.decay import Decay as Decay
from selective_optim.groups import param_groups as param_groups
from selective_optim.layers import layerwise_groups as layerwise_groups
from selective_optim.parameters import ParameterInfo as ParameterInfo
from selective_optim.report import DecayReport as DecayReport
from selective_optim.schedules import WeightDecay as WeightDecay
from selective_optim.schedules import proportional_to_lr as proportional_to_lr
from selective_optim.sgd import SGD as SGD

__version__ = "0.2.0.dev0"
