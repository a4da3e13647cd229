"""Takes the pictures in docs/images: runs a short gate on the quickstart's models and opens its report in Chromium.

    .venv/bin/pip install -c constraints.txt -e '.[quickstart,test]'
    .venv/bin/python docs/screenshots.py

Run the quickstart before; its models are in `quickstart/models` of the current directory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser  # noqa: E402 (it is with the tests)

MODELS = Path("quickstart/models")
REPORT = Path("quickstart/report.html")
LIMITS = ("--kld-max-mean=0.05", "--kld-max-p99=0.5", "--kld-min-top1=0.9")
PROTOCOL = ("--kld-dataset=python-docs", "--kld-windows=8", "--kld-window-size=256", "--kld-stride=256")
DESKTOP, PHONE = 1100, 390
"""Widths in CSS pixels."""


def main() -> None:
    """Run the gate, then take a light, a dark and a phone's picture."""
    gate()
    report = REPORT.resolve()
    with Browser() as browser:
        browser.open(report, width=DESKTOP)
        browser.screenshot(ROOT / "docs/images/report-light.png", top=0, height=1150)
        browser.open(report, width=DESKTOP, dark=True)
        browser.screenshot(ROOT / "docs/images/report-dark.png", top=browser.top_of("#distribution"), height=1250)
        browser.open(report, width=PHONE)
        browser.screenshot(ROOT / "docs/images/report-phone.png", top=0, height=1150)


def gate() -> None:
    """Write the report. NVFP4 fails, as it should."""
    names = ("int8", "fp8", "nvfp4")
    command = [
        *(sys.executable, "-m", "pytest", "quickstart", f"--kld-ref={MODELS / 'smollm2-135m'}"),
        *(f"--kld-candidate={MODELS / name}" for name in names),
        *(*LIMITS, *PROTOCOL, "--kld-cache-dir=quickstart/cache", f"--kld-html={REPORT}"),
    ]
    subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
