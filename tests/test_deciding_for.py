"""Factories that own the constructor: the model and the policy come from around."""

import threading
from contextlib import suppress

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import (
    SGD,
    Adam,
    AdamW,
    decay_report,
    deciding_for,
    param_groups,
    selective,
)
from selective_optim.policies import exclude, is_bias


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def factory(net, cls=AdamW, **arguments):
    """Make an optimizer as frameworks do: of bare tensors, in groups of its own."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:]}]
    return cls(groups, lr=0.01, weight_decay=0.5, **arguments)


def exempt(optimizer):
    return [row.name for row in optimizer.decay_report().rows if not row.weight_decay]


NO_BIAS_NORM = ["0.bias", "1.weight", "1.bias", "2.bias"]


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_factory_gets_the_model_and_the_policy(cls):
    model = net()
    with deciding_for(model, wd_policy="no_bias_norm"):
        optimizer = factory(model, cls)
    assert exempt(optimizer) == NO_BIAS_NORM


def test_factory_that_passes_a_policy_on_gets_the_model():
    model = net()
    with deciding_for(model):
        assert exempt(factory(model, wd_policy="no_bias_norm")) == NO_BIAS_NORM


def test_what_the_constructor_was_given_comes_first():
    model, other = net(), net()
    with deciding_for(other, wd_policy="no_bias_norm"):
        assert exempt(factory(model, model=model, wd_policy="no_norm")) == [
            *("1.weight", "1.bias"),
        ]


def test_the_inner_block_counts_and_ends():
    model, inner = net(), net()
    with deciding_for(model, wd_policy="no_bias"):
        with deciding_for(inner, wd_policy="no_norm"):
            assert exempt(factory(inner)) == ["1.weight", "1.bias"]
        assert exempt(factory(model)) == ["0.bias", "1.bias", "2.bias"]
    assert exempt(factory(model)) == []


def test_block_ends_where_the_factory_fails():
    with suppress(ZeroDivisionError), deciding_for(net(), wd_policy="no_bias"):
        raise ZeroDivisionError
    assert exempt(factory(net())) == []


def test_model_may_be_asked_for_when_there_is_one():
    made = []

    def train():  # as Trainer(model_init=...) does
        made.append(net())
        return factory(made[0])

    with deciding_for(lambda: made[0], wd_policy="no_bias_norm"):
        assert exempt(train()) == NO_BIAS_NORM


def test_container_makes_an_optimizer_per_part():
    """As torchtitan's: one optimizer per pipeline stage, of bare tensors."""
    parts = [nn.Linear(3, 4), nn.LayerNorm(4)]
    with deciding_for(parts, wd_policy=exclude(is_bias)):
        optimizers = [SGD(list(p.parameters()), weight_decay=0.5) for p in parts]
    assert [exempt(optimizer) for optimizer in optimizers] == [["bias"], ["bias"]]


def test_parameter_of_another_model_is_told():
    with (
        deciding_for(net(), wd_policy="no_bias"),
        pytest.raises(ValueError, match="in none of the modules given as `model`"),
    ):
        factory(net())


def test_optimizer_without_a_policy_is_left_alone():
    with deciding_for(net()):
        assert exempt(factory(net())) == []


def test_other_threads_are_left_alone():
    model, seen = net(), []

    def in_another_thread():
        thread = threading.Thread(target=lambda: seen.append(exempt(factory(model))))
        with deciding_for(model, wd_policy="no_bias"):
            thread.start()
            thread.join()

    with pytest.warns(UserWarning, match=UNUSED):
        in_another_thread()
    assert seen == [[]]


UNUSED = "no optimizer of selective_optim was made inside deciding_for"


def made_after(model):
    with deciding_for(model, wd_policy="no_bias"):
        pass
    return factory(model)


def made_of_torch(model):
    with deciding_for(model, wd_policy="no_bias"):
        return factory(model, torch.optim.AdamW)


@pytest.mark.parametrize("make", [made_after, made_of_torch])
def test_block_in_which_nothing_was_made_warns_once(make):
    with pytest.warns(UserWarning, match=UNUSED) as caught:
        make(net())
    (warning,) = caught
    assert str(warning.message) == (
        "no optimizer of selective_optim was made inside deciding_for, so its "
        "`wd_policy` exclude(is_bias) decides nothing. Make selective_optim.AdamW or "
        "selective_optim.selective(cls)(...) inside, or give the framework that class."
    )


@pytest.mark.parametrize("cls", [AdamW, selective(torch.optim.NAdam)])
def test_advice_of_a_block_that_was_not_used_leads_to_the_policy(cls):
    model = net()
    with deciding_for(model, wd_policy="no_bias_norm"):
        assert exempt(factory(model, cls)) == NO_BIAS_NORM


def test_block_is_used_by_what_a_block_inside_makes_and_by_groups():
    model = net()
    with (
        deciding_for(model, wd_policy="no_bias"),
        suppress(ZeroDivisionError),
        deciding_for(model, wd_policy="no_norm"),
    ):
        factory(model)
        raise ZeroDivisionError
    with deciding_for(model, wd_policy="no_bias"):
        param_groups(model, None, weight_decay=0.1)


def test_block_without_a_policy_and_one_that_fails_say_nothing():
    with deciding_for(net()):
        pass
    with suppress(ZeroDivisionError), deciding_for(net(), wd_policy="no_bias"):
        raise ZeroDivisionError


def test_optimizer_from_a_block_is_as_any():
    model = net()
    with deciding_for(model, wd_policy="no_bias_norm"):
        around = factory(model)
    given = factory(model, wd_policy="no_bias_norm", model=model)
    assert around.decay_report() == given.decay_report()
    head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="in none of the modules"):
        around.add_param_group({"params": list(head.parameters())})
    assert type(around) is AdamW


@pytest.mark.parametrize("model", [3, "net", [nn.Linear(2, 2), 3]], ids=str)
def test_what_is_no_model_is_refused_at_once(model):
    with pytest.raises(TypeError, match="`model` must be"), deciding_for(model):
        pytest.fail("the block was entered")


def test_wrong_policy_is_refused_at_once():
    with (
        pytest.raises(ValueError, match="Did you mean"),
        deciding_for(net(), wd_policy="no_bais"),
    ):
        pytest.fail("the block was entered")


def test_error_of_a_factory_names_the_way_out():
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))]}]
    with pytest.raises(ValueError, match="module types") as caught:
        AdamW(groups, wd_policy="no_bias_norm")
    assert str(caught.value).endswith(
        'Pass model=model or model.named_parameters(), or use wd_policy="matrices", '
        "which decays whatever has two or more dimensions; where a framework makes the "
        "optimizer, write with "
        "selective_optim.deciding_for(model): around it."
    )
    assert selective_optim.deciding_for is deciding_for


# Frameworks.


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_plus_of_peft():
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    from tests.test_frameworks_transformers import llama

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="lora_only")
    model = peft.get_peft_model(llama(), config)
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}

    def make():
        return optimizers.create_loraplus_optimizer(
            model, AdamW, **settings, wd_policy="no_bias_norm * exclude('*lora_B*')"
        )

    with deciding_for(model):
        told = make()
    for optimizer in (told, make()):  # which finds the model
        decayed = [row.name for row in optimizer.decay_report() if row.weight_decay]
        assert decayed
        assert all("lora_A" in name for name in decayed)
        assert len(optimizer.param_groups) == 4


@pytest.mark.integration
def test_trainer_that_chooses_the_class_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.test_frameworks_transformers import llama, trainer

    class Own(transformers.Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return AdamW, {"lr": 1e-3, "wd_policy": "no_bias_norm"}

    model = llama()
    training = Own(model, trainer(model, tmp_path).args)
    training.args.weight_decay = 0.1
    with deciding_for(model):
        training.create_optimizer()
    report = training.optimizer.decay_report()
    assert all(row.name for row in report.rows)
    assert {row.form for row in report.rows} == {"decoupled"}


@pytest.mark.integration
def test_trainer_with_a_class_alone_and_again(tmp_path):
    """The Trainer takes "model" out of the arguments, and has none the second time."""
    pytest.importorskip("transformers")
    from tests.test_frameworks_transformers import llama, trainer

    model = llama()
    arguments = {"lr": 1e-3, "weight_decay": 0.1, "wd_policy": "no_bias_norm"}
    training = trainer(model, tmp_path, optimizer_cls_and_kwargs=(AdamW, arguments))
    training.args.weight_decay = 0.1
    reports = []
    for _ in range(2):
        with deciding_for(model):
            training.create_optimizer()
        reports.append(training.optimizer.decay_report())
        training.optimizer = None
    assert reports[0] == reports[1]
    assert 0 < sum(bool(row.weight_decay) for row in reports[0].rows) < 30


@pytest.mark.integration
def test_trainer_that_makes_the_model_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.test_frameworks_transformers import llama, texts, trainer

    training = transformers.Trainer(
        model_init=llama,
        args=trainer(llama(), tmp_path).args,
        train_dataset=texts(),
        optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-3}),
    )
    training.args.weight_decay = 0.1
    training.args.save_strategy = "no"
    with deciding_for(lambda: training.model, wd_policy="no_bias_norm"):
        training.train()
    rows = decay_report(training.optimizer).rows  # inside Accelerate's wrapper
    assert any(row.reason == "exclude is_norm" for row in rows)
