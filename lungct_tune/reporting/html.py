"""Renders templates and pictures as pages that need no network and no other file."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from lungct_tune import __version__
from lungct_tune.auditing.conclusions import counted
from lungct_tune.auditing.findings import Audit
from lungct_tune.data.decode import read_file
from lungct_tune.reporting.format import figure, interval, percent
from lungct_tune.reporting.output_file import GENERATOR

THUMBNAIL = 192
"""The longer side of a copy's picture, in pixels."""


def render(template: str, shown: Mapping[str, Any]) -> bytes:
    """Renders one of the package's templates, HTML or Markdown."""
    is_html = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("lungct_tune.reporting"),
        # users choose the names of files and classes; in Markdown only < could start markup
        autoescape=is_html,
        finalize=None if is_html else lambda value: value.replace("<", "&lt;") if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "interval": interval}
    environment.filters["counted"] = counted
    common = {
        "generator": Markup(GENERATOR),
        "version": __version__,
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }
    return environment.get_template(template).render({**common, **shown}).encode()


def markdown(text: str) -> Markup:
    """Converts Markdown to HTML. HTML inside it is shown as text, and headings are two levels lower."""
    converted = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for level in (2, 1):
        converted = re.sub(rf"<(/?)h{level}>", rf"<\1h{level + 2}>", converted)
    tables = converted.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    return Markup(tables)  # safe: the converter escapes all text


def data_uri(image: Image.Image, quality: int) -> str:
    """Encodes an image for a page: WebP, as a data: URI."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pairs_of_copies(audit: Audit, root: Path, most: int) -> list[dict[str, Any]]:
    """The worst pairs of copies that an audit found, with pictures.

    Args:
        root: the folder of the images.
        most: how many pairs; each takes some 10 KB.
    """
    return [
        vars(pair) | {"sides": [(side, _thumbnail(root, side.path)) for side in (pair.first, pair.second)]}
        for pair in audit.copies.pairs[:most]
    ]


def _thumbnail(root: Path, name: str) -> str:
    """The picture of a file in the folder of the images; "" if it is not there, or no image any more.

    The audit advises to delete one of two contradicting files. A stored audit may also have been changed by others, to
    get a picture from elsewhere on this machine into the page.
    """
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file has been decoded before
            grey, _, _ = read_file(path)
    except Exception:  # Pillow's plugins raise many kinds
        return ""
    grey.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(grey, quality=70)
