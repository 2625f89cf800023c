"""The project that a folder's runs belong to."""

from loraflow.config.project import PROJECT_VARIABLE, served_project


def test_decisions_of_a_worker_without_prefect_yaml_carry_the_project_that_it_was_told(tmp_path, monkeypatch):
    monkeypatch.delenv(PROJECT_VARIABLE, raising=False)
    assert served_project(tmp_path) is None
    monkeypatch.setenv(PROJECT_VARIABLE, " tickets ")
    assert served_project(tmp_path) == "tickets"
    (tmp_path / "prefect.yaml").write_text("name: support\n")
    assert served_project(tmp_path) == "support", "the file comes first"
