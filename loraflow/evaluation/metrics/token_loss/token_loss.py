"""Negative log-likelihood of the reference answers, nats per token, weighted by tokens; and perplexity."""

import math

import datasets
import evaluate


class TokenLoss(evaluate.Metric):
    """predictions: the sum of -log p over a row's answer tokens; references: how many they are."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Token-weighted negative log-likelihood (nats) and perplexity.",
            citation="",
            inputs_description="predictions: sums of -log p; references: numbers of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        loss = sum(predictions) / sum(references)
        scores = [total / tokens for total, tokens in zip(predictions, references, strict=True)]
        return {
            "token_loss": loss,
            "token_loss_scores": scores,
            "perplexity": math.exp(loss),
        }
