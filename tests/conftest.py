"""Tiny real models and a tiny real tokenizer, made once per session; nothing here needs a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; set before torch and for its children
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Loaded before a session in process can load it: that session forgets its modules at its end, but fsspec's registry
# would keep the class, and datasets would take its twin for a remote file system.
import fsspec.implementations.local  # noqa: F401
import pytest
import torch
from cpu_environment import ServerEnvironment
from filelock import FileLock
from guarantees.campaign import Campaign
from hypothesis import Phase, settings
from sglang_cpu.environment import SGLangEnvironment, sglang_environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from vllm_cpu.environment import VLLMEnvironment, vllm_environment

from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig

settings.register_profile("long")
"""Chosen with --hypothesis-profile=long: the fuzzing of readers tries many more files."""
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])
"""Mutation testing wants to know that a test fails, and not the smallest input with which it does."""
ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 1024
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SMALL_RUN = ("--kld-dataset=python-docs", "--kld-windows=3", "--kld-window-size=64", "--kld-stride=32")
"""Options of a run that takes a second: three windows of 64 tokens."""
ENVIRONMENTS = {"sglang": "environment", "vllm": "vllm_cpu"}
"""The fixtures of the real engines."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


class MakeModel(Protocol):
    def __call__(
        self, name: str, config: PretrainedConfig | None = None, *, noise: float = 0.0, tokenizer: bool = True
    ) -> Path: ...


MakeDisk: TypeAlias = "Callable[[str], Path]"


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Makes a file system of its own of a size such as `700k`; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the text that the tests run on; it uses 1,000 ids of 1,024."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([load_corpus("python-docs", Path()).text[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """Return a function that saves a random model, always the same one except for `noise` on its weights."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str, config: PretrainedConfig | None = None, *, noise: float = 0.0, tokenizer: bool = True) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config or Qwen3Config(**TINY, tie_word_embeddings=False))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
            # Random heads give nearly flat distributions; sharper ones make a better test.
            model.get_output_embeddings().weight.mul_(20)
        model.save_pretrained(root / name)
        if tokenizer:
            saved_tokenizer.save_pretrained(root / name)
        return root / name

    saved_tokenizer = tokenizer
    return make


@pytest.fixture(scope="session")
def reference_dir(make_model: MakeModel) -> Path:
    """A tiny dense Qwen3."""
    return make_model("reference")


@pytest.fixture(scope="session")
def candidate_dir(make_model: MakeModel) -> Path:
    """The same model with a little noise: mean KL between 0.001 and 0.1 nats."""
    return make_model("candidate", noise=0.0005)


@pytest.fixture(scope="session")
def broken_dir(make_model: MakeModel) -> Path:
    """The same model with much noise: mean KL above 0.1 nats."""
    return make_model("broken", noise=0.005)


@pytest.fixture(scope="session")
def unloadable_dir(make_model: MakeModel) -> Path:
    """A model whose weights are truncated: it looks right until it is loaded."""
    path = make_model("unloadable")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return path


class Gate:
    """Runs pytest on tiny models, in its own directory and with a cache that all tests share."""

    def __init__(self, pytester: pytest.Pytester, reference: Path, candidate: Path, text: Path, cache: Path) -> None:
        self.pytester, self.path = pytester, pytester.path
        self.reference, self.candidate = reference, candidate
        self.protocol = (f"--kld-dataset={text}", *SMALL_RUN[1:])
        self.cache = f"--kld-cache-dir={cache}"

    def __call__(
        self, *arguments: str, candidates: tuple[Path | str, ...] | None = None, subprocess: bool = False
    ) -> pytest.RunResult:
        """Gate the candidates; options that come later win."""
        named = (self.candidate,) if candidates is None else candidates
        options = [f"--kld-ref={self.reference}", *(f"--kld-candidate={path}" for path in named)]
        run = self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        return run(*options, *self.protocol, self.cache, *arguments)

    def results(self, name: str = "report.json") -> list[dict[str, Any]]:
        """Return the results in a JSON report."""
        results: list[dict[str, Any]] = json.loads((self.path / name).read_text())["results"]
        return results


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text, which tokenizes quickly."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(load_corpus("python-docs", Path()).text[:5_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def gate_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate-cache")


@pytest.fixture
def gate(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    reference_dir: Path,
    candidate_dir: Path,
    text_file: Path,
    gate_cache: Path,
) -> Gate:
    """A function that runs the gate; see `Gate`. Unrelated plugins are not loaded."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)  # the tests' own sessions do not report to the real job
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:platformdirs")
    return Gate(pytester, reference_dir, candidate_dir, text_file, gate_cache)


MakeCampaign: TypeAlias = "Callable[[str, Path], Campaign]"


@pytest.fixture(scope="session")
def make_campaign(
    request: pytest.FixtureRequest,
    make_model: MakeModel,
    reference_dir: Path,
    candidate_dir: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeCampaign:
    """Return a function that makes a gate in processes of its own, on an engine and in a directory.

    The real engines are too fast for faults in a capture of 12 windows, and every one of them runs heads of 32.
    """
    config = LlamaConfig(**{**TINY, "head_dim": 32}, tie_word_embeddings=False)
    longer = tmp_path_factory.mktemp("text") / "longer.txt"
    longer.write_text(load_corpus("python-docs", Path()).text[:20_000], encoding="utf-8")

    def make(engine: str, directory: Path) -> Campaign:
        if engine not in ENVIRONMENTS:
            return Campaign(directory, engine, reference_dir, (candidate_dir,), text_file)
        environment: ServerEnvironment = request.getfixturevalue(ENVIRONMENTS[engine])
        environment = environment.with_dtype("float32")
        reference, candidate = make_model("campaign", config), make_model("campaign-noisy", config, noise=0.0005)
        return Campaign(directory, engine, reference, (candidate,), longer, environment, 64)

    return make


class Undisturbed(dict[str, dict[str, Any]]):
    """The figures of a campaign by engine, if nothing happens; measured when they are asked for."""

    def __init__(self, make: MakeCampaign, directory: Path) -> None:
        self.make, self.directory = make, directory

    def __missing__(self, engine: str) -> dict[str, Any]:
        campaign = self.make(engine, self.directory / engine)
        self[engine] = campaign.completes()
        campaign.end()
        return self[engine]


@pytest.fixture(scope="session")
def undisturbed(make_campaign: MakeCampaign, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(make_campaign, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def campaign(request: pytest.FixtureRequest, tmp_path: Path, make_campaign: MakeCampaign) -> Iterator[Campaign]:
    """A gate in processes of its own on the engine that the parameter names, slowly if that is not a real one."""
    made = make_campaign(request.param, tmp_path / "campaign")
    made.fault("slow")
    yield made
    made.end()


@pytest.fixture(scope="session")
def windows(reference_dir: Path) -> Windows:
    """Three windows of 64 tokens at stride 32, as `SMALL_RUN` asks for."""
    loaded = load_tokenizer(ModelSpec.parse(str(reference_dir), Path()), trust_remote_code=False)
    return cut_windows(
        load_corpus("python-docs", Path()), loaded, count=3, size=64, stride=32, label=str(reference_dir)
    )


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> SGLangEnvironment:
    """The real SGLang on a CPU, with the hook as it is in this checkout."""
    return sglang_environment(tmp_path_factory.mktemp("hook"))


@pytest.fixture(scope="session")
def vllm_cpu(tmp_path_factory: pytest.TempPathFactory) -> VLLMEnvironment:
    """The real vLLM on a CPU, with the hook as it is in this checkout."""
    return vllm_environment(tmp_path_factory.mktemp("hook"))


@pytest.fixture(
    scope="session",
    params=[pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def engine(request: pytest.FixtureRequest) -> ServerEnvironment:
    """Each engine's real server in turn, in float32."""
    environment: ServerEnvironment = request.getfixturevalue(ENVIRONMENTS[request.param])
    return environment.with_dtype("float32")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory in which the quickstart ran as a newcomer runs it, and what it printed; one for all workers."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "quickstart-of-all"
    printed = directory / "printed.txt"
    with FileLock(f"{directory}.lock"):
        if not printed.is_file():
            directory.mkdir(exist_ok=True)
            command = [sys.executable, str(ROOT / "conftest_examples" / "quickstart" / "run.py")]
            run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stdout + run.stderr
            printed.write_text(run.stdout)
    return directory / "quickstart", printed.read_text()


@pytest.fixture(scope="session")
def real_models(quickstart: tuple[Path, str]) -> Path:
    """SmolLM2-135M and its round trips, as the quickstart made them."""
    return quickstart[0] / "models"
