"""The kernels by one name, for those to whom it is all the same which it is."""

from selective_optim._adam_kernel import AdamKernel as AdamKernel
from selective_optim._settings import FusedCall as FusedCall
from selective_optim._settings import Group as Group
from selective_optim._settings import Lists as Lists
from selective_optim._settings import Scaling as Scaling
from selective_optim._settings import Setting as Setting
from selective_optim._settings import State as State
from selective_optim._settings import States as States
from selective_optim._settings import is_zero as is_zero
from selective_optim._sgd_kernel import SGDKernel as SGDKernel

Kernel = AdamKernel | SGDKernel
