"""What users ask for and the library does as it is: each as one would write it."""

import copy

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, decay_report, selective
from selective_optim.policies import only, towards
from tests.support.compare import assert_same
from tests.support.devices import on_cuda
from tests.support.graphs import captured, side_stream, static_grads

STEPS = range(5)
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}


def grads(params, step):
    torch.manual_seed(step)
    return [torch.randn(param.shape, dtype=param.dtype) for param in params]


# Rows of an embedding that stay as they are


def train_rows(policy, frozen):
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3, dtype=torch.float64)
    mask = torch.ones(5, 1, dtype=torch.float64)
    mask[frozen] = 0
    embedding.weight.register_hook(lambda grad: grad * mask)
    before = embedding.weight.detach().clone()
    optimizer = AdamW(embedding, lr=0.1, weight_decay=0.1, wd_policy=policy)
    for step in STEPS:
        optimizer.zero_grad()
        out = embedding(torch.arange(5))
        (out * grads([out], step)[0]).sum().backward()
        optimizer.step()
    return before, embedding.weight.detach()


def test_rows_without_gradient_stay_under_decay_towards_init():
    """Decay towards 0 shrinks them, whose gradient is 0 and not missing."""
    before, after = train_rows(towards("init"), [0, 3])
    _, shrunk = train_rows("all", [0, 3])
    assert_same(after[[0, 3]], before[[0, 3]])
    torch.testing.assert_close(shrunk[[0, 3]], before[[0, 3]] * (1 - 0.1 * 0.1) ** 5)


def test_the_other_rows_train_as_torch_does_with_decay_by_hand():
    before, after = train_rows(towards("init"), [0, 3])
    rows = nn.Parameter(before.clone())
    oracle = torch.optim.AdamW([rows], lr=0.1, weight_decay=0)
    for step in STEPS:
        rows.grad = grads([rows], step)[0]
        with torch.no_grad():
            rows -= 0.1 * 0.1 * (rows - before)
        oracle.step()
    # The pull is one operation there and three here.
    assert_same(after[[1, 2, 4]], rows[[1, 2, 4]], rtol=1e-12)


# A target that moves: FedProx


def test_assigned_policy_pulls_towards_what_the_model_is_in_each_round():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    mu, lr = 0.3, 0.1
    optimizer = SGD(model, lr, weight_decay=mu, wd_policy=towards("init"))
    oracle = torch.optim.SGD(twin.parameters(), lr)
    for turn in range(3):
        for each in (model, twin):  # what the server sends
            with torch.no_grad():
                for param, sent in zip(
                    each.parameters(), grads(each.parameters(), turn)
                ):
                    param.copy_(sent)
        optimizer.wd_policy = towards("init")
        begun = [param.detach().clone() for param in twin.parameters()]
        for step in STEPS:
            for param, grad in zip(model.parameters(), grads(begun, step)):
                param.grad = grad
            optimizer.step()
            pairs = list(zip(twin.parameters(), begun))
            proximal = sum((p - t).square().sum() for p, t in pairs) * mu / 2
            oracle.zero_grad()
            proximal.backward()
            for param, grad in zip(twin.parameters(), grads(begun, step)):
                param.grad += grad
            oracle.step()
    # Autograd forms mu * (p - t) in another order.
    assert_same(list(model.parameters()), list(twin.parameters()), rtol=1e-12)


# Decay of LoRA's B alone


class Adapted(nn.Module):
    """A frozen layer with LoRA, named as in peft."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})


def peft_model():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"]))


@pytest.mark.parametrize(
    "make", [Adapted, pytest.param(peft_model, marks=pytest.mark.integration)]
)
def test_decay_of_loras_b_alone_is_that_of_two_groups_by_hand(make):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(
        filter(lambda p: p.requires_grad, model.parameters()),
        weight_decay=0.1, wd_policy=only("*lora_B*"), fused=False,
    )  # fmt: skip
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if ("lora_B" in n) is b], "weight_decay": wd}
        for b, wd in ((True, 0.1), (False, 0.0))
    ]
    oracle = torch.optim.AdamW(groups, fused=False)
    assert [len(group["params"]) for group in groups] == [len(trained) // 2] * 2
    for step in STEPS:
        for each in (trained, [p for _, p in named]):
            for param, grad in zip(each, grads(each, step)):
                param.grad = grad
        optimizer.step()
        oracle.step()
    assert_same(trained, [p for _, p in named])


# A schedule in the optimizer, as in the Annotated Transformer


def with_own_schedule(cls):
    class Scheduled(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._step, self._rate = 0, 0.0

        def step(self, closure=None):
            self._step += 1
            self._rate = 0.1 * min(self._step**-0.5, self._step * 3**-1.5)
            for group in self.param_groups:
                group["lr"] = self._rate
            return super().step(closure)

    return Scheduled


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
def test_subclass_may_count_its_steps_under_the_usual_name(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    torchs = getattr(torch.optim, name)
    ours = with_own_schedule(selective(torchs))
    implementation = {} if name == "NAdam" else {"fused": False, "foreach": False}
    shared = {**SETTINGS, **implementation}
    optimizer = ours(model.parameters(), **shared, wd_policy="no_bias")
    groups = [{"params": twin.weight}, {"params": twin.bias, "weight_decay": 0.0}]
    oracle = with_own_schedule(torchs)(groups, **shared)
    for step in STEPS:
        for each in (model, twin):
            for param, grad in zip(each.parameters(), grads(each.parameters(), step)):
                param.grad = grad
        optimizer.step()
        oracle.step()
    assert optimizer._step == oracle._step == len(STEPS)
    assert_same(model, twin)


# Groups that say of which model they are


@pytest.mark.parametrize("cls", [SGD, AdamW, selective(torch.optim.NAdam)])
def test_groups_may_be_tagged_with_the_name_of_their_model(cls):
    parts = {"student": nn.Linear(4, 3), "projector": nn.Linear(3, 2)}
    groups = [{"params": m.parameters(), "model": name} for name, m in parts.items()]
    optimizer = cls(groups, **SETTINGS, wd_policy="no_bias")
    again = cls(
        [{"params": m.parameters()} for m in parts.values()],
        **SETTINGS, wd_policy="no_bias",
    )  # fmt: skip
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    for each in (optimizer, again):
        assert [group["model"] for group in each.param_groups] == list(parts)
        decays = [row.weight_decay for row in each.decay_report()]
        assert decays == [0.1, 0, 0.1, 0]


# Only the import is changed, and the groups stay split by hand


@pytest.mark.parametrize("make", [SGD, AdamW, selective(torch.optim.NAdam)])
def test_report_with_the_model_tells_what_a_list_of_names_missed(make):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 3))
    model.add_module("norm", nn.LayerNorm(3))
    named = list(model.named_parameters())
    listed = [name.endswith(("bias", "LayerNorm.weight")) for name, _ in named]
    groups = [
        {"params": [p for (_, p), out in zip(named, listed) if out is exempt], **decay}
        for exempt, decay in ((False, {}), (True, {"weight_decay": 0.0}))
    ]
    report = decay_report(make(groups, **SETTINGS), model)
    assert report.remark == "looks wrong: 1 norm decays ('norm.weight')"
    assert report["norm.weight"].weight_decay == 0.1


# A report in half precision, of bare tensors


def test_report_tells_of_rounding_with_the_model_and_without():
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    params = list(model.parameters())
    optimizer = AdamW(params, lr=1e-4, weight_decay=0.1, wd_policy="no_bias")
    found = "note: known from Linear, found alive with these parameters"
    for report in (
        optimizer.decay_report(),
        decay_report(optimizer),
        decay_report(optimizer, model),
    ):
        loss, *notes = report.remark.splitlines()
        assert loss.startswith("looks wrong: 'weight' hardly decays: torch.bfloat16")
        assert notes == [found]
        assert not report.agrees
    other = nn.Linear(4, 4)
    several = [optimizer, SGD(other, lr=0.1, weight_decay=0.1, wd_policy="no_bias")]
    assert decay_report(several, [model, other]).remark == loss


# What a captured graph sees


@on_cuda
def test_graph_sees_tensors_and_keeps_numbers_until_it_is_captured_again(device):
    """A rate that is a tensor is read at each replay; a decay or policy is not."""

    def run(edit):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 4, device=device)) for _ in range(2)]
        lr = torch.tensor(0.1, device=device)
        optimizer = AdamW(
            params, lr, weight_decay=0.1, wd_policy="all", capturable=True
        )
        static_grads(params, 0)
        with side_stream(device):
            optimizer.step()
        replay = captured(device, optimizer.step)
        edit(optimizer)
        replay()
        replayed = [param.detach().clone() for param in params]
        captured(device, optimizer.step)()
        return replayed, params

    def new_decay(optimizer):
        optimizer.param_groups[0]["weight_decay"] = 0.0

    def new_policy(optimizer):
        optimizer.wd_policy = "none"

    def new_rate(optimizer):
        optimizer.param_groups[0]["lr"].fill_(0.01)

    (plain, later), decayed = run(lambda optimizer: None), [new_decay, new_policy]
    for edit in decayed:
        replayed, again = run(edit)
        assert_same(replayed, plain)
        assert not torch.equal(again[0], later[0])
    assert not torch.equal(run(new_rate)[0][0], plain[0])
