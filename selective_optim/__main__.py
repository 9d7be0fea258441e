"""Tell what decays in a model, before it is trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import fill
from typing import Any

import selective_optim
from selective_optim._target import CommandError, build, load
from selective_optim.audit import audit
from selective_optim.policies import as_policy
from selective_optim.policies.named import NAMED
from selective_optim.policies.text import is_expression

ABOUT_POLICIES = f"""\
policies:
  a name:
{fill(", ".join(NAMED), 76, initial_indent="    ", subsequent_indent="    ")}
  an expression: "exclude('*.bias', is_norm) * layerwise(0.75)"
  one of your own: MODULE:NAME or FILE.py:NAME
"""
ABOUT_AUDIT = """\
Build a model, without memory for its weights where it allows that, and tell what a
policy decays in it and what looks wrong.
"""
EXAMPLE = """\
example:
  selective_optim audit torchvision.models:resnet50 --against huggingface
"""
ABOUT_TARGETS = """\
models:
  torchvision.models:resnet50                    a callable of a module
  experiments/train.py:build_model               a callable of a file
  'timm:create_model(vit_base_patch16_224)'      one that takes arguments: Python
  'timm:create_model(resnet50, num_classes=10)'    literals, or words without quotes
"""
ABOUT_CODES = """\
exit status:
  0  the audit was printed
  1  with --strict: something looks wrong, or --against disagrees
  2  the model or a policy does not work; the reason is on stderr
"""


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
    """Read a policy's name or expression, or ``MODULE:NAME`` of one."""
    if text is None:
        return None
    own = ":" in text and not is_expression(text)
    policy = load(text) if own else text
    as_policy(policy)  # before the model is built, which may take a while
    return policy


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "selective_optim",
        description=__doc__,
        epilog=f"{EXAMPLE}\n{ABOUT_POLICIES}\n{ABOUT_CODES}",
        formatter_class=layout,
    )
    version = f"selective_optim {selective_optim.__version__}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser(
        "audit",
        help="tell what a policy decays in a model, and what looks wrong",
        description=ABOUT_AUDIT,
        epilog=f"{ABOUT_TARGETS}\n{ABOUT_POLICIES}\n{ABOUT_CODES}",
        formatter_class=layout,
    )
    sub.add_argument("target", metavar="MODEL", help="MODULE:CALLABLE, see below")
    sub.add_argument(
        "--policy",
        default="no_bias_norm",
        help="whom to ask who decays (default: no_bias_norm)",
    )
    sub.add_argument(
        "--against", metavar="POLICY", help="another one, to list disagreements with"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 if something looks wrong or the policies disagree",
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
