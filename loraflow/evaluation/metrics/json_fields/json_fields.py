"""Answers that are JSON objects: are they valid, and how many fields are right?

A field is a path with a value: {"a": {"b": 1}} has one, a.b = 1; a list's items are fields of the list. F1 is over
fields, so that one that is missing and one that is too many count alike.
"""

import collections
import json

import datasets
import evaluate


def refuse(constant):
    """Refuse NaN and Infinity, which Python reads and other parsers of JSON do not."""
    raise ValueError(constant)


def parse(text):
    """Return the object, or None if the text is no JSON object."""
    try:
        value = json.loads(text.strip(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fields(value, path=()):
    """Return an object's fields as a multiset of (path, value). In a path, 0 stands for a list's items."""
    if isinstance(value, dict) and value:
        return sum((fields(item, (*path, key)) for key, item in value.items()), collections.Counter())
    if isinstance(value, list) and value:
        return sum((fields(item, (*path, 0)) for item in value), collections.Counter())
    return collections.Counter([(path, json.dumps(value, sort_keys=True))])


def score_one(prediction, reference):
    """Return (valid, field F1)."""
    ours, theirs = parse(prediction), parse(reference)
    if ours is None or theirs is None:
        return float(ours is not None), 0.0
    try:
        have, want = fields(ours), fields(theirs)
    except RecursionError:  # an answer with too many open brackets
        return 1.0, 0.0
    shared = sum((have & want).values())
    return 1.0, 2 * shared / (sum(have.values()) + sum(want.values()))


class JsonFields(evaluate.Metric):
    """Share of valid objects, and mean F1 over fields."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of answers that are JSON objects, and mean F1 over their fields.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        rows = [score_one(p, r) for p, r in zip(predictions, references, strict=True)]
        valid, f1 = [row[0] for row in rows], [row[1] for row in rows]
        return {
            "json_valid": sum(valid) / len(valid),
            "json_valid_scores": valid,
            "field_f1": sum(f1) / len(f1),
            "field_f1_scores": f1,
        }
