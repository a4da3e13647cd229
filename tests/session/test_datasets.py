"""Several datasets, conversations, and positions that are left out, from the command line to the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pytest_kld.errors import CorpusError
from pytest_kld.settings.config import build_config
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import chat_renderer, cut_windows, join_windows

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is a number."}]
    for i in range(40)
]


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with its own chat template."""
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    chat.chat_template = TEMPLATE
    return chat


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_conversations_are_rendered_with_the_chat_template_and_glued_with_nothing(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages} for messages in CONVERSATIONS[:2]])
    corpus = load_corpus("chat.jsonl", tmp_path, chat_renderer(chat_tokenizer, "model"))
    assert corpus.text == (
        "<user>What is 0?</><assistant>0 is a number.</><user>What is 1?</><assistant>1 is a number.</>"
    )


def test_a_template_that_writes_todays_date_gives_the_same_text_every_day(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat_tokenizer.chat_template = (
        "{%- macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}: {{ messages[0]['content'] }}"
    )
    render = chat_renderer(chat_tokenizer, "model")
    assert render([{"role": "user", "content": "hello"}]) == "26 Jul 2024: hello"


def test_conversations_need_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATIONS[0]}])
    with pytest.raises(CorpusError, match=r"the tokenizer of my-model has no chat template; .*--kld-tokenizer"):
        load_corpus("chat.jsonl", tmp_path, chat_renderer(tokenizer, "my-model"))
    with pytest.raises(CorpusError, match="no tokenizer to render them"):
        load_corpus("chat.jsonl", tmp_path)


def test_what_a_template_refuses_is_an_error_in_its_words(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATIONS[0]}])
    with pytest.raises(CorpusError, match=r"chat\.jsonl.*roles must alternate"):
        load_corpus("chat.jsonl", tmp_path, chat_renderer(chat_tokenizer, "model"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "line 1: expected an object"),
        ([{"messages": "hello"}], "line 1: expected an object"),
        ([{"messages": [{"content": "no role"}]}], "line 1: expected an object"),
        ([{"text": 3}], "line 1: expected an object"),
        ([{"text": "a", "messages": CONVERSATIONS[0]}], "line 1: the row has both `text` and `messages`"),
        ([{"text": "a"}, {"messages": CONVERSATIONS[0]}], "line 2: .*put them in separate files"),
    ],
)
def test_rows_that_are_neither_text_nor_conversation_are_refused_by_line(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(CorpusError, match=message):
        load_corpus("rows.jsonl", tmp_path)


def test_a_line_separator_inside_a_row_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one\u2028two"}\r\n{"text": "three"}\n', encoding="utf-8")
    assert load_corpus("rows.jsonl", tmp_path).text == "one\u2028two\n\nthree"


def test_no_window_holds_text_of_two_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 30, encoding="utf-8")
    (tmp_path / "b.txt").write_text("delta epsilon " * 50, encoding="utf-8")
    parts = [
        cut_windows(load_corpus(name, tmp_path), tokenizer, count=count, size=16, stride=8, label="model")
        for name, count in (("a.txt", 2), ("b.txt", 3))
    ]
    windows = join_windows(parts)
    assert windows.count == 5
    np.testing.assert_array_equal(windows.token_ids[:2], parts[0].token_ids)
    np.testing.assert_array_equal(windows.token_ids[2:], parts[1].token_ids)
    assert windows.starts.tolist() == [0, 8, 0, 8, 16]
    protocol = windows.protocol()
    assert protocol["dataset"] == "a.txt, b.txt"
    assert [(one["dataset"], one["windows"]) for one in protocol["datasets"]] == [("a.txt", 2), ("b.txt", 3)]
    assert [one["text_sha256"] for one in protocol["datasets"]] == [part.text_sha256 for part in parts]


def test_one_dataset_is_joined_to_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = cut_windows(load_corpus("python-docs", Path()), tokenizer, count=2, size=16, stride=8, label="model")
    assert join_windows([windows]) is windows
    (dataset,) = windows.protocol()["datasets"]
    assert (dataset["dataset"], dataset["windows"]) == ("python-docs", 2)


def test_a_gate_over_two_datasets_reports_each_and_judges_the_average(
    pytester: pytest.Pytester,
    reference_dir: Path,
    candidate_dir: Path,
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "qwen3"}')
    write_jsonl(pytester.path / "chat.jsonl", [{"messages": messages} for messages in CONVERSATIONS])
    result = pytester.runpytest(
        *(
            f"--kld-ref={reference_dir}",
            f"--kld-candidate={candidate_dir}",
            f"--kld-tokenizer={tmp_path / 'tokenizer'}",
        ),
        *("--kld-dataset=python-docs", "--kld-dataset=chat.jsonl", "--kld-windows=2", "--kld-window-size=64"),
        *("--kld-stride=32", "--kld-skip-first=8", "--kld-max-mean=0.1", "--kld-each-dataset"),
        *(f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-json=report.json", "--kld-junit=report.xml"),
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*dataset: macro average of python-docs, chat.jsonl, 256 positions, 32 of them skipped)"]
    )
    result.stdout.re_match_lines([r"  python-docs +0\.\d+", r"  chat\.jsonl +0\.\d+"])
    (report,) = json.loads((pytester.path / "report.json").read_text())["results"]
    parts = report["datasets"]
    assert set(parts) == {"python-docs", "chat.jsonl"}
    assert report["figures"]["mean"] == pytest.approx(sum(part["mean"] for part in parts.values()) / 2)
    assert report["figures"]["mean"] != parts["python-docs"]["mean"]
    assert report["figures"]["js"] is None
    assert report["figures"]["coverage"] == 1 - 32 / 256
    assert [check["dataset"] for check in report["checks"] if check["limit"] == "max_mean"] == [
        None,
        "python-docs",
        "chat.jsonl",
    ]
    assert 'name="max_mean[chat.jsonl]"' in (pytester.path / "report.xml").read_text()


def test_scores_from_the_cache_go_by_the_names_that_the_datasets_have_now(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path, tmp_path: Path
) -> None:
    text = load_corpus("python-docs", Path()).text
    (pytester.path / "old.txt").write_text(text[:20_000], encoding="utf-8")
    (pytester.path / "new.txt").write_text(text[:20_000], encoding="utf-8")
    pytester.makepyfile(
        """
        def test_names(kld, request):
            assert list(kld.datasets) == request.config.getoption("kld_dataset")
        """
    )
    for name in ("old.txt", "new.txt"):
        result = pytester.runpytest(
            *(f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", f"--kld-cache-dir={tmp_path}"),
            *("--kld-windows=2", "--kld-window-size=64", "--kld-stride=32"),
            *(f"--kld-dataset={name}", "--kld-dataset=python-docs"),
        )
        result.assert_outcomes(passed=1)
    assert len(list((tmp_path / "scores").glob("*.safetensors"))) == 1


def test_datasets_stand_one_a_line_in_an_ini_file_and_start_from_its_directory(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\nkld_dataset =\n    python-docs\n    texts/a.txt")
    monkeypatch.chdir(pytester.mkdir("inner"))
    config = build_config(pytester.parseconfig("--rootdir=..", "-c", "../tox.ini"))
    assert config.dataset == ("python-docs", str(Path("..", "texts", "a.txt")))


def test_the_default_is_one_dataset(pytester: pytest.Pytester) -> None:
    assert build_config(pytester.parseconfig()).dataset == ("wikitext-2",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kld-skip-first=-1",), "--kld-skip-first: expected a whole number of at least 0, got '-1'"),
        (("--kld-skip-first=63", "--kld-window-size=64"), "--kld-skip-first: skipping 63 positions leaves none"),
        (("--kld-metrics=most",), "--kld-metrics: expected one of core, all, got 'most'"),
        (("--kld-dataset=a.txt", "--kld-dataset=./a.txt"), "--kld-dataset: './a.txt' is given twice"),
        (("--kld-max-js=1",), "--kld-max-js: expected a number of at least 0 and at most 0.693147, got '1'"),
    ],
)
def test_values_that_make_no_sense_are_usage_errors(
    pytester: pytest.Pytester, options: tuple[str, ...], message: str
) -> None:
    result = pytester.runpytest(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message.replace('[', '[[]')}*"])


def test_skipping_all_but_two_positions_is_allowed(pytester: pytest.Pytester) -> None:
    config = build_config(pytester.parseconfig("--kld-skip-first=62", "--kld-window-size=64"))
    assert config.skip_first == 62
