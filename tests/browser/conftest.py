"""A browser in front of a small project under `loraflow up`."""

from __future__ import annotations

import os

import pytest

from tests.local_deployment import LocalDeployment, build_project

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="session")
def deployment(tmp_path_factory, quick_phi3):
    deployment = LocalDeployment(build_project(tmp_path_factory.mktemp("deployment") / "project", quick_phi3))
    yield deployment
    assert deployment.stop() == 0, deployment.log.read_text()
    assert deployment.workers() == []


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, deployment):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    yield page
    page.close()
