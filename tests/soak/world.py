"""One configuration under way: ours, the judges, and the checks after every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.soak.config import Config, Round
from tests.soak.ours import build
from tests.soak.tensors import Mismatch, make_param, require_same
from tests.soak.twin import Twin
from tests.support.others import in_another_thread, looking

# A power of two: scaling and unscaling by it loses nothing.
SCALE = 1024.0


class World:
    """Ours and torch by hand over like parameters."""

    def __init__(self, config: Config) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.values)
        self.actual = [make_param(spec, generator) for spec in config.params]
        generator.manual_seed(config.values)
        self.expected = [make_param(spec, generator) for spec in config.params]
        self.twins = [
            Twin(config.name, config.decoupled, spec, param)
            for spec, param in zip(config.params, self.expected)
        ]
        self.settings = [dict(group.settings) for group in config.groups]
        self.named = True
        self.joined = [i for i, g in enumerate(config.groups) if g.joins == 0]
        self.build()
        self.saved: Any = None
        self.scaler: Any = None
        self.generator = generator
        self.steps = 0
        # For the next step: whether another thread takes it, and whether one looks on.
        self.elsewhere = self.watched = False

    @property
    def order(self) -> list[int]:
        """Number the parameters that ours has, in its order."""
        return [i for group in self.joined for i in self.config.members(group)]

    def build(self) -> None:
        """Build the selective optimizer over the parameters as they are."""
        made = build(self.config, self.actual, self.settings, self.joined)
        # The module is kept, as a user keeps it: a tensor that is put into a group
        # is known by it.
        self.ours, self.module = made

    def take(self, plan: Round) -> None:
        """Set gradients, step every side and compare.

        Raises:
            Mismatch: Ours and a judge disagree.
        """
        infinite = plan.way == "infinite" and self._scalable(plan)
        way = plan.way if self._scalable(plan) or plan.way == "closure" else "plain"
        grads = self._gradients(plan)
        self._set(self.expected, grads, plan.in_place)
        if infinite:
            self._spoil(grads)
        step = partial(self._step_ours, way, grads, plan.in_place)
        with looking(self.ours, self.watched):
            in_another_thread(step) if self.elsewhere else step()
        self.elsewhere = self.watched = False
        formulas = [None] * len(self.expected)
        company = {i: self._company(i) for i in self.order}
        for i in self.order if not infinite else ():
            settings = self.settings[self.config.params[i].group]
            formulas[i] = self.twins[i].formula(settings)
            self.twins[i].step(settings, self.kind(i), company[i])
        self.steps += 1
        self.compare(formulas)

    def _company(self, i: int) -> bool:
        """Tell whether momentum begins for another parameter of one call with this."""
        own = self.config.params[i]
        settings = self.settings[own.group]
        if self.config.name != "SGD" or not settings["momentum"]:
            return False
        return any(
            self.twins[j].begins
            and other.group == own.group
            and other.dtype == own.dtype
            and self.twins[j].decay(settings) == self.twins[i].decay(settings)
            for j, other in ((j, self.config.params[j]) for j in self.order)
        )

    def kind(self, i: int) -> str:
        """Name the implementation that steps a parameter."""
        return self.config.groups[self.config.params[i].group].kind

    def _scalable(self, plan: Round) -> bool:
        """Tell whether a GradScaler takes these gradients: not complex or float16."""
        present = [i for i in self.order if i not in plan.absent]
        dtypes = {self.config.params[i].dtype for i in present}
        odd = {"complex64", "complex128", "float16"}
        return any(self.actual[i].numel() for i in present) and not dtypes & odd

    def _gradients(self, plan: Round) -> list[Tensor | None]:
        self.generator.manual_seed(self.config.values + 1 + self.steps)
        grads = []
        for i, spec in enumerate(self.config.params):
            grad = make_param(spec, self.generator).detach() * self.config.grad_scale
            absent = i in plan.absent or i not in self.order
            grads.append(None if absent else grad)
        return grads

    def _set(
        self, params: list[nn.Parameter], grads: list[Tensor | None], in_place: bool
    ) -> None:
        for param, grad, spec in zip(params, grads, self.config.params):
            reused = param.grad if in_place and spec.grad != "sparse" else None
            if grad is None:
                param.grad = None
            elif spec.grad == "sparse":
                param.grad = grad.to_sparse()
            elif reused is not None:
                reused.copy_(grad)
            elif spec.grad == "contiguous":
                param.grad = grad.contiguous().clone()
            elif spec.grad == "strided":
                strides = param.stride()  # with the gaps, which empty_like closes
                param.grad = grad.new_empty_strided(grad.shape, strides).copy_(grad)
            else:
                param.grad = torch.empty_like(param).copy_(grad)

    def _spoil(self, grads: list[Tensor | None]) -> None:
        whole = [grad for grad in grads if grad is not None and grad.numel()]
        spoiled = whole[self.steps % len(whole)]
        spoiled[(0,) * spoiled.ndim] = float("inf")

    def _step_ours(self, way: str, grads: list[Tensor | None], in_place: bool) -> None:
        if way in ("scaled", "infinite"):
            grads = [grad if grad is None else grad * SCALE for grad in grads]
            self._set(self.actual, grads, in_place)
            self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=SCALE)
            self.scaler.scale(torch.ones(()))  # a scaler starts with its first scale
            self.scaler.step(self.ours)
            self.scaler.update(SCALE)
        elif way == "closure":
            loss = self.ours.step(lambda: self._set(self.actual, grads, in_place) or 1)
            if loss != 1:
                raise Mismatch(f"the closure's loss came back as {loss}")
        else:
            self._set(self.actual, grads, in_place)
            self.ours.step()

    def compare(self, formulas: list[Any]) -> None:
        """Compare the parameters.

        Raises:
            Mismatch: Ours and a judge disagree.
        """
        for i, (a, b, formula) in enumerate(
            zip(self.actual, self.expected, formulas, strict=True)
        ):
            require_same(a, b, f"parameter {i}")
            if formula is None:
                continue
            value, error = formula
            if not ((a.detach().double() - value).abs() <= error).all():
                raise Mismatch(f"parameter {i}: {a.tolist()}, by formula {value}")

    def compare_state(self) -> None:
        """Compare the state: entries and bits.

        Raises:
            Mismatch: Ours and torch disagree.
        """
        for i in self.order:
            actual = dict(self.ours.state.get(self.actual[i]) or {})
            expected = self.twins[i].state
            if not expected:  # one whose only steps were dropped may have zeros
                expected = {k: torch.zeros_like(v) for k, v in actual.items()}
                actual = {k: v + 0.0 for k, v in actual.items()}  # of either sign
            if actual.keys() != expected.keys():
                raise Mismatch(f"state of {i}: {[*actual]}, not {[*expected]}")
            for name, value in expected.items():
                if value is not None:
                    require_same(actual[name], value, f"{name} of parameter {i}")
