"""F1 of the words that answer and reference share, as SQuAD has it, for every script.

A word is a run of letters, marks and digits; Chinese, Japanese and Thai, which do not write spaces, count by character.
Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250
"""

import collections
import unicodedata

import datasets
import evaluate
import regex

WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]\p{M}*|[\p{L}\p{M}\p{N}]+")


def words(text):
    """Return a text's words, lower case."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def score_one(prediction, reference):
    """Return the harmonic mean of precision and recall over words; two texts without words are equal."""
    ours, theirs = words(prediction), words(reference)
    if not ours or not theirs:
        return float(prediction.strip() == reference.strip() or (not ours and not theirs and prediction == reference))
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


class TokenF1(evaluate.Metric):
    """Mean F1 over shared words."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean F1 of shared words.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scores = [score_one(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"token_f1": sum(scores) / len(scores), "token_f1_scores": scores}
