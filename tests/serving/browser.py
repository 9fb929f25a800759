"""A headless Chromium for tests of pages; they skip where it, chromedriver or selenium is missing."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium(profile, width=1280, height=900):
    """A driver of a browser with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
        "--autoplay-policy=no-user-gesture-required",
        *(f"--user-data-dir={profile}", f"--window-size={width},{height}"),
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


def complaints(driver):
    """What the browser logged of errors, without videos that were deleted while it asked for them."""
    return [e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "status of 404" not in e["message"]]
