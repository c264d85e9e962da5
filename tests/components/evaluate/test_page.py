from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from components.evaluate import page
from components.evaluate.findings import Findings

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    """Collects tags and whatever could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetches: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetches += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")
        ]


def document(**changes):
    verdict = {
        "passed": False,
        "system": "tuned",
        "gates": [{"metric": "rouge_l", "value": None, "min": 0.2, "max": None, "passed": False}],
    }
    facts = {
        "task": "causal-lm",
        "pipeline": EVIL,
        "test": {"count": 2, "digest": "ab" * 32},
        "verdict": verdict,
        "truncated": {"prompts": 1, "left_out": [], "of": 2, "limit_tokens": 128},
        "precision": "float32",
        "max_new_tokens": 8,
        "latency": "in a batch",
    }
    return {**facts, **changes}


@pytest.fixture
def findings():
    answer = {
        "id": "c" * 64,
        "origin": {"file": EVIL, "line": 3},
        "prompt": EVIL,
        "reference": "甲",
        "base": EVIL,
    }
    answer |= {
        "tuned": "",
        "base_rouge_l": 0.1,
        "tuned_rouge_l": 0.0,
        "base_ended": False,
        "tuned_ended": True,
    }
    base = {"about": "base", "loss": 3.0, "rouge_l": 0.1, "intervals": {"rouge_l": [0.05, 0.2]}}
    tuned = {"about": "tuned", "loss": 2.5, "rouge_l": None, "intervals": {}}
    return Findings({"base": base, "tuned": tuned}, "tuned", [answer])


def test_the_page_needs_nothing_and_runs_nothing(findings):
    reader = Reader()
    text = page.render(document(), findings)
    reader.feed(text)
    assert not {"script", "img", "link", "iframe"} & reader.tags
    assert reader.fetches == []
    assert "&lt;script&gt;" in text
    assert "url(" not in text


def test_the_page_shows_difference_verdict_and_what_was_not_measured(findings):
    text = page.render(document(), findings)
    row = re.search(r"Loss, nats per token</td>(.*?)</tr>", text, re.S)[1]
    assert re.findall(r"[−+]?\d\.\d{3}", row) == ["3.000", "2.500", "−0.500"]
    assert "better" in row
    assert "0.050 to 0.200" in text
    assert "not measured" in text
    assert "1 of 1 gates failed" in text
    assert "(nothing)" in text
    assert "cut at the limit" in text


def test_a_classifier_page_shows_mistakes_and_confusion():
    per_class = [
        {"label": label, "precision": 0.5, "recall": 0.5, "f1": 0.5, "auc": None, "count": 2}
        for label in ("甲", "乙")
    ]
    system = {
        "about": "x",
        "accuracy": 0.5,
        "per_class": per_class,
        "confusion": [[1, 1], [0, 2]],
        "intervals": {},
    }
    rows = [
        {"prompt": EVIL, "reference": "甲", "tuned": "乙", "tuned_probability": 0.9},
        {"prompt": "right one", "reference": "乙", "tuned": "乙", "tuned_probability": 0.8},
    ]
    changes = {
        "task": "classification",
        "truncated": {"texts": 1, "of": 4, "limit_tokens": 8},
        "threads": 2,
    }
    text = page.render(document(**changes), Findings({"tuned": system, "base": system}, "tuned", rows))
    assert "By class" in text
    assert "Confusion" in text
    assert "right one" not in text
    assert text.count("0.90") == 1
    assert page.confusion_rows(system)[0] == {"label": "甲", "cells": [(1, 50, True), (1, 50, False)]}
