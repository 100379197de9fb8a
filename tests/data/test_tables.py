"""A table gives back the names that it was given, and no name is a formula for a spreadsheet."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest

from lungct_tune.data.tables import read_table, write_table


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "a=1", "NA", "1", 'a"b\nc', "ü,;"])
def test_a_name_is_read_as_it_was_and_is_no_formula(name: str) -> None:
    names = {"path": [name, "b"], "label": ["normal", name], "group": ["007", name], "images_say": [f"{name} 2", ""]}
    table = pd.DataFrame(names | {"p_normal": [-0.5, 1.0]})
    content = write_table(table)
    pd.testing.assert_frame_equal(read_table(content), table)
    rows = list(csv.reader(io.StringIO(content.decode())))[1:]
    assert not any(cell.startswith(("=", "+", "@", "\t")) for row in rows for cell in row)
    assert not any(cell.startswith("-") for cell in (rows[0][0], rows[1][1], rows[1][2], rows[0][3]))


@pytest.mark.parametrize("names", [["normal", None], [None, float("nan")], [pd.NA, 7]])
def test_a_name_that_is_missing_is_empty(names: list[object]) -> None:
    read = read_table(write_table(pd.DataFrame({"path": ["a", "b"], "class": names})))
    assert list(read["class"]) == ["" if pd.isna(name) else str(name) for name in names]
