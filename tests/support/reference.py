"""The formulas, one parameter at a time in float64, written from the papers.

Plain operators on plain tensors: nothing of ``torch.optim``, nothing of the package.

Loshchilov and Hutter 2019, Algorithms 1 and 2; Kingma and Ba 2015, Algorithm 1;
Reddi et al. 2018 for ``amsgrad``; torch's convention for SGD's momentum. Defazio 2025
for "corrected"; Chen et al. 2025, Algorithm 1, for "cautious"; Li et al. 2018 for
targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def decayed(ref: SGDReference | AdamReference, u: Tensor) -> Tensor:
    """Return the parameter after decay that is not the gradient's business."""
    offset = ref.p - ref.target
    if ref.form == "independent":
        return ref.p - ref.lr / ref.lr0 * ref.wd * offset
    if ref.form == "corrected":
        return ref.p - ref.lr**2 / ref.lr0 * ref.wd * offset
    if ref.form == "cautious":
        return ref.p - ref.lr * ref.wd * offset.where(u * offset >= 0, 0 * offset)
    return ref.p - ref.lr * ref.wd * offset


@dataclass
class SGDReference:
    p: Tensor
    lr: float
    wd: float
    form: str = "l2"
    target: Tensor | float = 0.0
    lr0: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    buffer: Tensor | None = None

    def step(self, g: Tensor) -> None:
        g = -g if self.maximize else g
        if self.form == "l2":
            g = g + self.wd * (self.p - self.target)
        if self.momentum:
            if self.buffer is None:
                self.buffer = g.clone()  # not the gradient's memory: torch writes there
            else:
                self.buffer = self.momentum * self.buffer + (1 - self.dampening) * g
            g = g + self.momentum * self.buffer if self.nesterov else self.buffer
        if self.form != "l2":
            self.p = decayed(self, g)
        self.p = self.p - self.lr * g


@dataclass
class AdamReference:
    p: Tensor
    lr: float
    wd: float
    form: str = "l2"
    target: Tensor | float = 0.0
    lr0: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = False
    maximize: bool = False
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    v_max: Tensor | float = 0.0
    t: int = 0

    def step(self, g: Tensor) -> None:
        g = -g if self.maximize else g
        self.t += 1
        if self.form == "l2":
            g = g + self.wd * (self.p - self.target)
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        self.v_max = self.v.where(self.v > self.v_max, self.v_max)
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - self.beta2**self.t)
        if self.form != "l2":
            self.p = decayed(self, m_hat)
        self.p = self.p - self.lr * m_hat / (v_hat**0.5 + self.eps)
