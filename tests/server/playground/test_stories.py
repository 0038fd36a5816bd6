"""What people do on the page, in a real browser, before the embedded demo: no story breaks the page's policy, asks
another host, or leaves an error behind."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from browser import CHROMIUM, violations
from compare_screen import MORNING, Compare, answer
from playwright.sync_api import Locator, Page, Route, expect
from serving import Server

from .conftest import Visiting

pytestmark = pytest.mark.engine

PICTURES = os.environ.get("WHIPSTAFF_PICTURES")  # a folder, such as docs: the README's pictures go there
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'`${alert(3)}"


@pytest.fixture
def compare(demo_server: Server, visiting: Visiting) -> Compare:
    """A first visit: the demo's example runs by itself."""
    return Compare(visiting(demo_server.url))


def picture(page: Page, name: str, tmp_path: Path) -> None:
    browser = page.context.browser
    assert browser is not None
    if browser.browser_type.name != CHROMIUM.name:
        return  # elsewhere, to take one puts a style into the page, which its policy forbids
    path = Path(PICTURES or tmp_path) / f"{name}.png"
    page.set_viewport_size({"width": 1280, "height": 720})
    page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 30_000


def test_a_first_visit_shows_what_the_project_is(compare: Compare, demo_server: Server, tmp_path: Path) -> None:
    """Three answers that differ, each what the API says; then why a word was chosen."""
    compare.wait_until_done("Plain", "Steered", "Decoded")
    said = [compare.text(name) for name in ("Plain", "Steered", "Decoded")]
    assert len(set(said)) == 3
    more: list[dict[str, Any]] = [
        {},
        {"steering": {"vector": "cheerful", "scale": -8}},
        {"decoding": {"method": "dola"}},
    ]
    for text, fields in zip(said, more, strict=True):
        assert text == answer(demo_server, "/v1/completions", prompt=MORNING, **fields)["choices"][0]["text"]
    loaded = compare.page.evaluate(
        "performance.getEntriesByType('resource').filter(one => !one.name.includes('/v1/'))"
        ".reduce((sum, one) => sum + one.transferSize, 0)"
    )
    assert 50_000 < loaded < 300_000
    expect(compare.pane("Steered").locator(".b3, .b4").first).to_be_visible()
    picture(compare.page, "playground", tmp_path)
    compare.example("A question, answered")
    compare.wait_until_done("Plain", "Steered", "Decoded")
    assert "Mara lives in Greystow" in compare.text("Decoded")
    compare.page.get_by_role("radio", name="KL").check()
    compare.tokens("Decoded").first.click()
    expect(compare.drawer()).to_contain_text("tuned")
    picture(compare.page, "playground-inside", tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(compare: Compare, scheme: Any) -> None:
    compare.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.tokens("Steered").nth(2).click()
    compare.pane("Steered").get_by_text("where, when, how").click()
    assert violations(compare.page) == []
    for screen in ("Library", "Health"):
        compare.page.get_by_role("link", name=screen).click()
        expect(compare.page.locator(f"main.{screen.lower()}")).to_be_visible()
        assert violations(compare.page) == [], screen
    compare.page.get_by_role("button", name="Settings").click()
    assert violations(compare.page) == []


def test_a_slider_runs_its_pane_again_and_no_other(compare: Compare, demo_server: Server) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    asked = len(compare.visit.urls)
    slider = compare.pane("Steered").get_by_role("slider", name="cheerful: scale")
    slider.fill("8")
    wanted = answer(demo_server, "/v1/completions", prompt=MORNING, steering={"vector": "cheerful"})
    expect(compare.tokens("Steered").nth(1)).to_have_text(" soft")
    compare.wait_until_done("Steered")
    assert compare.text("Steered") == wanted["choices"][0]["text"]
    generated = [url for url in compare.visit.urls[asked:] if url.endswith("/v1/completions")]
    assert len(generated) == 1


def test_the_keyboard_alone_is_enough(compare: Compare) -> None:
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.pane("Steered").get_by_role("spinbutton", name="cheerful: scale, exactly").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("4")
    with compare.asking_anew():
        page.keyboard.press("Control+Enter")
    compare.wait_until_done("Plain", "Steered", "Decoded")
    assert compare.request("Steered")["steering"] == [{"vector": "cheerful", "scale": 4}]
    compare.pane("Plain").get_by_role("log").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    expect(compare.drawer().get_by_role("heading")).to_have_text(
        f"␣{compare.tokens('Plain').nth(2).inner_text().strip()}"
    )
    expect(compare.drawer().get_by_role("heading")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(compare.drawer()).to_contain_text("token 4 of")
    page.keyboard.press("Escape")
    expect(compare.drawer()).to_have_count(0)


def test_a_fork_keeps_what_was_before_and_goes_on_with_the_choice(compare: Compare) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    before = compare.tokens("Plain").all_text_contents()
    compare.tokens("Plain").nth(4).click()
    row = compare.drawer().get_by_role("row").filter(has=compare.page.get_by_role("button", name="go on with it")).first
    choice = row.get_by_role("rowheader").inner_text().replace("␣", " ")
    row.get_by_role("button", name="go on with it").click()
    compare.wait_until_done("Plain, from token 5")
    after = compare.tokens("Plain, from token 5").all_text_contents()
    assert after[:4] == before[:4] and after[4] == choice != before[4]


def test_a_search_leaves_what_the_api_answers(compare: Compare, demo_server: Server) -> None:
    """Streamed ahead of what is settled, with what it took back struck."""
    compare.example("Beams")
    compare.wait_until_done("Plain", "Searched")
    beams = {"method": "beam_search", "num_beams": 4}
    wanted = answer(demo_server, "/v1/completions", prompt=MORNING, decoding=beams, stop=["."], max_tokens=48)
    assert compare.text("Searched") == wanted["choices"][0]["text"]
    expect(compare.pane("Searched").locator(".figures")).to_contain_text("taken back")


def test_every_number_of_the_drawer_is_the_records(compare: Compare, demo_server: Server) -> None:
    compare.example("A question, answered")
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.tokens("Decoded").first.click()
    drawer = compare.drawer()
    messages = [{"role": "user", "content": "Where does Mara live?"}]
    decoding = {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}
    told = answer(demo_server, "/v1/chat/completions", messages=messages, decoding=decoding, explain={"top": 5})
    record = told["choices"][0]["explain"][0]
    figures = drawer.locator(".four dd").all_text_contents()
    assert figures[0] == str(record["final"]["rank"]) and figures[2] == str(record["base"]["rank"])
    assert float(figures[3].removesuffix(" nats")) == pytest.approx(record["kl"], rel=0.01)
    heads = drawer.locator("thead th").all_text_contents()
    assert heads[:-1] == ["token", "final", "base", "tuned", "untuned"]
    tokens = {
        token["token"] for one in (record["final"], record["base"], *record["streams"].values()) for token in one["top"]
    }
    assert {
        text.replace(" (drawn)", "").replace("␣", " ") for text in drawer.locator("tbody th").all_text_contents()
    } == tokens


def test_a_steered_answer_is_seen_by_the_unsteered_model(compare: Compare, demo_server: Server) -> None:
    """Held against a plain request that is given the same tokens."""
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.tokens("Steered").nth(1).click()
    drawer = compare.drawer()
    expect(drawer).to_contain_text("rank unsteered")
    steering = {"vector": "cheerful", "scale": -8}
    told = answer(demo_server, "/v1/completions", prompt=MORNING, steering=steering, explain={"top": 1})
    ids = [record["id"] for record in told["choices"][0]["explain"]]
    forced = {"method": "forced", "ids": ids}
    plain = answer(demo_server, "/v1/completions", prompt=MORNING, decoding=forced, explain={"top": 5})
    record = plain["choices"][0]["explain"][1]
    assert record["base"]["rank"] > 1
    assert drawer.locator(".four dd").all_text_contents()[2] == str(record["base"]["rank"])


def readings(label: str) -> tuple[float, float]:
    """The least and the most of a strip, as it says them."""
    found = re.search(r"reads (\S+) to (\S+), most", label)
    assert found is not None, label
    return float(found[1]), float(found[2])


def test_what_is_read_of_the_model_is_what_the_api_tells(compare: Compare, demo_server: Server) -> None:
    """A probe at every token, as a strip, a colour and a number; and how long activations are."""
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page, steered = compare.page, compare.pane("Steered")
    assert page.locator(".strip").count() == 0
    with compare.asking_anew():
        page.get_by_label("read along").select_option(label="is_cheerful")
    with compare.asking_anew():
        page.get_by_label("activations of layers").fill("2-3, 5")
        page.get_by_label("activations of layers").blur()
    expect(page.locator(".strip svg")).to_have_count(3)
    compare.wait_until_done("Plain", "Steered", "Decoded")
    steering = {"vector": "cheerful", "scale": -8}
    capture = {"layers": [2, 3, 5], "where": "generation"}
    along: dict[str, Any] = {"stop_when": {"probe": "is_cheerful", "above": 1e6}, "capture": capture}
    told = answer(demo_server, "/v1/completions", prompt=MORNING, steering=steering, **along)["whipstaff"]
    (read,) = told["stop_when"]["readings"]
    tensors = safetensors.numpy.load(base64.b64decode(told["captured"][0]["safetensors"]))
    label = steered.locator(".strip svg").get_attribute("aria-label") or ""
    assert readings(label) == pytest.approx((min(read), max(read)), rel=0.01)
    compare.tokens("Steered").nth(3).click()
    drawer = compare.drawer()
    said = drawer.locator(".facts > div").filter(has_text="is_cheerful reads").locator("dd")
    assert float(said.inner_text()) == pytest.approx(read[3], rel=0.01)
    lengths = [float(one) for one in drawer.locator(".lengths .bar > span").all_text_contents()]
    rows = [float(np.linalg.norm(tensors[f"0.resid_post.{layer}"][3])) for layer in (2, 3, 5)]
    assert lengths == pytest.approx(rows, rel=0.01)
    page.get_by_role("radio", name="probe").check()
    colours = [one.get_attribute("class") for one in compare.tokens("Steered").all()[: len(read)]]
    assert colours[read.index(max(read))] == "b8" and colours[read.index(min(read))] == "b0"
    box = steered.locator(".strip svg").bounding_box()
    assert box is not None
    steered.locator(".strip svg").click(position={"x": box["width"] * 5.5 / len(read), "y": 5})
    expect(drawer).to_contain_text("token 6 of")
    assert violations(page) == []
    assert "capture" not in compare.request("Steered") and "stop_when" not in compare.request("Steered")


def test_a_reading_ends_an_answer(compare: Compare, demo_server: Server) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    along = {"stop_when": {"probe": "is_cheerful", "above": 1e6}}
    (read,) = answer(demo_server, "/v1/completions", prompt=MORNING, **along)["whipstaff"]["stop_when"]["readings"]
    limit = round((min(read) + max(read)) / 2, 1)
    first = next(index for index, reading in enumerate(read) if reading > limit)
    compare.page.get_by_label("read along").select_option(label="is_cheerful")
    compare.page.get_by_label("reading that ends the answer").fill(str(limit))
    expect(compare.pane("Plain").locator(".figures .state")).to_have_text(f"done, {first + 1} tokens")
    assert compare.request("Plain")["stop_when"] == {"probe": "is_cheerful", "above": limit}
    expect(compare.pane("Plain").locator(".strip .limit")).to_have_count(1)
    compare.example("Beams")
    expect(compare.pane("Searched").locator(".figures .state")).to_have_class("state done")


def test_what_a_condition_reads_is_read_along(compare: Compare) -> None:
    compare.example("Only where it is merry")
    pane = compare.pane("Held back")
    expect(pane.locator(".strip svg")).to_have_attribute("aria-label", re.compile("is_cheerful reads"))
    expect(pane.locator(".strip .limit")).to_have_count(1)
    assert compare.pane("Plain").locator(".strip").count() == 0
    compare.wait_until_done("Held back")
    expect(pane.locator(".figures")).to_contain_text("open at")


def test_editors_say_where_when_and_how(compare: Compare) -> None:
    """Layers, a condition and a schedule by their forms: the request has what was touched, and the server takes it."""
    compare.wait_until_done("Plain", "Steered", "Decoded")
    pane = compare.pane("Steered")
    pane.get_by_text("where, when, how").click()
    pane.get_by_role("group", name="layers").get_by_role("button", name="3").click()
    pane.get_by_role("button", name="set when").click()
    pane.get_by_role("textbox", name="probe").fill("is_cheerful")
    pane.get_by_role("spinbutton", name="above").fill("-2.5")
    pane.get_by_role("radio", name="step").check()
    pane.get_by_role("button", name="set schedule").click()
    pane.get_by_role("combobox", name="shape").select_option("linear")
    pane.get_by_role("spinbutton", name="to, exactly").fill("0.5")
    pane.get_by_role("spinbutton", name="tokens").fill("9")
    expect(pane.locator(".figures")).to_contain_text("open at")
    expect(pane.locator(".wrong")).to_have_count(0)
    when = {"probe": "is_cheerful", "above": -2.5, "decide": "step"}
    schedule = {"shape": "linear", "to": 0.5, "tokens": 9}
    wanted = [{"vector": "cheerful", "scale": -8, "layers": [4], "when": when, "schedule": schedule}]
    assert compare.request("Steered")["steering"] == wanted


MADE_UP: dict[str, Any] = {
    "name": "made_up",
    "kind": "truncation",
    "available": True,
    "reason": None,
    "paper": None,
    "defaults": {},
    "shorthands": {},
    "schema": {
        "type": "object",
        "required": ["method", "share"],
        "$defs": {"Row": {"type": "object", "properties": {"weight": {"type": "number", "default": 1.0}}}},
        "properties": {
            "method": {"const": "made_up"},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "many": {"type": "integer", "default": 3},
            "which": {"enum": ["a", "b", "c", "d", "e"]},
            "is_on": {"type": "boolean", "default": False},
            "text": {"anyOf": [{"type": "string", "maxLength": 5000}, {"type": "null"}], "default": None},
            "rows": {"type": "array", "items": {"$ref": "#/$defs/Row"}},
            "weights": {"type": "object", "additionalProperties": {"type": "number"}},
            "window": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "integer"}]},
            "either": {"anyOf": [{"enum": ["all"]}, {"type": "array", "items": {"type": "integer"}}]},
            "strange": {"not": {"type": "string"}},
        },
    },
    "example": {
        "model": "demo",
        "prompt": "Once",
        "max_tokens": 5,
        "temperature": 0,
        "min_tokens": 2,
        "decoding": {"method": "made_up", "share": 0.5, "rows": [{"weight": 2}], "strange": [1]},
    },
}


def test_a_new_method_needs_no_page_code(demo_server: Server, visiting: Visiting) -> None:
    """One that nobody has heard of, of every keyword: it is offered, has a form and an example, and what is wrong with
    it stands there."""
    visit = visiting(demo_server.url)
    table = httpx.get(f"{demo_server.url}/v1/steering/methods").json()
    table["data"].append(MADE_UP)
    visit.page.route("**/v1/steering/methods", lambda route: route.fulfill(json=table))
    compare = Compare(visit)
    compare.wait_until_done("Plain", "Steered", "Decoded")
    pane = compare.pane("Plain")
    pane.get_by_role("combobox", name="add decoding").select_option(label="made_up (truncation)")
    pane = compare.pane("Decoded")
    entry = pane.get_by_role("article", name="decoding: made_up")
    entry.locator("summary").click()
    assert entry.locator(".fields").first.locator(":scope > .field").count() == 9
    assert violations(visit.page) == []
    entry.get_by_role("button", name="example of made_up").click()
    expect(visit.page.get_by_role("textbox", name="prompt", exact=True)).to_have_value("Once")
    expect(pane.locator(".wrong").first).to_contain_text("made_up")
    entry.get_by_role("button", name="JSON").click()
    assert json.loads(entry.get_by_role("textbox").input_value()) == MADE_UP["example"]["decoding"]
    more = pane.get_by_role("textbox", name="further fields as JSON")
    assert json.loads(more.input_value()) == {"min_tokens": 2}
    entry.get_by_role("button", name="remove made_up").click()
    compare.run()
    compare.wait_until_done("Plain")
    more = compare.pane("Plain").get_by_role("textbox", name="further fields as JSON")
    more.fill('{"max_tokens": 2, "echo": true}')
    expect(compare.pane("Plain").locator(".figures .state")).to_have_text("done, 2 tokens")
    assert compare.text("Plain").startswith("Once")


def test_examples_of_methods_run_as_they_stand(compare: Compare, demo_server: Server) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    methods = {one["name"]: one for one in httpx.get(f"{demo_server.url}/v1/steering/methods").json()["data"]}
    for pane, name in (("Steered", "caa"), ("Decoded", "dola")):
        example = methods[name]["example"]
        with compare.asking_anew():
            compare.pane(pane).get_by_role("button", name="example of").click()
        compare.wait_until_done(pane)
        said = compare.request(pane)
        assert said["prompt"] == example["prompt"] and said["max_tokens"] == example["max_tokens"]
        wanted = httpx.post(f"{demo_server.url}/v1/completions", json=example, timeout=120).json()
        assert compare.text(pane) == wanted["choices"][0]["text"]


def test_errors_stand_beside_the_field_that_the_server_names(compare: Compare) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    pane, page = compare.pane("Steered"), compare.page
    pane.get_by_text("where, when, how").click()
    pane.get_by_role("radio", name="custom").check()
    expect(pane.locator('[data-path="steering[0].where"] > .wrong')).to_contain_text("the clause selects no token")
    pane.get_by_role("button", name="where: unset").click()
    expect(pane.locator(".wrong")).to_have_count(0)
    box = page.get_by_role("spinbutton", name="temperature, exactly")
    box.fill("-1")
    expect(page.locator('.ask [data-path="temperature"] .wrong')).to_contain_text("temperature must be non-negative")
    box.fill("0")
    expect(page.locator(".wrong")).to_have_count(0)
    pane.get_by_role("button", name="JSON").click()
    pane.get_by_role("textbox", name="cheerful as JSON").fill('{"vector": "cheerfull"}')
    expect(pane.locator(".wrong")).to_contain_text("there is no vector 'cheerfull'")


def test_every_method_has_a_form_and_untouched_defaults_are_not_sent(compare: Compare, demo_server: Server) -> None:
    """All that this server can run: added, with its form open, the request is the method's name and what it needs."""
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.page.get_by_role("button", name="remove Decoded").click()
    methods = {one["name"]: one for one in httpx.get(f"{demo_server.url}/v1/steering/methods").json()["data"]}
    able = [name for name, one in methods.items() if one["available"] and one["kind"] != "edit"]
    assert len(able) > 20
    compare.page.get_by_role("button", name="remove Steered").click()
    pane = compare.page.locator(".pane").first
    for name in able:
        adder = pane.get_by_role("combobox", name="add decoding")
        adder.select_option(label=f"{name} ({methods[name]['kind']})")
        entry = pane.get_by_role("article", name=f"decoding: {name}")
        entry.locator("summary").click()
        fields = entry.locator(".fields").first.locator(":scope > .field").count()
        free = [key for key, one in methods[name]["schema"]["properties"].items() if "const" not in one]
        assert len(free) - 1 <= fields <= len(free), name
        said = json.loads(entry_json(entry))
        assert said["method"] == name and set(said) <= {"method", *methods[name]["schema"].get("required", [])}, name
        entry.get_by_role("button", name=f"remove {name}").click()


def entry_json(entry: Locator) -> str:
    entry.get_by_role("button", name="JSON").click()
    return entry.get_by_role("textbox").input_value()


def test_copied_code_gives_the_same_answer(compare: Compare) -> None:
    compare.example("A question, answered")
    compare.wait_until_done("Plain", "Steered", "Decoded")
    prompt = "Where does Mara live? 'quoted' \"twice\" $HOME `id` \\ </script>\nand so"
    compare.page.get_by_role("textbox", name="message 1: user").fill(prompt)
    compare.run()
    compare.wait_until_done("Plain", "Steered", "Decoded")
    wanted = compare.text("Decoded")
    compare.page.get_by_role("button", name="Code", exact=True).click()
    dialog = compare.page.get_by_role("dialog")
    dialog.get_by_role("radio", name="Decoded").check()
    for language in ("curl", "Python"):
        dialog.get_by_role("radio", name=language).check()
        dialog.get_by_role("button", name="Copy").click()
        code = compare.page.evaluate("navigator.clipboard.readText()")
        command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        text = json.loads(said)["choices"][0]["message"]["content"] if language == "curl" else said.removesuffix("\n")
        assert text == wanted, language


def test_a_link_fills_the_page_and_does_not_run(compare: Compare, demo_server: Server, visiting: Visiting) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.page.get_by_role("textbox", name="prompt", exact=True).fill(
        f"A link {HOSTILE} \u0645\u0631\u062d\u0628\u0627"
    )
    compare.page.get_by_role("button", name="Share").click()
    expect(compare.page).to_have_url(re.compile("#s=1"))
    other = Compare(visiting(demo_server.url), compare.page.url.partition("/#")[2].join(["#", ""]))
    expect(other.page.get_by_role("textbox", name="prompt", exact=True)).to_have_value(re.compile("^A link <img"))
    expect(other.page.get_by_text("Nothing runs before you say so")).to_be_visible()
    assert other.request("Steered")["steering"] == [{"vector": "cheerful", "scale": -8}]
    assert not any(url.endswith("completions") for url in other.visit.urls)
    for bad in ("#s=1.AAAA", "#s=9.x", "#s=1." + "A" * 1_100_000, "#s=1.<script>alert(1)</script>"):
        broken = Compare(visiting(demo_server.url), bad)
        expect(broken.page.get_by_text("The link is no good")).to_be_visible()


def test_nothing_is_lost_on_reload_and_all_can_be_cleared(compare: Compare) -> None:
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page.get_by_role("textbox", name="prompt", exact=True).fill("Kept words")
    page.get_by_role("radio", name="KL").check()
    page.reload()
    expect(page.get_by_role("textbox", name="prompt", exact=True)).to_have_value("Kept words")
    expect(page.get_by_role("radio", name="KL")).to_be_checked()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Clear what this browser keeps").click()
    expect(page.get_by_role("textbox", name="prompt", exact=True)).to_have_value(MORNING)
    page.evaluate("localStorage.setItem('whipstaff.playground', '{\"version\": 99, \"setup\": 7}')")
    page.reload()
    expect(page.get_by_role("textbox", name="prompt", exact=True)).to_have_value(MORNING)


def test_a_stopped_pane_keeps_its_text_and_the_others_go_on(compare: Compare, demo_server: Server) -> None:
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page = compare.page
    with compare.asking_anew():
        page.get_by_label("read along").select_option(label="is_cheerful")
    before = aborted(demo_server)
    compare.visit.make_endless()
    page.get_by_label("at most").fill("900")
    with demo_server.held() as go_on:
        compare.run()
        while compare.tokens("Steered").count() < 4:
            go_on()
            page.wait_for_timeout(100)
        expect(compare.pane("Steered").locator(".strip svg")).to_have_count(1)  # it grows with the answer
        page.get_by_role("button", name="stop Steered").click()
        expect(compare.pane("Steered").locator(".figures")).to_contain_text("stopped after")
        kept = compare.text("Steered")
        assert len(kept.split()) > 2
        expect(compare.pane("Plain").locator(".figures .state")).to_have_class(re.compile("streaming"))
        page.keyboard.press("Escape")
        expect(compare.pane("Plain").locator(".figures")).to_contain_text("stopped after")
    deadline = time.monotonic() + 120
    while aborted(demo_server) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert aborted(demo_server) >= before + 3
    assert compare.text("Steered").startswith(kept)


def aborted(server: Server) -> float:
    """Requests whose client went away."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(map(float, re.findall(r'^whipstaff_requests_total\{.*outcome="aborted".*\} (\S+)$', text, re.M)))


def test_hostile_words_are_shown_as_words(compare: Compare) -> None:
    """In the prompt, in an answer (by `forced`), in a label and in what the server says of an error."""
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page.get_by_role("textbox", name="prompt", exact=True).fill(HOSTILE)
    pane = compare.pane("Decoded")
    pane.get_by_role("button", name="JSON").click()
    pane.get_by_role("textbox", name="dola as JSON").fill(json.dumps({"method": "forced", "text": HOSTILE}))
    page.get_by_label("at most").fill("120")
    compare.run()
    expect(pane.get_by_role("log")).to_contain_text("<script>alert(2)</script>")
    compare.wait_until_done("Decoded")
    assert HOSTILE in compare.text("Decoded")
    compare.tokens("Decoded").first.click()
    steered = compare.pane("Steered")
    steered.get_by_role("button", name="JSON").click()
    steered.get_by_role("textbox", name="cheerful as JSON").fill(json.dumps({"vector": HOSTILE[:60]}))
    expect(steered.locator(".wrong")).to_contain_text("<img src=x")
    assert page.locator("img, main script").count() == 0


def test_other_scripts_keep_their_shape_and_direction(compare: Compare) -> None:
    """Every record is in exactly one cell, the joined cells are the text, and no character is cut in two."""
    arabic, hindi = "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947"
    text = f"{arabic} {hindi} \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea"
    compare.wait_until_done("Plain", "Steered", "Decoded")
    pane = compare.pane("Decoded")
    pane.get_by_role("button", name="JSON").click()
    pane.get_by_role("textbox", name="dola as JSON").fill(json.dumps({"method": "forced", "text": text}))
    compare.page.get_by_label("at most").fill("120")
    compare.run()
    expect(pane.get_by_role("log")).to_contain_text("\U0001f1e9\U0001f1ea")
    compare.wait_until_done("Decoded")
    cells = compare.tokens("Decoded").all_text_contents()
    assert "\ufffd" not in "".join(cells) and "".join(cells).startswith(text)
    assert all(not cell.startswith(("\u200d", "\U0001f1ea")) for cell in cells)
    direction = pane.locator(".text p").first.evaluate("element => getComputedStyle(element).direction")
    assert direction == "rtl"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_phone_needs_no_scrolling_sideways(demo_server: Server, visiting: Visiting, path: str) -> None:
    visit = visiting(demo_server.url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    visit.page.goto(path)
    if path == "/":
        steered = visit.page.get_by_role("region", name="Steered")
        expect(steered.locator(".figures .state")).to_have_class("state done")
        steered.locator("[data-cell]").nth(1).tap()
        expect(visit.page.get_by_role("complementary", name="inside this token")).to_be_visible()
        assert violations(visit.page) == []
    else:
        expect(visit.page.locator(".opblock").first).to_be_visible()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_screen_readers_hear_one_line_for_each_event(compare: Compare) -> None:
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page.evaluate(
        """window.heard = []; new MutationObserver(() => heard.push(document.querySelector('p.unseen[role=status]')
        .textContent)).observe(document.querySelector('p.unseen[role=status]'), {childList: true, characterData: true,
        subtree: true})"""
    )
    compare.run()
    compare.wait_until_done("Plain", "Steered", "Decoded")
    compare.visit.until("heard.some(one => one.startsWith('Decoded: done'))")
    heard = page.evaluate("heard")
    assert 2 <= len(heard) <= 6 and all(re.fullmatch(r"\w+: (started|done, \d+ tokens)", one) for one in heard)
    assert page.locator(".text").first.get_attribute("aria-live") == "off"


def test_health_shows_what_happens(compare: Compare) -> None:
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")
    page.get_by_role("link", name="Health").click()
    expect(page.locator(".tile").filter(has_text="slots").first).to_be_visible()
    httpx.post(
        f"{compare.visit.url}/v1/completions", json={"model": "demo", "prompt": "In", "max_tokens": 60}, timeout=60
    )
    expect(page.get_by_role("figure", name="first token, p50 (s)").get_by_role("row", name="plain")).to_be_visible()
    assert "NaN" not in page.locator("main").inner_text()


def test_health_is_no_row_of_zeros_where_it_may_not_be_seen(compare: Compare) -> None:
    """As on a server with a file of keys: the administrator's opens it, in the user's place."""
    page = compare.page
    compare.wait_until_done("Plain", "Steered", "Decoded")

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer root":
            route.continue_()
        else:
            route.fulfill(status=403, json={"error": {"message": "this key does not open that", "param": None}})

    page.route("**/metrics", guard)
    page.get_by_role("link", name="Health").click()
    expect(page.locator(".wrong")).to_contain_text("/metrics: this key does not open that")
    assert page.locator(".tile").count() == 0 and violations(page) == []
    page.get_by_label("administrator's key").get_by_role("textbox").fill("root")
    expect(page.locator(".tile").filter(has_text="slots").first).to_be_visible()
    expect(page.locator(".wrong")).to_have_count(0)
    assert (
        page.get_by_role("link", name="Grafana").count() == 0 and "--grafana-url" in page.locator("main").inner_text()
    )


def test_the_library_shows_what_there_is(compare: Compare) -> None:
    page = compare.page
    page.get_by_role("link", name="Library").click()
    vector = page.get_by_role("article", name="cheerful", exact=True)
    expect(vector).to_contain_text("layers 3, 4 of resid_post")
    expect(vector).to_contain_text("dose 0.54 at resid_post.4")
    assert vector.get_by_role("button", name="remove cheerful").count() == 0  # it was given by --vectors
    page.get_by_role("article", name="gloomy").get_by_role("button", name="try it").click()
    expect(page.get_by_role("region", name="@gloomy")).to_be_visible()
    compare.run()
    compare.wait_until_done("@gloomy")
    assert compare.text("@gloomy") == compare.text("Steered")
