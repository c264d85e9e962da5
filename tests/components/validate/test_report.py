"""result.json and page.html: complete, equal for equal input, offline, and safe with any text in them."""

from __future__ import annotations

import json
import logging
import re
import socket
import tempfile
from html.parser import HTMLParser

import pytest

ATTACK = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"' {{ 7 * 7 }}"


@pytest.fixture
def page(run, corpus, quarantined):
    changes = {n: {"text": f"{ATTACK} {n}", "label": ATTACK} for n in range(1, 30)}
    own = {
        "type": "expect_column_values_to_match_regex",
        "column": "text",
        "regex": "<b>|^[^<]",
        "description": ATTACK,
    }
    rows = [{**row, "detail": ATTACK, "field": ATTACK} for row in quarantined(2)]
    result, folder = run(
        "labelled-text", corpus("labelled-text", 100, changes), {"expectations": [own]}, rows
    )
    assert result.stop and result.page == folder / "page.html"
    return result.page.read_text("utf-8")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and len(tags.found) > 100
    assert {tag for tag, _ in tags.found}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "svg", "base"}
    )
    for tag, attributes in tags.found:
        assert not {"src", "href", "srcset"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    assert "url(" not in style and "@import" not in style


def test_text_of_the_corpus_is_shown_and_never_obeyed(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7 * 7 }}" in page
    assert "<script" not in page and "<img" not in page


def test_the_page_says_what_failed_with_its_rows_and_the_bars(page):
    assert "The line was stopped" in page
    assert "corpus.jsonl:1<" in page and "corpus.jsonl:900" in page and "bad_json" in page
    assert "Characters of text" in page and "<h3>Labels</h3>" in page


def test_the_result_holds_every_expectation_and_is_strict_json(run, corpus):
    result, folder = run("prompt-completion", corpus("prompt-completion", 40, {5: {"completion": "N/A"}}))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((folder / "result.json").read_text("utf-8"), parse_constant=refuse)
    assert report["success"] is False and report["rows"] == 40 and result.metrics["rows"] == 40
    (entry,) = [e for e in report["expectations"] if not e["success"]]
    assert entry["expectation"] == "expect_column_values_to_not_match_regex_list"
    assert (entry["columns"], entry["severity"], entry["unexpected_percent"]) == (["completion"], "fail", 2.5)
    assert entry["examples"] == [{"origin": "corpus.jsonl:5", "values": {"completion": "N/A"}}]
    assert report["lengths"]["completion"]["min"] == 3
    assert sum(b["count"] for b in report["lengths"]["completion"]["bins"]) == 40
    assert result.kinds == {"report": "report"}


def test_equal_input_gives_equal_bytes(run, corpus, quarantined):
    outputs = []
    for _ in range(2):
        _, folder = run("conversational", corpus("conversational", 30), quarantined=quarantined(1))
        outputs.append([(folder / name).read_bytes() for name in ("result.json", "page.html")])
    assert outputs[0] == outputs[1]


def test_nothing_is_written_beside_the_report_and_nothing_is_sent(
    run, corpus, tmp_path_factory, monkeypatch, capfd
):
    home, here = (tmp_path_factory.mktemp(name) for name in ("home", "here"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: pytest.fail("a folder was made"))
    result, folder = run("labelled-text", corpus("labelled-text", 30))
    assert not result.stop
    assert sorted(p.name for p in folder.iterdir()) == ["page.html", "result.json"]
    assert capfd.readouterr() == ("", "")
    assert list(home.iterdir()) == [] and list(here.iterdir()) == []


def test_the_chatter_of_the_library_stays_out_of_the_log(run, corpus):
    run("labelled-text", corpus("labelled-text", 20))
    seen = []
    ours = logging.Handler()
    ours.emit = seen.append
    logging.getLogger().addHandler(ours)  # not caplog: pytest also listens where nothing is passed on
    try:
        logging.getLogger("great_expectations.anything").warning("a line for each method")
        logging.getLogger("tuneyard.validate").warning("ours")
    finally:
        logging.getLogger().removeHandler(ours)
    assert [record.name for record in seen] == ["tuneyard.validate"]


def test_a_long_value_is_cut_in_the_message_and_stays_on_its_line(run, corpus):
    changes = {4: {"label": "x\n" + "y" * 300}}
    stop = run("labelled-text", corpus("labelled-text", 40, changes))[0].stop
    (line,) = [line for line in stop.splitlines() if "corpus.jsonl:4" in line]
    assert "label='x\\nyyy" in line and len(line) < 200


def test_domain_text_is_counted_and_held_against_its_own_suite(run, corpus):
    labelled = corpus("labelled-text", 60)
    documents = [
        {"id": str(n), "text": text, "origin": {"file": "law.jsonl", "line": n, "part": "domain"}}
        for n, text in enumerate(["第一条 合同自成立时生效。", "\ufffd\ufffd 第二条"], 1)
    ]
    result, folder = run("labelled-text", labelled, documents=documents[:1])
    assert not result.stop  # one document is enough: a code of law is one
    result, folder = run("labelled-text", labelled, documents=documents)
    assert "domain text: no text was damaged" in result.stop and "law.jsonl:2" in result.stop
    told = json.loads((folder / "result.json").read_text())
    assert told["rows"] == 60 and told["quarantine"]["kept"] == 62
