"""The quickstart: a real model, three quantized candidates, one gate. Everything goes to `quickstart/` here."""

import json
import subprocess
import sys
from pathlib import Path

from make_models import make_models

ROOT = Path("quickstart")
EXPECTED = {"int8": "passed", "fp8": "passed", "nvfp4": "failed"}


def main() -> int:
    """Make the models, run the gate, and say whether it went as it should."""
    reference, candidates = make_models(ROOT / "models")
    report = ROOT / "report.json"
    (ROOT / "pytest.ini").write_text("[pytest]\n")  # so that no ini file of a directory above counts
    command = [
        *(sys.executable, "-m", "pytest", str(ROOT)),
        f"--kld-ref={reference}",
        *(f"--kld-candidate={candidate}" for candidate in candidates),
        "--kld-max-mean=0.05",
        # A short protocol, so that this takes two minutes on a laptop; the standard one is the default.
        *("--kld-dataset=python-docs", "--kld-windows=16", "--kld-window-size=512", "--kld-stride=512"),
        *(f"--kld-cache-dir={ROOT / 'cache'}", f"--kld-junit={ROOT / 'report.xml'}", f"--kld-json={report}"),
        f"--kld-html={ROOT / 'report.html'}",
    ]
    print("$ pytest", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=False)
    outcomes = {
        Path(result["candidate"]).name: result["outcome"] for result in json.loads(report.read_text())["results"]
    }
    if outcomes != EXPECTED:
        print(f"\nThat is not what should have happened: {outcomes}, expected {EXPECTED}.")
        return 1
    print(
        "\nThis is as it should be: INT8 and FP8 are within 0.05 nats of the reference, NVFP4 is not, and pytest "
        f"failed.\nOpen {ROOT / 'report.html'} in a browser; {ROOT / 'report.xml'} is JUnit, {report} has every "
        "figure. Run this again with another limit: nothing is computed anew."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
