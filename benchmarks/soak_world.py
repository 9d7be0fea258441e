"""One configuration under way: ours, the judges, and the checks after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import selective_optim
from benchmarks.soak_config import KINDS, Config, Round
from benchmarks.soak_tensors import Mismatch, make_param, require_same
from benchmarks.soak_twin import Twin
from selective_optim import Decay
from selective_optim.policies import as_policy, exclude, first_match, form, scale

# A power of two: scaling and unscaling by it loses nothing.
SCALE = 1024.0


@dataclass(frozen=True)
class Table:
    """A policy as a callable that pickles."""

    decays: tuple[Decay, ...]

    def __call__(self, info: Any) -> Decay:
        return self.decays[int(info.name[1:])]


def policy_of(config: Config) -> Any:
    """Write the same verdicts as a callable, a mapping, or a product of policies."""
    decays = {f"p{i}": param.decay for i, param in enumerate(config.params)}
    if config.policy in ("callable", "by group"):
        return Table(tuple(decays.values()))
    late = {"missing_ok": True}  # groups may join later
    if config.policy == "mapping":
        return first_match(decays, **late)
    product = as_policy("all")
    for name, decay in decays.items():
        by = decay.multiplier
        product *= scale(name, by=by, **late) if by else exclude(name, **late)
        if decay.form:
            product *= form(decay.form, name, **late)
    return product


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
        self.ours = self.build()
        self.saved: Any = None
        self.scaler: Any = None
        self.generator = generator
        self.steps = 0

    def members(self, group: int) -> list[int]:
        """Number the parameters of a group."""
        return [i for i, p in enumerate(self.config.params) if p.group == group]

    @property
    def order(self) -> list[int]:
        """Number the parameters that ours has, in its order."""
        return [i for group in self.joined for i in self.members(group)]

    def group_dict(self, group: int) -> dict[str, Any]:
        """Write a group as a user would."""
        named = [(f"p{i}", self.actual[i]) for i in self.members(group)]
        bare = self.config.source == "model"
        own = {"wd_policy": policy_of(self.config)} if self._by_group else {}
        return {
            "params": [param for _, param in named] if bare else named,
            **self.settings[group],
            **KINDS[self.config.groups[group].kind],
            **own,
        }

    @property
    def _by_group(self) -> bool:
        several = self.config.source in ("pairs", "model")
        return self.config.policy == "by group" and several

    def build(self) -> Any:
        """Build the selective optimizer over the parameters as they are."""
        config = self.config
        arguments = {**self.settings[0], **KINDS[config.groups[0].kind]}
        if config.name != "AdamW":
            arguments["decoupled_weight_decay"] = config.decoupled
        if not self._by_group:
            arguments["wd_policy"] = policy_of(config)
        # Kept, as a user keeps the model: a tensor put into a group is known by it.
        module = nn.ParameterDict({f"p{i}": p for i, p in enumerate(self.actual)})
        self.module = module
        params: Any = [self.group_dict(group) for group in self.joined]
        if config.source == "model":
            arguments["model"] = module
        elif config.source == "module":
            params = module
        elif config.source == "generator":
            params = module.parameters()
        return getattr(selective_optim, config.name)(params, **arguments)

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
        self._step_ours(way, grads, plan.in_place)
        formulas = [None] * len(self.expected)
        for i in self.order if not infinite else ():
            settings = self.settings[self.config.params[i].group]
            formulas[i] = self.twins[i].formula(settings)
            self.twins[i].step(settings, self.kind(i))
        self.steps += 1
        self.compare(formulas)

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
