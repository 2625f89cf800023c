"""Architectures on a GPU: concatenated documents, by the kernel of training, against each document alone."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

from loraflow.base.architecture import FAST  # noqa: E402
from loraflow.failures import BadModel  # noqa: E402
from loraflow.hardware.attention import DOCUMENTS  # noqa: E402
from loraflow.training import attention  # noqa: E402
from loraflow.training.collation import concatenated  # noqa: E402
from loraflow.training.document_check import refuse_leaking_documents  # noqa: E402
from tests.families.test_documents import LENGTHS, documents, each_alone, families  # noqa: E402
from tests.families.tiny import tiny_model  # noqa: E402


@pytest.mark.parametrize("family", families(FAST))
def test_concatenated_documents_equal_each_document_alone(family):
    attention.register()
    docs = documents()
    model = tiny_model(family, DOCUMENTS).to("cuda", torch.bfloat16)
    refuse_leaking_documents(model, 0, is_concatenated=True, compute_dtype=torch.bfloat16)
    batch = concatenated([docs], 64, 8, max(LENGTHS), 0)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()
              if key not in ("loss_index", "targets")}  # fmt: skip
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits[0, : sum(LENGTHS)].float().cpu()
    expected = each_alone(tiny_model(family, "eager"), docs)
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.03, "rounding to bfloat16"
    assert np.isfinite(error)


@pytest.mark.parametrize("family", families(["lfm2", "granitemoehybrid"]))
def test_a_state_that_passes_a_border_is_detected(family):
    attention.register()
    model = tiny_model(family, DOCUMENTS).to("cuda", torch.bfloat16)
    with pytest.raises((BadModel, ValueError), match=r"influence each other|packed sequences"):
        refuse_leaking_documents(model, 0, is_concatenated=True, compute_dtype=torch.bfloat16)
