"""What each recipe decays in well-known models, as a Markdown table.

``python -m benchmarks.recipes_page`` audits every recipe and two policies of ours on
ten models built without weights, saves what it counts under ``benchmarks/results``
and prints the table, the fewest mistakes first; with ``--saved FILE`` it prints the
table of an earlier run. It needs torchvision, timm and transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.step.results import FOLDER, describe_run, load, save
from selective_optim.audit import find_mistakes, model_report
from selective_optim.parameters import ModelIndex
from selective_optim.policies import is_bias, is_layer_weight, is_norm
from selective_optim.policies.recipes import RECIPES

PACKAGES = ("torchvision", "timm", "transformers")
OURS = ("no_bias_norm", "layer_weights")


def vision(name: str) -> Callable[[], nn.Module]:
    """Build a model of torchvision."""

    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return build


def timm(name: str) -> Callable[[], nn.Module]:
    """Build a model of timm."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def hugging(kind: str, auto: str, **settings: Any) -> Callable[[], nn.Module]:
    """Build a model of transformers from the default configuration of its kind."""

    def build() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **settings)
        return getattr(transformers, auto).from_config(config)

    return build


# The defaults of transformers are BERT base, GPT-2 small, T5 small and Llama 7B.
MODELS = {
    "ResNet-50": vision("resnet50"),
    "ViT-B/16": vision("vit_b_16"),
    "EfficientNet-B0": timm("efficientnet_b0"),
    "ConvNeXt-T": timm("convnext_tiny"),
    "Swin-T": timm("swin_tiny_patch4_window7_224"),
    "BERT base": hugging("bert", "AutoModelForSequenceClassification"),
    "GPT-2": hugging("gpt2", "AutoModelForCausalLM"),
    "T5 small": hugging("t5", "AutoModelForSeq2SeqLM"),
    "Llama 7B": hugging("llama", "AutoModelForCausalLM"),
    "Mamba 130M": hugging("mamba", "AutoModelForCausalLM", num_hidden_layers=24),
}


def count(model: nn.Module, recipe: str) -> dict[str, Any]:
    """Count what a recipe decays, and the mistakes among it."""
    try:
        rows = model_report(model, recipe).rows
        kinds = Counter(finding.kind for finding in find_mistakes(model, recipe))
    except ValueError as error:  # minGPT's rule does not cover every model
        return {"refused": str(error)}
    infos = ModelIndex(model).everyone()
    decayed = [info for info, row in zip(infos, rows) if row.weight_decay]
    exempt = [info for info, row in zip(infos, rows) if not row.weight_decay]
    weights = list(map(is_layer_weight, decayed))
    others = [i for i, weight in zip(decayed, weights) if not weight]
    return {
        "decayed": _totals(decayed),
        "exempt": _totals(exempt),
        "norms": kinds["norm"],
        "biases": kinds["bias"],
        "others": sum(not (is_norm(info) or is_bias(info)) for info in others),
        "weights": sum(map(is_layer_weight, exempt)),
    }


def _totals(infos: Sequence[Any]) -> dict[str, int]:
    elements = sum(info.parameter.numel() for info in infos)
    return {"tensors": len(infos), "elements": elements}


def measure() -> dict[str, Any]:
    """Audit every recipe on every model."""
    run = describe_run(torch.device("cpu"), quick=False)
    found: dict[str, Any] = {}
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        found[name] = {recipe: count(model, recipe) for recipe in (*OURS, *RECIPES)}
    return {**run, **{name: version(name) for name in PACKAGES}, "models": found}


def page(results: dict[str, Any]) -> str:
    """Write the counts as a Markdown table, the fewest mistakes first."""
    models = results["models"]
    by_recipe = {
        recipe: [counts[recipe] for counts in models.values()]
        for recipe in next(iter(models.values()))
    }
    # Which build of torch it was, for which CUDA, is not what the counts rest on.
    told = {name: results[name].partition("+")[0] for name in ("torch", *PACKAGES)}
    versions = ", ".join(f"{name} {number}" for name, number in told.items())
    head = ["recipe", "norms + biases decayed", "others decayed", "weights exempt"]
    lines = [[*head, *models], ["---", *("---:" for _ in (*head[1:], *models))]]
    for recipe, cells in sorted(by_recipe.items(), key=lambda item: _rank(item[1])):
        decayed = ["-" if "refused" in c else _cell(c) for c in cells]
        lines.append([f"`{recipe}`", *_mistakes(cells), *decayed])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{versions}:\n\n{table}"


def _rank(cells: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    told = [cell for cell in cells if "refused" not in cell]
    sums = [sum(cell[key] for cell in told) for key in ("norms", "biases")]
    return len(cells) - len(told), sum(sums), sum(cell["others"] for cell in told)


def _cell(counts: dict[str, Any]) -> str:
    wrong = [f"{counts[key]} {key[0]}" for key in ("norms", "biases") if counts[key]]
    brackets = f" ({', '.join(wrong)})" if wrong else ""
    return f"{counts['decayed']['tensors']}{brackets}"


def _mistakes(cells: Sequence[dict[str, Any]]) -> list[str]:
    told = [cell for cell in cells if "refused" not in cell]
    kinds = ("norms", "biases", "others", "weights")
    norms, biases, others, weights = (sum(c[kind] for c in told) for kind in kinds)
    few = f" in {len(told)} of {len(cells)}" if len(told) < len(cells) else ""
    return [f"{norms} + {biases}{few}", str(others), str(weights)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("benchmarks.recipes_page", description=__doc__)
    parser.add_argument("--saved", type=Path, help="print an earlier run's table")
    options = parser.parse_args(arguments)
    if options.saved:
        print(page(load(options.saved)))
        return
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)}: pip install -e '.[integration]'")
    results = measure()
    save(results, FOLDER / f"recipes_{results['date']}.json")
    print(page(results))


if __name__ == "__main__":
    main()
