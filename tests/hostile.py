"""Real files of every kind that the package reads, and what reads them: for fuzzing, see test_hostile.py."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from click.testing import CliRunner
from made import made_matrix, made_result, subject
from recorded import record
from safetensors.torch import save_file

from pytest_kld.captures import shared
from pytest_kld.captures.archive import export_captures, import_captures
from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, LogitsReader
from pytest_kld.captures.covered import windows_of
from pytest_kld.captures.inventory import inventory, key_of_scores
from pytest_kld.captures.journal import Journal
from pytest_kld.captures.remote import Remote
from pytest_kld.captures.shared import SharedCache
from pytest_kld.captures.timing import EarlierRuns
from pytest_kld.command import cli
from pytest_kld.command.doctor import _issues
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.handshake import read_handshake
from pytest_kld.engines.served.load import Load, LoadTool
from pytest_kld.engines.served.pieces import first_row, join, reaches, read_piece
from pytest_kld.engines.sglang import load as sglang_load
from pytest_kld.engines.stored import read_stored
from pytest_kld.engines.vllm import load as vllm_load
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.files import sha256_of_file, sha256_of_json
from pytest_kld.hook.protocol import ORIGIN, PROTOCOL
from pytest_kld.progress import Silent
from pytest_kld.report.json_file import write_json_report
from pytest_kld.subjects.digests import FileDigests
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.suites.file import read_suite_file
from pytest_kld.text.corpus import load_corpus
from pytest_kld.throughput.gauges import Gauges
from pytest_kld.throughput.runner import LoadSettings, _Run, _Target


def make_files(made: Path, reference: Path, candidate: Path, windows: Any) -> None:
    """Fill a folder with one real file of each kind."""
    two = windows.first(2)
    captures = [record(model, two, made / "cache") for model in (reference, candidate)]
    shutil.copytree(captures[0].path, made / "capture")
    export_captures(captures[:1], made / "archive.tar", Silent())
    scores = compare(*captures, two, head="exact", device=torch.device("cpu"), progress=Silent())
    scores.save(made / "scores.safetensors")
    result = made_result("candidate", bounds={"max_mean": 1.0})
    write_json_report(made / "report.json", [result], matrices=[made_matrix("candidate", bound=0.1, confidence=0.9)])
    (made / "original").mkdir()
    for window in range(2):
        logits = LogitsReader.of(captures[0], "exact", torch.device("cpu")).logits(window, 0, windows.size)
        save_file({"log_probs": logits.log_softmax(-1).contiguous()}, made / "original" / f"{window}.safetensors")
    (made / "run").mkdir()
    piece = {"token_ids": torch.arange(8), "logits": torch.rand(2, 16), "rows": torch.arange(2)}
    save_file({**piece, "hidden": torch.rand(8, 4)}, made / "run" / "0.0.safetensors", metadata={ORIGIN: "a server"})
    save_file({"weight": torch.rand(16, 4)}, made / "part.safetensors", metadata={"start": "0", "stop": "16"})
    (made / "handshake.json").write_text(json.dumps(handshake()))
    (made / "release.kld.toml").write_text(SUITE)
    memo = FileDigests(memo=made / "memo.json")
    memo.of([made / "release.kld.toml"])
    (made / "memo.json").write_text(json.dumps({str(made / "release.kld.toml"): {"status": [1] * 5, "full": "a" * 64}}))
    journal = Journal(made / "partial", {"key": 1})
    (made / "partial").mkdir()
    (made / "partial" / "x").write_text("x")
    journal.add("x", {"bytes": 1, "sha256": sha256_of_file(made / "partial" / "x")})
    team = SharedCache(remote=Remote(f"file://{made / 'shared'}"), push=True, progress=Silent())
    team.give(captures[0], captures[0].verify)
    (made / "shared" / "claims").mkdir()
    (made / "shared" / "claims" / "one.json").write_bytes(shared._Claim().contents())
    for name, told in (("sglang", SGLANG_REPORT), ("vllm", VLLM_REPORT)):
        (made / f"{name}.jsonl").write_text(json.dumps(told))
    (made / "metrics").write_text(METRICS)
    (made / "checkpoint").mkdir()
    halves = {"one.safetensors": {"a.weight": torch.rand(4, 4)}, "two.safetensors": {"b.weight": torch.rand(4, 4)}}
    for name, tensors in halves.items():
        save_file(tensors, made / "checkpoint" / name)
    weight_map = {tensor: name for name, tensors in halves.items() for tensor in tensors}
    (made / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (made / "checkpoint" / "config.json").write_text(json.dumps(CONFIG))
    rows = [{"text": "one"}, {"text": "two \u00e4"}]
    (made / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made / "text.parquet")


TIMES = {f"{prefix}_{name}_ms": 1.5 for prefix in ("median", "p99", "mean") for name in ("ttft", "tpot", "itl", "e2el")}
COUNTS = {"completed": 4, "total_output_tokens": 32, "duration": 1.0, "output_throughput": 32.0, "errors": ["", ""]}
SGLANG_REPORT = {
    **{name.replace("e2el", "e2e_latency"): value for name, value in TIMES.items()},
    **{**COUNTS, "total_throughput": 64.0, "request_throughput": 4.0},
    "server_info": {"dp_size": 2, "internal_states": [{"effective_max_running_requests_per_dp": 8}]},
}
VLLM_REPORT = {**TIMES, **COUNTS, "total_token_throughput": 64.0, "request_throughput": 4.0}
METRICS = """
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m",engine_type="unified"} 0.5
sglang:num_running_reqs{model_name="m"} 4.0
# TYPE requests histogram
requests_bucket{le="1.0"} 1.0
requests_bucket{le="+Inf"} 2.0
"""
CONFIG = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "auto_map": {"a": "b"}},
    "quantization_config": {"quant_method": "modelopt", "ignore": ["lm_head"], "config_groups": {"g": {"weights": {}}}},
    "text_config": {"vocab_size": 16, "num_hidden_layers": 2},
}

SUITE = """
[reference]
model = "org/reference"
[protocol]
windows = 4
dataset = ["python-docs"]
[limits]
max_mean = 0.05
[[candidate]]
model = "org/candidate"
args = "--tp 2"
tags = ["nvfp4"]
axes = { "prefill chunk" = [512, 8192] }
"""


def handshake() -> dict[str, Any]:
    from pytest_kld import __version__

    return {
        **{"protocol": PROTOCOL, "pytest_kld": __version__, "torch": "2", "environment": {}, "engine": "sglang"},
        ORIGIN: "a server",
        **{"version": "1", "device": "cpu", "model_names": ["model"], "model_class": "M", "vocab_size": 16},
        **{"hidden_size": 4, "dtype": "float32", "quantization": None, "head_ranks": 1, "arguments": {}},
        "refusal": None,
        "head": {"plain": True, "kind": "k", "scale": 1.0, "softcap": None},
        "routing": {"layers": [0], "experts": 4, "per_token": 2, "unobserved": None},
    }


def use_capture(path: Path) -> None:
    """Use everything of a capture, as a comparison does."""
    capture = Capture.open(path.parent if path.parent.name != "windows" else path.parent.parent)
    capture.verify()
    windows_of(capture)
    reader = LogitsReader.of(capture, "exact", torch.device("cpu"))
    for window in range(capture.windows):
        reader.logits(window, 0, 64)


def seal_capture(path: Path) -> None:
    """Give a capture's manifest the digest of a changed file, and its own."""
    root = path.parent if path.parent.name != "windows" else path.parent.parent
    manifest = json.loads((root / "capture.json").read_text())
    name = path.relative_to(root).as_posix()
    if name != "capture.json":
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    manifest.pop("sha256", None)
    with suppress(ValueError):
        (root / "capture.json").write_text(json.dumps({**manifest, "sha256": sha256_of_json(manifest)}))


def use_scores(path: Path) -> None:
    key_of_scores(path)
    scores = Scores.load(path)
    Summary.of(scores)
    scores.by_dataset()
    scores.subject("candidate")


def use_report(path: Path) -> None:
    """Write every report again, as the command does."""
    outputs = [f"--{kind}={path.parent / kind}" for kind in ("json", "html", "junit", "markdown")]
    ran = CliRunner().invoke(cli, ["report", str(path), *outputs])
    assert isinstance(ran.exception, SystemExit | None), ran.exception
    assert ran.exit_code in (0, 1, 2)


def use_piece(path: Path) -> None:
    served = ServedModel(
        **{"kind": None, "url": "u", "label": "m", "capture_dir": path.parent, "api_key": None},
        **{"pool": None, "server": None, "handshake": handshake()},  # type: ignore[arg-type]
    )
    pieces = served.pieces(path.parent, 0, 8)
    for name in ("token_ids", "logits", "hidden", "rows"):
        join(pieces, name)


def use_head(path: Path) -> None:
    if reaches({first_row(path): path}, 16):
        join([read_piece(path, "weight")], "weight")


def use_original(path: Path, windows: Any) -> None:
    from pytest_kld.captures.importing import import_original

    cache = Cache(path.parent.parent / "imported")
    import_original(path.parent, "m", windows.first(2), cache, Silent())


def use_cache(path: Path) -> None:
    root = path.parents[2] if path.name == "capture.json" else path.parents[1]
    inventory(root)
    EarlierRuns.in_cache(root)


def use_shared(path: Path) -> None:
    """Bring the capture of a shared cache into an empty one."""
    root = path.parents[1] if path.parent.name in ("captures", "files") else path.parent
    remote = SharedCache(remote=Remote(f"file://{root}"), push=False, strict=True, progress=Silent())
    cache = Cache(root.parent / "arrived")
    try:
        for manifest in (root / "captures").iterdir():
            entry = cache.root / "captures" / manifest.stem
            remote.offers(entry)
            if remote.pull(cache, entry, "m"):
                Capture.open(entry).verify()
    finally:
        shutil.rmtree(cache.root)


def seal_shared(path: Path) -> None:
    """Give a file of a shared cache the name of its digest, list it, and give the manifest its own digest."""
    root = path.parents[1]
    (listed,) = (root / "captures").iterdir()
    manifest = json.loads(listed.read_bytes())
    if path.parent.name == "files":
        known = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for name, file in manifest["files"].items():
            if file["sha256"] == path.name:
                manifest["files"][name] = known
        path.with_name(known["sha256"]).write_bytes(path.read_bytes())
    manifest.pop("sha256", None)
    with suppress(ValueError):
        listed.write_text(json.dumps({**manifest, "sha256": sha256_of_json(manifest)}))


def use_load_report(path: Path, tool: LoadTool) -> None:
    """Read and check the report of a load generator, as a measurement does."""
    run = _Run(
        **{"engine": None, "tool": tool, "subject": subject("m"), "tokenizer": "t", "directory": path.parent},  # type: ignore[arg-type]
        target=_Target(url="u", handle=None, own=False, arguments=(), added=()),
        settings=LoadSettings(concurrencies=(4,), input_tokens=8, output_tokens=8, rounds=1),
    )
    load = Load(concurrency=4, requests=4, input_tokens=8, output_tokens=8, seed=0, warmup=0)
    result = run._read(path, path, 0)
    run._check(load, result)
    json.dumps(result.raw)


def use_gauges(path: Path) -> None:
    gauges = Gauges(("sglang:token_usage", "sglang:num_running_reqs"))
    with suppress(ValueError):  # as `watched` does
        gauges.read(path.read_text("latin-1"))
    assert all(0 < value < math.inf for value in gauges.medians().values())


def use_checkpoint(path: Path) -> None:
    """Identify a checkpoint and read its headers, as the engines do."""
    model = ModelSpec.parse(str(path.parent), Path())
    model.identity(FileDigests(kind="sample", memo=path.parent / "memo", fresh=True))
    read_stored(model, {})


def use_config(path: Path) -> None:
    """Identify a model by its config, and look for known issues, as `pytest-kld doctor` does."""
    model = ModelSpec.parse(str(path.parent), Path())
    model.identity(FileDigests(kind="sample", memo=path.parent / "memo", fresh=True), trust_remote_code=True)
    with suppress(ValueError, RecursionError):  # as the doctor does
        if isinstance(config := json.loads(path.read_bytes()), dict):
            list(_issues("m", config))


READERS: dict[str, tuple[str, Callable[..., object], Callable[[Path], None] | None]] = {
    "manifest": ("capture/capture.json", use_capture, seal_capture),
    "window": ("capture/windows/00001.safetensors", use_capture, seal_capture),
    "head": ("capture/head.safetensors", use_capture, seal_capture),
    "scores": ("scores.safetensors", use_scores, None),
    "report": ("report.json", use_report, None),
    "archive": ("archive.tar", lambda path: import_captures(path, Cache(path.parent / "new"), Silent()), None),
    "piece": ("run/0.0.safetensors", use_piece, None),
    "part of the head": ("part.safetensors", use_head, None),
    "handshake": ("handshake.json", lambda path: read_handshake(path, "http://h"), None),
    "suite": ("release.kld.toml", read_suite_file, None),
    "memo": ("memo.json", lambda path: FileDigests(memo=path).of([path]), None),
    "journal": ("partial/journal", lambda path: Journal(path.parent, {"key": 1}).intact("x"), None),
    "original": ("original/1.safetensors", use_original, None),
    "shared manifest": ("shared/captures/*.json", use_shared, seal_shared),
    "shared file": ("shared/files/*", use_shared, seal_shared),
    "shared marker": ("shared/pytest-kld.json", use_shared, None),
    "claim": ("shared/claims/one.json", lambda path: shared._who(path.read_bytes()), None),
    "SGLang load": ("sglang.jsonl", lambda path: use_load_report(path, sglang_load.LOAD_TOOL), None),
    "vLLM load": ("vllm.jsonl", lambda path: use_load_report(path, vllm_load.LOAD_TOOL), None),
    "gauges": ("metrics", use_gauges, None),
    "index": ("checkpoint/model.safetensors.index.json", use_checkpoint, None),
    "shard": ("checkpoint/one.safetensors", use_checkpoint, None),
    "config": ("checkpoint/config.json", use_config, None),
    "text in JSON": ("text.jsonl", lambda path: load_corpus(path.name, path.parent), None),
    "text in Parquet": ("text.parquet", lambda path: load_corpus(path.name, path.parent), None),
}
"""By kind of file: its name or the pattern of it, what reads it, and what makes its digests right again."""
