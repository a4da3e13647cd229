"""The same inputs give the same bytes: in another process, in another order, with other hash seeds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from guarantees.campaign import REAL, Campaign
from transformers import AutoConfig

pytestmark = pytest.mark.slow

REPORTS = {"report.json", "report.xml", "report.html", "report.md"}
OPTIONS = ("--kld-junit=report.xml", "--kld-html=report.html", "--kld-markdown=report.md", "--kld-confidence=0.9")


def run(campaign: Campaign, name: str, seed: str, *options: str) -> Path:
    """Run with an empty cache; return the directory to which cache and reports were moved."""
    code, output = campaign.run(*OPTIONS, *options, PYTHONHASHSEED=seed)
    assert code == 0, output
    kept = campaign.directory.parent / name
    kept.mkdir()
    for path in (campaign.cache, *(campaign.directory / report for report in REPORTS)):
        shutil.move(path, kept)
    return kept


def without_times(name: str, contents: bytes) -> Any:
    """Return a file's contents without the fields that docs/guarantees.md declares to differ."""
    text = contents.decode("utf-8", "surrogateescape")
    if name == "capture.json":
        manifest = json.loads(text)
        del manifest["timing"], manifest["origin"], manifest["sha256"]
        return manifest
    if name == "report.json":
        return re.sub(r'^ *"(created|seconds)": .*,$', "", text, flags=re.MULTILINE)
    if name == "report.xml":
        return re.sub(r' (time|timestamp)="[^"]*"', "", text)
    if name == "report.html":
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", text)
    return text


def contents(directory: Path, *patterns: str) -> dict[str, Any]:
    files = [path for pattern in patterns for path in directory.glob(pattern) if path.is_file()]
    return {path.relative_to(directory).as_posix(): without_times(path.name, path.read_bytes()) for path in files}


ENTRIES = ("cache/captures/*/**/*", "cache/scores/*.safetensors")


@pytest.mark.parametrize("campaign", ["transformers", "tiny", *REAL], indirect=True)
def test_captures_scores_and_reports_are_the_same_bytes_in_another_process_and_order(
    campaign: Campaign, make_model: MakeModel
) -> None:
    campaign.fault("")
    noisier = make_model(f"noisier-{campaign.engine}", AutoConfig.from_pretrained(campaign.reference), noise=0.001)
    near, far = f"--kld-candidate={campaign.candidates[0]}", f"--kld-candidate={noisier}"
    campaign.candidates = ()
    limit = "--kld-max-mean=10"
    first = run(campaign, "first", "1", near, far, limit)
    again = run(campaign, "again", "2", near, far, limit)
    other = run(campaign, "other", "3", far, near, limit)
    entries = contents(first, *ENTRIES)
    assert len(entries) == 3 * (campaign.count + 2) + 2
    for repeat in (again, other):
        found = contents(repeat, *ENTRIES)
        assert found.keys() == entries.keys()
        assert [name for name in entries if found[name] != entries[name]] == []
    reports, repeated = contents(first, "report.*"), contents(again, "report.*")
    assert reports.keys() == REPORTS
    assert [name for name in reports if reports[name] != repeated[name]] == []
    results = [
        json.loads(reports_of["report.json"])["results"] for reports_of in (reports, contents(other, "report.*"))
    ]
    assert results[0] == results[1][::-1]
