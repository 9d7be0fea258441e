"""The decay report: records, printed table, notebook table and picture."""

import json
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from selective_optim import SGD, Adam, AdamW, decay_report
from selective_optim.policies import exclude, form
from selective_optim.report import MANY_BARS
from tests.support.nets import Net


def report_of(params, **settings):
    settings = {"weight_decay": 0.5, "wd_policy": "no_bias_norm", **settings}
    return AdamW(params, **settings).decay_report()


def group_per_tensor(model, **settings):
    return [
        {"params": [p], **{key: value(i) for key, value in settings.items()}}
        for i, p in enumerate(model.parameters())
    ]


def test_rows_tell_everything_of_each_parameter():
    rows = report_of(Net().parameters(), lr=0.25).rows
    actual = [
        (r.group, r.name, tuple(r.shape), r.numel, r.lr, r.weight_decay, r.form)
        for r in rows
    ]
    expected = [
        (0, "scale", (), 1, 0.25, 0.5, "decoupled"),
        (0, "empty", (0, 3), 0, 0.25, 0.5, "decoupled"),
        (0, "body.0.weight", (4, 3), 12, 0.25, 0.5, "decoupled"),
        (0, "body.0.bias", (4,), 4, 0.25, 0.0, "decoupled"),
        (0, "body.1.weight", (4,), 4, 0.25, 0.0, "decoupled"),
        (0, "body.1.bias", (4,), 4, 0.25, 0.0, "decoupled"),
        (0, "head.weight", (2, 4), 8, 0.25, 0.5, "decoupled"),
        (0, "head.bias", (2,), 2, 0.25, 0.0, "decoupled"),
    ]
    assert actual == expected
    assert [r.reason for r in rows] == [
        *["decays in full"] * 3,
        "exclude is_bias",
        "exclude is_norm",
        "exclude is_bias",
        "decays in full",
        "exclude is_bias",
    ]


FORMS = {
    "sgd": (SGD, {}, "l2"),
    "sgdw": (SGD, {"decoupled_weight_decay": True}, "decoupled"),
    "adam": (Adam, {}, "l2"),
    "adam decoupled": (Adam, {"decoupled_weight_decay": True}, "decoupled"),
    "adamw": (AdamW, {}, "decoupled"),
    "policy over class": (AdamW, {"wd_policy": form("l2")}, "l2"),
}


@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)
def test_rows_tell_the_form_that_the_optimizer_applies(case):
    cls, settings, expected = case
    optimizer = cls(Net().parameters(), weight_decay=0.5, **settings)
    assert {row.form for row in optimizer.decay_report().rows} == {expected}


def test_rows_follow_what_the_groups_say_now():
    optimizer = AdamW(Net(), lr=1.0, weight_decay=0.5, wd_policy={"head.*": 0.5})
    optimizer.param_groups[0].update(lr=0.125, weight_decay=0.25)
    rows = {row.name: row for row in optimizer.decay_report().rows}
    assert (rows["head.bias"].lr, rows["head.bias"].weight_decay) == (0.125, 0.125)
    assert rows["scale"].weight_decay == 0.25


def test_report_is_a_sequence_of_rows_and_finds_them_by_name():
    report = report_of(Net())
    assert (len(report), list(report)) == (8, list(report.rows))
    assert report[-1] is report["head.bias"] is report.rows[-1]
    assert report[:2] == report.rows[:2]
    with pytest.raises(KeyError, match="haed"):
        report["haed.bias"]


def test_report_is_short_where_its_repr_is_shown():
    assert repr(report_of(Net())) == (
        "DecayReport(decayed: 4 tensors, 21 elements; exempt: 4 tensors, 14 elements)"
    )


def test_report_as_dict_is_ready_for_json():
    report = report_of(Net(), lr=0.5)
    told = report.as_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["rows"][2]["shape"] == [4, 3]
    assert told["exempt"] == {"tensors": 4, "elements": 14}
    assert told["remark"] == report.remark


def test_reason_of_a_group_without_decay_is_that_and_no_selector():
    model = Net()
    groups = [
        {"params": list(model.body.parameters()), "weight_decay": 0.0},
        {"params": list(model.head.parameters())},
    ]
    rows = report_of(groups, model=model).rows
    assert [(row.name, row.reason) for row in rows if row.name.endswith("weight")] == [
        ("body.0.weight", "weight_decay=0"),
        ("body.1.weight", "exclude is_norm"),
        ("head.weight", "decays in full"),
    ]


def test_report_prints_an_aligned_table_by_group_and_reason():
    model = Net()
    groups = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "weight_decay": 0.25, "lr": 0.02},
    ]
    assert str(report_of(groups, model=model, lr=0.01)).splitlines() == [
        "group  reason             lr  decay  form       timescale  tensors  elements",
        "    0  decays in full   0.01    0.5  decoupled  200 steps        1        12",
        "    0  exclude is_bias  0.01      0  exempt                      2         8",
        "    0  exclude is_norm  0.01      0  exempt                      1         4",
        "    1  decays in full   0.02   0.25  decoupled  200 steps        1         8",
        "    1  exclude is_bias  0.02      0  exempt                      1         2",
        "decayed: 2 tensors, 20 elements; exempt: 4 tensors, 14 elements",
        "looks wrong: 2 parameters train and are in no group ('scale' and 1 more)",
    ]


def test_report_works_on_tensors_without_names():
    report = report_of(list(Net().parameters()), wd_policy="matrices")
    assert {row.name for row in report.rows} == {None}
    assert report.summary() == (
        "decayed: 3 tensors, 20 elements; exempt: 5 tensors, 15 elements"
    )


def test_report_reads_hyperparameters_given_as_tensors():
    lr, decay = torch.tensor(0.25), torch.tensor(0.5)
    row = report_of(Net(), lr=lr, weight_decay=decay).rows[0]
    assert (row.lr, row.weight_decay) == (0.25, 0.5)
    assert type(row.lr) is type(row.weight_decay) is float


HEADERS = (
    *("group", "reason", "lr", "decay", "form", "timescale", "tensors", "elements"),
)
RATES = "0.25 to 1"


def test_printed_table_is_a_page_wide_and_rows_have_the_whole_reasons():
    policy = exclude(re.compile("weight|" + "x" * 90))
    report = AdamW(nn.Linear(2, 3), wd_policy=policy).decay_report()
    long, *_ = [line for line in str(report).splitlines() if "xxx..." in line]
    assert len(long) == 100
    assert max(map(len, str(report).splitlines())) == 100
    assert report["weight"].reason.count("x") >= 90


def test_many_groups_print_as_one_line_per_reason():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(13)))
    groups = group_per_tensor(model, lr=lambda i: 0.5 ** (i % 3))
    steps = "2 to 8 steps"
    assert report_of(groups, model=model).table() == [
        HEADERS,
        ("13 groups", "decays in full", RATES, "0.5", "decoupled", steps, "13", "208"),
        ("13 groups", "exclude is_bias", RATES, "0", "exempt", "", "13", "52"),
    ]


def test_many_groups_print_with_the_range_of_their_decay():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(10)))
    groups = group_per_tensor(model, weight_decay=lambda i: i / 2)
    assert report_of(groups, model=model, lr=0.5).table()[1:] == [
        ("0", "weight_decay=0", "0.5", "0", "exempt", "", "1", "16"),
        (
            *("1-9", "decays in full", "0.5", "0.5 to 4.5", "decoupled"),
            *("0 to 4 steps", "9", "144"),
        ),
    ]


@pytest.mark.parametrize(("count", "lines"), [(8, 8), (9, 1)])
def test_up_to_eight_groups_have_a_line_each(count, lines):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    assert len(report_of(group_per_tensor(model), model=model).table()) == 1 + lines


RUNS = {
    "three ranges": ({0, 2, 4}, ["0, 2, 4", "1, 3, 5-8"]),
    "four ranges": ({0, 2, 4, 6}, ["4 groups", "5 groups"]),
}


@pytest.mark.parametrize(("without", "expected"), RUNS.values(), ids=RUNS)
def test_groups_of_a_line_are_spelled_out_in_up_to_three_ranges(without, expected):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(9)))
    groups = group_per_tensor(model, weight_decay=lambda i: float(i not in without))
    table = report_of(groups, model=model).table()
    assert [line[0] for line in table[1:]] == expected


def test_html_holds_the_table_with_everything_escaped():
    policy = exclude(re.compile("(?<=head.)bias|a&b"))
    report = report_of(Net(), wd_policy=policy)
    table = ElementTree.fromstring(report._repr_html_())
    cells = [tuple(cell.text for cell in row) for row in table.iter("tr")]
    assert cells == [tuple(cell or None for cell in row) for row in report.table()]
    assert table.findtext("caption") == f"{report.summary()}; {report.remark}"
    assert any("(?<=head.)" in row[1] for row in cells)


def axes():
    figure = pytest.importorskip("matplotlib.figure", reason="draws with matplotlib")
    return figure.Figure().subplots()


def bars_of(ax):
    return {b.get_label(): [bar.get_width() for bar in b] for b in ax.containers}


def labels_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_plot_draws_the_share_of_each_kind_with_counts_beside():
    model = Net()
    model.head.requires_grad_(False)
    ax = report_of(model, wd_policy={"scale": 0, "*.bias": 0, nn.LayerNorm: 0}).plot(
        axes()
    )
    assert labels_of(ax) == [
        *("Linear.weight", "Linear.bias", "LayerNorm.weight", "LayerNorm.bias"),
        *("Net.scale", "Net.empty"),
    ]
    assert bars_of(ax) == {
        "decayed": [60, 0, 0, 0, 0, 0],
        "exempt": [0, pytest.approx(200 / 3), 100, 100, 100, 0],
        "frozen": [40, pytest.approx(100 / 3), 0, 0, 0, 0],
    }
    assert [text.get_text() for text in ax.texts][:2] == [
        "2 tensors, 20 elements",
        "2 tensors, 6 elements",
    ]
    assert ax.get_xlim() == (0, 100)
    assert ax.get_xlabel() == "share of the elements of a kind (%)"
    assert ax.get_title(loc="left") == (
        "decayed: 2 tensors, 12 elements\nexempt: 4 tensors, 13 elements\n"
        "frozen: 2 tensors, 10 elements"
    )
    ax.figure.canvas.draw()  # nothing warns


def test_plot_of_tensors_without_names_draws_reasons():
    ax = report_of(list(Net().parameters()), wd_policy="matrices").plot(axes())
    assert labels_of(ax) == ["decays in full", "exclude is_vector"]
    assert bars_of(ax) == {"decayed": [100, 0], "exempt": [0, 100]}


def test_plot_draws_the_smallest_of_many_kinds_as_one():
    model = nn.Sequential()
    for i in range(20):
        setattr(model, f"w{i}", nn.Parameter(torch.ones(2, 20 - i)))
    ax = report_of(model, wd_policy="all").plot(axes())
    assert len(labels_of(ax)) == MANY_BARS
    assert labels_of(ax)[-2:] == ["Sequential.w14", "5 other kinds"]


@pytest.mark.parametrize("kinds", [1, 4, MANY_BARS])
def test_legend_stands_right_below_the_picture(kinds):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="draws with matplotlib")
    pyplot.switch_backend("Agg")
    model = nn.Sequential()
    for i in range(kinds):
        setattr(model, f"w{i}", nn.Parameter(torch.ones(2, 2)))
    ax = report_of(model, wd_policy="all").plot()
    ax.figure.canvas.draw()
    label, line = ax.xaxis.label.get_window_extent(), ax.xaxis.label.get_fontsize()
    top = ax.get_legend().get_window_extent().y1
    pyplot.close(ax.figure)
    assert 0 <= label.y0 - top <= 3 * line * ax.figure.dpi / 72


def test_plot_makes_a_figure_when_no_axes_are_given():
    pytest.importorskip("matplotlib", reason="draws with matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = report_of(Net()).plot()
    assert ax.figure.number in pyplot.get_fignums()
    pyplot.close(ax.figure)


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report_of(Net()).plot()


# What trains, and what there is by now.


def test_frozen_parameters_are_counted_apart():
    model = Net()
    model.body.requires_grad_(False)
    report = report_of(model, lr=0.01)
    assert str(report).splitlines() == [
        "group  reason             lr  decay  form       timescale  tensors  elements",
        "    0  decays in full   0.01    0.5  decoupled  200 steps        3         9",
        "    0  decays in full   0.01      -  frozen                      1        12",
        "    0  exclude is_bias  0.01      -  frozen                      2         8",
        "    0  exclude is_norm  0.01      -  frozen                      1         4",
        "    0  exclude is_bias  0.01      0  exempt                      1         2",
        "decayed: 3 tensors, 9 elements; exempt: 1 tensor, 2 elements; "
        "frozen: 4 tensors, 24 elements",
    ]
    rows = {row.name: row for row in report.rows}
    assert not rows["body.0.weight"].requires_grad
    assert rows["body.0.weight"].weight_decay == 0.5  # what it would be
    model.body.requires_grad_(True)
    assert rows["head.weight"].requires_grad


def test_frozen_parameter_counts_again_once_it_trains():
    model = Net().requires_grad_(False)
    optimizer = AdamW(model, weight_decay=0.5, wd_policy="no_bias_norm")
    before = optimizer.decay_report().summary()
    model.requires_grad_(True)
    assert before == (
        "decayed: 0 tensors, 0 elements; exempt: 0 tensors, 0 elements; "
        "frozen: 8 tensors, 35 elements"
    )
    assert "frozen" not in optimizer.decay_report().summary()


def test_lazy_module_has_its_shape_once_it_has_one():
    model = nn.Sequential(nn.LazyLinear(2), nn.LayerNorm(2))
    optimizer = AdamW(model.parameters(), weight_decay=0.5, wd_policy="no_bias_norm")
    assert optimizer.decay_report().rows[0].numel == 0
    model(torch.ones(1, 3))
    row = optimizer.decay_report().rows[0]
    assert (row.name, row.shape, row.numel) == ("0.weight", (2, 3), 6)


def weight_normed():
    return nn.Sequential(weight_norm(nn.Linear(3, 2)), nn.LayerNorm(2))


def test_gain_and_direction_of_weight_norm_can_be_told_apart():
    names = [row.name for row in report_of(weight_normed(), wd_policy="no_bias").rows]
    assert names == [
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        *("1.weight", "1.bias"),
    ]


@pytest.mark.parametrize("read", ["parameters", "named_parameters"])
@pytest.mark.parametrize("pattern", ["*original0", "*.weight.original0", "0.par*0"])
def test_glob_reaches_the_gain_of_weight_norm_alone(read, pattern):
    params = getattr(weight_normed(), read)()
    rows = report_of(params, wd_policy=exclude(pattern)).rows
    assert [row.name for row in rows if not row.weight_decay] == [
        "0.parametrizations.weight.original0"
    ]


def test_glob_on_the_plain_name_still_means_both():
    rows = report_of(weight_normed(), wd_policy=exclude("0.weight")).rows
    assert [row.weight_decay for row in rows] == [0.5, 0, 0, 0.5, 0.5]


def test_other_parametrizations_keep_the_plain_name():
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2)))
    assert {row.name for row in report_of(model).rows} == {"0.weight", "0.bias"}


# Rate and timescale.

TIMESCALES = {
    "decoupled": (AdamW, {}, 1000),
    "l2": (SGD, {}, None),
    "no rate": (AdamW, {"lr": 0.0}, None),
    "no decay": (AdamW, {"weight_decay": 0.0, "wd_policy": None}, None),
}


@pytest.mark.parametrize("case", TIMESCALES.values(), ids=TIMESCALES)
def test_timescale_is_that_of_decoupled_decay(case):
    cls, changes, expected = case
    settings = {"lr": 0.01, "weight_decay": 0.1, "wd_policy": "no_bias_norm", **changes}
    row = cls(Net().parameters(), **settings).decay_report().rows[0]
    assert row.timescale == (expected if expected is None else pytest.approx(expected))


def test_report_of_l2_leaves_the_timescale_out():
    optimizer = SGD(Net(), lr=0.01, weight_decay=0.1, wd_policy="no_bias")
    assert "timescale" not in optimizer.decay_report().table()[0]


# Any optimizer.


def hand_split(model, *no_decay):
    named = list(model.named_parameters())
    exempt = [any(word in name for word in no_decay) for name, _ in named]
    groups = [
        {"params": [p for (_, p), e in zip(named, exempt) if e is which],
         "weight_decay": wd}
        for which, wd in ((False, 0.5), (True, 0.0))
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


def test_report_of_hand_split_groups_shows_the_wrong_list():
    model = Net()
    groups = hand_split(model, "bias", "LayerNorm.weight")
    report = decay_report(torch.optim.AdamW(groups, lr=0.01), model)
    assert str(report).splitlines() == [
        "group  reason    lr  decay  form       timescale  tensors  elements",
        "    0  vector  0.01    0.5  decoupled  200 steps        1         1",
        "    0  weight  0.01    0.5  decoupled  200 steps        3        20",
        "    0  norm    0.01    0.5  decoupled  200 steps        1         4",
        "    1  bias    0.01      0  exempt                      2         6",
        "    1  norm    0.01      0  exempt                      1         4",
        "decayed: 5 tensors, 25 elements; exempt: 3 tensors, 10 elements",
        "looks wrong: 1 norm decays ('body.1.weight')",
    ]


def test_report_of_a_right_list_has_no_remark():
    model = Net()
    groups = hand_split(model, "bias", "body.1", "scale")
    assert decay_report(torch.optim.AdamW(groups), model).remark == ""


def test_report_tells_exempt_weights_and_parameters_in_no_group():
    model = Net()
    groups = hand_split(model, "bias", "body.1", "head")
    groups[0]["params"].remove(model.scale)
    remark = decay_report(torch.optim.SGD(groups, lr=0.1), model).remark
    assert remark == (
        "looks wrong: 1 weight does not decay ('head.weight'); 1 parameter trains and "
        "is in no group ('scale')"
    )


def test_report_without_a_split_counts_norms_and_biases():
    model = Net()
    assert decay_report(torch.optim.AdamW(model.parameters()), model).remark == (
        "looks wrong: 2 norms decay ('body.1.weight' and 1 more); 2 biases decay "
        "('body.0.bias' and 1 more)"
    )


def test_report_of_one_of_ours_tells_its_own_reasons():
    model = Net()
    optimizer = AdamW(model, weight_decay=0.5, wd_policy="no_bias_norm")
    assert decay_report(optimizer, model) == optimizer.decay_report()


def test_report_finds_the_optimizer_inside_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = Net()
    inner = torch.optim.AdamW(model.parameters())
    assert decay_report(Wrapper(inner), model) == decay_report(inner, model)


def test_report_without_a_model_tells_shapes_and_names_if_given():
    model = Net()
    rows = decay_report(torch.optim.SGD(model.named_parameters())).rows
    assert [(row.name, row.reason) for row in rows][:4] == [
        *(("scale", "vector"), ("empty", "weight")),
        *(("body.0.weight", "weight"), ("body.0.bias", "bias")),
    ]
    rows = decay_report(torch.optim.SGD(list(model.parameters()))).rows
    assert {row.name for row in rows} == {None}


class Lion(torch.optim.Optimizer):
    def __init__(self, params, **defaults):
        super().__init__(params, defaults)


ANY_FORMS = {
    "sgd": (torch.optim.SGD, {}, "l2"),
    "adam": (torch.optim.Adam, {}, "l2"),
    "adamw": (torch.optim.AdamW, {}, "decoupled"),
    "nadam": (torch.optim.NAdam, {"decoupled_weight_decay": True}, "decoupled"),
    "rmsprop": (torch.optim.RMSprop, {}, "l2"),
    "adafactor": (torch.optim.Adafactor, {}, "decoupled"),
    "another": (Lion, {"lr": 0.1}, None),
}


@pytest.mark.parametrize("case", ANY_FORMS.values(), ids=ANY_FORMS)
def test_report_knows_the_form_of_the_classes_of_torch(case):
    cls, settings, expected = case
    optimizer = cls(Net().parameters(), weight_decay=0.5, **settings)
    assert {row.form for row in decay_report(optimizer).rows} == {expected}


def test_report_knows_no_form_of_what_is_no_class_of_torch():
    inner = torch.optim.SGD(Net().parameters())
    rows = decay_report(SimpleNamespace(param_groups=inner.param_groups)).rows
    assert {(row.form, row.target, row.lr0) for row in rows} == {(None, None, None)}
    assert {row.owner for row in rows} == {""}


def test_report_of_what_is_no_optimizer_says_so():
    with pytest.raises(TypeError) as caught:
        decay_report(Net(), None)
    assert str(caught.value) == (
        "`optimizer` must have param_groups, and a Net has none. Pass the optimizer "
        "first, then the model: decay_report(optimizer, model)."
    )


def test_report_of_an_optimizer_without_decay_says_so():
    with pytest.raises(ValueError, match="no weight_decay") as caught:
        decay_report(torch.optim.Rprop(Net().parameters()))
    assert str(caught.value) == (
        "group 0 of `optimizer` (Rprop) has no weight_decay to report. Use one that "
        "decays: selective_optim.AdamW."
    )
