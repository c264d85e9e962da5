"""A file that is no corpus stops the line with its name and what is wrong; it never ends in a traceback."""

from __future__ import annotations

import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.shared.errors import EXIT_STOPPED, StageStopped
from components.shared.store import split_uri

BINARY = random.Random(0).randbytes(20_000)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    "content", [b"", BINARY, BINARY.replace(b"\n", b"")], ids=["empty", "binary", "one line"]
)
def test_a_file_without_a_row_stops_the_line(run, tmp_path, suffix, content):
    source = tmp_path / f"corpus{suffix}"
    source.write_bytes(content)
    with pytest.raises(StageStopped, match=r"0 of \d+ rows of .*corpus\.") as caught:
        run(source)
    assert caught.value.exit_code == EXIT_STOPPED and caught.value.todo
    assert "Traceback" not in caught.value.what and len(caught.value.what) < 2000


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_stop_the_line(run, tmp_path_factory, suffix, content):
    source = tmp_path_factory.mktemp("wild") / f"wild{suffix}"
    source.write_bytes(b"q,a\nwhat,this\n" + content if suffix == ".csv" else content)
    try:
        result, examples, quarantine = run(source)
    except StageStopped as error:
        assert str(source) in error.what
    else:
        assert result.summary["read"] == len(examples) + len(quarantine)


def test_two_columns_of_one_name_are_refused_with_the_name(run, tmp_path):
    source = tmp_path / "corpus.csv"
    source.write_text("q,a, q ,note,note,,\nwhat,this,lost,x,y,,\n")
    with pytest.raises(StageStopped, match=r"corpus.csv: more than one column is named 'note', 'q'"):
        run(source)
    # What spreadsheets leave behind.
    source.write_text("q,a,,\nwhat,this,,\n")
    assert run(source)[0].summary["kept"] == 1
    table = pyarrow.table([["what"], ["this"], ["lost"]], names=["q", "a", "q"])
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet")
    with pytest.raises(StageStopped, match=r"corpus.parquet: more than one column is named 'q'"):
        run(tmp_path / "corpus.parquet")


def test_a_role_that_no_template_renders_goes_to_quarantine(run, tmp_path):
    source = tmp_path / "chats.jsonl"
    said = '{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}'
    source.write_text(
        f'{{"messages": [{said}]}}\n{{"messages": [{said}, {{"role": "judge", "content": "4"}}]}}\n'
    )
    result, examples, (bad,) = run(source, format="conversational", columns={})
    assert len(examples) == 1 and result.summary["by_reason"] == {"wrong_type": 1}
    assert (bad["line"], bad["field"]) == (2, "messages[2]") and "assistant" in bad["detail"]


def test_a_prefix_of_the_store_is_read_as_its_files(run, store, store_env):
    _, prefix = split_uri(store.root)
    root = f"s3://corpora/{prefix}/mixed"
    files = {
        "a/one.jsonl": '{"q": "one", "a": "1"}\n{"q": "torn"\n{"q": "two", "a": "2"}\n',
        "b/two.csv": 'q,a\n"three\nlines",3\nlonely\n',
        "_SAMPLE.json": "{}",
        "README.md": "not data",
    }
    for name, text in files.items():
        store.client.put_object(Bucket="corpora", Key=f"{prefix}/mixed/{name}", Body=text.encode())
    result, examples, quarantine = run(root, store)
    origins = [
        (e["origin"]["file"].removeprefix(root), e["origin"]["line"], e["completion"]) for e in examples
    ]
    assert origins == [("/a/one.jsonl", 1, "1"), ("/a/one.jsonl", 3, "2"), ("/b/two.csv", 2, "3")]
    places = [(q["file"].removeprefix(root), q["line"], q["reason"]) for q in quarantine]
    assert places == [("/a/one.jsonl", 2, "bad_json"), ("/b/two.csv", 4, "bad_csv")]
    assert result.summary["read"] == 5
    one, _, _ = run(f"{root}/b/two.csv", store)
    assert one.summary["kept"] == 1
