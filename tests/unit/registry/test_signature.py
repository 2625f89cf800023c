"""Signatures of promotion logs, with ssh-keygen: whoever rewrites log, anchor and run records together is noticed."""

import json
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.registry import PromotionLog
from loraflow.registry.runs import LogHead
from loraflow.registry.signature import heads_file, remember_verified
from loraflow.store import LocalStore
from tests.promoted_models import add_model, promote

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs; only the first one's owner is an allowed signer."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    kind, key, *_ = (folder / "mine.pub").read_text().split()
    (folder / "signers").write_text(f"ada@acme.example {kind} {key}\n")
    return folder


@pytest.fixture(autouse=True)
def forget_verified(keys):
    yield
    heads_file(keys / "signers").unlink(missing_ok=True)


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "store")
    for name in "ab":
        promote(PromotionLog(store, "tickets"), add_model(store, name))
    return store


def loraflow(store, *arguments, fails=None):
    done = CliRunner().invoke(cli, [*map(str, arguments), "--store", store.uri])
    assert type(done.exception) is (fails or type(None)), done.exception
    return done.output


def verify(store, keys, fails=None):
    return loraflow(store, "verify", "--signers", keys / "signers", fails=fails)


def test_a_signed_log_is_verified_and_a_later_entry_is_named_until_it_is_signed_too(store, keys):
    assert "no signature" in str(verify(store, keys, fails=CorruptArtifact))
    assert "signed: entry 2" in loraflow(store, "registry", "sign", "--key", keys / "mine")
    assert "2 entries of tickets are signed by ada@acme.example" in verify(store, keys)
    loraflow(store, "rollback", "--reason", "x")
    assert "entries 3 to 3 are not signed" in verify(store, keys, fails=CorruptArtifact)


def test_a_key_in_the_environment_signs_each_promotion(store, keys, monkeypatch, caplog):
    monkeypatch.setenv("LORAFLOW_SIGNING_KEY", str(keys / "mine"))
    promote(PromotionLog(store, "tickets"), add_model(store, "c"))
    assert "3 entries of tickets are signed" in verify(store, keys)
    monkeypatch.setenv("LORAFLOW_SIGNING_KEY", str(keys / "missing"))
    promote(PromotionLog(store, "tickets"), add_model(store, "d"))
    assert "entry 4 is written, but not signed" in caplog.text, "the promotion stands"


def test_whoever_rewrites_log_anchor_and_run_records_together_is_noticed(store, keys, tmp_path):
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    signature = store.read_document("anchors/tickets/signed.json")
    for folder in ("registry", "anchors"):
        shutil.rmtree(store.root / folder)
    for name in "ba":
        promote(PromotionLog(store, "tickets"), add_model(store, name))
    loraflow(store, "verify")
    assert "no signature" in str(verify(store, keys, fails=CorruptArtifact))
    store.write_document("anchors/tickets/signed.json", signature)
    assert "without entry 2, which ada@acme.example signed" in verify(store, keys, fails=CorruptArtifact)
    loraflow(store, "registry", "sign", "--key", keys / "other")
    verify(store, keys, fails=CorruptArtifact)


@pytest.mark.parametrize("left", ["the older log", "nothing"])
def test_an_older_log_with_its_own_older_signature_is_refused_after_the_newer_one_was_verified(
    store, keys, tmp_path, left
):
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    shutil.copytree(store.root, tmp_path / "older")
    promote(PromotionLog(store, "tickets"), add_model(store, "c"))
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    assert "3 entries of tickets are signed" in verify(store, keys)
    for folder in ("registry", "anchors"):
        shutil.rmtree(store.root / folder)
        if left == "the older log":
            shutil.copytree(tmp_path / "older" / folder, store.root / folder)
    loraflow(store, "verify")
    assert "entries without it" in verify(store, keys, fails=CorruptArtifact)
    heads_file(keys / "signers").write_text("{")
    verify(store, keys, fails=BadConfig)
    heads_file(keys / "signers").unlink()
    verify(store, keys, fails=None if left == "the older log" else CorruptArtifact)


def test_a_list_of_signers_in_a_read_only_folder_is_used_with_a_warning(store, keys, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    loraflow(store, "registry", "sign", "--key", keys / "mine")
    monkeypatch.setattr("loraflow.registry.signature.write_atomic", refuse)
    assert "2 entries of tickets are signed" in verify(store, keys)
    assert "will not be noticed" in caplog.text


def verified(signers):
    return json.loads(heads_file(signers).read_bytes())


def test_what_many_processes_have_verified_is_remembered(tmp_path):
    """A process that reads the file before another one writes it must not take the other's entry away."""
    signers = tmp_path / "signers"
    models = [f"m{number}" for number in range(24)]
    start = threading.Barrier(len(models))

    def remember(model):
        start.wait()
        remember_verified(SimpleNamespace(uri="/s"), model, LogHead(seq=1, hash="1" * 64), signers)

    threads = [threading.Thread(target=remember, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verified(signers)["/s"].keys() == set(models)


def test_a_later_verified_entry_is_not_replaced_by_an_earlier_one(tmp_path):
    store, signers = SimpleNamespace(uri="/s"), tmp_path / "signers"
    for seq, last in ((3, 3), (2, 3), (3, 3), (4, 4), (1, 4)):
        remember_verified(store, "m", LogHead(seq=seq, hash=str(seq) * 64), signers)
        assert verified(signers) == {"/s": {"m": {"seq": last, "hash": str(last) * 64}}}


@pytest.mark.parametrize(
    ("content", "why"), [(b'{"/s": {"m": 1}}', r"/s\.m: "), (b"", "Invalid JSON"), (b"\xff", "JSON")]
)
def test_a_damaged_file_of_verified_entries_is_named_with_what_is_wrong_and_the_way_out(tmp_path, content, why):
    signers = tmp_path / "my signers"
    heads_file(signers).write_bytes(content)
    with pytest.raises(BadConfig, match=rf"{why}(.|\n)*rm '") as caught:
        remember_verified(SimpleNamespace(uri="/s"), "m", LogHead(seq=1, hash="1" * 64), signers)
    assert "validation error" not in str(caught.value)


@pytest.mark.parametrize("change", [(b'"seq": 2', b'"seq": 1'), (b"AAAA", b"AAAB"), (b'"signature"', b'"signatur"')])
def test_a_changed_signature_is_refused(store, keys, change):
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    data = store.read_document("anchors/tickets/signed.json")
    assert change[0] in data
    store.write_document("anchors/tickets/signed.json", data.replace(*change))
    verify(store, keys, fails=CorruptArtifact)


def test_without_a_key_a_list_or_a_program_there_is_one_sentence(store, keys, monkeypatch):
    loraflow(store, "registry", "sign", "--key", keys / "missing", fails=BadConfig)
    loraflow(store, "verify", "--signers", keys / "missing", fails=BadConfig)
    monkeypatch.setenv("PATH", "/nowhere")
    loraflow(store, "registry", "sign", "--key", keys / "mine", fails=BadConfig)
    monkeypatch.undo()
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    monkeypatch.setenv("PATH", "/nowhere")
    verify(store, keys, fails=BadConfig)  # not known, which is another thing than not signed


def test_a_signed_log_that_was_emptied_is_noticed(store, keys):
    loraflow(store, "registry", "sign", "--key", keys / "mine")
    shutil.rmtree(store.root / "registry")
    (store.root / "anchors" / "tickets" / "head.json").unlink()
    assert "without entry 2, which ada@acme.example signed" in verify(store, keys, fails=CorruptArtifact)
    shutil.rmtree(store.root / "anchors")
    assert "no promotion log" in verify(store, keys, fails=CorruptArtifact)
    assert "0 damaged" in loraflow(store, "verify")
