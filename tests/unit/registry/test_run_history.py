"""The report's settings, what changed since the last run, and earlier runs."""

from loraflow.config.load import parse_recipe
from loraflow.evaluation.values import MetricValue
from loraflow.registry.runs import RecordedDecision, RunRecord, RunSummary, StageRun
from loraflow.reporting.sections import MOST_CHANGES, History, history_lines

RECIPE = "name: tickets\nbase: {model: a|b}\ntraining_config: {max_steps: 40}\n"


def record(day, verdict="promote", loss=1.0, data="a", entry=None, **overrides):
    run = f"2026010{day}-000000-abcdef"
    score = MetricValue(value=loss, low=loss, high=loss, n=20)
    summary = RunSummary(
        run=run, recipe="tickets", decision=RecordedDecision(verdict=verdict), registered=entry,
        metrics={"tuned": {"heldout": {"token_loss": score}}, "champion": None},
    )  # fmt: skip
    recipe = parse_recipe(RECIPE, overrides={"gate.primary": "token_loss", **overrides})
    return RunRecord(
        run=run, recipe="tickets", started=1767225600.0 + 86400 * (day - 1), loraflow="0.1.0", commit="c" * 40,
        resolved=recipe.model_dump(by_alias=True, mode="json"), summary=summary,
        stages=[StageRun(stage="version_dataset", state="computed", fingerprint="f", digest=data * 64)],
    )  # fmt: skip


def text_of(run, *earlier):
    return "\n".join(history_lines(History(run, earlier, "data.dvc, md5 0123")))


def test_the_first_run_shows_its_settings_and_no_history():
    text = text_of(record(1, **{"training_config.learning_rate": 5e-5, "peft_config.target_modules": ["q", "v"]}))
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert rows["dataset"] == "data.dvc, md5 0123" and rows["base"] == r"a\|b"
    assert (rows["learning_rate"], rows["max_steps"], rows["target_modules"]) == ("5e-05", "40", "q, v")
    assert rows["loraflow"] == "0.1.0" and rows["git commit"] == "c" * 12
    assert "num_train_epochs" not in rows and "Runs of this recipe" not in text and "hanged" not in text


def test_epochs_are_shown_where_they_decide_the_length():
    text = text_of(record(1, **{"training_config.max_steps": -1, "training_config.num_train_epochs": 3}))
    assert "| num_train_epochs | 3 |" in text and "max_steps" not in text


def test_changes_since_the_last_run_and_earlier_runs_are_shown():
    last = record(2, "undecided", 1.25)
    text = text_of(record(3, loss=0.5, data="b", entry=2, **{"peft_config.r": 4}), last, record(1, entry=1))
    changes = text[text.index("Changed since run 20260102-000000-abcdef:") : text.index("### Runs of this recipe")]
    assert [line for line in changes.splitlines() if line.startswith("- ")] == [
        "- `peft_config.r 16 → 4`", f"- `version_dataset {'a' * 12} → {'b' * 12}`",
    ]  # fmt: skip
    assert [line for line in text.splitlines() if line.startswith(("| **2026", "| 2026"))] == [
        "| **20260103-000000-abcdef** | 2026-01-03 00:00 UTC | promote | 0.500 | 2 |",
        "| 20260102-000000-abcdef | 2026-01-02 00:00 UTC | undecided | 1.250 |  |",
        "| 20260101-000000-abcdef | 2026-01-01 00:00 UTC | promote | 1.000 | 1 |",
    ]
    assert "Nothing changed since run 20260102-000000-abcdef." in text_of(record(3), last)


def test_many_changes_are_cut_and_the_command_that_shows_all_is_named():
    other = {f"gate.guards.{name}": 0.1 for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    other |= {f"peft_config.{key}": 3 for key in ("r", "lora_alpha")}
    other |= {
        f"training_config.{key}": 3 for key in ("seed", "max_steps", "max_length", "logging_steps", "weight_decay")
    }
    other |= {"evaluation.metrics": ["token_loss", "rouge"], "evaluation.max_rows": 3, "data.seed": 3}
    text = text_of(record(2, **other), record(1))
    listed = [line for line in text.splitlines() if line.startswith("- `")]
    assert len(listed) == MOST_CHANGES
    assert "more: `loraflow compare 20260101-000000-abcdef 20260102-000000-abcdef`" in text
