"""What is served to browsers, without an engine: files, policies, sizes, and where the vendored ones come from."""

import re
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from whipstaff.server.playground import vendor
from whipstaff.server.playground.pages import DOCS_POLICY, FILES, MOUNT, POLICY, serve_docs, serve_playground
from whipstaff.server.settings import Settings

MOST_BYTES = 300_000  # of all files that the page may load
OWN = sorted(path for path in FILES.iterdir() if path.suffix in (".js", ".html", ".css", ".svg"))
each_own = pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI(docs_url=None, redoc_url=None)
    serve_playground(app)
    serve_docs(app)
    return TestClient(app)


def test_the_page_and_its_files_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text)
    assert len(named) == 4
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name
    assert client.get(f"{MOUNT}/../pages.py").status_code == client.get(f"{MOUNT}/%2e%2e/pages.py").status_code == 404


def test_every_answer_has_its_policy(client: TestClient) -> None:
    for path in ("/", f"{MOUNT}/app.js", f"{MOUNT}/vendor/preact.js", f"{MOUNT}/style.css"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == POLICY, path
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
    for path in ("/docs", "/docs/start.js"):
        assert client.get(path).headers["content-security-policy"] == DOCS_POLICY, path
    scripts = [policy.partition("script-src ")[2].partition(";")[0] for policy in (POLICY, DOCS_POLICY)]
    assert scripts == ["'self'"] * 2 and "unsafe" not in POLICY


def test_a_file_is_asked_for_again_only_when_it_changed(client: TestClient) -> None:
    first = client.get(f"{MOUNT}/app.js")
    again = client.get(f"{MOUNT}/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


def test_the_page_is_small() -> None:
    docs = {"docs.html", "docs.js"}  # not the page's
    files = [path for path in FILES.rglob("*") if path.is_file() and path.name not in docs]
    assert sum(path.stat().st_size for path in files if path.suffix != ".LICENSE") < MOST_BYTES


@each_own
def test_nothing_becomes_markup_or_a_program_or_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    for bad in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "dangerouslySet",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert bad not in text, bad
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=\"|\sstyle=\"|<style", text)
    hosts = set(re.findall(r"https?://([\w.]+)", text))
    assert hosts <= {"www.w3.org"}, hosts


@each_own
def test_imports_lead_to_files(path: Path) -> None:
    for name in re.findall(r'^(?:import|export) .*?from "([^"]+)";', path.read_text(), re.M | re.S):
        assert name.startswith("./") and (FILES / name).is_file(), name


@each_own
def test_every_name_that_is_imported_is_exported(path: Path) -> None:
    """Browsers stop at the first that is not."""
    for names, source in re.findall(r'^import \{([^}]+)\} from "\./(\w+\.js)";', path.read_text(), re.M):
        exported = (FILES / source).read_text()
        for name in (one.split(" as ")[0].strip() for one in names.split(",")):
            found = re.search(rf"export (?:async )?(?:function\*?|const|class|let) {name}\b", exported)
            listed = any(name in re.split(r"[,\s]+", part) for part in re.findall(r"export \{([^}]+)\}", exported))
            assert found or listed, f"{name} of {source}"


def test_vendored_files_are_those_of_the_lock(tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("NO NPM: it is not on PATH")
    made = vendor.vendored(vendor.install(tmp_path))
    assert {path.name: path.read_text() for path in vendor.VENDOR.iterdir()} == made


def test_the_lock_names_no_host_and_every_hash() -> None:
    text = (vendor.HERE / "package-lock.json").read_text()
    assert "resolved" not in text and text.count('"integrity"') == 3


def test_the_page_can_be_left_out() -> None:
    parser = ArgumentParser()
    Settings.add_flags(parser)
    assert Settings.from_args(parser.parse_args([])).playground
    assert not Settings.from_args(parser.parse_args(["--no-playground"])).playground
