"""1 if an answer is the label of its row, without differences of case and white space (and NFC), otherwise 0."""

import datasets
import evaluate

from loraflow.evaluation.label_scores import label


class Labels(evaluate.Metric):
    """Share of answers that are the row's label."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of answers that are the row's label.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scores = [float(label(p) == label(r)) for p, r in zip(predictions, references, strict=True)]
        return {"accuracy": sum(scores) / len(scores), "accuracy_scores": scores}
