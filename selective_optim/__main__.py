"""Show what decays in a model, before you train it."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource
from itertools import chain
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import selective_optim
from selective_optim._text import aligned, param_ids
from selective_optim.audit import audit, decay_report
from selective_optim.policies.named import EXPRESSION, NAMED, as_policy

EXAMPLE = "Write for example torchvision.models:resnet50."
EXAMPLE_CALL = "Write for example 'timm:create_model(vit_base_patch16_224)'."
CALL = re.compile(r"(?P<head>[^()]+)(?:\((?P<arguments>.*)\))?", re.DOTALL)
KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)(.*)", re.DOTALL)
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
# The keywords are `None` where there are no parentheses.
Target = tuple[str, str, tuple[Any, ...], dict[str, Any] | None]


class Built(NamedTuple):
    """A model or optimizer, where it was built, and why not on the meta device."""

    model: Any
    device: str
    note: str | None


def read_target(text: str) -> Target:
    """Take apart ``MODULE:NAME`` or ``FILE.py:NAME``, with arguments if it has any."""
    matched = CALL.fullmatch(text.strip())
    head = matched["head"].strip() if matched else ""
    module, colon, path = head.rpartition(":")
    if not colon and not head.endswith(".py"):
        module, _, path = head.rpartition(".")
    if matched is None or not (module and path):
        example = EXAMPLE
        if head.endswith(".py"):
            file = Path(head)
            text_of_file = file.read_text("utf-8", "replace") if file.is_file() else ""
            names = re.findall(r"^(?:def|class) (\w+)", text_of_file, re.MULTILINE)
            close = get_close_matches("build_model", names, 1, 0.0) or ["build_model"]
            example = f"Write for example {head}:{close[0]}."
        raise ValueError(f"`{text}` is not of the form MODULE:CALLABLE. {example}")
    if matched["arguments"] is None:
        return module, path, (), None
    arguments, keywords = [], {}
    for part in filter(str.strip, _split(matched["arguments"])):
        if named := KEYWORD.fullmatch(part):
            keywords[named[1]] = _value(named[2])
        else:
            arguments.append(_value(part))
    return module, path, tuple(arguments), keywords


def _split(text: str) -> Iterator[str]:
    # At the commas that stand in no brackets and no quotes.
    part = ""
    for piece in text.split(","):
        part += piece
        bare = QUOTED.sub("", part)
        # A quote that is left has no end yet, as a bracket that is open.
        if sum(map(bare.count, "([{'\"")) != sum(map(bare.count, ")]}")):
            part += ","
        else:
            yield part
            part = ""
    yield part


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def load(module: str, path: str) -> Any:
    """Import a module or file and return what a dotted path names in it."""
    try:
        value: Any = _module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"`{module}` cannot be imported: {on_one_line(error)}. "
            f"Run in the folder that holds it, or correct the name."
        ) from error
    for name in path.split("."):
        if not hasattr(value, name):
            close = get_close_matches(name, dir(value), n=1)
            hint = f"Did you mean {close[0]!r}?" if close else EXAMPLE
            raise ValueError(f"`{module}:{path}`: there is no {name!r} in it. {hint}")
        value = getattr(value, name)
    return value


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent))  # its neighbors, as when it is run
    spec: Any = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def on_one_line(error: BaseException) -> str:
    """Show an exception by its class and message."""
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))


def build(text: str) -> Built:
    """Call what a text names, without memory for weights where that can be done."""
    if Path(text).is_file() and not text.endswith(".py"):
        return Built(_read_checkpoint(text), "as saved", None)
    module, path, arguments, keywords = read_target(text)
    model = load(module, path)
    built = Built(model, "as found", None)
    if keywords is not None or not _is_audited(model):
        if not callable(model):
            raise ValueError(
                f"`{text}` is {model!r} ({type(model).__name__}), not a callable that"
                f" returns a model. {EXAMPLE}"
            )
        built = _make(partial(model, *arguments, **(keywords or {})), text)
        model = built.model
    if not _is_audited(model):
        raise ValueError(
            f"`{text}` returned {model!r} ({type(model).__name__}), not a module or "
            f"optimizer. {EXAMPLE}"
        )
    if isinstance(model, nn.Module) and any(map(is_lazy, model.parameters())):
        raise ValueError(
            f"`{text}` returned a model with uninitialized parameters. "
            f"Run one batch through the model before returning it."
        )
    return built


def _is_audited(model: object) -> bool:
    return isinstance(model, nn.Module) or bool(param_ids(model))


def _read_checkpoint(path: str) -> list[Any]:
    try:
        level: list[Any] = [[torch.load(path, map_location="cpu", weights_only=True)]]
    except Exception as error:
        raise ValueError(f"`{path}` cannot be read: {on_one_line(error)}.") from error
    while level:
        if saved := [v for v in level if isinstance(v, dict) and "param_groups" in v]:
            return saved
        inside = chain(*[v.values() if isinstance(v, dict) else v for v in level])
        level = [value for value in inside if isinstance(value, (dict, list))]
    raise ValueError(
        f"`{path}` holds no state dict of an optimizer. Save one, as in "
        f"torch.save(optimizer.state_dict(), path)."
    )


def _make(make: Callable[[], Any], text: str) -> Built:
    try:
        # There parameters have shapes and no memory: a model of any size is built.
        with torch.device("meta"):
            return Built(make(), "meta", None)
    except Exception as error:
        note = f"not built on the meta device: {on_one_line(error)}"
    print(f"note: {note}; building on the cpu", file=sys.stderr)
    try:
        return Built(make(), "cpu", note)
    except Exception as error:
        raise ValueError(
            f"`{text}` failed: {on_one_line(error)}. Give it the arguments that it "
            f"needs, or name another callable. {EXAMPLE_CALL}"
        ) from error


ABOUT_AUDIT = """\
Make a model, if possible without memory for its weights, and show what a policy decays
in it and what looks wrong. For an optimizer or a checkpoint, show what decays.
"""
ABOUT_EXAMPLE = """\
example:
  selective_optim audit torchvision.models:resnet50 --against huggingface
"""
ABOUT_TARGETS = """\
models, optimizers and checkpoints:
  torchvision.models:resnet50                    a callable in a module
  experiments/train.py:build_model               a callable in a file
  'timm:create_model(vit_base_patch16_224)'      a callable with arguments: Python
  'timm:create_model(resnet50, num_classes=10)'    literals, or words without quotes
  experiments/train.py:build_optimizer           a callable that returns an optimizer
  runs/checkpoint.pt                             a file that torch.save wrote
"""
ABOUT_THE_REST = f"""
policies:
  a name:
{fill(", ".join(NAMED), 76, initial_indent="    ", subsequent_indent="    ")}
  an expression: "exclude('*.bias', is_norm) * layerwise(0.75)"
  your own policy: MODULE:NAME or FILE.py:NAME

exit status:
  0  the audit was printed
  1  with --strict: something looks wrong, or --against disagrees
  2  the model cannot be made, or a policy raises; the reason is on stderr
"""


def run_audit(options: argparse.Namespace) -> int:
    """Print the audit; return 1 if something looks wrong and ``--strict`` is set."""
    with redirect_stdout(sys.stderr):  # what models print is no part of the audit
        policy, against = map(_policy, (options.policy, options.against))
        built = build(options.target)
    if isinstance(built.model, nn.Module):
        report: Any = audit(built.model, policy or "no_bias_norm", against)
    elif policy is None and against is None:
        report = decay_report(built.model)
    else:
        raise ValueError(
            f"--policy and --against are for a model, which `{options.target}` is not. "
            f"Leave them out."
        )
    if options.json:
        source = {"target": options.target, "device": built.device, "note": built.note}
        print(json.dumps({**source, **report.as_dict()}))
    else:
        print(f"{options.target}, device: {built.device}\n{report}")
    return int(options.strict and not report.agrees)


def _policy(text: str | None) -> Any:
    if text is None:
        return None
    is_path = ":" in text and not EXPRESSION.search(text)
    policy = load(*read_target(text)[:2]) if is_path else text
    as_policy(policy)  # before the model is built, which may take a while
    return policy


def run_list(options: argparse.Namespace) -> int:
    """Print the names of policies, or of recipes, with the sentence above each."""
    source = getsource(import_module(f"selective_optim.policies.{options.module}"))
    pairs = re.findall(r'((?: +# .*\n)+) +(?:Recipe\(\s*)?"(\w+)"', source)
    texts = [(name, " ".join(text.replace("#", "").split())) for text, name in pairs]
    table = [(name, f"{text.partition('. ')[0].rstrip('.')}.") for name, text in texts]
    print("\n".join(aligned(table)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    plain: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    epilog = ABOUT_EXAMPLE + ABOUT_THE_REST
    top = argparse.ArgumentParser(
        "selective_optim", description=__doc__, epilog=epilog, **plain
    )
    version = f"selective_optim {selective_optim.__version__}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, module in {"policies": "named", "recipes": "recipes"}.items():
        sub = commands.add_parser(name, help=f"list the {name}, with a sentence each")
        sub.set_defaults(run=run_list, module=module)
    sub = commands.add_parser(
        "audit",
        help="show what a policy decays in a model, and what looks wrong",
        description=ABOUT_AUDIT,
        epilog=ABOUT_TARGETS + ABOUT_THE_REST,
        **plain,
    )
    sub.set_defaults(run=run_audit)
    add = sub.add_argument
    add("target", metavar="TARGET", help="MODULE:CALLABLE or a file, see below")
    add("--policy", help="the policy to audit (default: no_bias_norm)")
    add("--against", metavar="POLICY", help="another policy to compare with")
    add("--json", action="store_true", help="print one JSON object")
    strict = "exit with 1 if something looks wrong or the policies disagree"
    add("--strict", action="store_true", help=strict)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 (strict) or 2 (error)."""
    options = parser().parse_args(arguments)
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        return int(options.run(options))
    except (TypeError, ValueError) as error:  # of what was typed, or stands behind it
        print(f"selective_optim: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        sys.stdout = None
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
