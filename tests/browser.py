"""Pages in a headless browser: Debian's Chromium, or playwright's own; nothing is downloaded."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from time_limit import HANG

NARROW, WIDE = 360, 1280

OVERFLOWING = """() => {
  const scrolls = element => element && (getComputedStyle(element).overflowX === "auto" || scrolls(element.parentElement));
  const width = document.documentElement.clientWidth;
  return [...document.body.querySelectorAll("*")]
    .filter(element => !scrolls(element.parentElement) && element.getBoundingClientRect().right > width + 0.5)
    .map(element => element.outerHTML.slice(0, 80));
}"""
"""The elements that stick out of the page on the right, unless in a box that scrolls."""

TEXTS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script, style")) continue;
    const style = getComputedStyle(element), opaque = colour => !/transparent|, 0\\)/.test(colour);
    let under = element;
    while (under && !opaque(getComputedStyle(under).backgroundColor)) under = under.parentElement;
    found.push([node.data.trim(), element.closest("svg") ? style.fill : style.color,
                getComputedStyle(under ?? document.body).backgroundColor]);
  }
  return found;
}"""
"""Each visible text, with its colour and that of its background."""


@dataclass
class Opened:
    """A page in a window of the browser.

    Attributes:
        page: playwright's.
        messages: errors and warnings on the console, and uncaught errors of scripts.
        requests: addresses of all that the page loaded, itself included.
    """

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def colours(self, selector: str) -> list[tuple[int, tuple[int, int, int]]]:
        """The colours in the box of an element, each with its number of pixels."""
        from PIL import Image

        picture = Image.open(io.BytesIO(self.page.locator(selector).screenshot())).convert("RGB")
        return picture.getcolors(maxcolors=picture.width * picture.height)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test that needs it is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        try:
            place = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"], timeout=1000 * HANG)
        except api.Error as error:
            pytest.skip(f"no browser: playwright install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, place: Path | str, width: int = WIDE, scheme: str = "light") -> Iterator[Opened]:
    """A page from a file or an address, in a window of some width in pixels, in a light or dark system."""
    window = {"viewport": {"width": width, "height": 800}, "device_scale_factor": 2 if width == NARROW else 1}
    page = browser.new_page(**window, color_scheme=scheme)
    page.set_default_timeout(1000 * HANG)
    found = Opened(page)
    page.on("console", lambda message: found.messages.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(place if isinstance(place, str) else place.as_uri())
    yield found
    page.close()


def wait_until(page: Any, condition: Callable[[], bool]) -> None:
    """Returns as soon as a condition of this process holds, while the page lives; fails if it doesn't come to that."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(10)


def wait_for_count(page: Any, selector: str, count: int) -> None:
    """Returns as soon as so many elements are on the page."""
    wait_until(page, lambda: page.locator(selector).count() == count)
