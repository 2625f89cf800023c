"""chrF: F2 of character n-grams, by sacrebleu, of each answer; the mean over rows. 0 to 100.

Popović 2015, https://aclanthology.org/W15-3049
"""

import datasets
import evaluate
import sacrebleu


class Chrf(evaluate.Metric):
    """Mean sentence-level chrF."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean sentence-level chrF, 0 to 100.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scores = [sacrebleu.sentence_chrf(p, [r]).score for p, r in zip(predictions, references, strict=True)]
        return {"chrf": sum(scores) / len(scores), "chrf_scores": scores}
