"""The page of ``oodcli show`` in a real browser; skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser, browser
from PIL import Image

import oodcli
from oodcli.files.scores import ScoreBlock, ScoresWriter, score_rows
from oodcli.report import listing
from oodcli.report.listing import read_listing
from oodcli.report.scores_page import overviews, scores_page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium")

EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
LONG = "a-folder-with-a-name-that-does-not-fit/and-another-one-below-it/"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def write(path: Path, rows: int, folder: str = LONG) -> dict[str, Any]:
    """Scores of two detectors: a with verdicts, b without."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, rows)).round(6)
    a[:3] = [7, 6, np.inf]
    p = np.clip(1 - (a.argsort().argsort() + 1) / rows, 0, 1)
    silent = np.arange(rows) % 50 == 49
    flags = np.where(silent, np.nan, a > 1.5)
    names = np.array(["cat", "dog", EVIL])[random.integers(0, 3, rows)]
    columns = {
        "a": a,
        "a.p": np.where(silent, np.nan, p),
        "a.ood": flags,
        "a.basis": ["200 real images; nominal 0.05"] * rows,
        "a.why": [f"{EVIL} {k}" if a[k] > 1 else "" for k in range(rows)],
        "b": b,
    }
    parts = ("first-half", "second-half")
    paths = [f"{folder}{parts[2 * k // rows]}/{k:06}.png" for k in range(rows)]
    block = ScoreBlock(
        [*paths, "gone.png"],
        [""] * (rows + 1),
        [""] * rows + [EVIL],
        names.tolist(),
        np.full(rows, 0.5),
        columns,
    )
    with ScoresWriter(path, tuple(columns)) as writer:
        writer.write(block)
    return {"a": a, "b": b, "silent": silent, "names": names, "paths": paths}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("show")
    (folder / LONG / "first-half").mkdir(parents=True)
    numbers = write(folder / "s.csv", 200, f"{folder.as_posix()}/{LONG}")
    for path in numbers["paths"][:5]:
        Image.new("RGB", (20, 30), (200, 0, 0)).save(path)
    return oodcli.show(folder / "s.csv").output, numbers


def text(window: Browser, selector: str) -> str:
    found = window.js(f"document.querySelector({json.dumps(selector)}).textContent")
    return str(found).replace("\u00a0", " ").replace("\u2011", "-")


def column(window: Browser, selector: str) -> list[str]:
    code = f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)"
    return list(window.js(code))


def focus(window: Browser, selector: str) -> None:
    window.js(f"document.querySelector({json.dumps(selector)}).focus()")


def counted(window: Browser) -> int:
    return int(text(window, "#sentence").partition(" ")[0].replace(",", ""))


def flagged(numbers: dict[str, Any], name: str, threshold: float) -> np.ndarray:
    high = (numbers[name] > threshold) | np.isinf(numbers[name])
    return high & ~numbers["silent"] if name == "a" else high


def test_it_starts_as_the_file_says(window: Browser, small) -> None:
    page, numbers = small
    window.messages.clear()
    window.open(page)
    expected = int(flagged(numbers, "a", 1.5).sum())
    assert text(window, "#sentence").startswith(f"{expected} of 196 images (")
    assert "4 without a verdict, 1 unreadable, 1 with an infinite score." in text(window, "#more")
    assert sum(map(int, column(window, "#classes tbody td:nth-child(3)"))) == expected
    assert window.js("document.querySelectorAll('#histogram rect').length") > 10
    assert window.js("document.querySelector('#reset').disabled")
    assert window.messages == []


def test_nothing_from_the_file_runs(window: Browser, small) -> None:
    window.open(small[0])
    assert window.js("document.title").startswith("Scores of ")
    assert window.js("document.scripts.length") == 2
    focus(window, "#search")
    window.type("onerror")
    assert EVIL in column(window, "#list td:nth-child(2)")
    assert window.js("document.title").startswith("Scores of ")
    assert not window.js("[...document.images].some(each => !each.src.startsWith('data:'))")


def test_counts_follow_the_threshold(window: Browser, small) -> None:
    page, numbers = small
    window.open(page)
    focus(window, "#slider")
    window.press("Home")
    lowest = float(window.js("document.querySelector('#number').value"))
    assert counted(window) == flagged(numbers, "a", lowest).sum()
    assert "score above" in text(window, "#sentence")
    seen = {counted(window)}
    for _ in range(40):
        window.press("ArrowRight")
        seen.add(counted(window))
    assert len(seen) > 3
    assert "flagged" in window.js(
        "document.querySelector('#slider').ariaValueText ?? "
        "document.querySelector('#slider').getAttribute('aria-valuetext')"
    )
    focus(window, "#number")
    window.js("document.querySelector('#number').select()")
    window.type("0.25")
    above = flagged(numbers, "a", 0.25)
    assert counted(window) == above.sum()
    classes = dict(
        zip(
            column(window, "#classes tbody th"),
            map(int, column(window, "#classes tbody td:nth-child(3)")),
            strict=True,
        )
    )
    assert classes == {name: above[numbers["names"] == name].sum() for name in classes}
    order = np.argsort(-numbers["a"], kind="stable")[:48]
    marked = window.js("document.querySelectorAll('#most-strip .flagged').length")
    assert marked == above[order].sum()
    focus(window, "#number")
    window.js("document.querySelector('#number').select()")
    window.type("6")  # a score that is not above itself
    assert counted(window) == 2
    focus(window, "#reset")
    window.press("Enter")
    assert counted(window) == flagged(numbers, "a", 1.5).sum()


def test_another_detector(window: Browser, small) -> None:
    page, numbers = small
    window.open(page)
    focus(window, "#detector")
    window.press("ArrowDown")
    assert text(window, "#sentence") == (
        "200 images scored by b; no threshold says which are out of distribution."
    )
    order = np.argsort(-numbers["b"])
    shown = column(window, "#most-strip figure b")
    np.testing.assert_allclose([float(each) for each in shown], numbers["b"][order[:24]], rtol=1e-3)
    assert column(window, "#most-strip figure small") == []  # b explains nothing
    assert window.js("document.querySelector('#p-head').hidden")
    focus(window, "#slider")
    window.press("Home")
    lowest = float(window.js("document.querySelector('#number').value"))
    assert counted(window) == flagged(numbers, "b", lowest).sum()


def test_the_list_can_be_searched_sorted_and_paged_by_keyboard(window: Browser, small) -> None:
    page, numbers = small
    window.open(page)
    assert len(column(window, "#list tbody tr")) == 50
    assert text(window, "#place") == "1–50 of 200 images"
    assert column(window, "#list td:nth-child(3)")[:3] == ["inf", "7", "6"]
    focus(window, "#next")
    window.press("Enter")
    assert text(window, "#place") == "51–100 of 200 images"
    focus(window, "[data-by=path]")
    window.press("Enter")
    assert column(window, "#list tbody th .cut")[0].endswith("000000.png")
    window.press("Enter")
    assert column(window, "#list tbody th .cut")[0].endswith("000199.png")
    assert window.js("document.activeElement.parentElement.ariaSort") == "descending"
    focus(window, "#search")
    window.type("/00017")
    assert text(window, "#place") == "1–10 of 10 images"
    window.js("document.querySelector('#search').value = ''")
    focus(window, "#which")
    window.press("ArrowDown")
    count = flagged(numbers, "a", 1.5).sum()
    assert text(window, "#place").endswith(f"of {count} images")
    focus(window, "#list tbody button")
    window.press("Enter")
    assert window.js("document.activeElement.ariaExpanded") == "true"


def test_images_are_reached_by_arrows_and_show_their_whole_name(window: Browser, small) -> None:
    window.open(small[0])
    focus(window, "#most-strip figure")
    window.press("ArrowRight")
    assert (
        window.js(
            "[...document.activeElement.parentElement.children].indexOf(document.activeElement)"
        )
        == 1
    )
    cut = "getComputedStyle(document.activeElement.querySelector('.cut')).display"
    assert window.js(cut) == "inline"
    window.press("End")
    window.press("ArrowLeft")
    assert window.js("document.querySelectorAll('#most-strip [tabindex=\"0\"]').length") == 1
    assert window.js("document.activeElement.title").endswith(".png")


def test_the_tab_key_reaches_every_control_and_shows_where_it_is(window: Browser, small) -> None:
    window.open(small[0])
    reached = []
    for _ in range(40):
        window.press("Tab")
        name = window.js(
            "document.activeElement.id || document.activeElement.dataset.by || "
            "document.activeElement.tagName"
        )
        reached.append(name)
        assert window.js("getComputedStyle(document.activeElement).outlineStyle") != "none", name
    order = [
        name
        for name in reached
        if name in ("detector", "number", "slider", "FIGURE", "search", "which", "path", "score")
    ]
    assert order[:4] == ["detector", "number", "slider", "FIGURE"]
    assert {"search", "which", "path", "score"} <= set(order)
    unnamed = window.js(
        "[...document.querySelectorAll('input,select')].filter(each => "
        "!each.labels?.length && !each.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [320, 400, 1400])
def test_it_fits_any_width(window: Browser, small, width: int) -> None:
    window.open(small[0], width=width)
    assert window.js("document.documentElement.scrollWidth") <= width


def test_dark_and_printed(window: Browser, small, tmp_path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    window.open(small[0])
    light = window.js(background)
    window.open(small[0], dark=True)
    assert window.js(background) != light
    window.call("Emulation.setEmulatedMedia", media="print")
    assert window.js(background) == "rgb(255, 255, 255)"
    hidden = "getComputedStyle(document.querySelector('{}')).display"
    assert window.js(hidden.format(".controls")) == "none"
    assert window.js(hidden.format("#slider")) == "none"
    figures = window.js("document.querySelectorAll('#most-strip figure').length")
    assert figures == 48
    window.pdf(tmp_path / "p.pdf")
    assert (tmp_path / "p.pdf").read_bytes()[:5] == b"%PDF-"


def test_without_a_script(window: Browser, small) -> None:
    page, numbers = small
    window.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(page)
        expected = flagged(numbers, "a", 1.5).sum()
        assert counted(window) == expected
        assert sum(map(int, column(window, "#classes tbody td:nth-child(3)"))) == expected
        assert window.js("document.querySelectorAll('#most-strip figure').length") == 48
        shown = "[...document.querySelectorAll('input,select')].some(each => each.offsetParent)"
        assert not window.js(shown)
    finally:
        window.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_hundred_thousand_rows(window: Browser, tmp_path: Path) -> None:
    numbers = write(tmp_path / "s.csv", listing.LISTED)
    shown = oodcli.show(tmp_path / "s.csv")
    assert shown.listed == listing.LISTED
    window.open(shown.output)
    loaded = window.js("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"{listing.LISTED} rows loaded after {loaded:.0f} ms")
    assert window.js("document.querySelectorAll('*').length") < 3000
    assert len(column(window, "#list tbody tr")) == 50
    focus(window, "#number")
    window.js("document.querySelector('#number').select()")
    window.type("1")
    assert counted(window) == flagged(numbers, "a", 1).sum()
    focus(window, "#search")
    window.type("09999")
    assert re.fullmatch(r"1–\d+ of \d+ images", text(window, "#place"))


def test_of_more_rows_the_counts_are_exact_at_every_step(
    window: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oodcli.stages.show.LISTED", 200)
    numbers = write(tmp_path / "s.csv", 3000)
    shown = oodcli.show(tmp_path / "s.csv")
    assert shown.listed < 300
    window.open(shown.output)
    assert counted(window) == flagged(numbers, "a", 1.5).sum()
    steps = window.js("JSON.parse(document.getElementById('data').textContent).detectors[0].steps")
    focus(window, "#slider")
    window.press("Home")
    for step in steps[1:30:7]:
        for _ in range(7 if step != steps[1] else 1):
            window.press("ArrowRight")
        assert counted(window) == flagged(numbers, "a", step).sum()
    focus(window, "#number")
    window.js("document.querySelector('#number').select()")
    window.type("0.3")  # the nearest step
    nearest = min(steps, key=lambda step: abs(step - 0.3))
    assert counted(window) == flagged(numbers, "a", nearest).sum()


def test_the_calibration_says_how_many_false_alarms_to_expect(
    window: Browser, tmp_path: Path
) -> None:
    write(tmp_path / "s.csv", 200)
    found = read_listing(score_rows(tmp_path / "s.csv"), ["a"], 1000)
    quantiles = np.linspace(-2, 2, 201).tolist()
    about = {"images": "9 real images", "rate": 0.05, "threshold": 1.5, "quantiles": quantiles}
    found = replace(found, made={"calibration": {"a": about}})
    page, _ = scores_page(found, overviews(found), thumbnails=False)
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    window.open(tmp_path / "p.html")
    assert "Calibrated on 9 real images." in text(window, "#more")
    assert "if all were in distribution (9 real images)" in text(window, "#legend")
    assert window.js("document.querySelectorAll('#histogram path.outline').length") == 1
    for typed, share in (("1", 25), ("-1.7", 92.5), ("3", 0), ("-3", 100)):
        focus(window, "#number")
        window.js("document.querySelector('#number').select()")
        window.type(typed)
        words = f", as do about {share:g} % of the calibration’s images."
        assert text(window, "#sentence").endswith(words)
