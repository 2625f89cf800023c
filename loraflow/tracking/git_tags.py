"""Git tags of promotions and rollbacks in the format of GTO (https://dvc.org/doc/gto): `register.git_tags`.

| tag | names |
|---|---|
| `MODEL@vN.0.0` | the promotion that is entry N of the log, on the commit of its run |
| `MODEL#champion#N` | the model in use since entry N, on the commit of that model's version |
| `MODEL#champion!#N` | the model that entry N replaced; without it, GTO takes the highest version, also after a rollback |

If the commit of a run is not in this repository, the tag is on the current one, and a warning says so. GTO knows one
version for a commit. If a commit has one already, the tag is on a new commit without changes, a child of it that is on no
branch. The promotion log decides: missing tags are made at the next promotion or rollback.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from loraflow.data.versions.git import GitError, git, git_or_none
from loraflow.failures import Failure
from loraflow.registry.log import Entry, PromotionLog
from loraflow.registry.runs import RunRecord, read_runs
from loraflow.store import Store

log = logging.getLogger("loraflow")
STAGE = "champion"
_IDENTITY = ("-c", "user.name=loraflow", "-c", "user.email=loraflow@localhost")  # where git has none, as on servers


def tag_log(store: Store, model: str, folder: Path | None = None) -> None:
    """Make the tags that are missing, in the git repository of the folder, if the model's newest run asks for them.

    Nothing that happens here changes the outcome: the promotion log is written by now.
    """
    try:
        records = [record for record in read_runs(store) if record.model == model]
        if not records or records[-1].section("register").get("git_tags") is not True:
            return
        for problem in make_tags(PromotionLog(store, model).entries(), records, model, folder or Path.cwd()):
            log.warning("%s", problem)
    except (Failure, OSError, GitError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        log.warning("%s is not tagged in git (%s); the next promotion or rollback will tag it", model, reason)


def make_tags(entries: Sequence[Entry], records: Iterable[RunRecord], model: str, folder: Path) -> list[str]:
    """Make the missing tags of a promotion log; return the problems of its existing tags.

    Raises:
        GitError: git fails, or the folder is in no repository.
    """
    tags, problems = _read_tags(model, folder), list[str]()
    commits = _commits(entries, records)
    versions: dict[str, str] = {}  # digest of a merged model → tag of its newest version
    in_use = ""  # tag of the champion's version
    for entry, date in zip(entries, _dates(entries), strict=True):
        digest, version = entry.merged.digest, f"{model}@v{entry.seq}.0.0"
        targets: dict[str, str] = {}  # tag → what it is on
        if entry.action == "promote":
            versions[digest] = version
            targets[version] = version
        if digest not in versions:  # the promotion is not in the log any more (`loraflow registry accept`)
            problems.append(f"{model}: entry {entry.seq} is not tagged, because the log has no promotion of its model")
            continue
        if in_use not in ("", versions[digest]):
            targets[f"{model}#{STAGE}!#{entry.seq}"] = in_use
        targets[f"{model}#{STAGE}#{entry.seq}"] = in_use = versions[digest]
        for name, where in targets.items():
            if name not in tags:
                recorded = commits.get(entry.seq)
                if name == where and not _is_here(recorded, folder):
                    known = (
                        f"the commit {recorded} of its run is not in this repository"
                        if recorded
                        else "its run has none"
                    )
                    problems.append(f"the git tag {name} is on the current commit, because {known}")
                commit = _commit_for(name, recorded, model, folder) if name == where else where
                _tag(name, f"{commit}^{{commit}}", _message(entry), date, folder)
            elif digest not in tags[name]:
                problems.append(f"the git tag {name} names another model than entry {entry.seq} of the promotion log")
    return problems


def _read_tags(model: str, folder: Path) -> dict[str, str]:
    form = "--format=%(refname:strip=2)%00%(contents)%01"
    listed = git(["for-each-ref", form, f"refs/tags/{model}@*", f"refs/tags/{model}#*"], folder)
    parts = [part.strip("\n").partition("\0") for part in listed.split("\1") if part.strip("\n")]
    return {name: message for name, _, message in parts}


def _commits(entries: Iterable[Entry], records: Iterable[RunRecord]) -> Mapping[int, str]:
    known = {record.run: record for record in records if record.commit}
    by_hand = {entry.seq: known.get(entry.inputs.get("run", "")) for entry in entries}
    by_run = {run.summary.registered: run for run in known.values() if run.summary and run.summary.registered}
    return {seq: run.commit for seq, run in {**by_hand, **by_run}.items() if run and run.commit}


def _is_here(commit: str | None, folder: Path) -> bool:
    found = commit and git_or_none(["rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], folder)
    return bool(found)


def _commit_for(name: str, recorded: str | None, model: str, folder: Path) -> str:
    """Return the commit for a version: the commit of its run, or a child of that commit if it has a version already."""
    commit = recorded if recorded and _is_here(recorded, folder) else git(["rev-parse", "--verify", "HEAD"], folder)
    commit = commit.strip()
    if not git(["tag", "--points-at", commit, "--list", f"{model}@*"], folder).strip():
        return commit
    message = f"{name}: no changes, because GTO allows one version per commit"
    arguments = ["commit-tree", f"{commit}^{{tree}}", "-p", commit, "-m", message]
    return git([*_identity_options(folder), *arguments], folder).strip()


def _dates(entries: Iterable[Entry]) -> Iterator[datetime]:
    """Yield the times of entries, each later than the one before: GTO sorts tags by their dates, in seconds."""
    last = datetime.fromtimestamp(0, UTC)
    for entry in entries:
        last = max(datetime.fromisoformat(entry.time), last + timedelta(seconds=1))
        yield last


def _tag(name: str, where: str, message: str, date: datetime, folder: Path) -> None:
    arguments = [*_identity_options(folder), "tag", "--annotate", "--no-sign", "-m", message, name, where]
    try:
        git(arguments, folder, {"GIT_COMMITTER_DATE": date.isoformat()})
    except GitError:
        if git_or_none(["rev-parse", "--verify", "--quiet", f"refs/tags/{name}"], folder) is None:
            raise  # else another process made it at the same time


def _identity_options(folder: Path) -> Sequence[str]:
    return () if git_or_none(["var", "GIT_COMMITTER_IDENT"], folder) else _IDENTITY


def _message(entry: Entry) -> str:
    facts = [f"{key}: {value}" for key, value in {"merged model": entry.merged.digest, **entry.inputs}.items()]
    title = f"{entry.action} of {entry.model}, entry {entry.seq} of the promotion log, by {entry.actor} at {entry.time}"
    return "\n".join([title, "", *facts, *entry.reasons])
