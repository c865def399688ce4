"""The page of a report in a real browser: it needs no network, sorts, filters, and its points answer the mouse."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_tables import example

from compresskit.benchmark.report import comparison
from compresskit.benchmark.report.page import page, plotly_script

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two tasks, one of which has a message that tries to be HTML."""
    frame = example()
    frame.loc[frame["status"] == "failed", "message"] = "</script><b>boom</b>"
    facts = {"lead": "What was measured.", "lines": [("Command", "compresskit bench"), ("Note", "<i>")]}
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page("Made smaller", comparison.sections(frame), facts, "0.0"), encoding="utf-8")
    return path


def test_page_is_self_contained(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head = text[: text.index("<script>")]
    assert not re.search(r"(src|href)=\"(?!data:)", head)
    assert "&lt;/script&gt;&lt;b&gt;boom&lt;/b&gt;" in text
    assert "<b>boom" not in text


def test_pages_may_share_the_script() -> None:
    facts = {"lead": "", "quality": "", "lines": []}
    text = page("Made smaller", comparison.sections(example()), facts, "0.0", script="../plotly.min.js")
    assert '<script src="../plotly.min.js"></script>' in text
    assert len(text) < len(plotly_script()) / 20


@pytest.fixture(scope="module")
def opened(file: Path) -> Iterator[Any]:
    """The page in a headless browser without a network; (page, console messages)."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1300, "height": 1000}, offline=True)
        tab = context.new_page()
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(file.as_uri())
        yield tab, said
        browser.close()


def column(tab: Any, title: str) -> tuple[Any, list[str]]:
    """The button of a column and the cells below it, in the order shown."""
    titles = tab.locator("#results th").all_inner_texts()
    index = next(i for i, text in enumerate(titles) if text.startswith(title))
    cells = tab.locator(f"#results tbody tr td:nth-child({index + 1})").all_inner_texts()
    return tab.locator("#results th").nth(index).locator("button"), cells


def test_sorts_numbers_both_ways_with_unknown_ones_last(opened: Any) -> None:
    tab, _ = opened
    button, before = column(tab, "kept")
    button.click()
    _, falling = column(tab, "kept")
    known = [float(cell) for cell in falling if cell != "N/A"]
    assert known == sorted(known, reverse=True)
    assert falling[len(known) :] == ["N/A"] * before.count("N/A") != []
    button.click()
    _, rising = column(tab, "kept")
    assert rising == [*(f"{value:.1f}" for value in sorted(known)), *falling[len(known) :]]
    column(tab, "method")[0].click()
    column(tab, "method")[0].click()
    _, methods = column(tab, "method")
    assert methods == sorted(methods)


def test_filters(opened: Any) -> None:
    tab, _ = opened
    tab.fill("#filter", "LOW-rank sst2")
    shown = tab.locator("#results tbody tr:visible")
    texts = shown.all_inner_texts()
    assert texts
    assert all("low-rank" in text and "sst2" in text for text in texts)
    assert tab.inner_text("#count").startswith(f"{len(texts)} of ")
    tab.fill("#filter", "")
    assert shown.count() > len(texts)


def test_points_answer_the_mouse(opened: Any) -> None:
    tab, _ = opened
    plot = tab.locator(".plot:visible").first
    plot.locator(".scatterlayer .point").first.scroll_into_view_if_needed()
    box = plot.locator(".scatterlayer .trace").nth(0).locator(".point").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    tip = plot.locator(".hovertext")
    tip.wait_for(timeout=5000)
    assert "kept" in tip.text_content()
    assert "parameters" in tip.text_content()


def test_choosing_a_task_changes_the_plots(opened: Any) -> None:
    tab, _ = opened
    first = tab.locator(".plot:visible").first.get_attribute("id")
    tab.select_option("#section", "rte")
    shown = tab.locator(".plot:visible")
    assert shown.first.get_attribute("id") != first
    assert shown.first.locator(".point").count() > 0
    tab.select_option("#section", "all tasks")


def test_no_complaint_in_the_console(opened: Any) -> None:
    assert opened[1] == []


def test_nothing_of_a_name_or_message_runs(opened: Any, tmp_path: Path) -> None:
    """HTML, Markdown and script in the names of model, method and task, in messages and facts."""
    attack = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
    link = "<a href=\"javascript:document.title='owned'\">[x](javascript:document.title='owned')</a>"
    frame = example()
    frame["model"] = frame["model"].where(frame["seed"] == 0, attack)  # two models: their names are in the titles
    frame["task"] = frame["task"].where(frame["task"] != "rte", attack + "task")
    frame["method"] = frame["method"].replace({"low-rank": attack + "method", "kronecker": link})
    frame.loc[frame["status"] == "failed", "message"] = attack
    facts = {"lead": attack, "quality": attack, "lines": [(attack, attack)]}
    path = tmp_path / "index.html"
    path.write_text(page(f"Made smaller {attack}", comparison.sections(frame), facts, "0.0"), encoding="utf-8")
    browser = opened[0].context.browser
    tab = browser.new_context(viewport={"width": 1300, "height": 1000}, offline=True).new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    for choice in tab.locator("#section option").all_inner_texts():
        tab.select_option("#section", choice)
        tab.locator(".plot:visible .scatterlayer .point").first.wait_for()
        for point in tab.locator(".plot:visible .scatterlayer .point").all()[:4]:
            point.hover(force=True)
    links = tab.locator(".plot a[*|href]").evaluate_all("all => all.map(a => a.getAttribute('xlink:href') || a.href)")
    tab.fill("#filter", attack)
    assert tab.locator("img, #results a, dl a").count() == 0
    assert "owned" in tab.title()  # the text of the title, nothing else
    assert tab.title().startswith("Made smaller <img")
    tab.close()
    assert not [link for link in links if "javascript" in (link or "")]
    assert asked == [path.as_uri()]


def answered(tab: Any, megabytes: int, milliseconds: int) -> tuple[str, float]:
    """What the page says to take where the sliders stand so (0 to 100), and the MB that it names as the limit."""
    for name, value in (("mb", megabytes), ("ms", milliseconds)):
        tab.locator(f"#{name}").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value)
    return tab.inner_text("#take"), float(tab.inner_text("output[for=mb]").split()[0])


def test_sliders_choose_what_keeps_most_within_the_limits(opened: Any) -> None:
    tab, _ = opened
    tab.select_option("#section", "sst2")
    table = dict(comparison.sections(example()))["sst2"]
    known = table[table["score_kept"].notna()]
    best = known.loc[known["score_kept"].idxmax()]
    assert answered(tab, 100, 100)[0].startswith(f"{comparison.row_name(best)} keeps {100 * best['score_kept']:.1f} %")
    for place in (0, 30, 60):
        said, limit = answered(tab, place, 100)
        fit = known[known["megabytes"] <= max(limit, known["megabytes"].min())]
        assert 0 < len(fit) < len(known)
        assert f"keeps {100 * fit['score_kept'].max():.1f} %" in said
    assert "Then: " in tab.inner_text("#next")


def test_plots_follow_the_dark_mode(opened: Any) -> None:
    tab, _ = opened
    paper = tab.locator(".plot:visible .main-svg").first
    light = paper.evaluate("e => getComputedStyle(e).backgroundColor")
    tab.emulate_media(color_scheme="dark")
    dark = paper.evaluate("e => getComputedStyle(e).backgroundColor")
    tab.emulate_media(color_scheme="light")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(17, 24, 39)")
