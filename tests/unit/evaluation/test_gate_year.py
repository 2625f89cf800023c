"""A year of nights through the gate's task, with a real promotion log and record of looks, while people change everything.

The oracle is the budget: whatever is changed in between, the levels of the looks whose challengers were not better add up to
at most the largest `gate.error` of their period, and a period begins with rows that no look used.
"""

import json
import random
import unicodedata
from contextlib import suppress
from types import SimpleNamespace

import pandas as pd
import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.execution.workspace import Workspace
from loraflow.registry.budget import gains_to_follow, near_gains
from loraflow.registry.log import HeadChanged
from loraflow.store import Summary
from loraflow.tasks.gate import gate

NIGHTS = 15


class Project:
    """Held-out rows, settings and the models of a project; each method named `do_` is a change that a person makes."""

    def __init__(self, recipe, seed):
        self.recipe, self.rng, self.night = recipe, random.Random(seed), 0
        self.settings = {"gate.looks": self.rng.choice([5, 12]), "evaluation.metrics": ["exact_match", "token_f1"]}
        self.settings |= {"gate.primary": "exact_match", "gate.guards": {}, "gate.error": 0.05, "gate.worst": {}}
        self.texts, self.removed, self.ids, self.base, self.set, self.written = [], [], 0, "base", "heldout", 0
        self.groups = 0
        self.texts = self.new_texts(60)

    def new_texts(self, count):
        self.written += count
        return [f"question {number}" for number in range(self.written - count, self.written)]

    def do_append(self):
        self.texts += self.new_texts(5)

    def do_replace(self):
        """The ids stay, with other texts."""
        self.removed, self.texts = self.texts, self.new_texts(60)

    def do_reorder(self):
        self.rng.shuffle(self.texts)

    def do_rename_ids(self):
        self.ids += 1

    def do_rewrite(self):
        """Case, white space and the encoding of a character make no new row."""
        upper = [f"  {text.upper()} " for text in self.texts]
        other = [unicodedata.normalize("NFD", text).replace("q", "\uff51") + "\u00a0\r\n" for text in self.texts]
        self.texts = self.rng.choice([upper, other])

    def do_change_groups(self):
        self.groups = self.rng.choice([0, 30])

    def do_change_number_of_seeds(self):
        self.settings["gate.seeds"] = self.rng.choice([1, 3])

    def do_rename_recipe(self):
        """Another recipe of the same model, with the same held-out rows."""
        self.settings["name"] = f"recipe-{self.rng.randrange(100)}"

    def do_shrink(self):
        self.removed += self.texts[30:]
        self.texts = self.texts[:30]

    def do_grow_again(self):
        known = set(map(plain, self.texts))
        self.texts += [text for text in self.removed if plain(text) not in known]
        self.removed = []

    def do_change_base(self):
        self.base += "x"

    def do_change_primary(self):
        self.settings["gate.primary"] = self.rng.choice(["exact_match", "token_f1"])

    def do_change_margin(self):
        self.settings["gate.guards"] = {"exact_match": self.rng.choice([0.3, 0.5, 0.7])}

    def do_add_rule(self):
        self.settings["gate.worst"] = {"token_f1": {"drop": 1.0, "share": self.rng.choice([0.8, 0.9])}}

    def do_change_error(self):
        self.settings["gate.error"] = self.rng.choice([0.01, 0.05, 0.2])

    def do_change_looks(self):
        self.settings["gate.looks"] = self.rng.choice([3, 5, 12, 365])

    def do_change_independence(self):
        """The rows of these models are drawn independently for each row, so whatever the recipe says is true."""
        self.settings["gate.independent_rows"] = self.rng.random() < 0.5

    def do_change_seeds(self):
        self.settings["training_config.seed"] = self.rng.randrange(100)

    def do_rollback(self):
        log = Workspace(load_recipe(self.recipe, self.settings)).log
        if sum(entry.action == "promote" for entry in log.entries()) > 1 and log.entries()[-1].action == "promote":
            log.rollback("by hand", "x")

    def change(self):
        """Change nothing, or up to three things."""
        changes = sorted(name for name in dir(self) if name.startswith("do_"))
        for name in self.rng.sample(changes, self.rng.randrange(4)):
            getattr(self, name)()

    def scores(self, workspace, model, share):
        """Commit the scores of a model that answers this share of the rows right."""
        chats = [json.dumps([{"role": "user", "content": text}]) for text in self.texts]
        right = [float(random.Random(f"{model} {plain(text)}").random() < share) for text in self.texts]
        rows = {"id": [f"{self.ids}-{i}" for i in range(len(chats))], "set": self.set, "prompt": chats}
        rows |= {"group": [f"group {i % self.groups}" for i in range(len(chats))]} if self.groups else {}
        table = pd.DataFrame(rows | {"exact_match": right, "token_f1": right})
        payload = identity.payload("evaluate", 1, {"model": model, "rows": f"{self.ids} {self.groups} {chats}"}, {})
        return commit(workspace, "evaluate", payload, "scores.parquet", table)

    def compare(self, challenger, share):
        """Run the gate, and register what it promotes."""
        return self.compare_at_once([challenger], share)[0]

    def compare_at_once(self, challengers, share):
        """Run the gate for several challengers, of which none knows the others, then register what each promotes."""
        nights = []
        for challenger in challengers:
            workspace = Workspace(load_recipe(self.recipe, self.settings))
            nights.append((workspace, self.result(workspace, challenger, share)))
        decided = [(gate.fn(workspace, result), workspace) for workspace, result in nights]
        for (decision, workspace), (_, result) in zip(decided, nights, strict=True):
            if decision.verdict == "promote":
                inputs = {"look": str(decision.look)}
                with suppress(HeadChanged):  # another one was promoted in between
                    workspace.log.append(
                        workspace.seen_head,
                        action="promote",
                        merged=result.merged,
                        adapter=None,
                        inputs=inputs,
                        reasons=[],
                        actor="x",
                    )
        return decided

    def result(self, workspace, challenger, share):
        champion = workspace.champion()
        seeds = workspace.recipe.seeds[1:]
        further = [SimpleNamespace(seed=n, scores=self.scores(workspace, f"{challenger}, {n}", share)) for n in seeds]
        return SimpleNamespace(
            merged=commit(workspace, "merge", identity.payload("merge", 1, {}, {"x": challenger}), "model", challenger),
            base_scores=self.scores(workspace, self.base, 0.5),
            tuned_scores=self.scores(workspace, challenger, share),
            champion_scores=champion and self.scores(workspace, f"champion {champion.digest}", 0.5),
            further_seeds=tuple(further),
            general={},
        )


def plain(text):
    """Return what a question is known by."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def commit(workspace, stage, payload, name, content):
    found = workspace.store.find(stage, identity.fingerprint(payload))
    if found is not None:
        return found
    staged = workspace.store.staging(stage, identity.fingerprint(payload))
    if isinstance(content, str):
        (staged / name).write_text(content)
    else:
        content.to_parquet(staged / name, index=False)
    return workspace.store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})


@pytest.mark.parametrize("seed", range(2))
def test_no_change_of_rows_rules_or_models_gives_more_error_than_the_recipe_says(recipe, seed):
    project, scored, better = Project(recipe, seed), set(), set()
    for night in range(NIGHTS):
        project.change()
        name, share = f"model {night}", 0.97 if project.rng.random() < 0.15 else 0.5
        names = [name, f"{name} of another machine"] if night % 6 == 5 else [name]
        decided = project.compare_at_once(names, share)
        workspace = decided[-1][1]
        rows, looks = set(map(plain, project.texts)), workspace.looks.entries()
        for (decision, _), look in zip(decided, looks[-len(names) :], strict=True):
            assert look.seq == decision.look, "each comparison uses a look"
            assert look.fresh == len(rows - scored), "rows are known by their question, whatever else is changed"
            scored |= rows
            if share > 0.9:
                better.add(decision.look)
            gains = [comparison for comparison in decision.comparisons if comparison.kind == "gain"]
            assert gains and all(one.level == look.level for one in gains)
            if decision.verdict == "promote":
                assert all(one.p_value <= look.level and one.difference > 0 for one in gains)
        if night % 3 == 0 and decision.verdict != "promote":
            again, _ = project.compare(name, share)
            assert again.verdict == "unchanged" and len(workspace.looks.entries()) == look.seq, "and no more than one"
    check_budget(workspace.looks.entries(), better)


def check_budget(looks, better):
    periods = {}
    for look in looks:
        periods.setdefault(look.period, []).append(look)
    for number, period in periods.items():
        error = max(look.error for look in period)
        assert sum(look.level for look in period if look.seq not in better) <= error * (1 + 1e-9)
        assert number == 1 or len(periods[number - 1]) >= max(one.horizon for one in periods[number - 1] if one.spent)
    assert len(looks) == NIGHTS + NIGHTS // 6


def test_a_nearly_shown_gain_raises_the_level_of_the_next_looks_at_fresh_rows(recipe):
    project = Project(recipe, 0)
    project.settings |= {"gate.looks": 5, "gate.independent_rows": True}
    decision, workspace = project.compare("near", 0.68)
    gain = decision.comparisons[0]
    assert decision.verdict == "undecided" and 0.025 < gain.p_value <= 1 / 5
    looks = workspace.looks.entries()
    assert near_gains(workspace.log, looks) == {1}
    again, _ = project.compare("at rows that were scored", 0.5)
    assert workspace.looks.entries()[-1].following is None and "almost confirmed" not in again.budget
    assert again.budget.endswith("of this model, if each run's new rows are independent of earlier ones.")
    project.do_replace()
    followed, _ = project.compare("at fresh rows", 0.5)
    look = workspace.looks.entries()[-1]
    assert look.following == pytest.approx(0.0015) and look.level == pytest.approx(0.019 / 4 + 0.0015)
    assert "Its level includes an extra 0.0015, because an earlier look almost confirmed a gain." in followed.budget
    del project.settings["gate.independent_rows"]
    project.do_append()
    later, _ = project.compare("without the key", 0.5)
    assert "if each run's new rows are independent of earlier ones" in later.budget, "a look before had more"
    for name in workspace.store.documents(f"{workspace.log.folder}/decisions/"):
        workspace.store.write_document(name, b"{}")
    assert near_gains(workspace.log, looks) == set(), "a damaged decision gives nothing"


def test_without_the_recipes_word_or_with_groups_no_look_follows_a_nearly_shown_gain(recipe):
    project = Project(recipe, 0)
    project.settings["gate.looks"] = 5
    decision, _ = project.compare("near", 0.68)
    assert decision.budget.endswith("of this model, whatever its held-out rows.")
    project.do_replace()
    _, workspace = project.compare("at fresh rows", 0.5)
    look = workspace.looks.entries()[-1]
    assert look.following is None and look.level == pytest.approx(0.025 / 4) and look.fresh == 60
    log, looks = workspace.log, workspace.looks.entries()[:1]
    assert gains_to_follow(log, looks, [None, None], independent=False) is None
    assert gains_to_follow(log, looks, [None, None], independent=True) == {1}
    assert gains_to_follow(log, looks, [None, "user 7"], independent=True) == set(), (
        "an earlier look may have had user 7"
    )
