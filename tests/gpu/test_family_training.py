"""Every family on a GPU: bfloat16 with both engines, an fp8 and an nf4 base, or a refusal in one sentence.

LORAFLOW_FAMILIES=all python -m pytest -m gpu tests/gpu/test_family_training.py        (bitsandbytes is needed for nf4)
"""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from loraflow.failures import BadConfig  # noqa: E402
from loraflow.training.preview import Support  # noqa: E402
from tests.families.test_matrix import EXPERTS, SETTINGS, STEPS, build  # noqa: E402
from tests.families.tiny import FAMILIES, family_config  # noqa: E402
from tests.unit.training.test_training import build_phi3, run, tokenize  # noqa: E402
from tests.variants import _documents, _validation_loss  # noqa: E402

MIXED = {"base__dtype": "bfloat16", "training_config__bf16": True, "runtime__compile": "off"}
ROUNDING = 0.02  # of losses, between two computations in bfloat16
FP8_ROUNDING = 0.03


@pytest.fixture(scope="module", autouse=True)
def one_gpu():
    """Show this process one GPU, as a worker has it: trl would spread the stock engine's model over all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tokenizer, and rows that were tokenized with it: the same for all families."""
    folder = tmp_path_factory.mktemp("prepared")
    phi3 = build_phi3(folder / "phi3", dtype="bfloat16")
    return SimpleNamespace(phi3=phi3, shards=tokenize(phi3, folder / "rows", chats=24, **SETTINGS))


def losses_of(base, prepared, folder, device, **settings):
    """Train; return the losses of the steps, and the engine."""
    _, losses = run(base, prepared.shards, folder, **{**SETTINGS, **MIXED, "runtime__device": device, **settings})
    assert losses[STEPS] < losses[1], "it learns"
    return list(losses.values()), json.loads((folder / "out" / "telemetry" / "engine.json").read_text())


def exported_loss(base, prepared, folder, device, **options):
    """Return the validation loss of the saved adapter, opened by plain PEFT on the base."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device}, **options).eval()
    model = PeftModel.from_pretrained(model, str(folder / "out" / "adapter")).eval()
    total, count = 0.0, 0
    for ids, labels in _documents(prepared.shards / "validation", 5):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids.tolist(), device=device)[None]).logits[0, :-1].float()
        targets = torch.tensor(labels[1:].tolist(), device=device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


def exercise(family, prepared, folder, device, kinds=("fp8", "nf4")):
    """Train a family in bfloat16, and on each kind of quantized base that it supports; the others have to be refused."""
    base = build(family, prepared, folder / "base")
    support = Support.of(family_config(family))
    more = EXPERTS if "experts adapted" in family else {}
    plain, chosen = losses_of(base, prepared, folder / "plain", device, **more)
    assert chosen["engine"] == support.engine
    assert exported_loss(base, prepared, folder / "plain", device) == pytest.approx(
        _validation_loss(folder / "plain"), rel=ROUNDING
    )
    if support.engine == "fast":
        stock, chosen = losses_of(base, prepared, folder / "stock", device, runtime__engine="stock")
        assert chosen["engine"] == "stock" and plain == pytest.approx(stock, rel=ROUNDING)
        recorded, _ = losses_of(base, prepared, folder / "recorded", device, runtime__cuda_graphs="on")
        assert recorded == pytest.approx(plain, rel=1e-4)
    for kind in kinds:
        options = {**more, "base__quantization": kind}
        if kind not in support.quantizations:
            with pytest.raises(BadConfig, match=f"does not allow base.quantization: {kind}"):
                losses_of(base, prepared, folder / kind, device, **options)
            continue
        found, chosen = losses_of(base, prepared, folder / kind, device, **options)
        assert chosen["engine"] == support.engine
        saved = _validation_loss(folder / kind)
        if kind == "fp8":
            assert found == pytest.approx(plain, rel=FP8_ROUNDING)
            assert exported_loss(base, prepared, folder / kind, device) == pytest.approx(saved, rel=FP8_ROUNDING)
            continue
        if support.engine == "fast":
            stock, _ = losses_of(base, prepared, folder / "stock nf4", device, **options, runtime__engine="stock")
            assert found == pytest.approx(stock, rel=ROUNDING)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        opened = exported_loss(base, prepared, folder / kind, device, quantization_config=nf4)
        assert opened == pytest.approx(saved, rel=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_in_bfloat16_fp8_and_nf4_and_plain_peft_opens_what_was_saved(family, prepared, tmp_path):
    if FAMILIES[family][0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    from loraflow.hardware.device import gpu_has_fp8

    kinds = [*(["fp8"] if gpu_has_fp8() else []), *(["nf4"] if find_spec("bitsandbytes") else [])]
    exercise(family, prepared, tmp_path, "cuda", kinds)
    if missing := {"fp8", "nf4"} - set(kinds):
        pytest.skip(
            f"bfloat16 passed, as did {', '.join(kinds) or 'nothing else'}; {', '.join(missing)} cannot run here"
        )
