"""Draw the pictures of docs/chat.md: python -m tests.server.web_pictures URL DIRECTORY, with `appliance serve` at URL."""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from tests.server.test_web import CHROMIUM

QUESTIONS = ("What is the capital of France?", "What is 17 plus 8?", "Spell the word garden.")


def load(url: str, stop: threading.Event) -> None:
    """Somebody else who uses the server."""
    body = json.dumps({"prompt": "Spell the word garden.", "max_tokens": 450, "ignore_eos": True}).encode()
    while not stop.is_set():
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            response.read()


def picture(browser: Browser, url: str, path: Path, *, panel: bool, **device: Any) -> None:
    page = browser.new_page(**device)
    page.goto(url)
    for question in QUESTIONS:
        page.fill("#prompt", question)
        expect(page.locator("#send")).to_be_enabled()
        page.press("#prompt", "Enter")
        expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
    if panel:
        page.click("#open-metrics")
        page.wait_for_timeout(40_000)
    page.mouse.move(0, 0)
    page.screenshot(path=path)
    page.close()


def main(url: str, directory: Path) -> None:
    stop = threading.Event()
    others = [threading.Thread(target=load, args=(url, stop)) for _ in range(3)]
    for other in others:
        other.start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            picture(browser, url, directory / "chat-page.png", panel=True, viewport={"width": 1200, "height": 760})
            phone = {"viewport": {"width": 390, "height": 700}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
            picture(browser, url, directory / "chat-page-phone.png", panel=False, **phone)
            browser.close()
    finally:
        stop.set()
        for other in others:
            other.join()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
