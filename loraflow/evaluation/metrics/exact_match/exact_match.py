"""Is the answer the reference, character by character? White space around it and Unicode's two ways to say é aside."""

import unicodedata

import datasets
import evaluate


def score_one(prediction, reference):
    """Return 1.0 if the two texts are the same."""
    return float(unicodedata.normalize("NFC", prediction).strip() == unicodedata.normalize("NFC", reference).strip())


class ExactMatch(evaluate.Metric):
    """Share of answers that are the reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of answers that equal the reference.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scores = [score_one(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(scores) / len(scores), "exact_match_scores": scores}
