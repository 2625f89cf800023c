"""The run form: its schema as both UIs get it, and the recipe keys that its fields change."""

import inspect
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from loraflow.config import load_recipe
from loraflow.config.load import _all_paths
from loraflow.config.recipe import Recipe
from loraflow.credentials import HAS_CREDENTIALS, mask
from loraflow.flows.parameters import KEYS, Overrides
from loraflow.stages import STAGES

GOLDEN = Path(__file__).parents[2] / "golden" / "form.json"


def schema() -> dict:
    from prefect.utilities.callables import parameter_schema

    from loraflow.flows.finetune import finetune

    return parameter_schema(finetune).model_dump()


@pytest.fixture
def two_recipes(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name in ("one", "two"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("name: x")
    monkeypatch.chdir(tmp_path)


def test_the_form_schema_is_unchanged(two_recipes):
    """A change here is a change of what people see: look at it in the UI, then `python tests/golden/write.py`."""
    assert schema() == json.loads(GOLDEN.read_text())


def test_recipes_are_a_choice_or_a_path_and_only_a_path_without_recipes(two_recipes, tmp_path, monkeypatch):
    choice, path = schema()["properties"]["recipe"]["anyOf"]
    assert choice["enum"] == ["one", "two"] and path["type"] == "string"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert schema()["properties"]["recipe"]["type"] == "string"


def test_a_flow_without_parameters_takes_the_only_recipe_or_says_which_there_are(two_recipes, tmp_path):
    """As `finetune.serve()` calls it: Prefect binds the default, then validates it."""
    from prefect.exceptions import ParameterTypeError

    from loraflow.flows.evaluate_model import evaluate
    from loraflow.flows.finetune import finetune
    from loraflow.flows.retrain import retrain
    from loraflow.flows.sweep import sweep

    for flow in (evaluate, finetune, retrain, sweep):
        with pytest.raises(ParameterTypeError, match="name the recipe.*configs/ has one, two"):
            flow.validate_parameters({"recipe": inspect.signature(flow.fn).parameters["recipe"].default})
    (tmp_path / "configs" / "one.yaml").unlink()
    for flow in (evaluate, finetune, retrain, sweep):
        default = inspect.signature(flow.fn).parameters["recipe"].default
        assert flow.validate_parameters({"recipe": default})["recipe"] == "two"


SECRET = "c4nary-0f-16-token"
CREDENTIALS = {
    "a password": {"data.repo": f"https://someone:{SECRET}@host/data.git"},
    "a token as the user": {"data.repo": f"https://{SECRET}@host/data.git"},
    "a password with ssh": {"data.repo": f"ssh://git:{SECRET}@host/data.git"},
    "a password with an @": {"data.repo": f"https://someone:{SECRET}@x@host/data.git"},
    "a token of the hub": {"register.push_to_hub": "hf_" + SECRET.replace("-", "") * 2},
    "in a text": {"data.repo": f"git clone https://someone:{SECRET}@host/data.git"},
    "behind a space": {"data.repo": f" https://someone:{SECRET}@host/data.git"},
    "behind a masked one": {"data.repo": f"https://***@host/a https://someone:{SECRET}@host/data.git"},
    "behind ssh": {"data.repo": f"ssh://git@host/a https://someone:{SECRET}@host/data.git"},
    "a parameter": {"data.source": f"https://host/x?Token={SECRET}"},
    "a signed URL": {"data.source": f"https://host/x?a=1&X-Amz-Signature={SECRET}&b=2"},
    "a header": {"x": f"Authorization: Bearer {SECRET}"},
    "seven objects deep": {"a": {"b": {"c": [{"d": {"e": {"f": f"https://someone:{SECRET}@host/data.git"}}}]}}},
    "in a list of sources": {"data.sources": [{"repo": f"https://someone:{SECRET}@host/data.git"}]},
}
NO_CREDENTIALS_THERE = (
    "https://host/data.git", "ssh://git@host/data.git", "git+ssh://git@host/a/b", "git@host:data.git", "https://***@host/x.git",
    "https://host/a@b", "me@acme.example", "s3://bucket/store", 3, None, [1, 2e-4], {"a": [{"b": True}]},
)  # fmt: skip


@pytest.mark.parametrize("case", CREDENTIALS)
def test_the_schema_refuses_credentials_without_repeating_them(case):
    from jsonschema import ValidationError as Refused
    from jsonschema import validate

    with pytest.raises(Refused, match="a text without a password or token") as caught:
        validate({"settings": CREDENTIALS[case]}, schema())
    assert SECRET not in caught.value.message


SCHEMES = ("https://", "ssh://", "git+ssh://", "1https://", "x-SSH.y://", "")
USERS = ("", "git@", "***@", "u:p@", "***:p@", "***@x@", ":@", "a b@", "u@x:y@")
TAILS = (
    "h/x",
    "h:22/x",
    "h",
    "h/a@b",
    "h?token=***",
    "h?Access_Key=abc",
    "h?sig=***&key=b",
    "h;PASSWD=a",
    "h bearer ***",
    "h Bearer 12345678",
)


def test_the_schema_refuses_every_text_that_is_masked_and_no_other_one():
    """So what the server stores is what logs and records show."""
    texts = [
        f"{start}{scheme}{user}{tail}"
        for start in ("", " ", "a ", "x=")
        for scheme in SCHEMES
        for user in USERS
        for tail in TAILS
    ]
    differ = [text for text in texts if (mask(text) != text) != bool(re.search(HAS_CREDENTIALS, text))]
    assert not differ and len({mask(text) != text for text in texts}) == 2


@pytest.mark.parametrize("name", ["base", "dataset_rev"])
def test_the_text_fields_of_the_form_refuse_credentials_too(name):
    from jsonschema import ValidationError as Refused
    from jsonschema import validate

    validate({"overrides": {name: "acme/model"}}, schema())
    with pytest.raises(Refused, match="a text without a password or token"):
        validate({"overrides": {name: f"https://someone:{SECRET}@host/model"}}, schema())


@pytest.mark.parametrize("value", NO_CREDENTIALS_THERE, ids=str)
def test_the_schema_accepts_settings_without_credentials(value):
    from jsonschema import validate

    validate({"settings": {"data.repo": value}}, schema())


def test_every_stage_can_be_forced():
    assert schema()["properties"]["force"]["items"]["enum"] == list(STAGES)


def test_an_unknown_stage_is_refused():
    from prefect.exceptions import ParameterTypeError

    from loraflow.flows.finetune import finetune

    assert finetune.validate_parameters({"force": list(STAGES)})["force"] == list(STAGES)
    with pytest.raises(ParameterTypeError, match="force.1: Input should be 'version_dataset', "):
        finetune.validate_parameters({"force": ["train", "trian"]})


def test_every_field_of_the_form_has_a_title_a_description_a_position_and_bounds():
    fields = schema()["definitions"]["Overrides"]["properties"]
    assert sorted(field["position"] for field in fields.values()) == list(range(len(fields)))
    for name, field in fields.items():
        assert field["title"][0].isupper() and field["description"].endswith("."), name
        assert field.keys() & {"enum", "minLength", "if"} or {"minimum", "maximum"} <= field.keys(), name
        assert "default" not in field and "anyOf" not in field, "an empty box, not two tabs"


def test_every_field_of_the_form_is_a_key_of_the_recipe():
    assert set(KEYS) == set(Overrides.model_fields)
    assert set(KEYS.values()) <= {".".join(path) for path in _all_paths(Recipe)}


def test_the_batch_size_is_that_of_an_optimizer_step(recipe):
    for size in (1, 6, 13, 64, 96):
        training = load_recipe(recipe, Overrides(batch_size=size).settings()).training_config
        assert training.global_batch == size and training.per_device_train_batch_size <= 8


def test_another_base_does_not_keep_the_revision_of_the_recipes_base(recipe):
    settings = {"base.revision": "a" * 40, **Overrides(base="org/other").settings()}
    base = load_recipe(recipe, settings).base
    assert (base.model, base.revision) == ("org/other", None)


def test_a_number_of_steps_replaces_the_epochs_and_not_both_are_accepted(recipe):
    assert load_recipe(recipe, Overrides(steps=7).settings()).training_config.max_steps == 7
    with pytest.raises(ValidationError, match="fill in Epochs or Steps, not both"):
        Overrides(epochs=1, steps=7)


def test_a_deployments_form_shows_the_values_of_its_recipe(recipe, tmp_path, monkeypatch):
    from loraflow.flows.server.prefect_yaml import read_all

    monkeypatch.chdir(tmp_path)
    document = {
        "name": "walk",
        "deployments": [
            {"name": "own", "entrypoint": "loraflow.flows.finetune.finetune", "parameters": {"recipe": recipe.name}, "work_pool": {"name": "p"}},
        ],
    }  # fmt: skip
    (tmp_path / "prefect.yaml").write_text(json.dumps(document))
    (spec,) = read_all(tmp_path / "prefect.yaml")[0]
    fields = spec.parameter_openapi_schema["definitions"]["Overrides"]["properties"]
    loaded, before = load_recipe(recipe), schema()["definitions"]["Overrides"]["properties"]
    assert fields["rank"]["description"] == f"{before['rank']['description']} In {recipe.name}: {loaded.peft_config.r}."
    assert fields["batch_size"]["description"].endswith(f": {loaded.training_config.global_batch}.")
    assert fields["base"]["description"].endswith(f": {loaded.base.model}.")
    assert fields["steps"]["description"].endswith(f": {loaded.training_config.max_steps}.")
    assert "not used because max_steps is" in fields["epochs"]["description"]


def test_empty_fields_keep_the_recipes_values(recipe):
    assert Overrides().settings() == {} and Overrides().model_dump() == {}
    assert load_recipe(recipe, Overrides().settings()) == load_recipe(recipe)


def test_filled_fields_override_the_recipe(recipe):
    form = Overrides(epochs=2, learning_rate=1e-4, rank=2, alpha=4, max_length=64, dataset_rev="main", seed=7,
                     loss_on="all")  # fmt: skip
    loaded = load_recipe(recipe, form.settings())
    training, peft = loaded.training_config, loaded.peft_config
    assert (training.num_train_epochs, training.max_steps) == (2, -1), "max_steps would win over the epochs"
    assert (training.learning_rate, training.max_length, training.seed) == (1e-4, 64, 7)
    assert (peft.r, peft.lora_alpha, loaded.data.rev, loaded.data.loss_on) == (2, 4, "main", "all")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"learning_rate": "2"}, {"learning_rate": "0.0"}, {"learning_rate": "much"}, {"epochs": 0}, {"loss_on": "some"}, {"rnk": 4},
                                   {"seed": -1}, {"max_length": "long"}])  # fmt: skip
def test_an_invalid_value_is_refused_by_the_schema_and_by_the_model(wrong):
    from prefect.utilities.schema_tools.validation import ValidationError as Refused
    from prefect.utilities.schema_tools.validation import validate

    with pytest.raises(Refused):
        validate({"overrides": wrong}, schema(), raise_on_error=True)
    with pytest.raises(ValidationError):
        Overrides.model_validate(wrong)


def test_a_valid_value_passes_the_schema():
    from prefect.utilities.schema_tools.validation import validate

    values = {"recipe": "some/file.yaml", "overrides": {"rank": 8, "learning_rate": "2e-4"}, "force": ["train"], "approval": True,
              "settings": {"data.limit": 5}}  # fmt: skip
    assert validate(values, schema(), raise_on_error=True) == []


@pytest.mark.parametrize("text", ["2e-4", "0.0002", ".5", "1", "1.0", "9.5E-6", "1e-05"])
def test_a_learning_rate_is_accepted_in_the_usual_notations(text):
    assert Overrides.model_validate({"learning_rate": text}).settings() == {
        "training_config.learning_rate": float(text)
    }
    assert re.search(schema()["definitions"]["Overrides"]["properties"]["learning_rate"]["if"]["pattern"], text)


@pytest.mark.parametrize("text", ["2e-4", "2,5e-4", "0,0002", ",5", "1,0", "9,5E-6"])
def test_a_decimal_comma_is_a_decimal_point_in_the_learning_rate(text):
    from prefect.utilities.schema_tools.validation import validate

    values = {"recipe": "one", "overrides": {"learning_rate": text}}
    assert validate(values, schema(), raise_on_error=True) == []
    assert Overrides.model_validate(values["overrides"]).learning_rate == float(text.replace(",", "."))


@pytest.mark.parametrize("text", ["0,0", "1,000.5", "0,0,2", "0.000,2", "2,5", ",", "1,5", "0,2.1e-4"])
def test_a_comma_that_is_no_decimal_comma_is_refused_by_form_and_flow(text):
    from prefect.utilities.schema_tools.validation import ValidationError as Refused
    from prefect.utilities.schema_tools.validation import validate

    with pytest.raises(Refused):
        validate({"recipe": "one", "overrides": {"learning_rate": text}}, schema(), raise_on_error=True)
    with pytest.raises(ValidationError):
        Overrides.model_validate({"learning_rate": text})


@pytest.mark.parametrize("text", ["much", "2", "0,0", "a number above 0 and at most 1, such as 0.0002 or 2e-4"])
def test_a_wrong_learning_rate_is_answered_with_a_sentence(text):
    from prefect.utilities.schema_tools.validation import build_error_obj, validate

    errors = validate({"recipe": "one", "overrides": {"learning_rate": text}}, schema())
    if text.startswith("a number"):
        with pytest.raises(ValidationError):
            Overrides.model_validate({"learning_rate": text})
    else:
        shown = build_error_obj(errors)["errors"][0]["errors"][0]["errors"]
        assert shown == ["'a number above 0 and at most 1, such as 0.0002 or 2e-4' was expected"]


def test_flows_that_are_called_from_python_take_a_path():
    from loraflow.flows.finetune import finetune
    from loraflow.flows.retrain import retrain

    for flow in (finetune, retrain):
        assert flow.validate_parameters({"recipe": Path("configs/one.yaml")})["recipe"] == "configs/one.yaml"


@pytest.mark.parametrize(
    "value",
    [
        "configs/a.yaml",
        Path("a"),
        ["train"],
        {"base.model": "b", "x": [1, 2.5, None]},
        Overrides(),
        Overrides(epochs=2, learning_rate="1e-4"),
        {"base": Overrides(rank=4)},
        {1, 2},
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_server_stores_the_parameters_that_prefect_would_send(value):
    from prefect import Flow

    from loraflow.flows.finetune import finetune

    given = {"recipe": "r", "settings": value}
    assert finetune.serialize_parameters(given) == Flow.serialize_parameters(finetune, given)
