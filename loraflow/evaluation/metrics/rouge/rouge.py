"""ROUGE-1, -2, -L and -Lsum by rouge_score, with words of every script and Porter's stemmer for English ones.

rouge_score's own tokenizer keeps a-z and 0-9 only, and gives 0.0 for two identical texts in Hindi.
Lin 2004, https://aclanthology.org/W04-1013
"""

import unicodedata

import datasets
import evaluate
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]\p{M}*|[\p{L}\p{M}\p{N}]+")
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Words:
    """The tokenizer that rouge_score is given."""

    def __init__(self):
        self.stemmer = PorterStemmer()

    def tokenize(self, text):
        """Return a text's words; like rouge_score, stem Latin words of more than three letters."""
        found = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        return [self.stemmer.stem(w) if len(w) > 3 and w.isascii() else w for w in found]


class Rouge(evaluate.Metric):
    """Mean F-measures."""

    def _info(self):
        return evaluate.MetricInfo(
            description="ROUGE-1/2/L/Lsum F-measures.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(list(KINDS), tokenizer=Words())
        rows = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
        out = {}
        for kind in KINDS:
            scores = [row[kind].fmeasure for row in rows]
            out[kind] = sum(scores) / len(scores)
            out[kind + "_scores"] = scores
        return out
