"""Muon for the hidden matrices of a model, and AdamW for the rest, in one optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selective_optim._optimizer import Model
from selective_optim._text import warn
from selective_optim.adamw import AdamW
from selective_optim.policies.named import WdPolicy
from selective_optim.policies.predicates import (
    everything,
    is_embedding,
    is_hidden_matrix,
    is_matrix,
)
from selective_optim.policies.selectors import Selector, as_selector
from selective_optim.report import amount
from selective_optim.routes.routed import Routed

# torch's, of its Newton-Schulz iteration (torch/optim/_muon.py).
COEFFICIENTS = (3.4445, -4.775, 2.0315)


class Muon(Routed):
    """One optimizer: ``torch.optim.Muon`` for hidden matrices, AdamW for the rest.

    Hidden matrices are weights of two dimensions that are neither embedding nor output
    layer (``policies.is_hidden_matrix``). AdamW steps all others, also convolutions and
    stacked experts. ``selective(torch.optim.Muon)`` is torch's class for matrices only.

    Args:
        params: As for ``Routed``.
        lr: Learning rate of Muon, >= 0.
        weight_decay: Decay of Muon and AdamW, >= 0.
        momentum: Decay rate of Muon's average of gradients.
        nesterov: Use Nesterov's momentum in Muon.
        ns_coefficients: Coefficients of Muon's Newton-Schulz iteration.
        eps: Added to the norm that the iteration divides by.
        ns_steps: Number of iterations.
        adjust_lr_fn: How Muon's rate depends on the shape of a matrix: ``"original"``
            (the default) or ``"match_rms_adamw"``, for rates that suit AdamW.
        rest: Arguments of AdamW.
        output: Selector of the output layer, if the model does not show which it is.
        wd_policy: Which parameters decay, under Muon and AdamW.
        model: The module, or modules, that hold the parameters.

    Raises:
        ImportError: This torch has no Muon (before 2.9).
        TypeError: AdamW does not take one of the arguments in ``rest``.
        ValueError: It is not known which kind of layer holds a parameter.

    Warns:
        UserWarning: The output layer is not certain, or a tenth or more of the elements
            of weights have more than two dimensions.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)
        ... )
        >>> optimizer = Muon(model.parameters(), output="2.*", rest=dict(lr=3e-4))
        >>> [(row.name, row.route) for row in optimizer.decay_report()][:2]
        [('1.weight', 'muon'), ('0.weight', 'adamw')]

    Source:
        ``torch/optim/_muon.py``; Jordan et al. 2024, "Muon: An optimizer for hidden
        layers in neural networks".
    """

    _may_be_empty = True  # on some models one of the two steps nothing

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rest: Mapping[str, Any] | None = None,
        output: Any = None,
        wd_policy: WdPolicy = None,
        model: Model = None,
    ) -> None:
        muon = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        cls = getattr(torch.optim, "Muon", None)
        if cls is None:
            raise ImportError(
                f"torch {torch.__version__} has no Muon; 2.9 has. Type "
                f"pip install -U torch."
            )
        hidden: Selector = is_hidden_matrix
        if output is not None:
            hidden = is_matrix & ~is_embedding & ~as_selector(output)
        super().__init__(
            params,
            {"muon": (hidden, cls, muon), "adamw": (everything, AdamW, rest or {})},
            weight_decay=weight_decay,
            wd_policy=wd_policy,
            model=model,
        )
        self._warn_of_wide()

    def _warn_of_wide(self) -> None:
        """Tell the share of weights that Muon could step were they matrices."""
        params = [param for group in self.param_groups for param in group["params"]]
        # Tables of positions have a first dimension of 1.
        wide = [p.numel() for p in params if p.ndim > 2 and p.shape[0] > 1]
        share = sum(wide) / max(sum(p.numel() for p in params), 1)
        if share >= 0.1:
            warn(
                f"torch's Muon steps only matrices, so AdamW steps "
                f"{amount(len(wide), 'weight')} of more than two dimensions, "
                f"{share:.0%} of all elements. To step convolutions "
                f"with Muon, use Routed instead, with the route "
                f"'muon': (is_hidden_weight, timm.optim.Muon, dict(lr=0.02))."
            )
