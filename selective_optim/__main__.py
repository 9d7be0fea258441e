"""The command line: ``python -m selective_optim audit MODULE:CALLABLE``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from selective_optim.audit import audit
from selective_optim.policies import as_policy
from selective_optim.policies.text import is_expression

EXAMPLE = "Write for example torchvision.models:resnet50."


class CommandError(Exception):
    """What the user typed, or what stands behind it, does not work."""


class Built(NamedTuple):
    """A model, where it was built, and why there if that is not the meta device."""

    model: nn.Module
    device: str
    note: str | None


def load(target: str) -> Any:
    """Import what ``MODULE:NAME`` names; the name may be dotted.

    Raises:
        CommandError: There is no such thing.
    """
    module_name, _, path = target.partition(":")
    if not (module_name and path):
        raise CommandError(f"`{target}` is not of the form MODULE:CALLABLE. {EXAMPLE}")
    try:
        found: Any = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise CommandError(
            f"`{module_name}` cannot be imported: {told(error)}. "
            f"Run in the folder that holds it, or correct the name."
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            close = get_close_matches(name, dir(found), n=1)
            hint = f"Did you mean {close[0]!r}?" if close else EXAMPLE
            raise CommandError(f"`{target}`: there is no {name!r} in it. {hint}")
        found = getattr(found, name)
    return found


def told(error: BaseException) -> str:
    """Put an exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def build(target: str) -> Built:
    """Call what ``target`` names, without memory for weights where that can be done.

    Raises:
        CommandError: It cannot be called, or what it returns is not a module.
    """
    factory = load(target)
    if isinstance(factory, nn.Module):
        return Built(_checked(factory, target), "as found", None)
    if not callable(factory):
        raise CommandError(
            f"`{target}` is {factory!r} ({type(factory).__name__}), not a callable that"
            f" returns a model. {EXAMPLE}"
        )
    try:
        with torch.device("meta"):
            return Built(_checked(factory(), target), "meta", None)
    except CommandError:
        raise
    except Exception as error:
        note = f"not built on the meta device: {told(error)}"
        return Built(
            _checked(_build_on_cpu(factory, target, note), target), "cpu", note
        )


def _build_on_cpu(factory: Callable[[], Any], target: str, note: str) -> Any:
    print(f"note: {note}; building on the cpu", file=sys.stderr)
    try:
        return factory()
    except Exception as error:
        raise CommandError(
            f"`{target}` failed: {told(error)}. "
            f"Name a callable that needs no arguments."
        ) from error


def _checked(model: Any, target: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"`{target}` returned {model!r} ({type(model).__name__}), not a module. "
            f"{EXAMPLE}"
        )
    if any(map(is_lazy, model.parameters())):
        raise CommandError(
            f"`{target}` returned a model with uninitialized parameters. "
            f"Run one batch through the model before returning it."
        )
    return model


def run_audit(options: argparse.Namespace) -> int:
    """Print the audit; return 1 if something looks wrong and that is to count.

    Raises:
        CommandError: The target or a policy does not work.
    """
    try:
        with redirect_stdout(sys.stderr):  # what models print is no part of the audit
            given = [_policy(text) for text in (options.policy, options.against)]
            built = build(options.target)
        found = audit(built.model, *given)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if options.json:
        source = {"target": options.target, "device": built.device, "note": built.note}
        print(json.dumps({**source, **found.as_dict()}))
    else:
        print(f"{options.target}, device: {built.device}\n{found}")
    return int(options.strict and not found.agrees)


def _policy(text: str | None) -> Any:
    """Read a policy's name, or ``MODULE:NAME`` of one; an unknown one raises."""
    if text is None:
        return None
    own = ":" in text and not is_expression(text)
    policy = load(text) if own else text
    as_policy(policy)  # before the model is built, which may take a while
    return policy


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser("selective_optim", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("audit", help="tell what a policy decays in a model")
    sub.add_argument(
        "target", metavar="MODULE:CALLABLE", help="returns the model, no arguments"
    )
    sub.add_argument(
        "--policy",
        default="no_bias_norm",
        help="name of a policy or recipe, or MODULE:NAME of your own (no_bias_norm)",
    )
    sub.add_argument("--against", help="another policy, to list disagreements with")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--strict", action="store_true", help="exit with 1 if something looks wrong"
    )
    sub.set_defaults(run=run_audit)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 (strict) or 2 (error)."""
    options = parser().parse_args(arguments)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return int(options.run(options))
    except CommandError as error:
        print(f"selective_optim: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        sys.stdout = None
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
