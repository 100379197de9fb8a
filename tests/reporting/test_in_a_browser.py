"""The report in a real Chromium: the texts of marks by keyboard, tap and click, on a screen and on a phone."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from make_pictures import Page, chromium
from recorded_search import finished_search

from lungct_tune.experiment.results import read_results
from lungct_tune.reporting.report_page import report_page
from lungct_tune.reporting.test_section import find_pictures

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]

TIP = "document.getElementById('tip').textContent"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    found = read_results(finished_search(tmp_path_factory.mktemp("finished"), phantoms).plan.experiment)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(report_page("one", found, find_pictures(found, None, is_local=True)))
    return path


async def press(page: Page, key: str) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        await page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_texts_of_marks_are_read_with_keyboard_and_touch(report: Path, width: int, dark: bool) -> None:
    async def look() -> None:
        async with chromium() as page:
            await page.show(report.as_uri(), width, dark=dark)
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            assert await page.evaluate(TIP) == ""
            charts = "[...document.querySelectorAll('figure svg')].filter(it => it.tabIndex === 0)"
            history = f"{charts}.find(it => it.getAttribute('aria-label').includes('by their start'))"
            await page.evaluate(f"{history}.focus()")
            read = []
            for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
                await press(page, key)
                read.append(await page.evaluate(TIP))
            assert [text.partition(":")[0] for text in read] == ["trial 0", "trial 1", "trial 0", "trial 4"]
            assert "completed" in read[0] and "depth 20" in read[0]
            await press(page, "Escape")
            assert await page.evaluate(TIP) == ""
            await page.evaluate(f"{history}.scrollIntoView({{block: 'center'}})")
            box = f"{history}.querySelectorAll('title')[1].parentElement.getBoundingClientRect()"
            x, y = [await page.evaluate(f"{box}.{edge}") for edge in ("right", "bottom")]
            beside = {"x": x + 8, "y": y + 8}  # a finger is not exact
            if width < 600:
                await page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[beside])
                await page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            else:
                for kind in ("mousePressed", "mouseReleased"):
                    await page.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **beside)
            await page.wait_for(f"{TIP} !== ''", 5)
            marked = f"{history}.querySelector('.shown > title').textContent"
            assert await page.evaluate(TIP) == await page.evaluate(marked)

    asyncio.run(asyncio.wait_for(look(), 120))
