"""What each recipe decays in well-known models, as a Markdown table.

``python -m benchmarks.recipes_page`` audits every recipe on ten models built without
weights, saves what it counts under ``benchmarks/results`` and prints the table;
with ``--saved FILE`` it prints the table of an earlier run. It needs torchvision,
timm and transformers.
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
from selective_optim.policies.recipes import RECIPES

PACKAGES = ("torchvision", "timm", "transformers")
OURS = "no_bias_norm"


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
    "ResNet-50 (torchvision)": vision("resnet50"),
    "ViT-B/16 (torchvision)": vision("vit_b_16"),
    "EfficientNet-B0 (timm)": timm("efficientnet_b0"),
    "ConvNeXt-T (timm)": timm("convnext_tiny"),
    "Swin-T (timm)": timm("swin_tiny_patch4_window7_224"),
    "BERT base (transformers)": hugging("bert", "AutoModelForSequenceClassification"),
    "GPT-2 (transformers)": hugging("gpt2", "AutoModelForCausalLM"),
    "T5 small (transformers)": hugging("t5", "AutoModelForSeq2SeqLM"),
    "Llama 7B (transformers)": hugging("llama", "AutoModelForCausalLM"),
    "Mamba 130M (transformers)": hugging(
        "mamba", "AutoModelForCausalLM", num_hidden_layers=24
    ),
}


def count(model: nn.Module, recipe: str) -> dict[str, Any]:
    """Count what a recipe decays, and the norms and biases among it."""
    try:
        rows = model_report(model, recipe).rows
        kinds = Counter(finding.kind for finding in find_mistakes(model, recipe))
    except ValueError as error:  # minGPT's rule does not cover every model
        return {"refused": str(error)}
    decayed = [row.numel for row in rows if row.weight_decay]
    exempt = [row.numel for row in rows if not row.weight_decay]
    return {
        "decayed": {"tensors": len(decayed), "elements": sum(decayed)},
        "exempt": {"tensors": len(exempt), "elements": sum(exempt)},
        "norms": kinds["norm"],
        "biases": kinds["bias"],
    }


def measure() -> dict[str, Any]:
    """Audit every recipe on every model."""
    run = describe_run(torch.device("cpu"), quick=False)
    found: dict[str, Any] = {}
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        found[name] = {recipe: count(model, recipe) for recipe in (OURS, *RECIPES)}
    return {**run, **{name: version(name) for name in PACKAGES}, "models": found}


def page(results: dict[str, Any]) -> str:
    """Write the counts as a Markdown table with a line above that explains it."""
    models = results["models"]
    recipes = list(next(iter(models.values())))
    versions = ", ".join(f"{name} {results[name]}" for name in ("torch", *PACKAGES))
    lines = [["model", *(f"`{recipe}`" for recipe in recipes)]]
    lines += [["---", *("---:" for _ in recipes)]]
    lines += [[name, *map(_cell, counts.values())] for name, counts in models.items()]
    wrong = [
        _mistakes([model[recipe] for model in models.values()]) for recipe in recipes
    ]
    lines += [["**norms + biases decayed**", *wrong]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"Tensors that decay; in brackets, how many of them are norms (n) and biases "
        f"(b) as `is_norm` and `is_bias` find them, which is what `{OURS}` exempts. "
        f"A dash: the project's own rule stops with an error on this model. "
        f"{versions}.\n\n{table}"
    )


def _cell(counts: dict[str, Any]) -> str:
    if "refused" in counts:
        return "-"
    wrong = [f"{counts[key]} {key[0]}" for key in ("norms", "biases") if counts[key]]
    brackets = f" ({', '.join(wrong)})" if wrong else ""
    return f"{counts['decayed']['tensors']}{brackets}"


def _mistakes(cells: Sequence[dict[str, Any]]) -> str:
    told = [cell for cell in cells if "refused" not in cell]
    norms, biases = (sum(cell[key] for cell in told) for key in ("norms", "biases"))
    few = f" in {len(told)} of {len(cells)}" if len(told) < len(cells) else ""
    return f"**{norms} + {biases}**{few}"


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
