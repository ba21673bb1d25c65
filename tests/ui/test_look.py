"""What everybody can read and reach: contrast in both themes, names for all that is pressed, a keyboard alone, a narrow screen."""

import json

import pytest

from tests.e2e.running import Daemon
from tests.ui.browser import Page
from tests.ui.test_page import opened, row, state_is

pytestmark = [pytest.mark.xdist_group("ui"), pytest.mark.timeout(180)]

# Of each element with a text of its own that is seen: its colour on the first opaque ground behind it (WCAG 2.2, 1.4.3).
FAINT = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = parse(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return parse(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  let judged = 0;
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({visibilityProperty: true}) || node.closest('.sr, .skip')) continue;
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    judged += 1;
    if (contrast < 4.5) found.push(`${node.tagName}.${node.className} ${node.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return {found, judged};
})()"""
NAMELESS = """[...document.querySelectorAll('button, input, textarea, [tabindex="0"], [role=img]')].filter((node) =>
  !(node.getAttribute('aria-label') || node.getAttribute('aria-labelledby') || node.labels?.length || node.textContent.trim()))
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_texts_can_be_read(daemon: Daemon, page: Page, url: str, theme: str) -> None:
    page.prefer(theme)
    opened(page, url)
    page.until("document.querySelector('.readout tbody')", "the GPU")
    page.js(
        "const n = document.querySelector('#notice'); n.hidden = false; n.firstElementChild.textContent = 'What a refusal looks like'; 1"
    )
    for state in ("ready", "asleep", "starting", "failed", "stopped"):
        page.js(f"document.querySelector('#rows .state').dataset.state = {json.dumps(state)}; 1")
        told = page.js(FAINT)
        assert told["found"] == []
        assert told["judged"] > 30
    page.click("#rows button.link")
    page.until("document.querySelector('#facts dt')", "the panel")
    assert page.js(FAINT)["found"] == []
    ground = page.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 300) == (theme == "dark")


def test_the_theme_that_is_chosen_stays(page: Page, url: str, daemon: Daemon) -> None:
    page.prefer("light")
    opened(page, url)
    page.click("#theme")
    page.click("#theme")
    assert page.js("document.documentElement.dataset.theme") == "dark"
    opened(page, url)
    assert page.js("document.documentElement.dataset.theme") == "dark"
    assert page.text("#theme") == "dark"


def test_all_that_is_pressed_has_a_name(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    page.until("document.querySelector('.readout tbody')", "the GPU")
    page.click("#rows button.link")
    assert page.js(NAMELESS) == []
    labels = page.js("[...document.querySelectorAll('#rows [data-verb]')].map((node) => node.getAttribute('aria-label'))")
    assert len(labels) == len(set(labels)) >= 4


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_makes_it_scroll_sideways(daemon: Daemon, page: Page, url: str, width: int) -> None:
    page.size(width, 800)
    opened(page, url)
    page.until("document.querySelector('.readout tbody')", "the GPU")
    over = "[...document.querySelectorAll('body *')].filter((node) => node.getBoundingClientRect().right > innerWidth + 1)"
    assert page.js(f"{over}.filter((node) => !node.closest('.sr, .uplot, thead')).map((node) => node.outerHTML.slice(0, 90))") == []
    assert page.js("document.documentElement.scrollWidth") <= width
    page.click("#rows button.link")
    assert page.js("document.querySelector('#panel').scrollWidth <= innerWidth")


def test_a_keyboard_is_enough(daemon: Daemon, page: Page, url: str) -> None:
    name = daemon.name("one")
    opened(page, url)
    page.until(f"{row(name)}.querySelector('[data-verb=sleep]')", "it can be put to sleep")

    def reach(what: str) -> None:
        for _ in range(60):
            page.press("Tab")
            if page.js(f"document.activeElement.matches({json.dumps(what)})"):
                return
        raise AssertionError(f"not reached: {what}")

    reach(".skip")
    page.press("Enter")
    reach(f"#rows tr[data-name='{name}'] button.link")
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    page.until("document.querySelector('#panel').open && document.activeElement.id === 'tab-about'", "the panel")
    page.press("ArrowRight")
    page.until("document.activeElement.id === 'talk-text'", "the chat")
    page.press("Escape")
    page.until("!document.querySelector('#panel').open", "closed")
    assert page.js(f"document.activeElement.matches({json.dumps(f'#rows tr[data-name={json.dumps(name)}] button.link')})")
    reach("[data-verb=sleep]")
    page.press("Enter")
    page.until(state_is(name, "asleep"), "it sleeps")
    assert page.js(f"{row(name)}.contains(document.activeElement)"), "the focus stays with the model"
    daemon.tell(name, "wake")
    daemon.until_state(name, "ready")
