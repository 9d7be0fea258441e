"""The tables of README and pages, written from saved results.

``python -m benchmarks.pages`` rewrites every table that stands between
``<!-- table: NAME -->`` and ``<!-- end -->`` from the newest saved result of its kind;
a test holds the pages to what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recipes_page
from benchmarks.digits import muon
from benchmarks.digits.effect import spread
from benchmarks.step.arms import ALONE, BARE, DEFAULT, FUSED, OURS
from benchmarks.step.cases import case_named
from benchmarks.step.results import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "selective_optim" / "docs").rglob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
CLASSES = {"adamw": "AdamW", "sgd": "SGD"}
Record = dict[str, Any]


def newest(pattern: str) -> Record:
    """Read the last saved result whose file name matches; names end in the date."""
    path = max(FOLDER.glob(pattern), key=lambda path: path.stem.rpartition("_")[2])
    results: Record = json.loads(path.read_text("utf-8"))
    return results


def table(headers: Sequence[str], lines: Iterable[Sequence[str]], texts: int) -> str:
    """Write a Markdown table whose first ``texts`` columns are no numbers."""
    numbers = ["---:"] * (len(headers) - texts)
    rows = [headers, ["---"] * texts + numbers, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def milliseconds(record: Record, arm: str) -> str:
    """Write the median of an arm; on a busy machine the mean; a dash for no run."""
    if arm not in record["arms"]:
        return "-"
    own = record["arms"][arm]
    busy = case_named(record["case"]).busy
    return f"{own['mean_ms'] if busy else own['ms']['median']:.2f}"


def titled(record: Record) -> str:
    title = case_named(record["case"]).title.replace("DTensors", "`DTensor`s")
    mean = " (mean)" if case_named(record["case"]).busy else ""
    return f"{title}{mean}, {CLASSES[record['optimizer']]}"


STEP_ARMS = {
    BARE: "bare kernel",
    ALONE: "bare, small on one thread",
    OURS: "ours",
    FUSED: "torch, split by hand, fused",
    DEFAULT: "torch, split by hand, default",
}
STEPS = "cpu_torch*.json"


def step_table() -> str:
    """Write the time of a step in every case and arm."""
    lines = [
        [titled(record), *(milliseconds(record, arm) for arm in STEP_ARMS)]
        for record in newest(STEPS)["cases"]
    ]
    return table(["case", *STEP_ARMS.values()], lines, 1)


def first_step_table() -> str:
    """Write the time of the first step in every case."""
    lines = [
        [titled(record), *(_median(record["first_step_ms"], arm) for arm in arms)]
        for record in newest(STEPS)["cases"]
        for arms in [(OURS, FUSED)]
    ]
    headers = ["first step", "ours", "torch, split by hand, fused"]
    return table(headers, lines, 1)


def _median(spreads: Record, arm: str) -> str:
    return f"{spreads[arm]['median']:.1f}" if arm in spreads else "-"


def once_table() -> str:
    """Write what is paid once."""
    once = newest(STEPS)["once"]
    building = {
        "torch, no policy": "torch, one group",
        "torch, split by hand": "torch, split by hand",
        "ours": 'ours, `"no_bias_norm"`',
    }
    lines = [
        [f"building for 1,000 parameters: {told}", _median(once["build_ms"], arm)]
        for arm, told in building.items()
    ]
    lines.append(["importing the library after torch", _median(once, "import_ms")])
    return table(["paid once", "ms"], lines, 1)


def forms_table() -> str:
    """Write the time of a step in every form over that of decoupled decay."""
    results = newest("forms_torch*.json")["results"]
    cases = list(dict.fromkeys((r["case"], r["optimizer"]) for r in results))
    ratios = {(r["form"], (r["case"], r["optimizer"])): r["ratio"] for r in results}
    forms = list(dict.fromkeys(r["form"] for r in results))
    lines = [
        [form, *(f"{ratios[form, case]['median']:.2f}" for case in cases)]
        for form in forms
    ]
    titles = [f"{case_named(case).title}, {CLASSES[name]}" for case, name in cases]
    return table(["form", *titles], lines, 1)


def _runs(pattern: str, arm: str, told: Callable[[Any], str]) -> Iterator[list[str]]:
    for result in newest(pattern)["results"]:
        known = [f"{result['weight_decay']:g}", told(result[arm])]
        runs = [spread(result["losses"]), spread(result["accuracies"])]
        yield [result["network"], *known, *runs]


RUNS = ["held-out loss", "accuracy"]


def effect_table() -> str:
    """Write what exempt norms and biases change on few digits."""
    lines = _runs("digits_effect*.json", "norms_and_biases", str)
    headers = ["network", "weight decay", "norms and biases", *RUNS]
    return table(headers, lines, 3)


def finetune_table() -> str:
    """Write what decay towards the start changes on few digits."""

    def told(target: Any) -> str:
        return f'`"{target}"`' if target == "init" else f"{target:g}"

    lines = _runs("digits_finetune*.json", "towards", told)
    headers = ["network", "weight decay", "towards", *RUNS]
    return table(headers, lines, 3)


def muon_table() -> str:
    """Write how far Muon with AdamW and AdamW alone come on digits."""
    headers = ["optimizer", "rate", "last loss", "held-out loss", "steps"]
    return table(headers, muon.lines(newest("digits_muon*.json")["results"]), 1)


def routed_table() -> str:
    """Write the time of a step of Muon over that of the two separate optimizers."""
    lines = [
        [f"{own['case']}", f"{own['ratio']['median']:.2f}", f"{own['equal_arms']:.2f}"]
        for own in newest("routed_*.json")["results"]
    ]
    return table(["model", "one over two", "two over two"], lines, 1)


def recipes_table() -> str:
    """Write what each recipe decays on well-known models."""
    return recipes_page.page(newest("recipes_*.json")) + "\n"


def any_class_table() -> str:
    """Write how many optimizer classes do what they do over groups split by hand."""
    found = sorted(
        newest("any_class*.json")["libraries"], key=lambda own: -own["exact"]
    )
    counts = [[own["exact"], len(own["refused"]), len(own["not run"])] for own in found]
    names = [f"{own['library']} {own['version'].partition('+')[0]}" for own in found]
    lines = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
    sums = [f"**{sum(column)}**" for column in zip(*counts, strict=True)]
    headers = ["library", "exact", "refused", "not run"]
    return table(headers, [*lines, ["**together**", *sums]], 1)


def scale_table() -> str:
    """Write what a parameter costs, and how many times that of torch it is."""
    cases = newest("scale_torch*.json")["cases"]

    def cell(cost: Record) -> str:
        ratio = f" ({cost['ratio']['median']:.2f})" if "ratio" in cost else ""
        return f"{cost['ours_us']:.1f}{ratio}" if cost else "-"

    names = list(dict.fromkeys(name for case in cases for name in case["costs"]))
    lines = [[n, *(cell(case["costs"].get(n, {})) for case in cases)] for n in names]
    for when, told in (("made", "bytes, made"), ("stepped", "bytes, stepped")):
        held = [[case["bytes"][a][when] for a in case["bytes"]] for case in cases]
        cells = ["{:,.0f} ({:,.0f})".format(*own) if own else "-" for own in held]
        lines.append([told, *cells])
    titles = [
        f"{case['tensors']:,}{' in as many groups' * case['groups']}" for case in cases
    ]
    return table(["per parameter", *titles], lines, 1)


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "first_step": first_step_table,
    "once": once_table,
    "forms": forms_table,
    "effect": effect_table,
    "finetune": finetune_table,
    "muon": muon_table,
    "routed": routed_table,
    "recipes": recipes_table,
    "any_class": any_class_table,
    "scale": scale_table,
}


def written(text: str) -> str:
    """Return a page with all of its tables as the saved results have them."""
    return TABLE.sub(
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text
    )


def main() -> None:
    """Rewrite the tables of every page."""
    for path in PAGES:
        text = path.read_text("utf-8")
        if (new := written(text)) != text:
            path.write_text(new, "utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
