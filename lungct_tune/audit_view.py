"""What a person sees of an audit: in the terminal, and as one page that needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from lungct_tune.auditing.conclusions import counted
from lungct_tune.rendering import pairs_of_copies, render

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

STYLES = {"leaks": "bold red", "caution": "bold yellow", "clean": "bold green"}
PAIRS_SHOWN = 60
"""Pairs of copies on the page."""


def print_audit(audit: Mapping[str, Any], console: Console) -> None:
    """The verdict first, then the figures that it rests on."""
    verdict, copies, groups, shortcuts = (audit[name] for name in ("verdict", "copies", "groups", "shortcuts"))

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    say(verdict["headline"], STYLES[verdict["level"]])
    for reason in verdict["reasons"]:
        say(f"  - {reason}")
    say("what to do")
    for advice in verdict["advice"]:
        say(f"  - {advice}")

    parts, inventory = audit["split"]["parts"], audit["inventory"]
    table = _table(f"\n{audit['images']} images, {audit['split']['how']} split", "class", *parts, "with a copy")
    for name, counts in inventory["by_class"].items():
        with_copy = copies["images_by_class"].get(name, 0)
        table.add_row(name, *(str(counts[part]) for part in parts), str(with_copy))
    console.print(table)
    say(f"formats: {counted(inventory['formats'])}; modes: {counted(inventory['modes'])}")
    width, height = inventory["sizes"]["width"], inventory["sizes"]["height"]
    say(
        f"widths {width['min']} to {width['max']}, heights {height['min']} to {height['max']}, "
        f"{inventory['distinct_sizes']} distinct sizes"
    )
    for file in inventory["not_what_the_suffix_says"]:
        say(f"  {file['path']} holds {file['format']}")
    for file in inventory["unreadable"]:
        say(f"  {file['path']} cannot be read: {file['reason']}")

    say(f"\npairs of copies: {counted(copies['pairs_by_kind'])}", "bold")
    for row in (*copies["across"], *copies["inside"]):
        if row["with_copy"]:
            say(
                f"  for {row['with_copy']} of {row['images']} {row['part']} images there is a copy in "
                f"{row.get('other', 'the same part')} ({row['byte_identical']} byte-identical): "
                f"{counted(row['by_class'])}"
            )
    by_threshold = ", ".join(f"{row['groups']} at {row['threshold']:g}" for row in groups["by_threshold"])
    say(
        f"groups: {groups['groups']} at a likeness of {groups['threshold']:g}, the largest of "
        f"{groups['largest']} images, {groups['cut_by_the_split']} cut by the split, {groups['of_several_classes']} of "
        f"several classes; by threshold {by_threshold}"
    )

    if shortcuts["rules"]:
        chance = shortcuts["chance"]
        title = "\nshortcuts: rules that see nothing but this, in grouped cross-validation"
        table = _table(title, "", *(rule["rule"] for rule in shortcuts["rules"]), "chance")
        figures = [rule["balanced_accuracy"] for rule in shortcuts["rules"]]
        table.add_row("balanced accuracy", *(f"{x:.2f}" for x in (*figures, chance["balanced_accuracy"])))
        for name in audit["classes"]:
            figures = [rule["auroc"][name] for rule in shortcuts["rules"]]
            table.add_row(f"AUROC of {name}", *(f"{x:.2f}" for x in (*figures, chance["auroc"])))
        console.print(table)
    for run in audit["permuted"] or []:
        proof = "proves that the split leaks" if run["proves_a_leak"] else "no proof of a leak"
        say(
            f"permuted labels, {run['part']}, {run['title']}: balanced accuracy {run['balanced_accuracy']:.2f}, "
            f"chance {run['chance']:.2f}: {proof}"
        )


def audit_page(audit: Mapping[str, Any], root: Path) -> bytes:
    """The audit as HTML, with pairs of copies as thumbnails, worst first.

    Args:
        root: the folder of the images.
    """
    shown = {
        "name": f"Audit of {root.name}",
        "kind": "audit",
        "warnings": [],
        "sections": [("verdict", "verdict"), ("there", "what is there"), ("found", "what was found")],
        "audit": audit,
        "pairs": (pairs := pairs_of_copies(audit, root, PAIRS_SHOWN)),
        "shows_images": bool(pairs),
    }
    return render("audit.html", shown)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
