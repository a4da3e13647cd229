"""One run, as a server's process sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from pytest_kld.hook.protocol import REQUEST_FILE, CaptureRequest


@dataclass(slots=True)
class Run:
    """One run as this process sees it. `reached` holds, by window, how many of its positions were seen."""

    path: Path
    request: CaptureRequest | None = None
    greeted: bool = False
    reached: dict[int, int] = field(default_factory=dict)

    def read(self) -> CaptureRequest:
        """Return the capture request that the other side wrote."""
        if self.request is None:
            self.request = CaptureRequest.from_json(json.loads((self.path / REQUEST_FILE).read_text()))
        return self.request
