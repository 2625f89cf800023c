"""A stage is its module, its config, its row and its task: nothing else has to know it."""

import json

from prefect import flow

from loraflow.stages import STAGES
from loraflow.tasks.run import open_run
from loraflow.tasks.stages import check_dataset, version_dataset
from tests.toy_stage import COUNT_WORDS, count_words


@flow(name="words", persist_result=False)
def words(recipe: str, name: str):
    with open_run(recipe, {"name": name}, []) as run:
        rows = check_dataset(run, dataset=version_dataset(run))
        ref = count_words(run, rows=rows)
        counts = json.loads(run.workspace.store.read(ref, "words.json"))
        state = run.stages["count_words"].state
        return counts, state, count_words.fn(run, rows=rows)


def test_an_added_stage_is_computed_cached_and_keyed_by_its_config(project, monkeypatch):
    monkeypatch.setitem(STAGES, COUNT_WORDS.name, COUNT_WORDS)
    counts, state, _ = words(str(project.recipe), "tiny")
    rows = (project.folder / "data" / "train.jsonl").read_text().splitlines()
    assert counts["what"] == len(rows) and state == "computed", "each question has the word once"
    again, state, hit = words(str(project.recipe), "tiny")
    assert again == counts and state == "cached"
    assert hit.name == "Cached" and hit.message.startswith("same inputs, settings and stage version")
    _, state, _ = words(str(project.recipe), "tiny-lower")
    assert state == "computed", "another config is another fingerprint"
