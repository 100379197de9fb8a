"""Tables of images as CSV. Names are as they are, and no name is a formula for a spreadsheet."""

from __future__ import annotations

from io import BytesIO

import pandas as pd

NAMES = ["path", "label", "class", "predicted", "group", "patient", "first_image", "images_say"]
"""The columns with names that users have given. They stay text: a class may be called 1, None or NA, a group 007."""

_SHIELD = "'"
_SHIELDED = ("=", "+", "-", "@", "\t", "\r", _SHIELD)


def write_table(table: pd.DataFrame) -> bytes:
    """Encodes a table; `read_table` gives the same names.

    Spreadsheets take cells that begin with = + - @ for formulas, which may call programs. So names that begin like this
    are written behind an apostrophe: https://owasp.org/www-community/attacks/CSV_Injection. A missing name is empty.
    """
    names = table.columns.intersection(NAMES)
    shielded = {name: [_shield(str(text)) for text in table[name].astype(object).fillna("")] for name in names}
    return table.assign(**shielded).to_csv(index=False).encode()


def read_table(csv: bytes) -> pd.DataFrame:
    """Decodes a table of images."""
    table = pd.read_csv(BytesIO(csv), dtype=dict.fromkeys(NAMES, str), keep_default_na=False)
    for name in table.columns.intersection(NAMES):
        table[name] = table[name].str.removeprefix(_SHIELD)
    return table


def _shield(text: str) -> str:
    return _SHIELD + text if text.startswith(_SHIELDED) else text
