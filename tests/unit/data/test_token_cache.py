"""Tokens of rows are kept by content, so that appended rows alone are tokenized; the result never depends on it."""

import json
import os
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from loraflow.config import Recipe
from loraflow.data.tokens import chunk_encoder
from loraflow.data.tokens.chunk_encoder import EncodedRows, key_of_rows, segments
from loraflow.data.tokens.loss_mask import Encoded
from loraflow.data.tokens.token_files import BATCH_ROWS, TokenBatch, batches_of
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.store import Ref
from loraflow.store.checkpoints import reset_work_folder
from loraflow.store.chunk_cache import MAX_ROWS, MEAN_ROWS, ChunkCache, stale_entries
from tests.job_factory import make_job


def lines(numbers) -> list[str]:
    chats = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * (n % 7)}] for n in numbers]
    return [
        f'{{"id": "{n:016x}", "set": "train", "place": "x:{i}", "messages": {json.dumps(chat)}}}\n'
        for i, (n, chat) in enumerate(zip(numbers, chats, strict=True))
    ]


def cut(folder: Path, rows: list[str]) -> list[list[str]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(rows))
    found = list(segments(file))
    assert [line for segment in found for line in segment] == rows
    return found


def test_rows_that_are_added_anywhere_change_few_segments(tmp_path):
    rows, more = lines(range(20_000)), lines(range(50_000, 50_200))
    before = {key_of_rows(b"", segment) for segment in cut(tmp_path, rows)}
    for at in (0, 10_000, 20_000):
        after = cut(tmp_path, [*rows[:at], *more, *rows[at:]])
        new = sum(len(segment) for segment in after if key_of_rows(b"", segment) not in before)
        assert new <= 0.03 * len(rows) + MEAN_ROWS and max(map(len, after)) <= MAX_ROWS


def test_segments_of_long_rows_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_encoder, "MAX_BYTES", 1000)
    rows = lines(range(500))
    sizes = [sum(len(chunk_encoder._content(line)) for line in segment[:-1]) for segment in cut(tmp_path, rows)]
    assert len(sizes) > 10 and max(sizes) < 1000


def test_the_key_of_rows_is_their_content_and_not_their_place():
    chat_lines, moved = lines([1, 2]), lines([0, 1, 2])[1:]
    assert chat_lines != moved and key_of_rows(b"", chat_lines) == key_of_rows(b"", moved)
    marked = [chat_lines[0], chat_lines[1].replace("}]}", '}], "learned": [1], "weights": [0.5]}')]
    assert (
        len({key_of_rows(b"", rows) for rows in (chat_lines, marked, chat_lines[:1])} | {key_of_rows(b"x", chat_lines)})
        == 4
    )


def encoded(rng, tokens, weighted, largest) -> Encoded:
    ids = rng.integers(0, largest, tokens).astype(np.int32)
    labels = np.where(rng.random(tokens) < 0.5, ids, IGNORED).astype(np.int32)
    weights = np.where(labels != IGNORED, np.float32(0.25), np.float32(0)) if weighted else None
    return Encoded(ids, labels, 0, "<|end|>" if tokens == 3 else None, tokens % 2, weights)


@pytest.mark.parametrize("largest", [1000, 100_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_entry_has_all_that_was_written(largest, weighted):
    rng = np.random.default_rng(0)
    rows = EncodedRows.of([encoded(rng, n, weighted and n == 5, largest) for n in (0, 3, 5, 1, 9)])
    back = EncodedRows.from_bytes(rows.as_bytes())
    for name in ("lengths", "ids", "labels", "weights"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(back, name))
    assert (back.special, back.cut) == ({1: "<|end|>"}, {1: 1, 2: 1, 3: 1, 4: 1}) and back.ids.dtype == np.int32


def test_batches_do_not_depend_on_the_segments():
    rng = np.random.default_rng(0)
    kept = rng.random(1700) < 0.8
    lengths = rng.integers(1, 9, int(kept.sum())).astype(np.int32)
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    starts, rows = np.concatenate(([0], np.cumsum(lengths))), np.concatenate(([0], np.cumsum(kept)))

    def parts(borders):
        for begin, end in zip([0, *borders], [*borders, len(kept)], strict=True):
            a, b = starts[rows[begin]], starts[rows[end]]
            yield TokenBatch(tokens[a:b], tokens[a:b], lengths[rows[begin] : rows[end]]), kept[begin:end]

    found = [list(batches_of(parts(borders))) for borders in ([], [1, 499, 500, 501, 1699], list(range(7, 1700, 7)))]
    for batches in found:
        assert [len(b.lengths) for b in batches] == [
            int(kept[n : n + BATCH_ROWS].sum()) for n in range(0, 1700, BATCH_ROWS)
        ]
        np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), tokens)


class Template:
    """Encodes a chat as the bytes of its messages, and counts the chats."""

    encoded = 0

    def encode(self, chats, loss_on, if_cut, learned, weights):
        self.encoded += len(chats)
        texts = [np.frombuffer(json.dumps(chat).encode(), np.uint8).astype(np.int32) for chat in chats]
        return [Encoded(ids, np.where(np.arange(len(ids)) > 5, ids, IGNORED).astype(np.int32), 0) for ids in texts]


def tokenized(folder: Path, numbers, cache, max_length=90, processes=1) -> tuple[int, list]:
    from loraflow.config.stage_configs import TokenizeConfig

    (folder / "rows.jsonl").write_text("".join(lines(numbers)))
    config = TokenizeConfig(
        loss_on="assistant", too_long="drop", special_tokens="drop", max_length=max_length, packing=False
    )
    template = Template()
    chunks = list(chunk_encoder.encoded_chunks(folder / "rows.jsonl", template, config, processes, cache, b"key"))
    batches = list(batches_of((chunk.batch, chunk.kept) for chunk in chunks))
    return template.encoded, [(b.ids.tolist(), b.labels.tolist(), b.lengths.tolist()) for b in batches]


def test_appended_rows_alone_are_encoded_and_the_result_is_that_without_a_cache(tmp_path):
    cache = ChunkCache(tmp_path / "cache")
    first = tokenized(tmp_path, range(3000), cache)
    assert first[0] == 3000 and tokenized(tmp_path, range(3000), cache) == (0, first[1])
    count, batches = tokenized(tmp_path, range(3030), cache)
    assert count <= 30 + MAX_ROWS and batches == tokenized(tmp_path, range(3030), None)[1]
    shorter = tokenized(tmp_path, range(3000), cache, max_length=75)
    assert shorter[0] == 0 and shorter[1] == tokenized(tmp_path, range(3000), None, max_length=75)[1] != first[1]


def test_a_damaged_entry_is_named_removed_and_computed_again(tmp_path, caplog):
    cache = ChunkCache(tmp_path / "cache")
    expected = tokenized(tmp_path, range(800), cache)[1]
    files = sorted(file for file in cache.folder.rglob("*") if file.is_file())
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\xff")
    files[-1].write_bytes(b"")
    count, batches = tokenized(tmp_path, range(800), cache)
    assert 0 < count <= 800 and batches == expected and caplog.text.count("is damaged") == 2
    assert tokenized(tmp_path, range(800), cache) == (0, expected)


def test_an_entry_that_was_copied_over_another_one_is_computed_again(tmp_path, caplog):
    cache = ChunkCache(tmp_path / "cache")
    expected = tokenized(tmp_path, range(3000), cache)[1]
    files = sorted(file for file in cache.folder.rglob("*") if file.is_file())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)
    count, batches = tokenized(tmp_path, range(3000), cache)
    assert count == 3000 and batches == expected and caplog.text.count("is damaged") == len(files) > 1


def test_cleanup_removes_entries_that_were_not_used_for_long(tmp_path):
    cache = ChunkCache(tmp_path / "cache" / "tokenize")
    cache.write("aa1", b"old")
    cache.write("bb2", b"used")
    for file in cache.folder.glob("*/*"):
        os.utime(file, (1, 1))
    assert cache.read("bb2") == b"used"
    before = time.time() - 60
    found = [(PurePosixPath("cache/tokenize"), 32 + len(b"old"))]
    assert list(stale_entries(tmp_path, before, remove=False)) == found and cache.read("aa1") == b"old"
    os.utime(cache.folder / "aa" / "aa1", (1, 1))
    assert list(stale_entries(tmp_path, before, remove=True)) == found
    assert cache.read("aa1") is None and cache.read("bb2") == b"used"


def test_a_forced_computation_and_a_folder_of_no_store_use_no_cache(tmp_path):
    work = tmp_path / "work" / "tokenize" / "f"
    work.mkdir(parents=True)
    assert ChunkCache.beside(work, "tokenize").folder == tmp_path / "cache" / "tokenize"
    assert ChunkCache.beside(tmp_path, "tokenize") is None and ChunkCache.beside(None, "tokenize") is None
    reset_work_folder(work, "d" * 64)
    assert ChunkCache.beside(work, "tokenize") is None


def test_a_cache_that_cannot_be_read_or_written_is_named_once_and_ends_nothing(tmp_path, caplog, monkeypatch):
    (tmp_path / "cache").write_text("a file of somebody")
    expected = tokenized(tmp_path, range(1000), None)
    assert tokenized(tmp_path, range(1000), ChunkCache(tmp_path / "cache" / "tokenize")) == expected
    assert caplog.text.count("rows are computed without it") == 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert tokenized(tmp_path, range(1000), ChunkCache(tmp_path / "other")) == expected
    assert caplog.text.count("No space left on device") == 1


def test_the_key_of_a_job_is_all_that_the_tokens_of_a_row_depend_on():
    def key(tokenizer="t", **settings) -> bytes:
        recipe = {"name": "r", "base": {"model": "m"}, "data": {"source": "d.dvc"}, **settings}
        base = Ref(stage="resolve_base", fingerprint="f", digest="d", uri="", facets={"tokenizer": tokenizer})
        rows = Ref(stage="check_dataset", fingerprint="f", digest="d", uri="", facets={"train": "x"})
        return chunk_encoder.key_of_job(
            make_job("tokenize", Recipe.model_validate(recipe), {"rows": rows, "base": base})
        )

    data = {"source": "d.dvc"}
    changed = [key("t2"), key(data={**data, "loss_on": "all"}), key(data={**data, "thinking": "keep"})]
    assert len({key(), *changed}) == 4, "tokenizer and template, loss_on, thinking"
    same = [key(training_config={"max_length": 77}), key(data={**data, "special_tokens": "allow"})]
    assert {key()} == set(same), "these concern the encoded rows"


def test_processes_are_started_for_many_new_rows_only(tmp_path, monkeypatch):
    started, start = [], chunk_encoder._started
    monkeypatch.setattr(chunk_encoder, "_started", lambda processes: started.append(processes) or start(processes))
    monkeypatch.setattr(chunk_encoder, "ONE_PROCESS_BYTES", 150_000)
    cache = ChunkCache(tmp_path / "cache")
    for numbers, expected in (
        (range(3000), 1),
        (range(3000), 0),
        (range(3030), 0),
        ([*range(4000, 4030), *range(3030)], 1),
    ):
        started.clear()
        found = tokenized(tmp_path, numbers, cache, processes=2)[1]
        assert len(started) == expected
        assert found == tokenized(tmp_path, numbers, None)[1]


def test_rows_in_the_cache_are_counted_in_bytes(tmp_path, monkeypatch):
    plain = lines
    monkeypatch.setitem(globals(), "lines", lambda rows: [row.replace("q", "語" * 300) for row in plain(rows)])
    monkeypatch.setattr(chunk_encoder, "ONE_PROCESS_BYTES", 1_200_000)
    cache = ChunkCache(tmp_path / "cache")
    tokenized(tmp_path, range(3000), cache)
    monkeypatch.setattr(chunk_encoder, "_started", lambda processes: pytest.fail("for 30 new rows"))
    tokenized(tmp_path, range(3030), cache, processes=2)
