"""Mixtures of several sources: data.sources."""

import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from loraflow.config import Recipe
from loraflow.config.load import parse_recipe
from loraflow.config.stage_configs import CheckDatasetConfig, VersionDatasetConfig
from loraflow.data.checks import check, row_limits
from loraflow.data.checks.check_report import CheckReport
from loraflow.data.checks.row_limits import source_lines
from loraflow.data.files.readers import read_rows
from loraflow.data.versions import version
from loraflow.data.versions.dvc import dvc_md5
from loraflow.data.versions.version import locate
from loraflow.evaluation.values import EvaluationReport
from loraflow.failures import BadConfig, BadData, DirtyData, LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.reporting.rows import RowPolicy, summarise_rows
from loraflow.store.files import HashMemo
from tests.job_factory import Outside


def write(path: Path, rows: range, word: str, keys: tuple[str, str] = ("prompt", "completion")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({keys[0]: f"{word} {n}?", keys[1]: f"answer {n}"}) + "\n" for n in rows)
    path.write_text(text)


def recipe(*sources: dict, **data) -> Recipe:
    return Recipe.model_validate({"name": "r", "base": {"model": "m"}, "data": {"sources": list(sources), **data}})


class Mixture:
    """The artifacts of version_dataset and check_dataset of a recipe, computed without a store."""

    def __init__(self, out: Path, settings: Recipe):
        location = locate(settings.data, HashMemo(None))
        context = Outside(dataset=location)
        self.version = VersionDatasetConfig.from_recipe(settings, context)
        self.config = CheckDatasetConfig.from_recipe(settings, context)
        dataset, self.out = out / "version", out / "check"
        for folder in (dataset, self.out):
            folder.mkdir(parents=True)
        runtime = {**settings.runtime.model_dump(), "origin": location.origin.model_dump()}
        job = Job(stage="version_dataset", version=1, config=self.version.identity(), runtime=runtime)
        version.run(job, Inputs({}), dataset, Progress())
        job = Job(stage="check_dataset", version=1, config=self.config.identity())
        report = check.run(job, Inputs({"dataset": dataset}), self.out, Progress()).report
        row_limits.check_limits(report, settings.data.max_quarantined, "report.json")
        self.report = CheckReport.model_validate(report)

    def places(self, split: str) -> list[str]:
        return [json.loads(line)["place"] for line in (self.out / f"{split}.jsonl").open()]

    def names(self, split: str) -> Counter:
        return Counter(place.split("/")[0] for place in self.places(split))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "faq" / "chats.jsonl", range(100), "faq")
    write(tmp_path / "general" / "a.jsonl", range(200), "general", ("question", "answer"))
    write(tmp_path / "general" / "old" / "a.jsonl", range(200, 400), "general", ("question", "answer"))
    return tmp_path


GENERAL = {"source": "general/**/*.jsonl", "columns": {"prompt": "question", "completion": "answer"}}


def test_sources_have_their_own_format_weight_and_split_and_each_row_names_its_source(here):
    found = Mixture(
        here / "out",
        recipe(
            {"source": "faq", "weight": 2.5, "format": "prompt_completion"},
            {**GENERAL, "weight": 0.2, "split": "train"},
        ),
    )
    train, held = found.places("train"), found.names("heldout")
    assert set(held) == {"faq"} and 0 < held["faq"] < 30
    times = Counter(Counter(place for place in train if place.startswith("faq/")).values())
    assert set(times) == {2, 3} and sum(times.values()) == 100 - held["faq"] and 20 < times[3] < 70
    general = [place for place in train if place.startswith("general/")]
    assert 50 < len(general) < 110 and len(set(general)) == len(general), "a fifth of 400 rows, none twice"
    assert {place.split(":")[0] for place in general} == {"general/a.jsonl", "general/old/a.jsonl"}
    assert not set(train) & set(found.places("heldout"))
    counts = found.report.sources
    assert counts["faq"]["read"] == 100 and counts["faq"]["heldout"] == held["faq"]
    assert counts["faq"]["train"] - counts["faq"]["repeated"] == 100 - held["faq"]
    assert counts["general"] == {
        "read": 400,
        "not_drawn": 400 - len(general),
        "train": len(general),
        "validation": 0,
        "heldout": 0,
    }
    assert source_lines(found.report)[1] == (
        f"source general: 400 rows read, {len(general)} trained on, {400 - len(general)} not drawn by its weight"
    )


def test_the_table_of_rows_adds_up(here):
    found = Mixture(here / "out", recipe({"source": "faq", "weight": 2.5, "limit": 80}, {**GENERAL, "weight": 0.2}))
    tokens = {"train_rows": found.report.rows.train}
    policy = RowPolicy(max_length=10, too_long="drop")
    rows = summarise_rows(found.report, tokens, EvaluationReport(metrics={}), policy)
    counts = {count.what: count.rows for count in rows.counts}
    left_out = sum(number for what, number in counts.items() if what.startswith("left out"))
    added = counts["added to training: repeated by the weight of its source"]
    assert counts["read"] - left_out + added == counts["trained on"] + found.report.rows.heldout
    assert counts["left out: the limit of its source"] == 20
    assert rows.notes[0].startswith("source faq: 100 rows read")


def test_more_rows_and_more_sources_move_no_row_of_a_mixture(here):
    sources = {"source": "faq", "weight": 1.5}, {**GENERAL, "weight": 0.3}
    before = Mixture(here / "1", recipe(*sources))
    write(here / "other.jsonl", range(50), "other")
    write(here / "general" / "b.jsonl", range(400, 500), "general", ("question", "answer"))
    after = Mixture(here / "2", recipe(*sources, {"source": "other.jsonl", "limit": 20}))
    for split in ("train", "heldout"):
        old = [place for place in after.places(split) if not place.startswith(("other/", "general/b."))]
        assert old == before.places(split)
    assert sum(after.names(split)["other"] for split in ("train", "heldout")) == 20
    assert after.report.sources["other"]["over_limit"] == 30
    assert after.version.md5 != before.version.md5
    assert before.version.sources["faq"] == after.version.sources["faq"]


def test_a_source_can_be_the_held_out_one_and_then_no_other_row_is_held_out(here):
    write(here / "test.jsonl", range(95, 110), "faq")
    held = {"source": "test.jsonl", "split": "heldout"}
    found = Mixture(here / "out", recipe({"source": "faq"}, held))
    assert (found.names("heldout"), found.names("train")) == ({"test": 15}, {"faq": 95})
    assert found.report.counts["leak"] == 5, "rows of another source with a held-out prompt"
    assert "heldout_fraction" not in found.config.identity()


def test_few_rows_of_sources_for_training_are_never_held_out(here):
    for near in ("off", "drop"):
        write(here / "few.jsonl", range(3), "few")
        found = Mixture(
            here / near,
            recipe({**GENERAL, "split": "train", "limit": 30}, {"source": "few.jsonl"}, heldout_fraction=0.001, near_duplicates=near),
        )  # fmt: skip
        assert found.names("heldout") == {"few": 1} and "general" in found.names("train")


def test_files_of_one_folder_can_be_two_sources(here):
    write(here / "faq" / "test.jsonl", range(100, 120), "faq")
    found = Mixture(
        here / "out",
        recipe(
            {"source": "faq", "name": "train", "files": ["chats*"]},
            {"source": "faq", "name": "test", "files": ["test.jsonl"], "split": "heldout"},
        ),
    )
    assert (found.names("train"), found.names("heldout")) == ({"train": 100}, {"test": 20})


def test_a_pinned_source_is_refused_with_its_number_if_its_files_differ(here):
    pin = {"md5": dvc_md5(here / "faq"), "path": "faq", "hash": "md5"}
    (here / "faq.dvc").write_text(json.dumps({"outs": [pin]}))
    mixed = recipe({**GENERAL, "limit": 5}, {"source": "faq.dvc", "files": ["chats.jsonl"]})
    found = Mixture(here / "out", mixed)
    assert found.report.sources["faq"]["read"] == 100 and found.version.sources["faq"] == {"": pin["md5"]}
    write(here / "faq" / "chats.jsonl", range(101), "faq")
    with pytest.raises(DirtyData, match=r"Source 2 \(faq\): faq differs from the version that faq.dvc pins"):
        locate(mixed.data, HashMemo(None))


def test_parquet_and_sqlite_are_sources(here):
    pd.DataFrame({"prompt": ["p1", "p2"], "completion": ["a", "b"]}).to_parquet(here / "p.parquet")
    with closing(sqlite3.connect(here / "t.db")) as database:
        database.execute("CREATE TABLE chats (id INTEGER, prompt TEXT, completion TEXT, weight REAL)")
        database.executemany("INSERT INTO chats VALUES (?, ?, ?, ?)", [(n, f"q{n}", f"a{n}", n % 2) for n in range(6)])
        database.execute("CREATE TABLE others (x)")
        database.commit()
    (here / "t.db").with_name("u.sqlite").write_bytes((here / "t.db").read_bytes())
    found = Mixture(
        here / "out",
        recipe(
            {"source": "p.parquet", "split": "train"},
            {"source": "t.db", "query": "chats", "name": "table"},
        ),
    )
    assert found.report.sources["table"]["read"] == 6 and found.report.counts["marked_false"] == 3
    query = 'SELECT prompt AS question, completion AS "the answer" FROM chats WHERE id < 2 ORDER BY id DESC'
    columns = {"prompt": "question", "completion": "the answer"}
    rows = list(read_rows(here, ["t.db"], "auto", columns, query=query))
    assert [row.messages[0]["content"] for row in rows] == ["q1", "q0"] and rows[0].place == "t.db:row 1"
    for query, got in ((None, "the tables chats, others"), ("chat", "no table 'chat'"), ("SELECT x FROM y", "no such table: y"),
                       ("SELECT id, id FROM chats", "two columns id"), ("DROP TABLE chats", "no table 'DROP TABLE chats'"),
                       ("WITH a AS (SELECT 1) DELETE FROM chats", "readonly")):  # fmt: skip
        with pytest.raises(BadData) as caught:
            list(read_rows(here, ["t.db"], "auto", query=query))
        assert got in caught.value.got
    (here / "bad.db").write_text("no database" * 100)
    with pytest.raises(BadData, match="cannot be read"):
        list(read_rows(here, ["bad.db"], "auto"))


def test_a_database_whose_last_changes_are_not_in_its_file_is_refused(here):
    with closing(sqlite3.connect(here / "t.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE chats (prompt, completion)")
        database.commit()
        with pytest.raises(BadData, match=r"Source 1 \(t\): the database has changes that are not in its file yet"):
            locate(recipe({"source": "t.db"}).data, HashMemo(None))
        with pytest.raises(BadData, match="changes that are not in its file yet"):  # of a folder
            list(read_rows(here, ["t.db"], "auto"))


@pytest.mark.parametrize(
    ("sources", "data", "problem"),
    [
        ([{"source": "faq", "wieght": 1}], {}, "data.sources: source 1 (faq): wieght is not a key of a recipe; did you mean weight?"),
        ([{"source": "a"}, {"source": "b", "name": "faq", "weight": -1}], {}, "source 2 (faq): weight: should be greater than 0, not -1"),
        ([{"source": "faq", "weight": 101}], {}, "less than or equal to 100"),
        ([{"source": "faq", "weight": 0}], {}, "greater than 0"),
        ([{"source": "faq"}, {"source": "x", "split": "heldout", "weight": 2}], {}, "weight 2: held-out rows are scored once"),
        ([{"source": "faq", "rev": "v1"}], {}, "only a .dvc file has revisions"),
        ([{"source": "faq"}, {"source": "x/faq.jsonl"}], {}, "sources 1 and 2 are both named faq: set name"),
        ([{"source": "faq", "split": "heldout"}], {}, "no row is left to train on"),
        ([{"source": "faq", "split": "test"}], {}, "split"),
        ([{"source": "faq", "name": "../x"}], {}, "letters, digits"),
        ([{"source": "gs://bucket/x"}], {}, "gs:// is not read; pin it with `dvc import-url gs://bucket/x NAME`"),
        ([{"source": "faq"}], {"train": ["a*"], "columns": {"prompt": "q"}}, "columns, train: with sources, each source has its own"),
        ([{"source": "faq", "columns": {"question": "q"}}], {}, "question: should be one of messages"),
    ],
)  # fmt: skip
def test_a_wrong_source_is_named_before_anything_runs(sources, data, problem):
    text = json.dumps({"name": "r", "base": {"model": "m"}, "data": {"sources": sources, **data}}, indent=1)
    with pytest.raises(BadConfig) as caught:
        parse_recipe(text, name="r.yaml")
    assert problem in str(caught.value)


def test_a_refused_url_is_shown_without_its_password():
    source = {"source": "https://me:secret-word@host/chats.jsonl"}
    with pytest.raises(BadConfig) as caught:
        parse_recipe(json.dumps({"name": "r", "base": {"model": "m"}, "data": {"sources": [source]}}), name="r.yaml")
    assert "dvc import-url 'https://***@host/chats.jsonl' NAME" in str(caught.value)
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "kind", "problem"),
    [
        ([{"source": "faq"}, {"source": "nothing"}], BadData, r"Source 2 \(nothing\): The dataset does not exist"),
        ([{"source": "faq/*.csv"}], BadData, r"Source 1 \(faq\): no file has a name of this pattern"),
        ([{"source": "faq"}, {"source": "faq/", "name": "again"}], BadData, r"Source 2 \(again\) and source 1"),
        ([{"source": "faq"}, {"source": "copy.jsonl"}], BadData, "The sources faq and copy have the same file"),
        ([{"source": "faq"}, {"source": "empty.jsonl"}], BadData, r"Source 2 \(empty\) gives no rows"),
        ([{"source": "faq"}, {"source": "general"}], LimitExceeded, r"400 of 400 rows of source 2 \(general\) are malformed"),
        ([{"source": "faq", "files": ["train*"]}], BadData, r"Source 1 \(faq\): No file of the dataset has this name"),
    ],
)  # fmt: skip
def test_a_source_that_gives_nothing_or_the_same_twice_is_named_with_its_number(here, sources, kind, problem):
    (here / "copy.jsonl").write_bytes((here / "faq" / "chats.jsonl").read_bytes())
    (here / "empty.jsonl").write_text("")
    with pytest.raises(kind, match=problem):
        Mixture(here / "out", recipe(*sources))


def test_a_changed_weight_is_another_fingerprint_and_a_recipe_without_sources_has_no_key_for_them(here):
    one, other = (
        CheckDatasetConfig.from_recipe(recipe({"source": "faq", "weight": weight}), Outside()).identity()
        for weight in (1, 2)
    )
    assert one["sources"] == [{"name": "faq"}] and other["sources"] == [{"name": "faq", "weight": 2.0}]
    plain = Recipe.model_validate({"name": "r", "base": {"model": "m"}})
    assert "sources" not in CheckDatasetConfig.from_recipe(plain, Outside()).identity()


@pytest.mark.parametrize("pinned_first", [False, True])
def test_rows_of_a_source_for_training_are_not_held_out_though_they_are_near_to_held_out_rows(here, pinned_first):
    """With near_duplicates: drop, a row goes to the side of its neighbours, but not if its source is pinned."""
    for name in ("a", "b"):
        rows = [
            {"prompt": f"How do I change the number of my account {n}, today?", "completion": name} for n in "123456789"
        ]
        rows += [{"prompt": f"{name} {n * 7919} {n * 104729}?", "completion": name} for n in range(1, 30)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"source": "a.jsonl", "split": "train"}, {"source": "b.jsonl"}]
    found = Mixture(
        here / "out", recipe(*sources[:: 1 if pinned_first else -1], heldout_fraction=0.3, near_duplicates="drop")
    )
    assert found.names("heldout")["a"] == 0 and found.names("heldout")["b"] > 0


def test_parts_by_a_field_of_a_database_are_those_of_its_query(here):
    with closing(sqlite3.connect(here / "faq.db")) as db:
        db.execute("CREATE TABLE faq (prompt, completion, language)")
        db.executemany(
            "INSERT INTO faq VALUES (?, ?, ?)", [(f"q{n}", "a", "de" if n < 20 else "en") for n in range(40)]
        )
        db.execute("CREATE TABLE other (x)")
        db.commit()
    settings = recipe({"source": "faq.db", "query": "SELECT * FROM faq ORDER BY prompt DESC"}, heldout_fraction=0.5)
    settings = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"slices": ["language"]})}
    )
    found = Mixture(here / "out", settings)
    heldout = [json.loads(line) for line in (found.out / "heldout.jsonl").open()]
    fields = {row["id"]: row["language"] for row in map(json.loads, (found.out / "heldout_fields.jsonl").open())}
    expected = {row["id"]: "de" if int(row["messages"][-2]["content"][1:]) < 20 else "en" for row in heldout}
    assert fields == expected and len(set(expected.values())) == 2


def test_two_queries_of_one_database_are_two_sources_and_the_same_query_twice_is_refused(here):
    with closing(sqlite3.connect(here / "faq.db")) as db:
        for table in ("tea", "rice"):
            db.execute(f"CREATE TABLE {table} (prompt, completion)")
            db.executemany(f"INSERT INTO {table} VALUES (?, 'a')", [(f"{table} {n}",) for n in range(20)])
        db.commit()
    tea = {"source": "faq.db", "name": "tea", "query": "tea"}
    rice = {"source": "faq.db", "name": "rice", "query": "SELECT * FROM rice"}
    found = Mixture(here / "out", recipe(tea, rice, heldout_fraction=0.5))
    assert found.report.sources["tea"]["read"] == found.report.sources["rice"]["read"] == 20
    with pytest.raises(BadData, match="have the same file"):
        Mixture(here / "same", recipe(rice, {**rice, "name": "again", "query": " SELECT *  FROM rice; "}))


def test_sources_that_are_all_for_training_are_refused_before_anything_runs():
    sources = [{"source": "faq", "split": "train"}, {"source": "general", "split": "train"}]
    text = json.dumps({"name": "r", "base": {"model": "m"}, "data": {"sources": sources}}, indent=1)
    with pytest.raises(BadConfig, match="no row can be held out for the gate; remove split from a source"):
        parse_recipe(text, name="r.yaml")


@pytest.mark.parametrize("name", ["chats[1].jsonl", "what?.jsonl", "a*b.jsonl"])
def test_a_file_whose_name_looks_like_a_pattern_is_a_file(here, name):
    write(here / name, range(40), "q")
    write(here / "chats1.jsonl", range(100, 110), "no")
    found = Mixture(here / "out", recipe({"source": name, "name": "x"}, heldout_fraction=0.5))
    assert found.report.sources["x"]["read"] == 40 and all(f"x/{name}:" in place for place in found.places("train"))


def test_checks_of_texts_leave_out_the_rows_that_they_name_if_a_source_uses_a_share_of_its_rows(here):
    rows = [{"prompt": f"q {n}", "completion": f"Ã© {n}" if n % 7 == 0 else f"answer {n}"} for n in range(200)]
    (here / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    profile = {"broken_text": {"action": "quarantine"}}
    source = {"source": "x.jsonl", "weight": 0.5, "limit": 150}
    found = Mixture(here / "out", recipe(source, heldout_fraction=0.1, profile=profile))
    plain = Mixture(here / "plain", recipe(source, heldout_fraction=0.1))
    broken = {f"x/x.jsonl:{n + 1}" for n in range(0, 200, 7)}
    assert set(found.places("train")) == set(plain.places("train")) - broken
    assert len(set(plain.places("train")) & broken) > 3 and found.places("heldout") == plain.places("heldout")


def test_the_sample_of_limit_depends_on_the_seed_if_files_are_held_out(here):
    def fields(**data):
        settings = {"limit": 3, "heldout": ["test*"], "train": ["train*"], **data}
        return CheckDatasetConfig.from_recipe(
            Recipe.model_validate({"name": "r", "base": {"model": "m"}, "data": settings}), Outside()
        ).identity()

    assert fields(seed=1)["seed"] == 1
    assert "seed" not in fields() and "seed" not in fields(seed=1, limit=None)  # fingerprints of before stay


@pytest.mark.parametrize("is_source", [True, False])
def test_a_source_or_dataset_ignores_the_keys_that_its_recipe_names(here, is_source):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "quality": "bad"} for n in range(20)]
    (here / "faq" / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"source": "faq"} if is_source else {"source": "faq", "train": ["chats.jsonl"]}

    def of(**settings) -> Recipe:
        return recipe({**where, **settings}) if is_source else recipe(**where, **settings)

    with pytest.raises(LimitExceeded, match="20 of 20 rows"):
        Mixture(here / "refused", of())
    found = Mixture(here / "out", of(ignore=["quality"]))
    assert len(found.places("train")) + len(found.places("heldout")) == 20
    assert "quality" not in found.report.unread and '"ignore":["quality"]' in json.dumps(
        found.config.identity(), separators=(",", ":")
    )
    unset = CheckDatasetConfig.from_recipe(of(), Outside(dataset=locate(of().data, HashMemo(None))))
    assert "ignore" not in json.dumps(unset.identity())
    with pytest.raises(ValueError, match="ignore: answer is named in columns"):
        of(columns={"completion": "answer"}, ignore=["answer"])


def test_the_same_rows_in_any_kind_of_file_give_the_same_mixture(here):
    """Columns, marks and an ignored key of one source say nothing about another one."""
    rows = [{"frage": f"q{n}?", "antwort": f"a{n}", "korrekt": n % 3 != 1, "label": n % 2 == 0} for n in range(30)]
    chats = [{"messages": [{"role": "user", "content": f"r{n}?"}, {"role": "assistant", "content": f"b{n}"}], "label": n % 2 == 0}
             for n in range(30)]  # fmt: skip
    table = pd.DataFrame(rows)
    table.to_csv(here / "c.csv", index=False)
    table.to_parquet(here / "p.parquet")
    table.to_json(here / "j.json", orient="records")
    with closing(sqlite3.connect(here / "d.db")) as database:
        table.to_sql("t", database, index=False)
    (here / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    columns = {"prompt": "frage", "completion": "antwort", "train": "korrekt"}
    found = []
    for name in ("c.csv", "p.parquet", "j.json", "d.db"):
        table_source = {"source": name, "name": "x", "columns": columns, "ignore": ["label"]}
        mixture = Mixture(here / f"out-{name}", recipe(table_source, {"source": "chats.jsonl"}))
        found.append({
            split: sorted(json.loads(line)["messages"][1]["content"] for line in (mixture.out / f"{split}.jsonl").open())
            for split in ("train", "heldout")
        })  # fmt: skip
    answers = {f"a{n}" for n in range(30) if n % 3 != 1} | {f"b{n}" for n in range(0, 30, 2)}
    assert all(other == found[0] for other in found) and answers == {*found[0]["train"], *found[0]["heldout"]}
