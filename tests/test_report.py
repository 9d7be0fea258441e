"""The decay report: records, printed table, notebook table and picture."""

import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW
from selective_optim.policies import exclude, form
from selective_optim.report import HEADERS
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
        *["no match"] * 3,
        "exclude is_bias",
        "exclude is_norm",
        "exclude is_bias",
        "no match",
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


def test_report_prints_an_aligned_table_by_group_and_reason():
    model = Net()
    groups = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "weight_decay": 0.25},
    ]
    assert str(report_of(groups, model=model)).splitlines() == [
        "group  reason           decay  form       tensors  elements",
        "    0  no match           0.5  decoupled        1        12",
        "    0  exclude is_bias      0  exempt           2         8",
        "    0  exclude is_norm      0  exempt           1         4",
        "    1  no match          0.25  decoupled        1         8",
        "    1  exclude is_bias      0  exempt           1         2",
        "decayed: 2 tensors, 20 elements; exempt: 4 tensors, 14 elements",
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


def test_many_groups_print_as_one_line_per_reason():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(13)))
    groups = group_per_tensor(model, lr=lambda i: 0.5**i)
    assert report_of(groups, model=model).table() == [
        ("13 groups", "no match", "0.5", "decoupled", "13", "208"),
        ("13 groups", "exclude is_bias", "0", "exempt", "13", "52"),
    ]


def test_many_groups_print_with_the_range_of_their_decay():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(10)))
    groups = group_per_tensor(model, weight_decay=lambda i: i / 2)
    assert report_of(groups, model=model).table() == [
        ("0", "no match", "0", "exempt", "1", "16"),
        ("1-9", "no match", "0.5 to 4.5", "decoupled", "9", "144"),
    ]


def test_html_holds_the_table_with_everything_escaped():
    policy = exclude(re.compile("(?<=head.)bias|a&b"))
    report = report_of(Net(), wd_policy=policy)
    table = ElementTree.fromstring(report._repr_html_())
    cells = [tuple(cell.text for cell in row) for row in table.iter("tr")]
    assert cells == [HEADERS, *report.table()]
    assert table.findtext("caption") == report.summary()
    assert any("(?<=head.)" in cell for row in cells for cell in row)


def axes():
    figure = pytest.importorskip("matplotlib.figure", reason="draws with matplotlib")
    return figure.Figure().subplots()


def test_plot_draws_elements_decayed_and_exempt_by_module():
    ax = report_of(Net()).plot(axes())
    bars = {b.get_label(): [bar.get_width() for bar in b] for b in ax.containers}
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        *("scale", "empty", "body", "head")
    ]
    assert bars == {"decayed": [1, 0, 12, 8], "exempt": [0, 0, 12, 2]}
    assert ax.get_xlabel() == "parameters (elements, log scale)"
    assert ax.get_ylabel() == "top-level module"
    ax.figure.canvas.draw()  # nothing on the log axis warns


def test_plot_of_tensors_without_names_draws_groups():
    ax = report_of([{"params": [p]} for p in Net().head.parameters()],
                   wd_policy="matrices").plot(axes())  # fmt: skip
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["group 0", "group 1"]
    assert ax.get_ylabel() == "parameter group"


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
