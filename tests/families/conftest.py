"""Run a third of the family tests, chosen by the commit; see `rotation`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.rotation import part_of, part_to_run

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the family tests of the other parts."""
    part = part_to_run(config.args, config.rootpath)
    if part is None:
        return
    others = [
        item
        for item in items
        if item.path.is_relative_to(HERE) and "test_rotation" not in item.nodeid and part_of(item.nodeid) != part
    ]
    if others:
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
