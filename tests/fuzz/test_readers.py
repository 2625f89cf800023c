"""Readers of files from outside, on a corpus of small files and for five seconds on mutations of it."""

import random
import time

import pytest

from tests.fuzz.fuzz import allowance, corpus, finding
from tests.fuzz.mutate import mutated
from tests.fuzz.readers import READERS

SECONDS = 5.0


@pytest.mark.parametrize("name", READERS)
def test_every_file_of_the_corpus_is_read_or_refused(name):
    for data in corpus(name):
        error = finding(name, data)
        assert error is None, f"{error!r} for {data[:200]!r}"


def test_a_broken_file_is_refused_with_a_failure_and_within_the_memory():
    seed = 0  # the same files in each run of the tests; `make fuzz` draws others
    with allowance():
        for name in READERS:
            chance, files = random.Random(f"{seed} {name}"), corpus(name)
            end = time.monotonic() + SECONDS / len(READERS)
            while time.monotonic() < end:
                data = mutated(files, chance)
                error = finding(name, data)
                assert error is None, f"{error!r} of {name} for {data[:200]!r} (seed {seed})"
