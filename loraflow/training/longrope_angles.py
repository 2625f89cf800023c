"""Give each document of a training its own LongRoPE angles."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loraflow.base.longrope import compute_angles_per_document
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraflow.training.setup import TrainingSetup

log = logging.getLogger(__name__)


def separate_angles(model: PreTrainedModel, setup: TrainingSetup) -> None:
    """Compute a model's angles for each document, because a call has positions on both sides of the switch.

    Args:
        model: the base, changed in place.
        setup: the training.

    Raises:
        BadModel: the angles are computed by code that comes with the model.
    """
    switch = setup.longrope_switch
    assert switch is not None
    if not compute_angles_per_document(model, switch):
        raise BadModel(
            "Rows on both sides of the model's longrope switch cannot be computed together: the longest row of a batch "
            "would change the angles of the others.",
            where="base.model",
            expected="rotary embeddings of transformers",
            got=f"architecture {model.config.model_type}, with code of its own",
            next_step=f"set training_config.max_length to {switch}, and data.too_long to drop or truncate",
        )
    log.info("documents of more than %d tokens have the long factors of longrope, the others the short ones", switch)
