"""Answers that call tools: is the right tool called, how many arguments are right, and is the call valid?

A call is valid if it can be read, names a tool of the row, and its arguments fit the tool's JSON schema. A row whose
reference calls no tool is right if the answer calls none.
"""

import collections
import json

import datasets
import evaluate

from loraflow.data.chats import BadRow
from loraflow.data.formats.call_parser import parse_calls
from loraflow.data.formats.tools import fitting_calls


def fields(calls):
    """Return the arguments of calls as a multiset of (number of the call, tool, name, value)."""
    return collections.Counter(
        (number, call["name"], key, json.dumps(value, sort_keys=True))
        for number, call in enumerate(calls)
        for key, value in call["arguments"].items()
    )


def fits(calls, tools):
    """Tell whether calls are JSON, which has no NaN and Infinity, and fit the schemas of their tools."""
    try:
        json.dumps(calls, allow_nan=False)
        fitting_calls([{"type": "function", "function": call} for call in calls], tools, "")
    except (BadRow, ValueError):
        return False
    return True


def score_one(prediction, reference):
    """Return (names are equal, F1 of the arguments, the calls are valid)."""
    row = json.loads(reference)
    ours, theirs = parse_calls(prediction), row["calls"]
    if ours is None:
        return 0.0, 0.0, 0.0
    valid = float(bool(ours) == bool(theirs) and fits(ours, row["tools"]))
    has_names = [call["name"] for call in ours] == [call["name"] for call in theirs]
    have, want = fields(ours), fields(theirs)
    if not have and not want:
        return float(has_names), float(has_names), valid
    f1 = 2 * sum((have & want).values()) / (sum(have.values()) + sum(want.values()))
    return float(has_names), f1, valid


class ToolCalls(evaluate.Metric):
    """Share of answers with the right tools in their order, mean F1 over arguments, share of valid calls."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Exactness of the tools that are called, F1 over their arguments, and the rate of valid calls.",
            citation="",
            inputs_description="predictions: texts; references: JSON objects {calls, tools}",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        rows = [score_one(p, r) for p, r in zip(predictions, references, strict=True)]
        out = {}
        for name, scores in zip(
            ("tool_name", "tool_arguments_f1", "valid_call_rate"), zip(*rows, strict=True), strict=True
        ):
            out |= {name: sum(scores) / len(scores), f"{name}_scores": list(scores)}
        return out
