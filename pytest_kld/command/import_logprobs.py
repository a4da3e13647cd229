"""`pytest-kld import-logprobs`: captures of the original layout become captures like any other."""

from __future__ import annotations

import math
from pathlib import Path

import click

from pytest_kld.command.output import Stderr, cache_option, directory, print_lines


@click.command(name="import-logprobs", epilog="Exit codes: 0 if it was imported, 2 if not.")
@click.argument("source", metavar="DIR", type=directory)
@click.option("--tokenizer", metavar="MODEL", required=True, help="The model whose tokenizer cut the text.")
@click.option("--name", help="The model's name in reports. Default: the name of DIR.")
@click.option("--dataset", default="wikitext-2", show_default=True, metavar="TEXT", help="As --kld-dataset.")
@click.option(
    "--windows", "count", default=100, show_default=True, type=click.IntRange(min=1), help="Number of windows."
)
@click.option("--window-size", default=2048, show_default=True, type=click.IntRange(min=2), help="Tokens in a window.")
@click.option("--stride", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens between two starts.")
@click.option("--trust-remote-code", is_flag=True, help="As --kld-trust-remote-code.")
@cache_option
def import_logprobs(
    source: Path,
    tokenizer: str,
    name: str | None,
    dataset: str,
    count: int,
    window_size: int,
    stride: int,
    trust_remote_code: bool,
    root: Path,
) -> None:
    """Add DIR, which holds log-probabilities in the original layout, to the cache.

    DIR has the files 0.safetensors, 1.safetensors, and so on. They say nothing about the text, so give the options with
    which they were made; the defaults are those of the original scripts. The capture gets token ids, digests and a
    manifest, and can then be compared, listed, verified and exported like any other. Its directory is printed. DIR
    stays as it is.
    """
    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.importing import import_original
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.text.corpus import load_corpus
    from pytest_kld.text.windows import chat_renderer, cut_windows, load_tokenizer

    try:
        model = ModelSpec.parse(tokenizer, Path.cwd()).pin()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tokenizer") from None
    loaded = load_tokenizer(model, trust_remote_code=trust_remote_code)
    windows = cut_windows(
        load_corpus(dataset, Path.cwd(), chat_renderer(loaded, model.label)),
        loaded,
        count=count,
        size=window_size,
        stride=stride,
        label=model.label,
    )
    progress = Stderr()
    capture, nll = import_original(source.resolve(), name or source.resolve().name, windows, Cache(root), progress)
    progress.note(f"{capture.name}: perplexity {math.exp(min(nll, 700)):,.2f} on these windows")
    if nll > math.log(capture.vocab_size):
        progress.note(
            "WARNING: the text is less probable than random tokens. Are these the tokenizer, the dataset, the window "
            "size and the stride of the capture? Figures that need the next token depend on it."
        )
    print_lines([str(capture.path)])
