"""Which settings `--kld-floor` cannot go with: they name what cannot be run twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.subjects.model import is_capture

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_runs_twice(values: Mapping[str, Any]) -> None:
    """Reject settings that name what cannot be run a second time by a server or a load of its own.

    Raises:
        pytest.UsageError: names the option and what to do.

    """
    for name, option in (("ref_url", "--kld-ref-url"), ("candidate_url", "--kld-candidate-url")):
        if values[name]:
            raise pytest.UsageError(
                f"--kld-floor boots a second server for each model, and {option} names one that runs already: let "
                "pytest-kld boot the servers, or leave --kld-floor out"
            )
    for model in (values["ref"], *values["candidate"]):
        if model is not None and is_capture(model.path):
            raise pytest.UsageError(
                f"--kld-floor runs each model twice, and {model.label} is a capture: name its model, or leave "
                "--kld-floor out"
            )
