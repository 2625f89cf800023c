"""Fingerprints, digests, and the digests of the code of stages."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraflow import identity

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_the_order_of_keys_does_not_matter(value):
    backwards = dict(reversed(list(value.items())))
    assert identity.canonical(value) == identity.canonical(backwards)


@given(JSON)
def test_a_fingerprint_survives_a_round_trip_through_json(value):
    assert identity.canonical(json.loads(json.dumps(value))) == identity.canonical(value)


def test_an_integral_float_equals_the_integer():
    assert identity.canonical({"lora_alpha": 32.0}) == identity.canonical({"lora_alpha": 32})
    assert identity.canonical(True) != identity.canonical(1)


@pytest.mark.parametrize("value", [print, object(), {1: 2}, {3, 4}, Path("x")])
def test_values_without_a_stable_text_are_refused(value):
    with pytest.raises(TypeError):
        identity.canonical({"a": value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(ValueError):
        identity.canonical(value)


def test_a_cache_miss_names_the_field_and_both_values():
    old = identity.payload("train", 1, {"base": "a" * 64}, {"peft_config": {"r": 8, "lora_alpha": 16}})
    new = identity.payload("train", 1, {"base": "b" * 64}, {"peft_config": {"r": 16, "lora_alpha": 16}})
    assert identity.explain(old, new) == ["peft_config.r 8 → 16", f"inputs.base {'a' * 12} → {'b' * 12}"]


def test_a_metric_that_is_removed_is_named_without_its_file_and_a_changed_file_is_named():
    old = {"config": {"metrics": ["rouge", "chrf"], "modules": {"rouge": "1", "chrf": "2"}}}
    new = {"config": {"metrics": ["rouge"], "modules": {"rouge": "3"}}}
    assert identity.explain(old, new) == ['metrics ["rouge", "chrf"] → ["rouge"]', "modules.rouge 1 → 3"]
    lost = {"config": {"metrics": ["rouge", "chrf"], "modules": {"rouge": "1"}}}
    assert identity.explain(old, lost) == ["modules.chrf 2 → absent"]


def test_a_digest_depends_only_on_names_and_contents():
    assert identity.digest({"a": "1", "b": "2"}) == identity.digest({"b": "2", "a": "1"})
    assert identity.digest({"a": "1", "b": "2"}) != identity.digest({"a": "2", "b": "1"})


def test_golden_fingerprints_are_unchanged():
    """A change here makes every store of every user recompute. Do not edit the figures without a decision."""
    job = identity.payload("train", 1, {"base": "0" * 64}, {"r": 16, "lr": 2e-4, "targets": ["qkv_proj"]})
    assert identity.fingerprint(job) == "fcb5e42e52b25d58625e3de8a3c1c55eff9ee42758602e82a563c78ed52e8177"
    assert (
        identity.digest({"adapter/adapter_model.safetensors": "f" * 64})
        == "e86c2f9a8a33a0494e803dc3bbbbab94b9fd75af117a7a24098affbe37754802"
    )


def test_golden_payloads_of_every_recipe_and_variant_are_unchanged():
    """A payload that changes makes every user's store recompute. Do not record it again: bump a stage's version."""
    from tests.golden.payloads import payloads

    golden = json.loads((Path(__file__).parents[2] / "golden" / "payloads.json").read_text())
    assert payloads() == golden


def test_comments_and_docstrings_do_not_change_a_code_digest():
    from loraflow.execution.code_digest import normalized

    first = normalized('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    second = normalized("def f(x):\n    return x + 1\n")
    assert first == second
    assert second != normalized("def f(x):\n    return x + 2\n")


def test_every_module_that_computes_a_result_is_in_a_code_digest():
    """A stage's code is its modules and the modules of loraflow that they import, except those that all stages share."""
    import ast
    from importlib.util import find_spec

    from loraflow.stages import STAGES

    ground = {"loraflow.failures", "loraflow.job", "loraflow.store", "loraflow.store.files", "loraflow.store.checksum", "loraflow.store.lock", "loraflow.identity",
              "loraflow.config.recipe", "loraflow.config.data", "loraflow.config.data_sources", "loraflow.config.training", "loraflow.config.lora",
              "loraflow.config.stage_configs", "loraflow.config.job_runtime", "loraflow.config.locations", "loraflow.training.callbacks", "loraflow.store.checkpoints", "loraflow.training.memory",
              "loraflow.training.adapter_rank", "loraflow.data.versions.remote_files",  # the md5 says what remote files are
              "loraflow.adapters.verify"}  # fmt: skip
    repository = Path(__file__).parents[3]
    packages = {
        ".".join(f.relative_to(repository).parts[:-1])
        for part in ("training", "data", "adapters")
        for f in (repository / "loraflow" / part).rglob("__init__.py")
    }
    for stage in STAGES.values():
        for module in stage.code:
            tree = ast.parse(Path(find_spec(module).origin).read_text())
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
            imported |= {f"{node.module}.{name.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                         for name in node.names if node.module in packages}  # fmt: skip
            own_modules = {name for name in imported - packages if name.startswith("loraflow.") and name.count(".") > 1}
            missing = own_modules - set(stage.code) - ground
            assert not missing, f"{stage.name} is also computed by {missing}: list it in loraflow/stage_code.py"


def test_a_change_of_a_stages_code_requires_a_decision():
    """A stage's code changed. If its result can change, raise its version in loraflow/stages.py; then run
    `python tests/golden/write.py` either way."""
    from loraflow.execution.code_digest import PREFIX, recorded
    from loraflow.stage_code import source_hash
    from loraflow.stages import STAGES

    now = {name: (stage.version, source_hash(stage.code)[:PREFIX]) for name, stage in STAGES.items()}
    assert now == {name: (code.version, code.sources) for name, code in recorded().items()}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the text of a syntax tree differs between Python versions")
def test_recorded_digests_equal_those_of_the_code_without_comments():
    from loraflow.execution.code_digest import parsed_digest, recorded
    from loraflow.stages import STAGES

    assert {name: parsed_digest(stage.code) for name, stage in STAGES.items()} == {
        name: code.digest for name, code in recorded().items()
    }


def test_artifacts_from_before_the_reorganisation_are_current():
    """Artifacts of loraflow as it was before files were renamed are hits without a warning."""
    from loraflow.execution.code_digest import is_current
    from loraflow.stages import STAGES

    earlier = json.loads((Path(__file__).parents[2] / "golden" / "code_before.json").read_text())
    same = {name: digest for name, (version, digest) in earlier.items() if STAGES[name].version == version}
    assert same.keys() >= {"version_dataset"}, "other stages' versions were raised: results differ for some inputs"
    assert all(is_current(STAGES[name], digest) for name, digest in same.items())


def test_digests_can_be_computed_by_many_threads_at_once():
    """CPython before 3.11.8 fails in ast.parse when two threads parse at once (bug 106905)."""
    from concurrent.futures import ThreadPoolExecutor

    from loraflow.execution.code_digest import parsed_digest
    from loraflow.stages import STAGES

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: parsed_digest(STAGES["evaluate"].code), range(16)))
    assert len(found) == 1
