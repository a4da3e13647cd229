"""A real headless Chromium that opens files and records its console and network requests."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def missing() -> str | None:
    """Return why a Chromium cannot be driven here; None if it can."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program}; on Debian: apt-get install chromium chromium-driver"
    return None


class Browser:
    """Opens files as pages; a context manager."""

    def __init__(self) -> None:
        self.url = ""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in (*_ARGUMENTS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(str(shutil.which("chromedriver")), log_output=os.devnull)
        self.driver = webdriver.Chrome(options=options, service=service)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()
        self._profile.cleanup()

    def open(self, path: Path, *, width: int = 1200, dark: bool = False, media: str = "screen") -> None:
        """Load the file in a viewport of a width in CSS pixels, and wait until the charts are drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        viewport = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", **viewport)
        self._command("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.driver.get_log("browser")
        self.driver.get_log("performance")  # drop what came before
        self.url = path.as_uri()
        self.driver.get(self.url)
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def run(self, script: str, *arguments: Any) -> Any:
        """Evaluate the body of a JavaScript function."""
        return self.driver.execute_script(script, *arguments)

    def scroll(self, steps: int) -> list[float]:
        """Scroll from the top to the bottom; return the seconds until each part was drawn."""
        taken = []
        for step in range(steps + 1):
            began = time.monotonic()
            share = step / steps
            self.run("scrollTo(0, arguments[0] * (document.documentElement.scrollHeight - innerHeight))", share)
            self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
            taken.append(time.monotonic() - began)
        return taken

    def press(self, key: str) -> None:
        """Press a key in the focused element."""
        self.driver.switch_to.active_element.send_keys(key)

    def complaints(self) -> list[str]:
        """Return what is on the console."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the URLs that were requested, except the file's own and those embedded in it (`data:`)."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert self.url in urls  # else nothing was recorded
        return [url for url in urls if url != self.url and not url.startswith("data:")]

    def pdf(self) -> bytes:
        """Print the page."""
        return base64.b64decode(self._command("Page.printToPDF")["data"])

    def top_of(self, selector: str) -> int:
        """Return where an element begins, in CSS pixels from the top of the page."""
        return int(
            self.run("return document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY", selector)
        )

    def screenshot(self, path: Path, *, top: int, height: int) -> None:
        """Save a part of the page over its full width."""
        width = self.run("return innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        image = self._command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))

    def _command(self, name: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)
