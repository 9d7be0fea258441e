"""fastai's Learner around a selective optimizer: slices, one cycle, exempt norms."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selective_optim
from tests.support.framework_cases import (
    batches,
    exempt_names,
    snapshot,
    unmoved,
)

fastai = pytest.importorskip("fastai")
pytest.importorskip("fastai.callback.schedule")  # gives Learner its fit_one_cycle
from fastai.data.core import DataLoaders  # noqa: E402  # after importorskip
from fastai.learner import Learner  # noqa: E402
from fastai.optimizer import OptimWrapper  # noqa: E402

pytestmark = pytest.mark.integration
STEPS = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(body, nn.Linear(8, 2))


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(part.parameters()) for part in model]


def no_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Give every parameter a gradient of zero, so that decay alone moves it."""
    return (outputs * 0).sum()


def learner(model: nn.Module, opt: Any, loss: Any = no_loss, **arguments: Any) -> Any:
    data = DataLoaders(batches(STEPS, 8, 4), batches(1, 8, 4))
    learn = Learner(
        data,
        model,
        loss_func=loss,
        opt_func=partial(OptimWrapper, opt=opt),
        splitter=body_and_head,
        cbs=[],
        default_cbs=True,
        **arguments,
    )
    learn.remove_cbs([cb for cb in learn.cbs if cb.name in ("progress", "recorder")])
    return learn


@pytest.mark.parametrize("wd_bn_bias", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fastai_decays_what_the_policy_says_whatever_its_flag(name, wd_bn_bias):
    """With a torch optimizer fastai 2.8.12 loses ``wd_bn_bias`` without a word."""
    model = network()
    before = snapshot(model)
    opt = partial(
        getattr(selective_optim, name),
        weight_decay=0.1,
        wd_policy="no_bias_norm",
        model=model,
    )
    learner(model, opt, wd_bn_bias=wd_bn_bias).fit(1, lr=0.1, wd=0.5)
    assert unmoved(before, model) == exempt_names(model)


def test_fastai_loses_its_flag_with_a_torch_optimizer():
    """The reason for the policy; when this fails, fastai honors its flag."""
    model = network()
    before = snapshot(model)
    learner(model, torch.optim.AdamW, wd_bn_bias=False).fit(1, lr=0.1, wd=0.5)
    # A bias of the batch norm is zero, and stays so however much it decays.
    assert unmoved(before, model) == {"0.1.bias"}


def test_rates_by_slice_keep_two_groups_and_shrink_by_their_rate():
    model = network()
    before = snapshot(model)
    opt = partial(selective_optim.AdamW, wd_policy="no_bias_norm", model=model)
    learn = learner(model, opt)
    learn.fit(1, lr=slice(1e-3, 1e-1), wd=0.5)
    groups = learn.opt.opt.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-1])
    for name, lr in {"0.0.weight": 1e-3, "1.weight": 0.1}.items():
        expected = before[name] * (1 - lr * 0.5) ** STEPS
        torch.testing.assert_close(dict(model.named_parameters())[name], expected)


def test_one_cycle_sets_strength_and_never_undoes_an_exemption():
    model = network()
    before = snapshot(model)
    opt = partial(selective_optim.AdamW, wd_policy="no_bias_norm", model=model)
    learn = learner(model, opt)
    learn.fit_one_cycle(1, lr_max=slice(1e-2, 1e-1), wd=0.3)
    assert unmoved(before, model) == exempt_names(model)
    assert [group["weight_decay"] for group in learn.opt.opt.param_groups] == [0.3, 0.3]


def test_one_cycle_has_the_bits_of_torch_where_everything_decays():
    ours, torchs = network(), network()
    loss = nn.functional.cross_entropy
    learner(ours, selective_optim.AdamW, loss).fit_one_cycle(2, 1e-2, wd=0.3)
    fused = partial(torch.optim.AdamW, fused=True)
    learner(torchs, fused, loss).fit_one_cycle(2, 1e-2, wd=0.3)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)


def test_opt_func_without_a_model_finds_it():
    model = network()
    before = snapshot(model)
    opt = partial(selective_optim.AdamW, wd_policy="no_bias_norm")
    learner(model, opt).fit_one_cycle(1, lr_max=slice(1e-2, 1e-1), wd=0.3)
    assert unmoved(before, model) == exempt_names(model)


def test_frozen_body_does_not_decay():
    model = network()
    before = snapshot(model)
    opt = partial(selective_optim.AdamW, wd_policy="matrices")
    learn = learner(model, opt)
    learn.freeze()
    learn.fit(1, lr=0.1, wd=0.5)
    assert unmoved(before, model) == set(before) - {"1.weight"}
