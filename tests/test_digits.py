import io
import sys

import pytest
import torch

from benchmarks import __main__ as main_job
from benchmarks.digits.arms import ALL, ARMS, HAND_SPLIT, SELECTIVE, all_decayed, run
from benchmarks.digits.networks import BIAS, GAIN, NETWORKS, WEIGHT, build, kinds
from benchmarks.digits.training import (
    Data,
    batch,
    differences,
    load,
    reproducible,
    snapshot,
    train,
)

EPOCHS = 2
STEPS_PER_EPOCH = 3
TOTAL = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64 * STEPS_PER_EPOCH + 8, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    return Data(images, labels, images[:20], labels[:20])


def results(network, data, arms):
    with reproducible():
        return [run(network, arm, data, EPOCHS, 0, lambda step: None) for arm in arms]


@pytest.mark.parametrize("network", NETWORKS)
def test_selective_arm_ends_with_the_bits_of_hand_split_groups(network, data):
    split, selective, decayed = results(network, data, [HAND_SPLIT, SELECTIVE, ALL])

    assert differences(selective.tensors, split.tensors) == []
    assert differences(selective.tensors, decayed.tensors) != []
    assert (selective.groups, split.groups, decayed.groups) == (2, 4, 2)


@pytest.mark.parametrize("network", NETWORKS)
def test_decay_shrinks_norm_gains_only_where_everything_decays(network, data):
    selective, decayed = results(network, data, [SELECTIVE, ALL])

    assert decayed.history.curve(GAIN)[-1] < selective.history.curve(GAIN)[-1]
    assert selective.history.steps == [0, 5, TOTAL]


@pytest.mark.parametrize("network", NETWORKS)
def test_kinds_hold_every_parameter_once(network):
    model = build(network, seed=0)
    sorted_ = kinds(model)

    actual = sorted(id(param) for params in sorted_.values() for param in params)
    assert actual == sorted(id(param) for param in model.parameters())
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in sorted_[GAIN])
    assert {param.ndim for param in sorted_[BIAS]} == {1}
    assert min(param.ndim for param in sorted_[WEIGHT]) > 1


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("first_step", [1, STEPS_PER_EPOCH, TOTAL - 1])
def test_training_resumes_with_the_same_bits(arm, first_step, data):
    file = io.BytesIO()

    def save(step):
        if step == first_step:
            torch.save((model.state_dict(), optimizer.state_dict()), file)

    with reproducible():
        model = build("conv net", seed=0)
        optimizer = ARMS[arm](model)
        train(model, optimizer, data, EPOCHS, save)
        expected = snapshot(model, optimizer)
        file.seek(0)

        model = build("conv net", seed=1)
        optimizer = ARMS[arm](model)
        model_state, optimizer_state = torch.load(file, weights_only=True)
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        train(model, optimizer, data, EPOCHS, first_step=first_step)

    assert differences(snapshot(model, optimizer), expected) == []


def test_batches_of_an_epoch_hold_no_image_twice(data):
    images = torch.cat([batch(data, 0, s)[0] for s in range(STEPS_PER_EPOCH)])
    assert len(images.unique(dim=0)) == 64 * STEPS_PER_EPOCH


def test_batches_depend_on_seed_and_epoch(data):
    first, again, seed, epoch = (
        batch(data, seed, step)[0]
        for seed, step in [(0, 0), (0, 0), (1, 0), (0, STEPS_PER_EPOCH)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, seed)
    assert not torch.equal(first, epoch)


ONE = torch.ones(2, 3)
DIFFERENCES = {
    "same": ({"a": ONE}, {"a": ONE.clone()}, []),
    "nan": ({"a": ONE * torch.nan}, {"a": ONE * torch.nan}, []),
    "strides": ({"a": ONE.t()}, {"a": ONE.t().contiguous()}, []),
    "value": ({"a": ONE, "b": ONE}, {"a": ONE, "b": ONE + 1e-7}, ["b"]),
    "sign of zero": ({"a": 0 * ONE}, {"a": -0.0 * ONE}, ["a"]),
    "shape": ({"a": ONE}, {"a": ONE.t()}, ["a"]),
    "dtype": ({"a": torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.int32)}, ["a"]),
    "missing": ({"a": ONE, "b": ONE}, {"b": ONE, "c": ONE}, ["a", "c"]),
}


@pytest.mark.parametrize(
    ("first", "second", "expected"), DIFFERENCES.values(), ids=DIFFERENCES
)
def test_differences_name_tensors_that_differ_in_a_bit(first, second, expected):
    assert differences(first, second) == expected


def test_snapshot_holds_parameters_buffers_and_state(data):
    model = build("conv net", seed=0)
    optimizer = all_decayed(model)
    train(model, optimizer, data, epochs=1)

    keys = snapshot(model, optimizer).keys()
    assert {"head.weight", "backbone.1.running_mean", "head.bias: exp_avg"} <= keys


def test_reproducible_restores_settings():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with reproducible():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
    after = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert after == before


def test_require_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit) as caught:
        main_job.main(["--quick"])
    assert "tqdm" in str(caught.value)
    assert str(caught.value).endswith(": pip install -e '.[bench]'")


@pytest.fixture
def main_on_noise(data, monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    pytest.importorskip("tqdm", reason="the main job shows a bar")
    pytest.importorskip("matplotlib", reason="the main job draws")
    monkeypatch.setattr(main_job, "load", lambda device: data)
    monkeypatch.setattr(main_job, "QUICK_EPOCHS", EPOCHS)
    arguments = ["--quick", "--device", "cpu", "--picture", str(tmp_path / "a.png")]
    return lambda: main_job.main(arguments)


def test_main_fails_when_arms_differ(main_on_noise, monkeypatch, capsys):
    monkeypatch.setitem(ARMS, SELECTIVE, all_decayed)
    assert main_on_noise() == 1
    assert (
        "'torch, hand-split' and 'selective_optim' differ in" in capsys.readouterr().out
    )


def test_main_prints_report_accuracy_and_verdict(main_on_noise, capsys, tmp_path):
    assert main_on_noise() == 0
    out = capsys.readouterr().out
    assert out.count("exclude is_norm") == len(NETWORKS)
    assert out.count("ended with identical bits in all") == len(NETWORKS)
    assert all(out.count(arm) > len(NETWORKS) - 1 for arm in ARMS)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_networks_learn_the_digits():
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    data = load()
    with reproducible():
        result = run("conv net", SELECTIVE, data, 3, 0, lambda step: None)
    assert (len(data.labels), len(data.held_out_labels)) == (1438, 359)
    assert result.accuracy > 0.95
