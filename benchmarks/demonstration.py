"""Checks the demonstration: does the winner on phantoms beat the published configuration and every simple rule?

    python benchmarks/demonstration.py --seeds 1 2 3 4 5

Each seed draws other phantom patients and runs the search that `python -m lungct_tune.search` runs without arguments.
The table has differences in balanced accuracy on the test split, paired by image, with 95 % intervals of a bootstrap of
patients. The exit status is 1 if an interval of any seed is not above 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def searched(storage: Path, seed: int, more: list[str]) -> tuple[dict[str, Any], float]:
    """The test figures of a search, from metrics.json, and its seconds."""
    name, began = f"seed-{seed}", time.monotonic()
    command = [sys.executable, "-m", "lungct_tune.search", "--seed", str(seed), "--name", name]
    subprocess.run([*command, "--storage", str(storage), *more], check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((storage / name / "best" / "metrics.json").read_text())["test"]
    return figures, time.monotonic() - began


def in_words(figure: dict[str, Any], style: str = ".3f") -> str:
    if figure["ci95"] is None:
        return f"{figure['value']:{style}}, no interval"
    low, high = figure["ci95"]
    return f"{figure['value']:{style}} ({low:{style}} to {high:{style}})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("more", nargs="*", help="for every search")
    asked = parser.parse_args()
    console, table = Console(highlight=False, width=200), Table("seed", "balanced accuracy", title_justify="left")
    kinds: list[str] = []
    below: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in asked.seeds:
            figures, seconds = searched(Path(folder), seed, asked.more)
            others = {kind: other for kind, other in figures["references"].items() if kind != "majority class"}
            if not kinds:
                kinds = list(others)
                for kind in (*(f"minus {kind}" for kind in kinds), "seconds"):
                    table.add_column(kind)
            gains = [others[kind]["balanced_difference"] if kind in others else None for kind in kinds]
            cells = [in_words(gain, "+.3f") if gain else "is the winner" for gain in gains]
            table.add_row(str(seed), in_words(figures["balanced_accuracy"]), *cells, f"{seconds:.0f}")
            pairs = zip(kinds, gains, strict=True)
            unsure = [kind for kind, gain in pairs if not (gain and gain["ci95"] and gain["ci95"][0] > 0)]
            below += [f"seed {seed}, {kind}" for kind in unsure]
    console.print(table)
    console.print("every interval is above 0" if not below else f"not above 0: {'; '.join(below)}", soft_wrap=True)
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())
