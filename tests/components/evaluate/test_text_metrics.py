from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate import text_metrics
from components.shared.errors import TuneyardError

LAW = "根据《民法典》第五百七十七条，当事人一方不履行合同义务的，应当承担违约责任。"
COOKING = "先把土豆切丝，再热油下锅快炒两分钟即可出锅。"
ENGLISH = [
    ("The court dismissed the appeal with costs.", "The appeal was dismissed by the court, with no costs."),
    ("A lease of land must be in writing", "a LEASE must be in writing; of land, too"),
    ("one two three four five", "five four three two one"),
    ("Article 12 of the Act", "the Act"),
    ("repeat repeat repeat", "repeat"),
    ("never", "seen"),
]


@pytest.mark.parametrize(("reference", "answer"), ENGLISH)
def test_rouge_l_is_rouge_score_in_english(reference, answer):
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert text_metrics.rouge_l(reference, answer) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from("abcde"), max_size=80), st.lists(st.sampled_from("abcde"), max_size=80))
def test_lcs_is_the_textbook_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert text_metrics.lcs_length(a, b) == table[-1][-1]


@given(st.text(), st.text())
def test_rouge_l_is_bounded_and_symmetric_and_knows_itself(a, b):
    assert 0 <= text_metrics.rouge_l(a, b) <= 1
    assert text_metrics.rouge_l(a, b) == text_metrics.rouge_l(b, a)
    assert text_metrics.rouge_l(a, a) == 1
    assert text_metrics.exact_match(a, a)


@pytest.mark.parametrize(
    "text", [LAW, "ประเทศไทย", "これはペンです。", "हिन्दी में लिखा", "Straße und Café", "대한민국 법률"]
)
def test_identical_scores_one_in_any_script(text):
    assert text_metrics.rouge_l(text, text) == 1
    assert text_metrics.bleu([text], [text])[0] == pytest.approx(1, abs=1e-9)


def test_unrelated_chinese_is_near_zero():
    assert text_metrics.rouge_l(LAW, COOKING) < 0.1
    assert text_metrics.bleu([LAW], [COOKING])[0] < 0.05


def test_chinese_counts_by_character_and_english_by_word():
    assert text_metrics.words("违约 the Court，第12条") == ["违", "约", "the", "court", "第", "12", "条"]
    # four of five characters in order on either side: F1 = 2 * 4 / 10
    assert text_metrics.rouge_l("应当承担责", "应当负担责") == pytest.approx(0.8)


def test_full_width_digits_are_digits():
    assert text_metrics.exact_match("第５９条　规定", "第59条 规定")


def test_bleu_is_sacrebleu():
    from sacrebleu import corpus_bleu

    references, answers = [r for r, _ in ENGLISH], [a for _, a in ENGLISH]
    expected = corpus_bleu(answers, [references], tokenize="13a", force=True).score / 100
    assert text_metrics.bleu(references, answers)[0] == pytest.approx(expected, abs=1e-9)
    chinese = corpus_bleu([LAW[5:]], [[LAW]], tokenize="zh").score / 100
    assert text_metrics.bleu([LAW], [LAW[5:]])[0] == pytest.approx(chinese, abs=1e-9)


def test_short_right_answers_do_not_score_zero():
    assert text_metrics.bleu(["yes", "no"], ["yes", "no"])[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [([LAW], "zh"), (["これはペンです"], "char"), (["the law"], "13a"), (["12"], "13a")],
)
def test_bleu_tokenizer_follows_the_language(texts, tokenizer):
    assert text_metrics.bleu_tokenizer(texts) == tokenizer


@pytest.mark.parametrize("texts", [[LAW, COOKING], [r for r, _ in ENGLISH], [LAW, ENGLISH[0][0]]])
def test_self_test_passes_on_real_text(texts):
    text_metrics.self_test(texts)
    strangers = [text_metrics.unrelated(t, {w for x in texts for w in text_metrics.words(x)}) for t in texts]
    assert all(
        len(text_metrics.words(s)) == len(text_metrics.words(t))
        for s, t in zip(strangers, texts, strict=True)
    )


def test_self_test_stops_on_a_metric_that_is_blind_to_chinese(monkeypatch):
    from rouge_score.rouge_scorer import RougeScorer

    def blind(reference: str, answer: str) -> float:
        return RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure

    monkeypatch.setattr(text_metrics, "rouge_l", blind)
    with pytest.raises(TuneyardError, match=r"with itself is 0\.000"):
        text_metrics.self_test([LAW])


def test_self_test_refuses_a_corpus_without_words():
    with pytest.raises(TuneyardError, match="none of 2 references"):
        text_metrics.self_test(["……", "。"])
