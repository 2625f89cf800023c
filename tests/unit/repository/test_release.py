"""What a release is made of: one version everywhere, all files of the package, upgrade notes of the present stages."""

import importlib.util

from loraflow.stages import STAGES
from tests.unit.repository.test_docs import REPOSITORY, read, rows_of_table

SPEC = importlib.util.spec_from_file_location("release", REPOSITORY / ".ci" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)


def test_package_code_and_changelog_name_one_version():
    assert len(set(release.versions(REPOSITORY).values())) == 1


def test_a_changelog_without_the_versions_heading_is_noticed(tmp_path):
    (tmp_path / "loraflow").mkdir()
    (tmp_path / "loraflow" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0\n")
    assert release.versions(tmp_path)["CHANGELOG.md"] == "Unreleased"


def test_the_built_files_must_hold_every_tracked_file_of_the_package():
    tracked = ["loraflow/flows", "loraflow/tasks", "loraflow/py.typed", "flows/server/up.py", "tasks/gate.py"]
    assert release.expected(tracked) == {"loraflow/py.typed", "loraflow/flows/server/up.py", "loraflow/tasks/gate.py"}


def test_the_upgrade_notes_name_the_version_of_every_stage():
    table = rows_of_table(read("docs/upgrade.md"), "| stage | 0.1.0 |")
    assert {row[0]: int(row[1]) for row in table} == {name: stage.version for name, stage in STAGES.items()}
