import json, random, time, unicodedata, os
from types import SimpleNamespace
import pandas as pd, pytest
from loraflow import identity
from loraflow.config import load_recipe
from loraflow.execution.workspace import Workspace
from loraflow.tasks.gate import gate
from tests.unit.test_gate_year import Project, commit, check_budget
import tests.unit.test_gate_year as Y


class More(Project):
    groups = 0
    seeds = 1
    form = 0

    def do_groups(self):
        self.groups = self.rng.choice([0, 25, 30])

    def do_seeds(self):
        self.settings["gate.seeds"] = self.rng.choice([1, 2, 3])

    def do_rename_recipe(self):
        self.settings["name"] = f"r{self.rng.randrange(9)}"

    def do_metrics(self):
        self.settings["evaluation.metrics"] = self.rng.choice(
            [["exact_match", "token_f1"], ["token_f1", "exact_match"], ["exact_match", "token_f1", "chrf"]]
        )

    def do_reencode(self):
        f = self.rng.choice(
            [
                lambda t: unicodedata.normalize("NFD", t),
                lambda t: t.replace(" ", "\u00a0"),
                lambda t: t + "\r\n",
                lambda t: t.replace("q", "\uff51"),
            ]
        )
        self.texts = [f(t) for t in self.texts]

    def scores(self, workspace, model, share, settle=""):
        chats = [json.dumps([{"role": "user", "content": t}]) for t in self.texts]
        key = lambda t: " ".join(unicodedata.normalize("NFKC", t).casefold().split())
        right = [float(random.Random(f"{model} {key(t)}").random() < share) for t in self.texts]
        rows = {"id": [f"{self.ids}-{i}" for i in range(len(chats))], "set": self.set, "prompt": chats}
        if self.groups:
            rows["group"] = [f"g{i % self.groups}" for i in range(len(chats))]
        table = pd.DataFrame(rows | {"exact_match": right, "token_f1": right})
        payload = identity.payload("evaluate", 1, {"model": model, "rows": f"{self.ids} {self.groups} {chats}"}, {})
        return commit(workspace, "evaluate", payload, "scores.parquet", table)

    def result(self, ws, challenger, share):
        champion = ws.champion()
        merged = commit(ws, "merge", identity.payload("merge", 1, {}, {"x": challenger}), "model", challenger)
        further = tuple(
            SimpleNamespace(seed=s, scores=self.scores(ws, f"{challenger} seed {s}", share))
            for s in ws.recipe.seeds[1:]
        )
        return SimpleNamespace(
            merged=merged,
            base_scores=self.scores(ws, self.base, 0.5),
            tuned_scores=self.scores(ws, challenger, share),
            champion_scores=champion and self.scores(ws, f"champion {champion.digest}", 0.5),
            further_seeds=further,
            general={},
        )

    def register(self, ws, r, d):
        if d.verdict == "promote":
            try:
                ws.log.append(
                    ws.seen_head,
                    action="promote",
                    merged=r.merged,
                    adapter=None,
                    inputs={"look": str(d.look)},
                    reasons=[],
                    actor="x",
                )
            except Exception as e:
                return type(e).__name__

    def compare(self, challenger, share):
        ws = Workspace(load_recipe(self.recipe, self.settings))
        r = self.result(ws, challenger, share)
        d = gate.fn(ws, r)
        self.register(ws, r, d)
        return d, ws


def test_year(recipe):
    end = time.time() + float(os.environ["SECONDS_"])
    seed = int(os.environ.get("SEED", "100"))
    done = 0
    kinds = {}
    base = recipe
    import tempfile, shutil

    while time.time() < end:
        p = More(recipe, seed)
        p.settings["register.model"] = f"m{seed}"
        scored = set()
        better = set()
        n = 0
        key = lambda t: " ".join(unicodedata.normalize("NFKC", t).casefold().split())
        for night in range(25):
            p.change()
            share = 0.97 if p.rng.random() < 0.15 else 0.5
            rows = {key(t) for t in p.texts}
            pair = p.rng.random() < 0.3
            wss = [Workspace(load_recipe(p.recipe, p.settings)) for _ in range(2 if pair else 1)]
            rs = [p.result(w, f"model {night} {i}", share) for i, w in enumerate(wss)]
            ds = [gate.fn(w, r) for w, r in zip(wss, rs)]
            for i, (w, r, d) in enumerate(zip(wss, rs, ds)):
                e = p.register(w, r, d)
                kinds[d.verdict + (e or "")] = kinds.get(d.verdict + (e or ""), 0) + 1
                if d.look is None:
                    kinds["nolook " + d.budget[:60]] = kinds.get("nolook " + d.budget[:60], 0) + 1
                    assert d.verdict != "promote"
                    continue
                n += 1
                look = w.looks.entries()[d.look - 1]
                if share > 0.9:
                    better.add(d.look)
                assert look.fresh == len(rows - scored), (seed, night, look.fresh, len(rows - scored))
                scored |= rows
                g = [c for c in d.comparisons if c.kind == "gain"]
                assert g and all(c.level == look.level for c in g)
                if d.verdict == "promote":
                    assert all(c.p_value <= look.level and c.difference > 0 for c in g)
        Y.NIGHTS = n
        check_budget(wss[0].looks.entries(), better)
        seed += 1
        done += 1
    print("YEARS", done, kinds)
