"""The audit of a policy on a model: findings, disagreements, command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import selective_optim
from benchmarks.recipes_page import page
from selective_optim import policies
from selective_optim.__main__ import build, main, read_target
from selective_optim.audit import audit, find_mistakes, model_report
from selective_optim.policies.named import NAMED

HERE = "tests.test_audit"
own_policy = policies.exclude("*.bias")
no_policy = 3.5


class Tiny(nn.Module):
    """An embedding tied to the head, a norm, and a scalar of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.scale * self.head(self.norm(self.embed(tokens)))


def tiny():
    print("building")
    return Tiny()


def needs_values():
    return nn.Linear(2, round(torch.ones(()).item()))


def needs_arguments(width):
    return nn.Linear(width, width)


def lazy():
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))


def broken():
    raise RuntimeError("no such\nweights")


FINDINGS = {
    "all": [
        ("vector", "scale"),
        ("norm", "norm.weight"),
        ("norm", "norm.bias"),
        ("bias", "head.bias"),
    ],
    "no_bias": [("vector", "scale"), ("norm", "norm.weight")],
    "no_norm": [("vector", "scale"), ("bias", "head.bias")],
    "no_bias_norm": [("vector", "scale")],
    "no_bias_norm_embedding": [("vector", "scale"), ("tied", "embed.weight")],
    "matrices": [],
    "none": [],
}


@pytest.mark.parametrize(("policy", "expected"), FINDINGS.items(), ids=FINDINGS)
def test_mistakes_are_found(policy, expected):
    found = find_mistakes(Tiny(), policy)
    assert [(finding.kind, finding.name) for finding in found] == expected


@pytest.mark.parametrize("target", ["1", "'init'"])
def test_decay_towards_another_target_is_no_mistake(target):
    """Gains that stay near 1, or a fine-tuning that stays near its start."""
    assert not find_mistakes(Tiny(), f"matrices * towards({target})")
    assert not find_mistakes(Tiny(), f"towards({target})")


def test_tied_parameter_with_two_verdicts_names_both_places():
    [finding] = find_mistakes(Tiny(), {"scale": 0, "head.*": 0.5, "norm.*": 0})[:1]
    assert (finding.kind, finding.shape) == ("tied", (5, 4))
    assert (
        finding.reason
        == "embed.weight: 1 (decays in full); head.weight: 0.5 ('head.*')"
    )


def test_frozen_parameters_are_no_mistake():
    model = Tiny().requires_grad_(False)
    assert find_mistakes(model, "all") == []


def test_model_report_needs_no_optimizer():
    rows = model_report(Tiny(), policies.form("l2", "head.*"), weight_decay=0.5).rows
    told = {row.name: (row.weight_decay, row.form) for row in rows}
    assert told["head.bias"] == (0.5, "l2")
    assert told["scale"] == (0.5, None)
    assert all(math.isnan(row.lr) for row in rows)


def test_model_report_says_which_glob_matches_nothing():
    with pytest.raises(ValueError, match=r"'heda\.\*' in `wd_policy` matches none"):
        model_report(Tiny(), {"heda.*": 0})


def test_audit_prints_report_disagreements_and_mistakes():
    assert str(audit(Tiny(), "no_norm", against="no_bias_norm")) == "\n".join(
        [
            "no_norm on Tiny, per unit of weight_decay",
            "group  reason           decay  form     tensors  elements",
            "    0  decays in full       1  default        3        26",
            "    0  exclude is_norm      0  exempt         2         8",
            "decayed: 3 tensors, 26 elements; exempt: 2 tensors, 8 elements",
            "",
            "against no_bias_norm",
            str(policies.diff(Tiny(), "no_norm", "no_bias_norm")),
            "",
            "looks wrong: biases that decay, 1",
            "  head.bias  5  decays in full",
            "",
            "looks wrong: tensors of fewer than two dimensions that decay, 1",
            "  scale  scalar  decays in full",
        ]
    )


def test_audit_says_that_nothing_looks_wrong():
    assert str(audit(Tiny(), "matrices")).endswith("looks wrong: nothing")


def test_audit_prints_the_first_of_many_mistakes():
    model = nn.Sequential(*(nn.LayerNorm(2, bias=False) for _ in range(13)))
    lines = str(audit(model, "all")).splitlines()
    assert "looks wrong: norms that decay, 13" in lines
    assert lines[-2:] == ["  9.weight  2  only everything", "  and 3 more"]


def test_audit_prints_ten_mistakes_whole():
    model = nn.Sequential(*(nn.LayerNorm(2, bias=False) for _ in range(10)))
    assert str(audit(model, "all")).endswith("  9.weight  2  only everything")


def test_audit_as_dict_has_the_same_content():
    told = audit(Tiny(), "no_norm", against="no_bias_norm").as_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["model"], told["policy"], told["against"]) == (
        *("Tiny", "no_norm", "no_bias_norm"),
    )
    assert told["decayed"] == {"tensors": 3, "elements": 26}
    assert told["exempt"] == {"tensors": 2, "elements": 8}
    assert told["frozen"] == {"tensors": 0, "elements": 0}
    assert told["rows"][1] == {
        "name": "embed.weight",
        "shape": [5, 4],
        "numel": 20,
        "multiplier": 1.0,
        "requires_grad": True,
        "form": None,
        "target": None,
        "fixed": None,
        "reason": "decays in full",
    }
    assert told["disagreements"] == [
        {
            "name": "head.bias",
            "shape": [5],
            "a": {"multiplier": 1.0, "form": None, "target": None, "fixed": None},
            "b": {"multiplier": 0.0, "form": None, "target": None, "fixed": None},
            "reason_a": "decays in full",
            "reason_b": "exclude is_bias",
        }
    ]
    assert told["findings"][1] == {
        "kind": "bias",
        "name": "head.bias",
        "shape": [5],
        "reason": "decays in full",
    }


def test_command_prints_the_audit(capsys):
    assert main(["audit", f"{HERE}:tiny", "--against", "timm"]) == 0
    assert capsys.readouterr().out == (
        f"{HERE}:tiny, device: meta\n{audit(Tiny(), against='timm')}\n"
    )


def test_command_prints_one_json_object(capsys):
    assert main(["audit", f"{HERE}:tiny", "--against", "timm", "--json"]) == 0
    out, err = capsys.readouterr()
    expected = audit(Tiny(), against="timm").as_dict()
    source = {"target": f"{HERE}:tiny", "device": "meta", "note": None}
    assert json.loads(out) == {**source, **expected}
    assert err == "building\n"


def test_command_takes_a_policy_of_the_users_own(capsys):
    arguments = [f"{HERE}:Tiny", "--policy", f"{HERE}:own_policy"]
    assert main(["audit", *arguments]) == 0
    assert "exclude('*.bias') on Tiny" in capsys.readouterr().out


def own_optimizer(lr=0.5):
    policy = policies.exclude("*.bias")
    return selective_optim.AdamW(Tiny(), lr=lr, weight_decay=0.5, wd_policy=policy)


def wrong_optimizer():
    return torch.optim.SGD(Tiny().named_parameters(), weight_decay=0.5)


def test_command_reports_what_an_optimizer_decays(capsys):
    assert main(["audit", f"{HERE}:own_optimizer(0.25)", "--strict"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{HERE}:own_optimizer(0.25), device: meta\ngroup  reason")
    assert "decayed: 3 tensors, 25 elements" in out


def test_command_reports_an_optimizer_as_json_and_strictly(capsys):
    arguments = ["audit", f"{HERE}:wrong_optimizer", "--json", "--strict"]
    assert main(arguments) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["decayed"] == {"tensors": 5, "elements": 34}
    assert told["remark"].startswith("looks wrong: ")


CHECKPOINTS = {
    "alone": lambda saved: saved,
    "among others": lambda saved: {"model": {"w": torch.ones(2)}, "optimizer": saved},
    "as Lightning": lambda saved: {"epoch": 3, "optimizer_states": [saved]},
}


@pytest.mark.parametrize("pack", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_command_reports_a_checkpoint(pack, tmp_path, capsys):
    optimizer = own_optimizer()
    file = tmp_path / "last.ckpt"
    torch.save(pack(optimizer.state_dict()), file)
    assert main(["audit", str(file)]) == 0
    told = selective_optim.decay_report(optimizer.state_dict())
    assert capsys.readouterr().out == f"{file}, device: as saved\n{told}\n"


def test_command_lists_policies_and_recipes_with_a_sentence_each(capsys):
    told = {}
    for command in ("policies", "recipes"):
        assert main([command]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 100
        told |= dict(line.split(maxsplit=1) for line in lines)
    assert told.keys() == NAMED.keys()
    assert all(text[0].isupper() and text[-1] == "." for text in told.values())
    assert all("\n" not in text and "  " not in text for text in told.values())


STRICT = {
    "findings": (["--policy", "all"], 1),
    "no findings": (["--policy", "matrices"], 0),
    "disagreements": (["--policy", "matrices", "--against", "none"], 1),
    "no disagreements": (["--policy", "matrices", "--against", "nanogpt"], 0),
}


@pytest.mark.parametrize(("arguments", "expected"), STRICT.values(), ids=STRICT)
def test_strict_command_exits_with_1_on_findings_and_disagreements(
    arguments, expected, capsys
):
    assert main(["audit", f"{HERE}:tiny", "--strict", *arguments]) == expected
    assert "looks wrong" in capsys.readouterr().out


class Vision(nn.Module):
    """What a ViT has beside layers, with what its author marked."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.gates = nn.Parameter(torch.ones(2, 4))
        self.down_proj = nn.Parameter(torch.ones(2, 4, 4))
        self.body = nn.Linear(8, 8)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}


def test_audit_tells_what_the_author_marked_and_hints_at_the_rest():
    assert str(audit(Vision(), "no_bias_norm")).split("\n\n")[1:] == [
        "looks wrong: decay, and the model's author marked them as exempt, 2\n"
        "  cls_token  1 x 1 x 8  Vision.no_weight_decay() lists 'cls_token'\n"
        "  pos_embed  1 x 5 x 8  Vision.no_weight_decay() lists 'pos_embed'",
        "worth a look: decay, and are neither weights of layers, norms nor biases, 3\n"
        "  mask_token  1 x 1 x 8  decays in full\n"
        "  gamma       8 x 1 x 1  decays in full\n"
        "  gates       2 x 4      decays in full",
    ]


def test_marks_that_the_policy_honors_are_no_mistake():
    policy = policies.marked() * policies.named("no_bias_norm")
    told = audit(Vision(), policy).as_dict()
    assert told["findings"] == []
    assert [hint["name"] for hint in told["hints"]] == ["mask_token", "gamma", "gates"]


def test_audit_counts_frozen_parameters_apart():
    model = Tiny()
    model.embed.requires_grad_(False)
    told = audit(model, "no_bias_norm")
    assert told.report.summary() == (
        "decayed: 1 tensor, 1 element; exempt: 3 tensors, 13 elements; "
        "frozen: 1 tensor, 20 elements"
    )
    assert told.as_dict()["frozen"] == {"tensors": 1, "elements": 20}


def test_building_takes_no_memory_where_the_model_allows_it():
    built = build(f"{HERE}:tiny")
    assert (built.device, built.note) == ("meta", None)
    assert all(param.is_meta for param in built.model.parameters())


def test_model_that_is_named_itself_is_taken_as_found():
    assert tuple(build(f"{HERE}:ready_made")) == (ready_made, "as found", None)


def test_building_falls_back_to_the_cpu_and_says_so(capsys):
    built = build(f"{HERE}:needs_values")
    assert built.device == "cpu"
    assert "not built on the meta device: RuntimeError" in built.note
    assert built.note in capsys.readouterr().err


TARGETS = {
    "m:f": ("m", "f", (), None),
    "a.b:c.f": ("a.b", "c.f", (), None),
    "a.b.f": ("a.b", "f", (), None),
    "dir/file.py:f": ("dir/file.py", "f", (), None),
    "m:f()": ("m", "f", (), {}),
    "m:f(vit_base, 3, 'a, b')": ("m", "f", ("vit_base", 3, "a, b"), {}),
    "m:f(hf_hub:timm/resnet50.a1_in1k)": (
        "m",
        "f",
        ("hf_hub:timm/resnet50.a1_in1k",),
        {},
    ),
    "m:f(x, n=[1, 2], flag=False, size=(3, 4))": (
        *("m", "f", ("x",), {"n": [1, 2], "flag": False, "size": (3, 4)}),
    ),
    "m:f((1, 2), [3, 4], {5: 6, 7: 8}, x)": (
        *("m", "f", ((1, 2), [3, 4], {5: 6, 7: 8}, "x"), {}),
    ),
    " m:f( a , b = None ) ": ("m", "f", ("a",), {"b": None}),
}


@pytest.mark.parametrize(("text", "expected"), TARGETS.items(), ids=TARGETS)
def test_target_is_read(text, expected):
    assert tuple(read_target(text)) == expected


ready_made = Tiny()
BUILT = {
    "model": f"{HERE}:ready_made",
    "module": f"{HERE}:tiny",
    "dotted": f"{HERE}.tiny",
    "file": f"{Path(__file__).parent}/test_audit.py:tiny",
    "arguments": f"{HERE}:needs_arguments(3)",
    "keywords": f"{HERE}:needs_arguments(width=3)",
    "class of torch": "torch.nn:Linear(3, 4, bias=False)",
}


@pytest.mark.parametrize("target", BUILT.values(), ids=BUILT)
def test_command_builds_what_is_named(target, capsys):
    assert main(["audit", target, "--policy", "no_bias"]) == 0
    assert "decayed: " in capsys.readouterr().out


def test_file_sees_its_neighbors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_sizes.py").write_text("WIDTH = 3\n")
    (tmp_path / "own_train.py").write_text(
        "from torch import nn\nfrom own_sizes import WIDTH\n"
        "def build(depth):\n    return nn.Linear(WIDTH, depth)\n"
        "from selective_optim.policies import exclude\npolicy = exclude('bias')\n"
    )
    file = tmp_path / "own_train.py"
    assert main(["audit", f"{file}:build(2)", "--policy", f"{file}:policy"]) == 0
    assert "exclude('bias') on Linear" in capsys.readouterr().out


def test_command_finds_a_module_of_the_folder_it_runs_in(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("import torch\nnet = torch.nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["audit", "own_net:net"]) == 0
    assert sys.path.count(str(Path.cwd())) == 1
    assert main(["audit", "own_net:net"]) == 0
    assert sys.path.count(str(Path.cwd())) == 1


class Closed:
    """A pipe whose reader has left, as in ``... | head``."""

    def write(self, text):
        raise BrokenPipeError


def test_command_ends_in_silence_where_nobody_reads_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["audit", f"{HERE}:ready_made"]) == 0
    # Python flushes what is there at its exit, and would complain of the pipe.
    assert sys.stdout is None
    assert capsys.readouterr().err == ""


def test_command_tells_its_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"selective_optim {selective_optim.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"]], ids=len)
def test_help_lists_policies_and_exit_codes(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    told = capsys.readouterr().out
    assert all(name in told for name in NAMED)
    assert "exclude('*.bias', is_norm) * layerwise(0.75)" in told
    assert [
        line for line in told.splitlines() if line.startswith(("  0", "  1", "  2"))
    ] == [
        "  0  the audit was printed",
        "  1  with --strict: something looks wrong, or --against disagrees",
        "  2  the model cannot be made, or a policy raises; the reason is on stderr",
    ]
    assert max(map(len, told.splitlines())) <= 88


ERRORS = {
    "no colon": (["tiny"], "is not of the form MODULE:CALLABLE"),
    "no module": (["no_such_module:x"], "No module named 'no_such_module'"),
    "no name": ([f"{HERE}:tinny"], "Did you mean 'tiny'?"),
    "number": ([f"{HERE}:no_policy"], "is 3.5 (float), not a callable"),
    "not a model": (
        ["builtins:dict"],
        "returned {} (dict), not a module or optimizer. Write",
    ),
    "policy beside an optimizer": (
        [f"{HERE}:own_optimizer", "--policy", "all"],
        "--policy and --against are for a model, which `tests.test_audit:own_optimizer`"
        " is not. Leave them out.",
    ),
    "no checkpoint": (["README.md"], "`README.md` cannot be read: "),
    "arguments": ([f"{HERE}:needs_arguments"], "missing 1 required positional"),
    "raises": (
        [f"{HERE}:broken"],
        "RuntimeError: no such weights. Give it the arguments that it needs, or name "
        "another callable. Write for example 'timm:create_model(vit_base_patch16_224)'",
    ),
    "open bracket": ([f"{HERE}:tiny("], "is not of the form MODULE:CALLABLE"),
    "no file": (["no_such.py:tiny"], "there is no file no_such.py"),
    "file without a name": (
        ["train.py"],
        "is not of the form MODULE:CALLABLE. Write for example train.py:build_model.",
    ),
    "wrong argument": ([f"{HERE}:tiny(3)"], "takes 0 positional arguments but 1 was"),
    "lazy": ([f"{HERE}:lazy"], "uninitialized parameters. Run one batch"),
    "policy": ([f"{HERE}:tiny", "--policy", "no_bais"], 'Did you mean wd_policy="no_b'),
    "against": ([f"{HERE}:tiny", "--against", "x"], "'x' is not the name of a policy"),
    "own policy": ([f"{HERE}:tiny", "--policy", f"{HERE}:no_policy"], "not 3.5 (float"),
    "policy path": (["torch.nn:Tanh", "--policy", f"{HERE}:"], "form MODULE:CALLABLE"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_command_tells_what_is_wrong_in_one_line(case, capsys):
    arguments, expected = case
    assert main(["audit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err.splitlines()[-1]
    assert "Traceback" not in err


def test_command_names_a_callable_of_the_file(tmp_path, capsys):
    file = tmp_path / "own_nets.py"
    file.write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 3)\n")
    assert main(["audit", str(file)]) == 2
    advice = capsys.readouterr().err.split()[-1].removesuffix(".")
    assert advice == f"{file}:make"
    assert main(["audit", advice]) == 0


def test_command_says_that_a_file_holds_no_state_dict(tmp_path, capsys):
    file = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2)}, file)
    assert main(["audit", str(file)]) == 2
    assert "holds no state dict of an optimizer. Save one, as in torch.save(" in (
        capsys.readouterr().err
    )


def test_command_runs_as_a_module_from_the_folder_of_the_model(tmp_path: Path):
    (tmp_path / "nets.py").write_text("import torch\nnet = torch.nn.Linear(2, 3)\n")
    command = [sys.executable, "-m", "selective_optim", "audit", "nets:net"]
    # The checkout itself, installed or not; of a missing numpy torch speaks, not we.
    path = str(Path(selective_optim.__file__).parents[1])
    quiet = "ignore:Failed to initialize NumPy:UserWarning"
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": quiet}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "decayed: 1 tensor, 6 elements" in done.stdout


def counts(tensors, norms=0, biases=0, others=0, weights=0):
    mistakes = {"norms": norms, "biases": biases, "others": others}
    return {"decayed": {"tensors": tensors}, **mistakes, "weights": weights}


def test_recipes_page_ranks_recipes_by_their_mistakes():
    models = {
        "A": {
            "w": counts(9, norms=2, biases=1),
            "x": counts(4, others=1),
            "y": counts(3, weights=2),
            "z": counts(4),
        },
        "B": {
            "w": counts(8, norms=1),
            "x": counts(5, others=2),
            "y": counts(5, weights=1),
            "z": {"refused": "why"},
        },
    }
    versions = dict.fromkeys(("torch", "torchvision", "timm", "transformers"), "1.2+c")
    text, table = page({**versions, "models": models}).split("\n\n")
    assert text == "torch 1.2, torchvision 1.2, timm 1.2, transformers 1.2:"
    assert table.splitlines() == [
        "| recipe | norms + biases decayed | others decayed | weights exempt | A | B |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| `y` | 0 + 0 | 0 | 3 | 3 | 5 |",
        "| `x` | 0 + 0 | 3 | 0 | 4 | 5 |",
        "| `w` | 3 + 1 | 0 | 0 | 9 (2 n, 1 b) | 8 (1 n) |",
        "| `z` | 0 + 0 in 1 of 2 | 0 | 0 | 4 | - |",
    ]


def llama_70b():
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256}
    layers = {"num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(**sizes, **layers, num_key_value_heads=8)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.integration
def test_seventy_billion_parameters_are_audited_without_memory_for_them(capsys):
    pytest.importorskip("transformers")
    target = f"{HERE}:llama_70b"
    assert main(["audit", target, "--against", "huggingface", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["device"], told["findings"]) == ("meta", [])
    assert told["decayed"] == {"tensors": 562, "elements": 70_552_387_584}
    assert told["exempt"] == {"tensors": 161, "elements": 1_318_912}
    assert told["disagreements"] == []


def test_model_whose_shapes_are_not_known_yet_is_audited():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(3))
    assert not audit(model, "none").findings
