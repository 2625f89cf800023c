"""The store and the promotion log against dictionaries: any order of writes, crashes, damage, cleanups and promotions.

The store holds what the dictionaries say, after every step. A crash leaves the old state or the new one. Damage is noticed
where it is documented to be noticed, and a champion to which the log can return is never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loraflow import identity
from loraflow.failures import CorruptArtifact, DamagedLog, Failure
from loraflow.registry import PromotionLog
from loraflow.registry.champions import choose_intact
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.entry import active_promotions
from loraflow.registry.log import HeadChanged
from loraflow.store import LocalStore, Ref, Summary
from tests.crash import Crash, crash_at

KEYS, CONTENTS = st.integers(0, 2), st.sampled_from("ab")
HANDLES = st.sampled_from([0, 1])
HARMS = st.sampled_from(["flip", "truncate", "delete", "manifest", "truncated manifest", "pointer", "broken pointer"])


def payload(key):
    return identity.payload("merge", 1, {}, {"x": key})


def fingerprint(key):
    return identity.fingerprint(payload(key))


class SteadyStore(LocalStore):
    """A store whose cleanup does not depend on which of two commits fell into the same tick of the clock.

    Hypothesis repeats orders of steps, and a step must then do the same again.
    """

    def committed_at(self, ref):
        return float(int(ref.digest[:8], 16))


class StoreAndLog(RuleBasedStateMachine):
    """`artifacts` is what is on the disk, `current` what the pointers name, `entries` what the log says."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="states-"))
        self.artifacts: dict[tuple[int, str], str] = {}  # (key, digest) → intact, flipped (only hashes show it) or torn
        self.current: dict[int, str] = {}  # key → digest
        self.broken: set[int] = set()  # keys whose pointer cannot be read: none of their manifests can be checked
        self.entries: list[str] = []  # digests of the champions, in the order of the log
        self.active: list[tuple[int, str]] = []  # (key, digest) of the champion and its rollback targets
        self.reopen()

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(key=KEYS, content=CONTENTS)
    def first(self, key, content):
        self.put(key, content, False, 0)

    @rule()
    def reopen(self):
        self.stores = [SteadyStore(self.folder / "store") for _ in range(2)]
        self.logs = [PromotionLog(store, "tickets") for store in self.stores]

    # the store

    def _stage(self, key, content, handle):
        store = self.stores[handle]
        staged = store.staging("merge", fingerprint(key))
        (staged / "weights").write_text(f"{content} of {key}")
        return store, staged

    def _commit(self, key, content, replace, handle):
        store, staged = self._stage(key, content, handle)
        with store.lock("merge", fingerprint(key)):
            return store.commit(
                staged, payload=payload(key), inputs={}, summary=Summary(), provenance={}, replace=replace
            )

    def _found(self, key):
        """Return the digest that a lookup finds: the current one, unless names or sizes show that it is damaged."""
        digest = self.current.get(key)
        return digest if self.artifacts.get((key, digest)) in ("intact", "flipped") else None

    def _state(self, key, digest):
        """Return what a check of an artifact shows."""
        return "torn" if key in self.broken else self.artifacts.get((key, digest))

    def _digest(self, key, content):
        return identity.digest({"weights": hashlib.sha256(f"{content} of {key}".encode()).hexdigest()})

    def _after_commit(self, key, content, replace):
        digest, found = self._digest(key, content), self._found(key)
        keeps = found is not None and (not replace or found == digest)
        if not keeps or self.artifacts[key, found] != "intact":
            self.artifacts[key, digest] = "intact"
            self.current[key] = digest
            self.broken.discard(key)
        return self.current[key]

    @rule(key=KEYS, content=CONTENTS, replace=st.booleans(), handle=HANDLES)
    def put(self, key, content, replace, handle):
        with crash_at(None):
            ref = self._commit(key, content, replace, handle)
        assert ref.digest == self._after_commit(key, content, replace)

    @rule(key=KEYS, content=CONTENTS, replace=st.booleans(), step=st.integers(0, 30))
    def put_and_crash(self, key, content, replace, step):
        digest, before = self._digest(key, content), self._found(key)
        was = self._state(key, digest)
        try:
            with crash_at(step):
                self._commit(key, content, replace, 0)
        except Crash:
            self.reopen()
            found = self.stores[0].find("merge", fingerprint(key))
            after = found.digest if found else None
            if after == digest != before:
                self._after_commit(key, content, replace)
            else:
                # A damaged artifact is moved to the quarantine before the same content takes its place.
                is_moved = after is None and digest == before and was == "flipped"
                assert after == before or is_moved, "neither the old state nor the new one"
                folder = self.folder / "store" / "merge" / fingerprint(key) / digest
                if was != "intact":  # a damaged one may be quarantined by now, and the new one be in its place
                    self._look_at(key, digest)
                else:
                    assert folder.exists(), "an intact artifact was moved away"
        else:
            self._after_commit(key, content, replace)

    def _look_at(self, key, digest):
        store = self.stores[0]
        ref = Ref(stage="merge", fingerprint=fingerprint(key), digest=digest, uri=store.uri)
        pointer = self._path(key, digest).parent / "current.json"
        if key in self.broken:
            pointer.unlink()
        if not (Path(store.location(ref)) / "manifest.json").exists() and not Path(store.location(ref)).exists():
            self.artifacts.pop((key, digest), None)
        else:
            self.artifacts[key, digest] = "torn" if store.check(ref) else "flipped" if store.verify(ref) else "intact"
        if key in self.broken:
            pointer.write_text("{")

    @rule(key=KEYS, contents=st.tuples(CONTENTS, CONTENTS))
    def put_twice_at_once(self, key, contents):
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._commit, key, content, False, handle) for handle, content in enumerate(contents)]
            digests = {job.result().digest for job in jobs}
        assert len(digests) == 1, "both agree on one artifact"
        [digest] = digests
        found = self._found(key)
        is_kept = found is not None and self.artifacts[key, found] == "intact"
        assert digest == found if is_kept else digest in {self._digest(key, content) for content in contents}
        self.artifacts[key, digest] = "intact"
        self.current[key] = digest
        self.broken.discard(key)
        if not is_kept and contents[0] != contents[1]:  # go on from one state, whichever of the two was first
            for content in (*contents, contents[0]):
                self.put(key, content, True, 0)

    @precondition(lambda self: self.artifacts)
    @rule(data=st.data(), harm=HARMS)
    def damage(self, data, harm):
        key, digest = data.draw(st.sampled_from(sorted(self.artifacts)))
        home = self.folder / "store" / "merge" / fingerprint(key)
        weights, manifest = home / digest / "weights", home / digest / "manifest.json"
        if harm == "pointer":
            (home / "current.json").unlink(missing_ok=True)
            self.current.pop(key, None)
            self.broken.discard(key)
        elif harm == "broken pointer":
            (home / "current.json").write_text("{")
            self.broken.add(key)
            self.current.pop(key, None)
        elif self.artifacts[key, digest] != "intact":
            return
        elif harm == "flip":
            weights.write_text(weights.read_text().replace("of", "oF"))
            self.artifacts[key, digest] = "flipped"
        else:
            if harm == "truncate":
                weights.write_text("")
            elif harm == "delete":
                weights.unlink()
            else:
                manifest.write_text(manifest.read_text()[:-20] if "truncated" in harm else "")
            self.artifacts[key, digest] = "torn"

    @rule(handle=HANDLES)
    def verify_and_quarantine(self, handle):
        store = self.stores[handle]
        by_name = {(fingerprint(key), digest): (key, digest) for key, digest in self.artifacts}
        seen = set()
        for ref in list(store.artifacts()):
            name = by_name[ref.fingerprint, ref.digest]
            seen.add(name)
            problems = store.verify(ref)
            assert bool(problems) == (self._state(*name) != "intact")
            if problems:
                store.quarantine(ref, problems)
                del self.artifacts[name]
        assert seen >= set(self.artifacts)

    @rule(keep=st.integers(0, 2), keep_champions=st.integers(2, 3), step=st.none() | st.integers(0, 12))
    def clean_up(self, keep, keep_champions, step):
        protected = set(self.active[-keep_champions:])
        found = {key: self._found(key) for key in range(3)}
        try:
            with crash_at(step):
                list(remove_unused(self.stores[0], keep=keep, keep_champions=keep_champions))
        except Crash:
            self.reopen()
        gone = {name for name in self.artifacts if not self._path(*name).exists()}
        assert not {digest for _, digest in gone} & {digest for _, digest in protected}, "a champion was removed"
        kept = [key for key, digest in found.items() if digest and (key, digest) not in gone]
        assert len(kept) >= min(keep, sum(map(bool, found.values()))), "more was removed than asked for"
        for name in gone:
            del self.artifacts[name]

    def _path(self, key, digest):
        return self.folder / "store" / "merge" / fingerprint(key) / digest

    # the log

    def _append(self, handle, ref, seen):
        return self.logs[handle].append(
            seen, action="promote", merged=ref, adapter=None, inputs={}, reasons=[], actor="me"
        )

    def _after_promotion(self, key, digest):
        self.entries.append(digest)
        if not self.active or self.active[-1][1] != digest:
            self.active.append((key, digest))

    @precondition(lambda self: any(self._found(key) for key in range(3)))
    @rule(data=st.data(), handle=HANDLES, step=st.none() | st.integers(0, 14))
    def promote(self, data, handle, step):
        key = data.draw(st.sampled_from([key for key in range(3) if self._found(key)]))
        ref = self.stores[handle].find("merge", fingerprint(key))
        seen = self.logs[handle].head()
        try:
            with crash_at(step):
                self._append(handle, ref, seen)
        except Crash:
            self.reopen()
            if len(self.logs[0].entries()) == len(self.entries):
                return
        self._after_promotion(key, ref.digest)

    @precondition(lambda self: any(self._found(key) for key in range(3)))
    @rule(data=st.data())
    def promote_twice_at_once(self, data):
        key = data.draw(st.sampled_from([key for key in range(3) if self._found(key)]))
        ref = self.stores[0].find("merge", fingerprint(key))
        seen = self.logs[0].head()

        def attempt(handle):
            try:
                self._append(handle, ref, seen)
            except HeadChanged:
                return 0
            return 1

        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(attempt, range(2))) == 1
        self._after_promotion(key, ref.digest)

    @rule(handle=HANDLES, step=st.none() | st.integers(0, 14))
    def roll_back(self, handle, step):
        log, store = self.logs[handle], self.stores[handle]
        try:
            with crash_at(step):
                log.rollback("bad", "me", lambda targets: choose_intact(store, targets))
        except Crash:
            self.reopen()
            for name in [name for name in self.artifacts if not self._path(*name).exists()]:
                assert self._state(*name) != "intact", "only damaged artifacts are quarantined"
                del self.artifacts[name]
            if len(self.logs[0].entries()) == len(self.entries):
                return
        except CorruptArtifact:
            target = self.active[-2]
            assert self._state(*target) != "intact"
            if not self._path(*target).exists():
                self.artifacts.pop(target, None)
            return
        except Failure:
            assert len(self.active) < 2
            return
        assert self._state(*self.active[-2]) == "intact"
        del self.active[-1]
        self.entries.append(self.active[-1][1])

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), harm=st.sampled_from(["delete", "truncate", "edit", "all"]))
    def damage_the_log_and_restore_it(self, data, harm):
        folder = self.folder / "store" / "registry" / "tickets" / "log"
        number = data.draw(st.integers(1, len(self.entries)))
        anchor = self.folder / "store" / "anchors" / "tickets" / "head.json"
        if number > json.loads(anchor.read_bytes())["seq"] if anchor.exists() else True:
            return  # a crash left the anchor behind, and the log alone cannot show that this entry is missing
        backup = {path: path.read_bytes() for path in folder.iterdir()}
        path = folder / f"{number:06d}.json"
        if harm == "delete":
            path.unlink()
        elif harm == "truncate":
            path.write_bytes(path.read_bytes()[:50])
        elif harm == "edit":
            path.write_bytes(path.read_bytes().replace(b'"actor": "me"', b'"actor": "you"'))
        else:
            shutil.rmtree(folder)
        for use in (self.logs[0].head, lambda: list(remove_unused(self.stores[0], keep=0))):
            with pytest.raises(DamagedLog):
                use()
        folder.mkdir(exist_ok=True)
        for file, content in backup.items():
            file.write_bytes(content)

    # what holds after every step

    @invariant()
    def every_lookup_finds_what_is_current_and_complete(self):
        for key in range(3):
            found = self.stores[0].find("merge", fingerprint(key))
            assert (found.digest if found else None) == self._found(key)

    @invariant()
    def the_log_is_what_was_written_to_it(self):
        entries = self.logs[len(self.entries) % 2].entries()
        assert [entry.merged.digest for entry in entries] == self.entries
        assert [entry.merged.digest for entry in active_promotions(entries)] == [digest for _, digest in self.active]


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch):
    """Thousands of flushes take minutes on a slow disk, and no test here takes the power away."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def explore(examples, **options):
    checks = list(HealthCheck)
    run_state_machine_as_test(
        StoreAndLog,
        settings=settings(max_examples=examples, stateful_step_count=30, suppress_health_check=checks, **options),
    )


def test_store_and_log_do_what_dictionaries_do():
    explore(25)


def test_a_crash_while_a_damaged_artifact_is_replaced_leaves_it_or_a_miss_or_the_new_one():
    seen = set()
    for step in range(31):
        machine = StoreAndLog()
        machine.put(0, "b", False, 0)
        ((key, digest),) = machine.artifacts
        machine._path(key, digest).joinpath("weights").write_text("b oF 0")
        machine.artifacts[key, digest] = "flipped"
        machine.put_and_crash(0, "b", False, step)
        machine.every_lookup_finds_what_is_current_and_complete()
        seen.add(machine.artifacts.get((key, digest)))
        machine.teardown()
    assert seen == {"flipped", None, "intact"}


def test_an_intact_artifact_is_never_moved_away_by_a_forced_recomputation_that_gives_the_same(tmp_path):
    """The artifact may be a champion's model, which must be there even if the recomputation crashes."""
    store = LocalStore(tmp_path)

    def put(content):
        staged = store.staging("merge", fingerprint(0))
        (staged / "weights").write_text(content)
        return store.commit(
            staged, payload=payload(0), inputs={}, summary=Summary(), provenance={"seconds": 1}, replace=True
        )

    champion = put("a")
    inode = store.path(champion).stat().st_ino
    for step in range(60):
        put("b")
        try:
            with crash_at(step):
                put("a")
        except Crash:
            assert store.verify(champion) == [] and store.path(champion).stat().st_ino == inode
        else:
            break
    assert step > 5 and store.find("merge", fingerprint(0)) == champion and not (tmp_path / "set-aside").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))  # 1,000 orders in parts, each of which ends within the time of one test
def test_store_and_log_do_what_dictionaries_do_in_many_more_orders(part):
    explore(125, derandomize=False)  # else all parts have the same orders where CI is set
