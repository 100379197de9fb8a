"""Writes docs/settings.md from the settings model, so that page and program say the same: `make settings-page`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lungct_tune.config.settings import Settings

PAGE = Path(__file__).with_name("settings.md")
TOP = """\
# Settings

<!-- Made by `make settings-page` from lungct_tune/config/settings.py. Change the text there. -->

Each setting is a flag of `python -m lungct_tune.search`, and a key of a YAML file for `--settings FILE`:

```yaml
data: chest-ctscan
image_size: 160
compare_baseline: true
```

Flags win over the file. The flags that you need most:

| for | flags |
|---|---|
| the budget | `--trials N --epochs N` |
| several workers for one trial | `--workers N` |
| several slots on one GPU | `--gpus-per-worker 0.25` |
| trials at the same time | `--slots N`; by default as many as the cluster has or can grow to |
| a cluster of several nodes | `--storage URI`, a shared folder or a bucket |
| another Ray cluster | `--address ADDR`; by default the one at hand, else a new one here; `local` is a new one |
| other random numbers | `--seed N` |

## All settings

"""
COLUMNS = ("flag, YAML key", "type", "default", "what it does")


def settings_page() -> str:
    """The whole page."""
    properties = Settings.model_json_schema()["properties"]
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(name, schema) for name, schema in properties.items())]
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return TOP + "\n".join(lines) + "\n"


def _row(name: str, schema: dict[str, Any]) -> tuple[str, ...]:
    """A setting's row; what its help says last in brackets is its default."""
    text = schema["description"]
    told = re.fullmatch(r"(.+) \(([^()]+)\)", text)
    what, default = told.groups() if told else (text, _shown(schema.get("default")))
    return f"`--{name.replace('_', '-')}`<br>`{name}`", _type(schema), default, what


def _shown(default: Any) -> str:
    return "none" if default is None else "off" if default is False else f"`{default}`"


def _type(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema["enum"])
    kind = schema.get("anyOf", [schema])[0]  # the second is null, or another way to write the same
    name = {"boolean": "switch", "string": "text", "object": "mapping"}.get(kind["type"], kind["type"])
    match kind:
        case {"minimum": low, "maximum": high}:
            return f"{name}, {low} to {high}"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f"{name}, {low} to {high - 1}"
        case {"minimum": low}:
            return f"{name}, {low} or more"
        case {"exclusiveMinimum": low}:
            return f"{name}, above {low}"
        case _:
            return name


if __name__ == "__main__":
    PAGE.write_text(settings_page())
