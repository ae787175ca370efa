"""The web page in headless Chromium. SCREENSHOTS=folder saves pictures of it."""

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("selenium")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("there is no Chromium with its driver", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Page:
    """A browser on the page; `js` runs in it."""

    def __init__(self, browser):
        self.browser, self.js = browser, browser.execute_script

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        return WebDriverWait(self.browser, 30).until(lambda _: condition())

    def keys(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def generate(self, prompt, seed=5):
        self.js("document.getElementById('seed').value = arguments[0]", seed)
        self["prompt"].send_keys(Keys.CONTROL, "a")
        self["prompt"].send_keys(prompt)
        self["generate"].click()
        self.wait(lambda: self["status"].text not in ("Ready.", "Generating…"))

    def open_choices(self, number):
        """Click a token until its alternatives are open: the page may miss a click during
        layout."""

        def clicked():
            self.all(".token")[number].click()
            return self["choices"].is_displayed()

        self.wait(clicked)

    def logged(self):
        return [line for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium, serve, tmp_path):
    """`page(width, height, scheme="light", **options)`: the page of a server with one run."""

    def page(width=1200, height=900, scheme="light", **options):
        (tmp_path / "tiny").mkdir()
        lines = [{"step": step, "val_loss": 3 - step / 10} for step in range(20)]
        (tmp_path / "tiny" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / "<b>other").mkdir()
        (tmp_path / "<b>other" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 600}
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get(f"http://127.0.0.1:{serve(**options)[1]}/")
        shown = Page(chromium)
        shown.wait(lambda: shown["status"].text not in ("", "Generating…"))
        return shown

    return page


def test_shading_and_alternative_tokens(page):
    shown = page()
    shown.generate("HELLO")
    text = shown["text"].text
    tokens = shown.all(".token")
    assert len(tokens) == 200 and text.startswith("HELLO")
    logprobs = shown.js("return tokens.map((token) => token.logprob)")
    shades = [float(t.get_attribute("style").split(":")[1].strip(" ;")) for t in tokens]
    assert shades == pytest.approx([min(-logprob / 8, 1) for logprob in logprobs], abs=1e-3)
    ActionChains(shown.browser).move_to_element(tokens[7]).perform()
    shown.wait(lambda: len(shown.all("#choices button")) == 10)
    choices = shown.all("#choices button")
    assert shown.all("#choices [aria-current]")
    other = next(c for c in choices if c.get_attribute("aria-current") is None)
    name = other.find_element(By.CSS_SELECTOR, ".name").text
    other.click()
    shown.wait(lambda: "a second" in shown["status"].text)
    again = shown["text"].text
    assert again[:12] == text[:12] and again[12] == name != text[12] and len(again) == len(text)
    assert "taken" in shown.all(".token")[7].get_attribute("class")
    assert shown.logged() == []


def test_keyboard_reaches_tokens_and_choices(page):
    shown = page()
    shown.generate("HELLO")
    shown.js("focusToken(0)")
    shown.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER, Keys.ARROW_DOWN)
    assert shown.js("return document.activeElement.parentElement.id") == "choices"
    shown.keys(Keys.ESCAPE)
    assert shown.js("return [shown, indexOf(document.activeElement)]") == [None, 2]
    before = shown["text"].text
    shown.keys(Keys.ENTER, Keys.ARROW_UP, Keys.ENTER)
    shown.wait(lambda: shown["text"].text != before and "a second" in shown["status"].text)
    assert shown["text"].text[:7] == before[:7]


def test_text_and_names_are_never_markup(page):
    shown = page()
    shown.generate("<img src=x>")  # outside the vocabulary
    assert "outside the vocabulary" in shown["status"].text and shown.all("#status.error")
    shown.js("append({id: 1, name: '<img src=x>', logprob: -1, top: []})")
    assert not shown.all("#text img, #text b, #runs b") and "<b>other" in shown["runs"].text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_layout_fits_every_width(page, width, scheme):
    shown = page(width, 900, scheme)
    shown.generate("HELLO")
    shown.wait(lambda: shown["curves"].is_displayed())
    assert shown["curves"].get_attribute("alt") == "Loss curves of tiny"
    shown.open_choices(3)
    assert shown.js("return document.documentElement.scrollWidth <= innerWidth")
    shown.js("hideChoices()")
    shown.open_choices(80)  # far down on a phone, where the choices come to lie
    assert not shown.all(".taken") and shown.js("return shown") == 80
    place = "const box = $('choices').getBoundingClientRect(); "
    place += "const token = tokens[80].span.getBoundingClientRect(); "
    assert shown.js(f"{place} return token.bottom <= box.top + 1 || token.top >= box.bottom - 1")
    if folder := os.environ.get("SCREENSHOTS"):
        shown.browser.save_screenshot(str(Path(folder, f"page-{scheme}-{width}.png")))


def test_api_key_and_live_curves(page, tmp_path):
    shown = page(api_key="secret")
    assert shown["key"].is_displayed() and "API key" in shown["status"].text
    shown["key"].send_keys("secret", Keys.TAB)
    shown.wait(lambda: shown["status"].text == "Ready." and shown["curves"].is_displayed())
    first = shown["curves"].get_attribute("src")
    with open(tmp_path / "tiny" / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 20, "val_loss": 0.5}')
    shown.wait(lambda: shown["curves"].get_attribute("src") != first)
