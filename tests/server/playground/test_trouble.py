"""The page before a server that asks for keys, says very much, and dies: one of its own, ended by the last story."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from browser import SLOW, Visit, violations
from playwright.sync_api import Locator, Page, Route, expect
from serving import API_KEY, Server, serving_demo

from whipstaff.server import demo
from whipstaff.server.demo.mood import contrast
from whipstaff.server.demo.world import build
from whipstaff.steering import vector_file
from whipstaff.steering.algebra import numbers_of

from .conftest import Visiting

pytestmark = pytest.mark.engine

ADMIN = "admin-secret"
GRAFANA = "https://grafana.test:3000/d/whipstaff?orgId=1&kiosk"
TOKENS = 900  # in each of three panes; the model's rotations end at 1,024
FITTING = 300  # seconds that a loaded machine may take for a fit
STREAMING = 600  # seconds that a loaded machine may take for a third of them
MOST_GROWTH = 0.8  # of the growth of the main thread's time per token if all were drawn anew with each
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
expect.set_options(timeout=SLOW)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    flags = ["--api-key", API_KEY, "--admin-key", ADMIN, "--registry", str(folder / "registry")]
    flags += ["--kv-cache-memory-bytes", "256M"]  # for four long sequences at once
    flags += ["--grafana-url", GRAFANA]
    with serving_demo(folder, *flags) as running:
        yield running


def give_key(page: Page, key: str = API_KEY) -> None:
    page.get_by_role("form", name="API key").get_by_role("textbox").fill(key)
    page.get_by_role("button", name="Use it").click()


@pytest.fixture
def visit(guarded: Server, visiting: Visiting) -> Visit:
    """Somebody who gave the key."""
    visit = visiting(guarded.url)
    visit.page.goto("/")
    give_key(visit.page)
    return visit


def states(page: Page) -> list[str | None]:
    return [one.get_attribute("class") for one in page.locator(".figures .state").all()]


def test_the_key_is_asked_for_and_told_to_nobody(guarded: Server, visiting: Visiting) -> None:
    visit = visiting(guarded.url)
    page = visit.page
    page.goto("/")
    expect(page.get_by_text("This server asks for its API key")).to_be_visible()
    assert violations(page) == []
    give_key(page, "wrong")
    expect(page.get_by_text("That was not this server's API key")).to_be_visible()
    give_key(page)
    expect(page.locator(".state.done")).to_have_count(3)  # what waited went on
    page.get_by_role("button", name="Share").click()
    expect(page).to_have_url(re.compile("#s=1"))
    page.get_by_role("button", name="Code", exact=True).click()
    for language in ("curl", "Python", "JSON"):
        page.get_by_role("dialog").get_by_role("radio", name=language).check()
        assert API_KEY not in page.get_by_role("dialog").inner_text(), language
    stores = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert API_KEY not in stores and not any(API_KEY in url for url in visit.urls)
    page.reload()
    expect(page.get_by_text("This server asks for its API key")).to_be_visible()


def test_a_refusal_that_comes_after_the_key_asks_for_nothing(guarded: Server, visiting: Visiting) -> None:
    """What was asked without a key goes on with the one that was given meanwhile."""
    page, late = visiting(guarded.url).page, list[Route]()

    def hold(route: Route) -> None:
        if late:
            route.continue_()
        else:
            late.append(route)

    page.route("**/v1/steering/links", hold)
    page.goto("/")
    give_key(page)
    expect(page.get_by_role("form", name="API key")).to_have_count(0)
    (held,) = late
    held.fulfill(status=401, json={"error": {"message": "a key is wanted"}})
    expect(page.locator(".state.done")).to_have_count(3)
    assert page.get_by_role("form", name="API key").count() == 0


def test_health_links_to_grafana_where_that_is_configured(visit: Visit, guarded: Server) -> None:
    visit.page.get_by_role("link", name="Health").click()
    link = visit.page.get_by_role("link", name="Grafana")
    expect(link).to_have_attribute("href", GRAFANA)
    assert link.get_attribute("rel") == "noopener noreferrer" and violations(visit.page) == []
    with guarded.client() as client:
        assert client.get("/v1/steering/links").json() == {"grafana": GRAFANA}
        assert client.get("/v1/steering/links", headers={"Authorization": "Bearer x"}).status_code == 401


def library(page: Page, key: str = ADMIN) -> None:
    page.get_by_role("link", name="Library").click()
    page.get_by_label("administrator's key").get_by_role("textbox").fill(key)


def upload(page: Page, path: Path, name: str) -> None:
    page.get_by_label("a vector file").set_input_files(path)
    page.get_by_role("region", name="Upload").get_by_role("textbox", name="name", exact=True).fill(name)
    page.get_by_role("button", name=f"Upload {path.name}").click()


def test_vectors_are_uploaded_renamed_and_removed(visit: Visit, tmp_path: Path) -> None:
    """With the administrator's key alone; a hostile description is a text."""
    page = visit.page
    vector = vector_file.read(demo.VECTORS / "cheerful.safetensors")
    header = vector.header.model_copy(update={"description": HOSTILE, "provenance": {"made_by": HOSTILE}})
    path = tmp_path / "<b>mood.safetensors"
    vector_file.write(path, header, numbers_of(vector))
    library(page, "wrong")
    upload(page, path, "mood")
    expect(page.get_by_text("send the admin key")).to_be_visible()
    library(page)
    page.get_by_role("button", name=re.compile("^Upload")).click()
    mood = page.get_by_role("article", name="mood", exact=True)
    expect(mood).to_contain_text(HOSTILE)
    expect(mood).to_contain_text("cosine with cheerful 1")
    mood.get_by_role("button", name="rename mood").click()
    mood.get_by_role("textbox", name="new name").fill("cheerful")
    mood.get_by_role("button", name="Rename", exact=True).click()
    expect(page.locator(".wrong")).to_contain_text("cheerful")
    mood.get_by_role("textbox", name="new name").fill("temper")
    mood.get_by_role("button", name="Rename", exact=True).click()
    temper = page.get_by_role("article", name="temper", exact=True)
    expect(temper).to_be_visible()
    assert violations(page) == [] and page.locator("main img, main script").count() == 0
    temper.get_by_role("button", name="remove temper").click()
    temper.get_by_role("button", name="Remove", exact=True).click()
    expect(temper).to_have_count(0)
    assert ADMIN not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert not any(ADMIN in url for url in visit.urls)


def fit_form(page: Page, name: str, pairs: str) -> Locator:
    form = page.get_by_role("region", name="Fit")
    form.get_by_role("textbox", name="pairs").fill(pairs)
    form.get_by_role("textbox", name="name").fill(name)
    return form


def test_a_vector_is_fitted_from_pasted_pairs_and_tried(visit: Visit) -> None:
    """By keys alone; what is wrong names its line; the hostile stays a text; the key is not kept."""
    page, world, draws = visit.page, build(0), Random(4)
    texts = [contrast(world, draws) for _ in range(60)]
    lines = [f"{one['cheerful']} | {one['gloomy']}" for one in texts]
    library(page)
    form = fit_form(page, "glad", "\n\n".join([*lines[:3], f"{HOSTILE} | "]))
    form.get_by_role("button", name="Fit").focus()
    page.keyboard.press("Enter")
    expect(form.get_by_role("alert")).to_contain_text("line 7, negative")
    expect(form.get_by_role("textbox", name="pairs")).to_have_attribute("aria-invalid", "true")
    form = fit_form(page, "glad", "\n".join([*lines, json.dumps({"positive": HOSTILE, "negative": "a dull day"})]))
    form.get_by_role("textbox", name="layers").fill("3-4")
    form.get_by_role("button", name="Fit").focus()
    page.keyboard.press("Enter")
    job = form.get_by_role("article", name="fit of glad")
    expect(job).to_contain_text("held-out rows", timeout=FITTING * 1000)
    expect(job).to_contain_text("tells the two texts of a pair apart in")
    assert violations(page) == [] and page.locator("main img, main script").count() == 0
    expect(page.get_by_role("article", name="glad", exact=True)).to_contain_text("layers 3, 4 of resid_post")
    job.get_by_role("button", name="try it").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("[data-pane]").last.locator(".state.done")).to_be_visible()
    visit.until("JSON.stringify({...localStorage}).includes('glad')")
    assert ADMIN not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert not any(ADMIN in url for url in visit.urls)


def test_a_fit_is_cancelled_and_put_away(visit: Visit) -> None:
    page = visit.page
    library(page)
    days = "day " * 60
    form = fit_form(page, "never", "\n".join(f"good {index} {days}| bad {index} {days}" for index in range(2000)))
    form.get_by_role("button", name="Fit").click()
    job = form.get_by_role("article", name="fit of never")
    job.get_by_role("button", name="cancel the fit of never").click()
    expect(job).to_contain_text("caa, cancelled", timeout=FITTING * 1000)
    job.get_by_role("button", name="put away the fit of never").click()
    expect(job).to_have_count(0)
    expect(page.get_by_role("article", name="never", exact=True)).to_have_count(0)


def test_what_a_foreign_file_leaves_unsaid_is_asked(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    np.save(tmp_path / "direction.npy", np.ones(192, dtype=np.float32))
    library(page)
    upload(page, tmp_path / "direction.npy", "direction")
    layer = page.get_by_role("region", name="Upload").get_by_role("textbox", name="layer")
    expect(layer).to_be_visible()
    layer.fill("3")
    page.get_by_role("button", name="Upload direction.npy").click()
    direction = page.get_by_role("article", name="direction", exact=True)
    expect(direction).to_contain_text("layers 3 of resid_post")


def test_thousands_of_tokens_stream_smoothly(visit: Visit, guarded: Server) -> None:
    """In three panes at once, each with its records: a token late in the text costs the page what an early one does,
    and typing is answered meanwhile."""
    page = visit.page
    expect(page.locator(".state.done")).to_have_count(3)
    cdp = visit.context.new_cdp_session(page)
    cdp.send("Performance.enable", {"timeDomain": "threadTicks"})  # time that the thread ran, whoever else did

    def spent() -> float:
        told = cdp.send("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in told if one["name"] == "TaskDuration"))

    def streamed() -> list[tuple[int, float]]:
        """(cells, what the page's thread has spent): at first, in the midst, and at the end."""
        page.evaluate("document.querySelectorAll('.figures').forEach(one => one.classList.add('before'))")
        marks = [(0, spent())]
        with guarded.held() as go_on:
            page.get_by_role("button", name="Run").click()
            expect(page.locator(".figures.before")).to_have_count(0)
            some = f"document.querySelectorAll('[data-cell]').length >= {TOKENS // 2}"
            visit.until(some, STREAMING, meanwhile=go_on)
            marks.append((page.locator("[data-cell]").count(), spent()))
            page.get_by_role("textbox", name="prompt", exact=True).press_sequentially(".")
        done = page.locator(".figures .state").filter(has_text=f"done, {TOKENS} tokens")
        expect(done).to_have_count(3, timeout=1000 * STREAMING)
        return [*marks, (page.locator("[data-cell]").count(), spent())]

    visit.make_endless()
    page.get_by_label("at most").fill(str(TOKENS))
    for _ in range(6):
        (_, start), (few, then), (every, end) = streamed()
        if few <= every / 2:
            anew = (every + few) / few  # growth of the time per token where every token has all of them drawn
            assert (end - then) / (every - few) < MOST_GROWTH * anew * (then - start) / few
            return
    pytest.skip("this machine gave the page most of the tokens at once, again and again")


def test_a_server_that_dies_in_mid_stream(visit: Visit, guarded: Server) -> None:
    """The text stays, marked as cut; nothing is sent again by itself."""
    page = visit.page
    expect(page.locator(".state.done")).to_have_count(3)
    visit.make_endless()
    page.get_by_label("at most").fill(str(TOKENS))
    with guarded.held() as go_on:
        page.get_by_role("button", name="Run").click()
        panes = "[...document.querySelectorAll('.pane')].slice(0, 3)"
        visit.until(f"{panes}.every(one => one.querySelectorAll('[data-cell]').length > 8)", meanwhile=go_on)
        texts = [one.inner_text() for one in page.locator(".text").all()]
        asked = sum(url.endswith("completions") for url in visit.urls)
        guarded.kill()
    for pane, text in enumerate(texts):
        one = page.locator(".pane").nth(pane)
        expect(one.locator(".figures .cut")).to_have_text(re.compile(r"the server went away after \d+ tokens"))
        assert one.locator(".text").inner_text().startswith(text.rstrip("▍"))
        expect(one.get_by_role("button", name="Retry")).to_be_visible()
    page.get_by_role("textbox", name="prompt", exact=True).fill("Edited meanwhile")
    page.locator(".pane").first.get_by_role("button", name="Retry").click()
    expect(page.locator(".pane").first.locator(".figures")).to_contain_text("the server cannot be reached")
    assert sum(url.endswith("completions") for url in visit.urls) == asked + 1
