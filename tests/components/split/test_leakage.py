"""Domain text that holds an example of eval or test is found, and nothing else is."""

from __future__ import annotations

import random

import pytest

from components.split.leakage import Judged, covered, runs, words

THEFT = (
    "盗窃公私财物，数额较大的，或者多次盗窃、入户盗窃、携带凶器盗窃、扒窃的，处三年以下有期徒刑、拘役或者管制，"
    "并处或者单处罚金；数额巨大或者有其他严重情节的，处三年以上十年以下有期徒刑，并处罚金。"
)
RENT = (
    "The lessee shall pay the rent within the agreed time limit; where the parties have not agreed on one, "
    "it shall be paid at the end of each year, and on return of the thing if less than a year remains."
)
OTHER = (
    "合同自成立时生效，法律另有规定或者当事人另有约定的除外。A contract takes effect when it is formed. " * 40
)


def example(text, number=0, **fields):
    origin = {"file": "test.jsonl", "line": number, "part": "main"}
    return {"id": str(number), "origin": origin, **({"text": text} if text else {}), **fields}


@pytest.mark.parametrize("text", [THEFT, RENT])
def test_a_text_is_found_verbatim_with_small_edits_and_other_layout(text):
    known = Judged([example(text)])
    edited = text.replace("数额较大", "金额较大").replace("拘役或者", "劳役或").replace("lessee", "tenant")
    edited = edited.replace("at the end of each year", "at the close of each year")
    assert edited != text
    relaid = " ".join(text.upper()).replace("，", " , ") if text is THEFT else text.upper().replace(" ", "\n")
    for held in (text, edited, relaid):
        leak = known.held(words(OTHER + held + OTHER))
        assert leak is not None and leak.covered > 0.85
    assert known.held(words(text)).covered == 1
    assert known.held(words(OTHER)) is None
    assert known.held(words(OTHER + text[: len(text) // 2])) is None  # half of it tells nothing
    assert known.held([]) is None


def test_commonplaces_scattered_over_a_library_are_no_leak():
    """Every run of the text stands somewhere in the document, and never close to the others."""
    said = words(THEFT)
    known = Judged([example(THEFT)])
    scattered = [w for at in range(0, len(said), 6) for w in (*said[at : at + 8], *words(OTHER)[:200])]
    assert known.held(scattered) is None
    together = [w for at in range(0, len(said), 6) for w in said[at : at + 6]]
    assert known.held(together) is not None


def test_what_is_judged_counts_and_what_surrounds_it_does_not():
    talk = [{"role": "system", "content": RENT}, {"role": "user", "content": "刑法第264条？"}]
    known = Judged(
        [
            example("", 1, messages=[*talk, {"role": "assistant", "content": THEFT}]),
            example("", 2, prompt="今天天气", completion="很好"),
            example(
                "",
                3,
                system=RENT,
                prompt="请问民法典第一条是怎么说的？",
                completion="为了保护民事主体的合法权益",
            ),
        ]
    )
    assert known.short == 1  # four and two words: any corpus has them
    assert known.held(words(RENT)) is None
    assert known.held(words(OTHER + THEFT)).example["id"] == "1"
    # Each part is too short to be told from chance; together they are not.
    assert known.held(words("请问民法典第一条是怎么说的：为了保护民事主体的合法权益")).example["id"] == "3"
    assert known.held(words("第三条为了保护民事主体的合法权益")) is None


def test_no_planted_text_is_missed_and_no_innocent_document_named():
    draw = random.Random(0)
    vocabulary = [f"w{n}" for n in range(3000)]
    texts = [draw.choices(vocabulary, k=draw.randint(20, 200)) for _ in range(300)]
    known = Judged([example(" ".join(text), n) for n, text in enumerate(texts)])
    for number, text in enumerate(texts[:60]):
        around = draw.choices(vocabulary, k=600)
        assert known.held(around) is None
        edited = list(text)
        for at in range(9, len(text), 12):  # an edit every dozen words: changed, left out, put in
            edited[at] = draw.choice(["another", "", "one more"])
        document = " ".join([*around[:300], *edited, *around[300:]])
        assert known.held(words(document)).example["id"] == str(number)


def test_coverage_is_that_of_a_plain_count():
    draw = random.Random(1)
    for _ in range(50):
        text = draw.choices("abcdefghijklmnop", k=30)
        start, end = sorted(draw.sample(range(31), 2))
        document = [*("xyz" * 20), *text[start:end], *("uvw" * 20)]
        plain = end - start if end - start >= 5 else 0
        found = covered(runs(text), runs(document))
        assert found == (plain / 30 if plain >= 24 else 0)
