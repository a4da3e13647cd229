"""The quickstart: a real model, three quantized candidates, one gate. All its files go to `./quickstart/`."""

import json
import subprocess
import sys
from pathlib import Path

from make_models import make_models

ROOT = Path("quickstart")
EXPECTED = {"int8": "passed", "fp8": "passed", "nvfp4": "failed"}


def main() -> int:
    """Make the models, run the gate, and say whether the outcomes are as expected."""
    reference, candidates = make_models(ROOT / "models")
    report = ROOT / "report.json"
    (ROOT / "pytest.ini").write_text("[pytest]\n")  # so that pytest takes no ini file from a directory above
    command = [
        *(sys.executable, "-m", "pytest", str(ROOT)),
        f"--kld-ref={reference}",
        *(f"--kld-candidate={candidate}" for candidate in candidates),
        "--kld-max-mean=0.05",
        # A short protocol, which takes two minutes on a laptop; the default is the standard protocol.
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
        print(f"\nThe outcomes are not as expected: {outcomes} instead of {EXPECTED}.")
        return 1
    print(
        "\nThe outcomes are as expected: INT8 and FP8 are within 0.05 nats of the reference, NVFP4 is not, and pytest "
        f"failed.\nOpen {ROOT / 'report.html'} in a browser; {ROOT / 'report.xml'} is JUnit, {report} has every "
        "figure. Run the command again with another limit: nothing is computed again."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
