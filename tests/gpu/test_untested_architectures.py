"""The checks of loaded weights in bfloat16 on a GPU: right models pass them, and wrong ones do not."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from loraflow.base.architecture import FAST  # noqa: E402
from loraflow.evaluation.generation import batches_are_exact  # noqa: E402
from loraflow.failures import BadModel  # noqa: E402
from loraflow.hardware.attention import DOCUMENTS  # noqa: E402
from loraflow.training import attention  # noqa: E402
from loraflow.training.document_check import refuse_seeing_later_tokens  # noqa: E402
from loraflow.training.stock_engine import use_own_logits_where_trl_is_wrong  # noqa: E402
from tests.families.test_documents import families  # noqa: E402
from tests.families.test_untested_architectures import model_of  # noqa: E402
from tests.families.tiny import FAMILIES, family_config, tiny_model  # noqa: E402

BF16 = torch.bfloat16


@pytest.mark.parametrize("family", families(FAST))
def test_concatenated_documents_pass_the_check_of_later_tokens(family):
    attention.register()
    model = tiny_model(family, DOCUMENTS).to("cuda", BF16)
    refuse_seeing_later_tokens(model, 0, is_concatenated=True, compute_dtype=BF16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_passes_the_checks_and_takes_batches(family):
    if FAMILIES[family][0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=BF16).cuda().eval()
    refuse_seeing_later_tokens(model, 0, is_concatenated=False, compute_dtype=BF16)
    assert batches_are_exact(model, 0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert not use_own_logits_where_trl_is_wrong(model, BF16)


def test_an_encoder_does_not_pass():
    with pytest.raises(BadModel, match="attention is not causal"):
        refuse_seeing_later_tokens(model_of("bert").to("cuda", BF16), 0, is_concatenated=False, compute_dtype=BF16)
