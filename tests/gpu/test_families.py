"""Architectures on a GPU: concatenated documents, by the kernel of training, against each document alone."""

import json

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
from tests.families.test_training import base_of  # noqa: E402
from tests.families.tiny import tiny_model  # noqa: E402
from tests.unit.training.test_training import build_phi3, run, tokenize  # noqa: E402


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", families(FAST))
def test_concatenated_documents_equal_each_document_alone(family, dtype, tolerance):
    attention.register(attention.efficient if dtype == torch.float32 else attention.varlen)
    docs = documents()
    model = tiny_model(family, DOCUMENTS).to("cuda", dtype)
    refuse_leaking_documents(model, 0, is_concatenated=True, compute_dtype=dtype)
    batch = concatenated([docs], 64, 8, max(LENGTHS), 0)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()
              if key not in ("loss_index", "targets")}  # fmt: skip
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits[0, : sum(LENGTHS)].float().cpu()
    expected = each_alone(tiny_model(family, "eager"), docs)
    error = float((found - expected).norm() / expected.norm())
    assert error < tolerance, "rounding"
    assert np.isfinite(error)


@pytest.mark.parametrize("family", families(["lfm2", "granitemoehybrid"]))
def test_a_state_that_passes_a_border_is_detected(family):
    attention.register()
    model = tiny_model(family, DOCUMENTS).to("cuda", torch.bfloat16)
    with pytest.raises((BadModel, ValueError), match=r"influence each other|packed sequences"):
        refuse_leaking_documents(model, 0, is_concatenated=True, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("family", families({"granite", "cohere2"}))
def test_scaled_logits_are_trained_compiled_and_not_with_equal_losses(family, tmp_path, monkeypatch):
    phi3 = build_phi3(tmp_path / "phi3", dtype="bfloat16")
    base = base_of(family, phi3, tmp_path / "base", monkeypatch)
    options = {"base__dtype": "bfloat16", "training_config__bf16": True, "runtime__device": "cuda",
               "training_config__max_steps": 6, "training_config__logging_steps": 1,
               "peft_config__target_modules": ["q_proj", "v_proj"], "training_config__learning_rate": 1e-2}  # fmt: skip
    shards = tokenize(base, tmp_path, **options)
    losses = {}
    for name, more in {"on": {"runtime__compile": "on"}, "off": {"runtime__compile": "off"},
                       "stock": {"runtime__engine": "stock"}}.items():  # fmt: skip
        _, losses[name] = run(base, shards, tmp_path / name, **options, **more)
        engine = json.loads((tmp_path / name / "out" / "telemetry" / "engine.json").read_text())
        assert engine["engine"] == ("stock" if name == "stock" else "fast"), engine
        assert (engine.get("compiled_layers") or 0) == (2 if name == "on" else 0)
    for name in ("off", "stock"):
        np.testing.assert_allclose(list(losses["on"].values()), list(losses[name].values()), rtol=0.02)
