from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from components.evaluate import gates
from components.evaluate.config import Bound, EvaluateConfig
from components.shared.errors import TuneyardError

METRICS = {"loss": 2.5, "rouge_l": 0.25, "bleu": math.nan, "perplexity": None}


@pytest.mark.parametrize(
    ("bound", "passed"),
    [
        ({"min": 0.25}, True),
        ({"max": 0.25}, True),
        ({"min": 0.26}, False),
        ({"max": 0.24}, False),
        ({"min": 0.2, "max": 0.3}, True),
    ],
)
def test_bounds_are_inclusive(bound, passed):
    found = gates.verdict({"rouge_l": Bound(**bound)}, "tuned", METRICS)
    assert found["passed"] is passed
    assert found["gates"][0]["value"] == 0.25


@pytest.mark.parametrize("metric", ["bleu", "perplexity", "statute_citation_accuracy"])
@pytest.mark.parametrize("bound", [{"min": -1e9}, {"max": 1e9}])
def test_what_could_not_be_measured_fails(metric, bound):
    found = gates.verdict({metric: Bound(**bound)}, "tuned", METRICS)
    assert found == {
        "passed": False,
        "system": "tuned",
        "gates": [
            {
                "metric": metric,
                "value": None,
                "min": bound.get("min"),
                "max": bound.get("max"),
                "passed": False,
            }
        ],
    }
    json.dumps(found, allow_nan=False)
    assert "could not be measured" in gates.stop_line(found)


def test_no_gate_passes():
    assert gates.verdict({}, "tuned", METRICS)["passed"]
    assert gates.stop_line(gates.verdict({}, "tuned", METRICS)) == ""


def test_the_stop_names_every_failed_gate_with_value_and_bound():
    bounds = {"loss": Bound(max=2.4), "rouge_l": Bound(min=0.3, max=0.9), "bleu": Bound(min=0.1)}
    line = gates.stop_line(gates.verdict(bounds, "tuned", METRICS))
    assert line == (
        "3 of 3 gates failed: loss: 2.5 (max 2.4); rouge_l: 0.25 (min 0.3 and max 0.9); "
        "bleu: could not be measured (min 0.1)"
    )


def test_a_gate_of_another_task_is_refused_with_the_metrics_there_are():
    with pytest.raises(
        TuneyardError, match=r"accuracy cannot be measured on a causal-lm model(.|\n)*rouge_l"
    ):
        gates.refuse_unknown(
            {"accuracy": Bound(min=0.5), "loss": Bound(max=3)}, "causal-lm", "prompt-completion"
        )


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"rogue_l": {"min": 0.2}}, "did you mean 'rouge_l'"),
        ({"nonsense": {"min": 0.2}}, "no such metric: 'nonsense'"),
        ({"rouge_l": {}}, "needs min or max"),
        ({"rouge_l": {"min": 0.3, "max": 0.2}}, "nothing could pass"),
        ({"rouge_l": {"min": math.nan}}, "finite"),
    ],
)
def test_wrong_gates_are_refused_before_anything_runs(gates, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig(gates=gates)
