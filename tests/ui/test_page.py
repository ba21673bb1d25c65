"""The page at /ui, as people meet it: a real daemon with simulated engines, a real browser."""

import json

import pytest

from tests.e2e.conftest import Fresh
from tests.e2e.running import Daemon
from tests.ui.browser import Browser, Page
from tests.ui.tunnel import tunnel

LIVE = "document.querySelector('#link').dataset.link === 'live' && document.querySelectorAll('#rows tr').length"
pytestmark = [pytest.mark.xdist_group("ui"), pytest.mark.timeout(180)]


def opened(page: Page, url: str) -> Page:
    page.open(f"{url}/ui")
    page.until(LIVE, "the page is live")
    return page


def row(name: str) -> str:
    return f"document.querySelector({json.dumps(f'#rows tr[data-name={json.dumps(name)}]')})"


def state_is(name: str, state: str) -> str:
    return f"{row(name)}?.querySelector('.state').textContent === {json.dumps(state)}"


def verb(page: Page, name: str, word: str) -> None:
    button = f"{row(name)}.querySelector('[data-verb={word}]')"
    page.until(button, f"{name} can {word}")
    page.js(f"{button}.click()")


def test_it_shows_who_has_the_gpu_and_asks_nobody_but_its_daemon(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    page.until("document.querySelectorAll('.readout tbody th').length >= 6 && document.querySelectorAll('canvas').length === 2", "charts")
    named = page.text(".readout")
    for model in ("one", "two"):
        assert daemon.name(model) in named
        assert page.js(state_is(daemon.name(model), "ready"))
    assert "GiB used" in page.text(".gpu")
    assert "ready" in page.text("#events")
    assert page.text("#simulated") == "simulated GPU"
    assert page.errors == []
    assert page.strangers(url) == []


def test_what_is_done_here_is_seen_here_without_a_reload(daemon: Daemon, page: Page, url: str) -> None:
    name = daemon.name("two")
    opened(page, url)
    verb(page, name, "sleep")
    page.until(state_is(name, "asleep"), "it sleeps")
    page.until(f"document.querySelector('#said').textContent.includes({json.dumps(name)})", "a screen reader hears of it")
    verb(page, name, "pin")
    page.until(f"{row(name)}.querySelector('[data-verb=unpin]')", "it is pinned")
    verb(page, name, "unpin")
    verb(page, name, "wake")
    page.until(state_is(name, "ready"), "it is awake")
    assert page.errors == []


def test_a_refusal_is_told_in_the_daemons_words(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    verb(page, daemon.name("one"), "unload")
    page.until(state_is(daemon.name("one"), "stopped"), "it is unloaded")
    page.js(f"{row(daemon.name('one'))}.querySelector('[data-verb=load]').dataset.verb = 'wake'; 1")
    verb(page, daemon.name("one"), "wake")
    page.until("document.querySelector('#notice').innerText.includes('not asleep')", "the refusal")
    page.js(f"{row(daemon.name('one'))}.querySelector('[data-verb=wake]').dataset.verb = 'load'; 1")
    verb(page, daemon.name("one"), "load")
    page.until(state_is(daemon.name("one"), "ready"), "it is back")
    page.until("document.querySelector('#notice').hidden", "the refusal is gone")


def test_a_chat_streams_and_can_be_stopped(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    page.click(f"#rows tr[data-name='{daemon.name('one')}'] [data-tab=chat]")
    page.until("document.activeElement.id === 'talk-text'", "ready to write")
    page.write("Hello")
    page.press("Enter")
    page.until("document.querySelector('.said.assistant p')?.textContent.length > 20", "it answers")
    page.until("document.querySelector('#talk-status').textContent.includes('pieces')", "the answer ends")
    with daemon.engines_held():
        page.write("More")
        page.press("Enter")
        page.click("#talk-stop:not([hidden])")
        page.until("document.querySelector('#talk-status').textContent === 'Stopped.'", "it is stopped")
    assert page.errors == []


def test_a_chat_tells_what_it_waits_for_and_wakes_the_model(daemon: Daemon, page: Page, url: str) -> None:
    name = daemon.name("two")
    opened(page, url)
    verb(page, name, "unload")
    page.until(state_is(name, "stopped"), "it is unloaded")
    page.js("""window.heard = []; new MutationObserver(() => heard.push(document.querySelector('#talk-status').textContent))
        .observe(document.querySelector('#talk-status'), {childList: true, characterData: true, subtree: true}); 1""")
    page.click(f"#rows tr[data-name='{name}'] [data-tab=chat]")
    page.write("Hello")
    page.press("Enter")
    page.until("document.querySelector('.said.assistant p')?.textContent.length > 20", "it answers")
    assert any(f"waiting for {name}" in heard for heard in page.js("heard"))


def test_a_log_is_followed(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    page.click(f"#rows tr[data-name='{daemon.name('one')}'] button.link")
    page.click("#tab-log")
    page.until("document.querySelector('#log').textContent.includes('INFO')", "its last lines")
    lines = page.js("document.querySelector('#log').textContent.length")
    daemon.ctl("limit", daemon.name("one"), "--weight", "2")
    page.until(f"document.querySelector('#log').textContent.length > {lines}", "more of them")


def test_what_users_made_up_is_text(daemon: Daemon, page: Page, url: str) -> None:
    hostile = daemon.folder / "<img src=x onerror=window.hit=1><script>window.hit=1<"
    hostile.mkdir()
    (hostile / "config.json").write_text((daemon.model_folder / "config.json").read_text())
    name = daemon.name("x")
    daemon.post("/models?start=false", {"name": name, "source": str(hostile)})
    opened(page, url)
    page.click(f"#rows tr[data-name='{name}'] button.link")
    page.until("document.querySelector('#facts').textContent.includes('<img src=x onerror')", "its source, as text")
    event = {"at": 1, "model": name, "kind": "<b>", "reason": str(hostile)}
    page.js(f"""import(document.baseURI + '/events.js').then(({{line}}) =>
        document.querySelector('#events').prepend(line({json.dumps(event)}, true)))""")
    assert "<img src=x onerror" in page.text("#events")
    assert page.js("document.querySelectorAll('main img, dialog img, main script').length") == 0
    assert page.js("window.hit === undefined")
    page.js("window.made = document.body.appendChild(document.createElement('img')); made.setAttribute('onerror', 'window.hit = 1')")
    page.js("new Promise((done) => { made.addEventListener('error', () => done(1)); made.src = 'x:'; })")
    assert page.js("window.hit === undefined"), "the policy is the wall behind it"
    assert daemon.ctl("rm", name).returncode == 0


def test_a_key_is_asked_for_and_shows_only_its_models(fresh: Fresh, page: Page) -> None:
    daemon = fresh().start()
    mine, other = daemon.name("mine"), daemon.name("other")
    daemon.add(mine)
    daemon.add(other)
    key = json.loads(daemon.ctl("keys", "create", "alice", "--model", mine, "--json").stdout)["key"]
    url = daemon.get("/status")["listen"]
    page.open(f"{url}/ui")
    page.until("document.querySelector('#key-box').open", "it asks for a key")
    page.js("document.querySelector('#key').focus()")
    page.write("wrong")
    page.press("Enter")
    page.until("document.querySelector('#key-why').textContent.includes('not taken')", "it says so")
    page.js("document.querySelector('#key').focus()")
    page.write(key)
    page.press("Enter")
    page.until(LIVE, "the page is live")
    page.until("document.querySelector('.readout')?.textContent.includes('other models')", "the GPU")
    assert page.js("document.querySelectorAll('#rows tr').length") == 1
    assert mine in page.text("#rows")
    assert other not in page.js("document.body.textContent")
    assert page.js("document.querySelectorAll('[data-verb]').length") == 0
    assert "ssh -L" in page.text("#why-not")
    page.click("#rows [data-tab=chat]")
    page.write("Hello")
    page.press("Enter")
    page.until("document.querySelector('.said.assistant p')?.textContent.length > 20", "the key is good for a chat")
    page.open(f"{url}/ui")
    page.until(LIVE, "the key is still there after a reload")


def test_a_daemon_that_goes_and_comes_back_is_told_and_found(daemon: Daemon, page: Page, url: str) -> None:
    opened(page, url)
    daemon.kill()
    page.until("!document.querySelector('#notice').hidden && document.querySelector('#link').textContent === 'offline'", "it says so")
    assert daemon.name("one") in page.text("#rows"), "what was seen last stays"
    daemon.start()
    page.until(f"{LIVE} && document.querySelector('#notice').hidden", "it is live again")
    page.until(state_is(daemon.name("one"), "ready"), "the engine is found running")


def test_a_hidden_page_asks_for_nothing(daemon: Daemon, browser: Browser, page: Page, url: str) -> None:
    name = daemon.name("one")
    opened(page, url)
    hide = (
        "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.js(hide % "true")
    pinned = f"!{row(name)}?.querySelector('.chip').hidden"
    with browser.page() as other:
        opened(other, url)
        daemon.tell(name, "pin")
        other.until(pinned, "whoever looks sees it")
    assert not page.js(pinned)
    page.js(hide % "false")
    page.until(pinned, "what happened meanwhile is seen")
    daemon.tell(name, "unpin")


def test_two_hundred_models(fresh: Fresh, page: Page) -> None:
    daemon = fresh()
    names = [daemon.name(f"team-{n % 7}/model-{n:03}-with-a-rather-long-name") for n in range(200)]
    daemon.env["ORCH_MODELS"] = json.dumps({name: {"source": str(daemon.model_folder)} for name in names})
    daemon.start()
    with tunnel(daemon.admin) as url:
        opened(page, url)
        assert page.js("document.querySelectorAll('#rows tr').length") == 200
        page.js("document.querySelector('#models-filter').focus()")
        page.write("model-117")
        page.until("document.querySelectorAll('#rows tr:not([hidden])').length === 1", "the filter")
        page.size(360, 780)
        assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.errors == []
