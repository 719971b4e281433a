"""Take docs/chat-page.png: a conversation with smollm2 on the chat page, in Chromium (scripts/install-browser)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

TARGET = Path(__file__).parents[1] / "docs/chat-page.png"
QUESTIONS = ("Name three planets of the solar system, in a list.", "Show me a Python function that adds two numbers.")
MAX_BYTES = 150_000


def converse(page: Page) -> None:
    """Ask the questions, with settings under which the answers are the same each time."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("120")
    page.get_by_role("button", name="Save").click()
    for question in QUESTIONS:
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_have_text("Send", timeout=300_000)


def main() -> None:
    command = [sys.executable, "-m", "forge", "serve", "-m", "smollm2", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        found = next(filter(None, (re.search(r"at (http://\S+) \(chat page\)", line) for line in server.stderr)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport={"width": 1080, "height": 800})
            page.goto(found[1])
            converse(page)
            page.screenshot(path=TARGET)
            browser.close()
    finally:
        server.terminate()
        server.communicate()
    size = TARGET.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{TARGET} has {size} bytes, more than {MAX_BYTES}")
    print(f"{TARGET}: {size} bytes")


if __name__ == "__main__":
    main()
