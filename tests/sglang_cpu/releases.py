"""Other releases of the real SGLang, overlaid on the environment of the newest one.

An overlay is a directory on PYTHONPATH with that release and those of its pinned packages that it needs in that very
version; the rest is shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from cpu_environment import ROOT, cached

from sglang_cpu.environment import HERE, SGLangEnvironment, sglang_environment, variables

_SHARED = ("llguidance==0.7.30", "openai==2.6.1")
OVERLAYS = {
    "0.5.9": ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface-hub==0.36.0", "xgrammar==0.1.27"),
    "0.5.10.post1": ("transformers==5.3.0", "tokenizers==0.22.2", "huggingface-hub==1.33.0", "xgrammar==0.1.32"),
    "0.5.15.post1": ("transformers==5.12.1", "tokenizers==0.22.2", "huggingface-hub==1.33.0", "xgrammar==0.2.1"),
}
"""What each release pins."""
CUSTOM_ALL_REDUCE = "sglang/srt/distributed/device_communicators/custom_all_reduce"
"""The files of SGLang's own all-reduce, which parse CUDA_VISIBLE_DEVICES."""
_UNPACKED = (
    *("sglang/_version.py", "sglang/__init__.py", "sglang/version.py", "sglang/srt/plugins/"),
    *("sglang/srt/server_args.py", "sglang/srt/arg_groups/fields/", CUSTOM_ALL_REDUCE),
    "sglang/srt/layers/logits_processor.py",
    "sglang/srt/model_executor/piecewise_cuda_graph_runner.py",
    "sglang/srt/model_executor/runner/prefill_cuda_graph_runner.py",
)
_FLAGS = {
    "0.5.9": (),
    "0.5.10.post1": ("--disable-piecewise-cuda-graph",),
    "0.5.15.post1": ("--disable-piecewise-cuda-graph",),
}


def release_environment(release: str, hook: Path) -> SGLangEnvironment:
    """Return an environment with another release, patched if necessary, and make what is missing.

    Args:
        release: a key of `OVERLAYS`.
        hook: an empty directory; pytest-kld is installed into it, as it is in this checkout.

    """
    base = sglang_environment(hook)
    requirements = (f"sglang=={release}", *OVERLAYS[release], *_SHARED)
    patches = "".join(path.read_text() for path in sorted((ROOT / "patches").iterdir()))

    def make(directory: Path) -> None:
        install = (base.python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory)
        subprocess.run([*install, *requirements], check=True)
        patch = (base.python, "-m", "pytest_kld.command", "patch", "--apply", "--sglang", directory)
        subprocess.run(patch, check=True, env={**os.environ, "PYTHONPATH": str(hook)})

    overlay = cached(f"sglang-{release}", f"{sys.version}\n{requirements}\n{patches}", make)
    return SGLangEnvironment(
        python=base.python,
        variables=variables(hook, overlay, HERE / "stubs_old", HERE / "stubs"),
        flags=(*base.flags, *_FLAGS[release]),
    )


def unpack(release: str, directory: Path) -> Path:
    """Extract the files of a release's wheel that tests read into a directory, and return the directory."""

    def make(target: Path) -> None:
        download = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", target)
        subprocess.run([*download, f"sglang=={release}"], check=True)

    (wheel,) = cached(f"sglang-wheel-{release}", f"{sys.version}\n{release}", make).glob("*.whl")
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_UNPACKED):
                archive.extract(name, directory)
        archive.extract("sglang/srt/model_executor/model_runner.py", directory)
    return directory


def make_readable(model: Path) -> None:
    """Rewrite a checkpoint's config so that transformers before version 5 can read it, too."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    path.write_text(json.dumps(config))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
