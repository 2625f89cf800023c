"""Marks in the store for what MLflow has not received. Each writer has its own mark, so none removes another writer's."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from loraflow.failures import Failure
from loraflow.store import Store


def read_marks(store: Store, model: str) -> list[str]:
    """Return the names of a model's marks; none if all was sent.

    Raises:
        Network: the store does not answer.
    """
    return store.documents(f"mlflow/{model}/")


def add_mark(store: Store, model: str, writer: str) -> str:
    """Write the mark of a run's id or another unique name, and return its name.

    If the store refuses, nothing is marked: `loraflow mlflow sync` finds what is missing without marks.
    """
    name = f"mlflow/{model}/pending/{writer}.json"
    with suppress(Failure, OSError):
        store.write_document(name, b"{}\n")
    return name


def remove_marks(store: Store, names: Iterable[str]) -> None:
    """Remove the marks of what was sent. One that stays costs the next run a comparison with MLflow, nothing else."""
    for name in names:
        with suppress(Failure, OSError):
            store.remove_document(name)
