"""A Chromium of the system, driven by Playwright: nothing is downloaded, nothing is reached, nothing is remembered."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

NAMES: Final[tuple[str, ...]] = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS: Final[tuple[str, ...]] = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running browser with a fresh profile. Raises RuntimeError without one, ImportError without its driver."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise RuntimeError(f"No Chromium was found ({', '.join(NAMES)}). Install it, e.g. `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Return when a JavaScript expression is true in a page; TimeoutError after so many seconds.

    Playwright's own wait compiles its text inside the page, which the policy of a report forbids.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise TimeoutError(f"Not true within {seconds:g} s: {expression}")
        page.wait_for_timeout(20)
