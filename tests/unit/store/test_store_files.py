"""The bytes of manifests, remembered hashes, and the modes of files."""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from loraflow import identity
from loraflow.store import (
    LocalStore,
    Manifest,
    Ref,
    Summary,
)
from loraflow.store.checkpoints import finalize_checkpoint
from loraflow.store.checksum import check_manifest_checksum
from loraflow.store.files import HashMemo, json_bytes
from tests.stored_artifacts import FP, PAYLOAD

# A manifest as it is in stores since the first release: its bytes must not change, and it must stay readable.
MANIFEST_ON_DISK = """{
 "digest": "64688d47f8e0e95040d2b078a9a331a56e61236d6b2365d2cb38ca6b23105023",
 "facets": {
  "adapter": "64688d47f8e0e95040d2b078a9a331a56e61236d6b2365d2cb38ca6b23105023"
 },
 "figures": {
  "first_loss": null,
  "mean": 0.5,
  "steps": 20
 },
 "files": {
  "adapter/weights.bin": {
   "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
   "size": 7
  },
  "telemetry/curve.jsonl": {
   "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
   "size": 3
  }
 },
 "fingerprint": "d789dee5d1b861d4456054b82fb5d579462641bd7180f2359ad1dbbc130eefce",
 "inputs": {
  "base": {
   "digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "facets": {
    "tokenizer": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
   },
   "fingerprint": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
   "stage": "resolve_base"
  }
 },
 "payload": {
  "config": {
   "lr": 0.0002,
   "note": null,
   "packing": true,
   "seed": 7,
   "targets": [
    "qkv_proj"
   ]
  },
  "inputs": {
   "base": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
  },
  "stage": "train",
  "version": 3
 },
 "provenance": {
  "name": "späce",
  "seconds": 12.5,
  "started": "2026-11-26T10:00:00Z",
  "versions": {
   "torch": "2.13.0"
  }
 },
 "report": {
  "samples": [
   {
    "id": "1",
    "ok": true
   }
  ]
 },
 "schema_version": 1,
 "stage": "train",
 "version": 3
}
"""


def test_a_manifest_is_serialized_to_the_bytes_of_existing_stores(tmp_path):
    store = LocalStore(tmp_path)
    payload = identity.payload(
        "train",
        3,
        {"base": "a" * 64},
        {"seed": 7, "lr": 2e-4, "targets": ["qkv_proj"], "note": None, "packing": True},
    )
    base = Ref(stage="resolve_base", fingerprint="b" * 64, digest="a" * 64, uri="/x", facets={"tokenizer": "c" * 64})
    staged = store.staging("train", identity.fingerprint(payload))
    for name, content in {"adapter/weights.bin": "weights", "telemetry/curve.jsonl": "{}\n"}.items():
        (staged / name).parent.mkdir()
        (staged / name).write_text(content)
    ref = store.commit(
        staged,
        payload=payload,
        inputs={"base": base},
        summary=Summary(
            figures={"steps": 20, "mean": 0.5, "first_loss": None},
            facets={"adapter": ["adapter/"]},
            report={"samples": [{"id": "1", "ok": True}]},
        ),
        provenance={
            "started": "2026-11-26T10:00:00Z",
            "seconds": 12.5,
            "versions": {"torch": "2.13.0"},
            "name": "späce",
        },
    )
    document = (store.path(ref) / "manifest.json").read_bytes()
    assert check_manifest_checksum(document).decode() == MANIFEST_ON_DISK
    assert b"checksum" in document and "checksum" not in store.manifest(ref).provenance
    as_earlier = Manifest.model_validate_json(document)  # which refuses other keys, and has no other check
    assert as_earlier.provenance["seconds"] == 12.5 and as_earlier.model_dump().keys() == Manifest.model_fields.keys()
    assert store.manifest(ref).input_refs(store.uri) == {"base": base.model_copy(update={"uri": store.uri})}


def test_a_manifest_of_an_older_release_is_read_and_written_unchanged():
    manifest = Manifest.parse(MANIFEST_ON_DISK.encode())
    assert manifest.size == 10 and manifest.files["adapter/weights.bin"].size == 7
    assert manifest.payload["config"]["lr"] == 2e-4 and manifest.provenance["versions"] == {"torch": "2.13.0"}
    assert json_bytes(manifest.model_dump()).decode() == MANIFEST_ON_DISK


def test_a_summary_accepts_every_json_value():
    """Stages report tuples and counts by number; in the manifest they are lists and strings."""
    summary = Summary(report={"by_length": {1: (2, 3)}, "share": np.float64(0.5)})
    assert summary.report == {"by_length": {"1": [2, 3]}, "share": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        Summary(report={"folder": Path("x")})


def test_cached_hashes_of_an_older_release_have_no_ctime_and_are_not_believed(tmp_path):
    file, memo = tmp_path / "file", tmp_path / "hashes.json"
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    inode = file.stat().st_ino
    memo.write_text(f'{{"sha256:{file}": [7, 1000000000000000000, {inode}, "remembered"]}}')
    assert HashMemo(memo).hash(file) == hashlib.sha256(b"content").hexdigest()


def test_a_changed_byte_is_seen_although_size_mtime_and_inode_are_as_before(tmp_path):
    file, memo = tmp_path / "file", HashMemo(None)
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    right = memo.hash(file)
    assert memo.remembers(file, right) and memo.has_hash(file, right)
    before = file.stat()
    time.sleep(0.05)  # longer than a tick of the kernel's clock
    file.write_text("cOntent")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (7, 10**18, before.st_ino)
    assert not memo.remembers(file, right) and not memo.has_hash(file, right)


def test_a_hash_of_a_file_that_was_just_written_is_not_remembered(tmp_path):
    file, memo = tmp_path / "file", HashMemo(None)
    file.write_text("content")
    memo.hash(file)
    assert memo.known == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"sha256:/file": [1]}'])
def test_a_damaged_hash_cache_is_ignored_and_rewritten(tmp_path, content):
    file, memo = tmp_path / "file", tmp_path / "hashes.json"
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    memo.write_text(content)
    hashes = HashMemo(memo)
    expected = hashlib.sha256(b"content").hexdigest()
    assert hashes.hash(file) == expected
    hashes.save()
    stamp = [7, 1_000_000_000_000_000_000, file.stat().st_ino, file.stat().st_ctime_ns, expected]
    assert json.loads(memo.read_text()) == {f"sha256:{file}": stamp}


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_decides_who_can_read_an_artifact_and_a_checkpoint(tmp_path, umask):
    import torch
    from safetensors.torch import save_file

    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    private = staged / "private"
    private.mkdir(mode=0o700)
    save_file({"w": torch.zeros(2)}, private / "model.safetensors")
    for mode in (0o600, 0o755, 0o444, 0o4755):
        (staged / f"{mode:o}.bin").write_text("x")
        (staged / f"{mode:o}.bin").chmod(mode)
    ref = store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})
    store.write_document("runs/x.json", b"{}")
    store.create_document("registry/m/log/1.json", b"{}")
    checkpoint = store.work_folder("train", FP) / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, checkpoint / "adapter_model.safetensors")
    finalize_checkpoint(checkpoint)
    for path in store.root.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(path.stat().st_mode & 0o7777) == oct(expected), path
    assert store.verify(ref) == []


def test_a_linked_file_of_another_folder_keeps_its_mode_and_is_readable_in_the_store(tmp_path):
    """Weights of a base are hard links: their mode belongs to whoever owns the base's folder."""
    private, public = tmp_path / "private.bin", tmp_path / "public.bin"
    for path, mode in ((private, 0o600), (public, 0o755)):
        path.write_text(path.name)
        path.chmod(mode)
    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    os.link(private, staged / "private.bin")
    os.link(public, staged / "public.bin")
    before = os.umask(0o022)
    try:
        folder = store.path(store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={}))
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600 and public.stat().st_mode & 0o777 == 0o755
    assert (folder / "private.bin").stat().st_mode & 0o777 == 0o644
    assert (folder / "private.bin").read_text() == "private.bin" and private.stat().st_nlink == 1
    assert public.stat().st_nlink == 2, "what everybody can read is not copied"
