"""The built-in page: its files and headers, and the page in a real browser, over a real engine and over a pretended one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually
from tests.server.test_real import Running, started

STATIC = Path(__file__).resolve().parents[2] / "appliance" / "web" / "static"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASSETS = sorted(f"/ui/{file.name}" for file in STATIC.iterdir() if file.name != "index.html")
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP evil.example 127.0.0.1")
LONG = {"ignore_eos": True, "min_tokens": 400}  # fields that keep the demo model busy for seconds
expect.set_options(timeout=30_000)


class Visit:
    """A look at the page, with what it complained of and where it went. All use one tab: another one costs more than a test."""

    def __init__(self, tab: Page, url: str, *, size: tuple[int, int], scheme: str, motion: bool) -> None:
        self.page, self.url, self.complaints, self.asked = tab, url, [], []
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme, reduced_motion="no-preference" if motion else "reduce")  # type: ignore[arg-type]
        self._heard = {
            "console": lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self.asked.append(request.url),
        }
        for event, hear in self._heard.items():
            tab.on(event, hear)  # type: ignore[call-overload]
        tab.goto(url)

    def close(self) -> None:
        self.page.unroute_all()
        self.page.evaluate("sessionStorage.clear()")
        for event, hear in self._heard.items():
            self.page.remove_listener(event, hear)
        self.page.goto("about:blank")  # it keeps what is on its way

    def say(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#prompt", text)
        expect(self.page.locator("#send")).to_be_enabled()
        self.page.press("#prompt", "Enter")
        if wait:
            self.answered()

    def answered(self) -> None:
        expect(self.page.locator("#log")).to_have_attribute("aria-busy", "false")

    def set(self, field: str, value: str) -> None:
        if self.page.locator("#settings").is_hidden():
            self.page.click("#open-settings")
        self.page.fill(f"#{field}", value)

    @property
    def texts(self) -> list[str]:
        return self.page.locator(".message > .plain, .message > .prose").all_inner_texts()


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    if CHROMIUM is None or subprocess.run([CHROMIUM, "--version"], capture_output=True).returncode:
        pytest.skip("no Chromium that runs on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield browser.new_page()
        browser.close()


@pytest.fixture
def visit(tab: Page, pretend: object) -> Iterator[Open]:
    """Open the page with an empty storage. In the end it has complained of nothing but ``expected``, and asked nobody else.

    Pages are closed before the servers of ``pretend``, which they ask every second, are there no more.
    """
    opened: list[tuple[Visit, str | None]] = []

    def open_(
        url: str,
        *,
        expected: str | None = None,
        size: tuple[int, int] = (1280, 720),
        scheme: str = "light",
        motion: bool = False,
    ) -> Visit:
        tab.goto(f"{url}/ui/icon.svg")  # of the same origin, and runs nothing
        tab.evaluate("localStorage.clear()")
        opened.append((Visit(tab, url, size=size, scheme=scheme, motion=motion), expected))
        return opened[-1][0]

    yield open_
    for one, _ in opened:
        one.close()
    for one, expected in opened:
        assert [text for text in one.complaints if expected is None or expected not in text] == []
        assert {url for url in one.asked if not url.startswith((one.url, "blob:"))} == set()


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    """The command as a user starts it, with the embedded model; computed slowly, so that there is time to look on."""
    with started("--port", "0", "--threads", "1", "--reference-ops", "--kv-cache-memory-bytes", "20000000") as running:
        running.engine.nice(19)  # on a busy machine the browser comes first
        yield running


@pytest.fixture
def pretend(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Callable[..., Served]]:
    """A server whose engine repeats the prompt: so a test decides what the model says."""
    with ExitStack() as stack:

        def start(client: Callable[[], FakeClient] = FakeClient, **options: Any) -> Served:
            server = ServerConfig(served_model_name=("tiny",), **options)
            return stack.enter_context(serve_in_thread(client, tokenizer, EngineConfig(model=str(model_dir)), server))

        yield start


# Without a browser


def test_files_and_headers(served: Served) -> None:
    with served.http as http:
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8" and page.text == (STATIC / "index.html").read_text()
        assert http.get("/favicon.ico").headers["content-type"] == "image/svg+xml; charset=utf-8"
        for path in ["/", *ASSETS]:
            answer, head = http.get(path), http.head(path)
            assert (answer.status_code, head.status_code, head.content) == (200, 200, b"")
            assert {k: v for k, v in head.headers.items() if k != "x-request-id"} == {
                k: v for k, v in answer.headers.items() if k != "x-request-id"
            }
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
            again = http.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for path in ("/ui/", "/ui/nothing.js", "/ui/../web/pages.py", "/ui/%2e%2e/pages.py", "/index.html"):
            assert http.get(path).status_code == 404
        assert http.post("/").status_code == 405


def test_the_page_names_nothing_of_elsewhere() -> None:
    """Not even as a link: what is loaded comes from the package, and scripts stand in files of their own."""
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text.replace("http: and https", "") and "https://" not in text, file.name
        assert "innerHTML" not in text and "eval(" not in text and "insertAdjacentHTML" not in text, file.name
    page = (STATIC / "index.html").read_text()
    assert page.count("<script") == 1 and "style=" not in page and " onclick" not in page


def test_needs_no_key_and_can_be_left_out(pretend: Callable[..., Served]) -> None:
    with pretend(api_key=("secret",)).http as http:
        assert {path: http.get(path).status_code for path in ["/", *ASSETS]} == dict.fromkeys(["/", *ASSETS], 200)
        assert http.head("/").status_code == 200
        assert http.get("/ui/nothing.js").status_code == http.get("/v1/models").status_code == http.post("/").status_code == 401
    with pretend(web_ui=False).http as http:
        assert http.get("/").status_code == http.get("/ui/main.js").status_code == 404


# In the browser, over the embedded model


def test_chats_streams_and_keeps_the_conversation(visit: Open, demo: Running) -> None:
    one = visit(demo.url)
    expect(one.page.locator("#state")).to_have_text("ready")
    one.say("Spell the word garden.")
    assert one.texts == ["Spell the word garden.", "garden is spelled g-a-r-d-e-n."]
    figures = one.page.locator(".assistant .figures").inner_text()
    assert "18 tokens" in figures and "first after" in figures and "prompt " in figures
    one.say("What is 7 plus 5?")
    assert one.texts[-1] == "7 plus 5 is 12."
    one.page.reload()
    expect(one.page.locator("#state")).to_have_text("ready")
    assert [one.texts[i] for i in (0, 3)] == ["Spell the word garden.", "7 plus 5 is 12."]
    assert one.page.locator("#list .title").all_inner_texts() == ["Spell the word garden."]


def test_messages_are_changed_asked_again_deleted(visit: Open, demo: Running) -> None:
    one = visit(demo.url)
    one.say("What is 7 plus 5?")
    one.page.locator(".user button[aria-label=Edit]").click()
    one.page.fill(".edit textarea", "What is the opposite of hot?")
    one.page.press(".edit textarea", "Control+Enter")
    expect(one.page.locator(".assistant")).to_contain_text("cold.")
    one.answered()
    one.page.locator(".assistant button[aria-label='Try again']").click()
    expect(one.page.locator(".assistant .figures")).to_contain_text("tokens")
    one.answered()
    assert one.texts == ["What is the opposite of hot?", "The opposite of hot is cold."]
    one.page.locator(".user button[aria-label=Delete]").click()
    expect(one.page.locator(".message")).to_have_count(0)
    one.page.click("#toast button")
    expect(one.page.locator(".message")).to_have_count(2)
    with one.page.expect_download() as download:
        one.page.click("#export")
    saved = json.loads(Path(download.value.path()).read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] and saved["model"] == "demo"
    one.page.click("#new")
    expect(one.page.locator(".message")).to_have_count(0)
    one.page.set_input_files("#file", files=[{"name": "c.json", "mimeType": "", "buffer": json.dumps(saved).encode()}])
    expect(one.page.locator(".message")).to_have_count(2)
    one.page.set_input_files("#file", files=[{"name": "c.json", "mimeType": "", "buffer": b'{"messages": [{"role": "x"}]}'}])
    expect(one.page.locator("#toast")).to_contain_text('The role of message 1 of the file is "x"')


def test_stop_ends_the_request_in_the_engine(visit: Open, demo: Running) -> None:
    def engine() -> dict[str, Any]:
        with demo.http as http:
            return http.get("/stats").json()["engine"]

    one, aborted = visit(demo.url), engine()["finished"].get("abort", 0)
    one.set("more", json.dumps(LONG))
    one.say("Spell the word garden.", wait=False)
    expect(one.page.locator(".assistant .figures")).to_contain_text("tokens")
    assert engine()["running"] == 1
    one.page.press("#prompt", "Escape")
    one.answered()
    expect(one.page.locator(".assistant .figures")).to_contain_text("Stopped.")
    eventually(lambda: engine()["running"] == 0)
    assert engine()["finished"]["abort"] == aborted + 1
    one.set("more", "")
    one.set("max_tokens", "8")
    before = one.texts[1]
    one.page.get_by_role("button", name="Go on").click()
    one.answered()
    assert one.texts[1].startswith(before[:20]) and len(one.texts) == 2


def test_errors_in_the_servers_words(visit: Open, demo: Running) -> None:
    one = visit(demo.url, expected="Failed to load resource: the server responded with a status of 400")
    one.say("spell garden " * 300)
    error = one.page.locator(".error:not([hidden])")
    expect(error).to_contain_text("512")
    expect(error).to_contain_text("tokens")
    one.set("more", "{not json")
    expect(one.page.locator("#more-error")).to_contain_text("this is no JSON")
    one.set("more", '{"top_k": "many"}')
    one.page.get_by_role("button", name="Try again").first.click()
    expect(error).to_contain_text("top_k")
    one.set("more", "")
    one.page.click("#new")
    one.say("What is 7 plus 5?")
    assert one.texts == ["What is 7 plus 5?", "7 plus 5 is 12."]


def test_the_servers_figures_live_while_somebody_looks(visit: Open, demo: Running) -> None:
    one = visit(demo.url)
    one.page.evaluate(
        """() => { window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector('.assistant .prose:not(details *)')?.textContent.length))
            .observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }"""
    )
    one.set("more", json.dumps(LONG))
    one.page.click("#tab-metrics")
    one.say("Spell the word garden.", wait=False)
    expect(one.page.locator(".tiles strong").first).to_have_text("1")
    expect(one.page.locator(".series strong").first).not_to_have_text("0")
    for words in ("KV cache", "Memory", "Machine", "demo", "awq", "blocks of 16 tokens", "Weights"):
        expect(one.page.locator("#metrics")).to_contain_text(words)
    one.page.wait_for_function("lengths.size >= 10")  # the answer comes in pieces, however slow the machine is
    one.page.click("#stop")
    one.answered()
    one.page.click("#close-side")
    for _ in range(5):  # one may have been on its way, on a busy machine for long
        asked = sum(url.endswith("/stats") for url in one.asked)
        one.page.wait_for_timeout(1100)
        if sum(url.endswith("/stats") for url in one.asked) == asked:
            return
    pytest.fail("nobody looks, and it still asks")


# In the browser, over an engine that says what a test wants it to

ATTACKS = "\n\n".join(
    (
        "<img src=x onerror=document.title=1>",
        "<script>document.title=2</script>",
        "[a](javascript:document.title=3)",
        "```<svg onload=document.title=4>\n<b>\n```",
        '<a href="data:text/html,x">b</a>',
    )
)


def test_what_a_model_says_stays_text(visit: Open, served: Served) -> None:
    one = visit(served.url)
    one.set("max_tokens", str(len(ATTACKS) + 6))
    one.say(ATTACKS)
    answer = one.page.locator(".assistant .prose").last
    for words in ("<img src=x onerror=document.title=1>", "<script>document.title=2</script>", "<b>", "<svg"):
        assert words in one.page.locator(".assistant").inner_text()
    assert answer.locator("img, script, svg:not(.icon), b, iframe, a").count() == 0
    assert one.page.title() == "appliance"


def test_a_page_waits_for_the_model_and_goes_on_by_itself(visit: Open, pretend: Callable[..., Served]) -> None:
    served = pretend(lambda: FakeClient(state="loading"))
    one = visit(served.url, expected="status of 503")
    expect(one.page.locator("#state")).to_have_text("loading")
    expect(one.page.locator("#loading")).to_contain_text("3 B of 10 B")
    expect(one.page.locator("#send")).to_be_disabled()
    served.client.state = "ready"
    expect(one.page.locator("#state")).to_have_text("ready")
    expect(one.page.locator("#loading")).to_be_hidden()
    one.set("max_tokens", "5")
    one.say("hello")
    assert len(one.texts) == 2


def test_asks_for_a_key_and_keeps_it_for_the_tab(visit: Open, pretend: Callable[..., Served]) -> None:
    one = visit(pretend(api_key=("right",)).url, expected="status of 401")
    expect(one.page.locator("#state")).to_have_text("needs a key")
    for key, says in (("wrong", "key"), ("schlüssel", "characters")):
        one.page.fill("#key", key)
        one.page.press("#key", "Enter")
        expect(one.page.locator("#key-error")).to_contain_text(says)
    one.page.fill("#key", "right")
    one.page.press("#key", "Enter")
    expect(one.page.locator("#state")).to_have_text("ready")
    one.set("max_tokens", "5")
    one.say("hello")
    assert len(one.texts) == 2
    one.page.reload()
    expect(one.page.locator("#state")).to_have_text("ready")
    stored = "JSON.stringify([Object.entries(localStorage), document.cookie, location.href])"
    assert "right" not in one.page.evaluate(stored)


def test_a_name_that_another_page_made_mean_this_server(visit: Open, served: Served) -> None:
    """DNS rebinding: the page is nobody's secret, but what it would use is not answered."""
    one = visit(served.url.replace("127.0.0.1", "evil.example"), expected="status of 403")
    expect(one.page.locator("#state")).to_have_text("refused")
    expect(one.page.locator("#loading")).to_contain_text("asked by the name 'evil.example:")
    send = "fetch('/v1/completions', {method: 'POST', body: '{\"prompt\": \"a\"}'}).then((answer) => answer.status)"
    assert one.page.evaluate(send) == 403 and not served.client.running


def test_an_answer_that_breaks_off(visit: Open, pretend: Callable[..., Served]) -> None:
    served = pretend(lambda: FakeClient(delay_s=0.01))
    one = visit(served.url, expected="status of 503")
    served.client.fail_at = 5
    one.say("hello you")
    expect(one.page.locator(".error:not([hidden])")).to_contain_text("the step failed")
    served.client.fail_at = None
    one.page.get_by_role("button", name="Try again").first.click()
    expect(one.page.locator(".assistant .figures")).to_contain_text("tokens")
    served.run(served.client.die, "the engine was killed")
    expect(one.page.locator(".error:not([hidden])")).to_contain_text("the engine was killed")
    expect(one.page.locator("#state")).to_have_text("engine down")


def stream(*deltas: dict[str, Any], finish: str = "stop") -> str:
    """The body of a stream of chat chunks."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def test_reasoning_is_folded_and_tool_calls_are_answered(visit: Open, served: Served) -> None:
    one, sent = visit(served.url), []
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": '"Paris"}'}}
    bodies = [
        stream({"reasoning_content": "Hm, "}, {"reasoning_content": "*so*."}, {"tool_calls": [call]}, {"tool_calls": [rest]}),
        stream({"content": "It is **warm**."}),
    ]

    def fulfil(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(body=bodies[len(sent) - 1], content_type="text/event-stream")

    one.page.route("**/v1/chat/completions", fulfil)
    one.say("Weather?")
    expect(one.page.locator(".reasoning summary").first).to_have_text("Reasoning")
    assert not one.page.locator(".reasoning .prose").first.is_visible()
    one.page.locator(".reasoning summary").first.click()
    expect(one.page.locator(".reasoning .prose em").first).to_have_text("so")
    expect(one.page.locator(".call")).to_contain_text('"city": "Paris"')
    expect(one.page.locator("#prompt")).to_have_attribute("placeholder", "Result of weather")
    one.say("30 degrees")
    assert [m["role"] for m in sent[1]["messages"]] == ["user", "assistant", "tool"]
    assert sent[1]["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Paris"}'}
    assert sent[1]["messages"][2] == {"role": "tool", "content": "30 degrees", "tool_call_id": "c1"}
    expect(one.page.locator(".assistant strong")).to_have_text("warm")


def overflow(page: Page) -> list[str]:
    """Elements that stick out to the right, unless something around them scrolls."""
    return page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility({visibilityProperty: true})
        && !e.closest('pre, .table, .offscreen, .skip') && e.getBoundingClientRect().right > innerWidth + 1)
        .map((e) => e.outerHTML.slice(0, 80))"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(visit: Open, served: Served, scheme: str) -> None:
    one = visit(served.url, size=(360, 700), scheme=scheme, motion=scheme == "light")
    wide = "x" * 300 + "\n\n|a|b|\n|-|-|\n|" + "y" * 90 + "|" + "z" * 90 + "|\n\n```\n" + "w" * 200 + "\n```\n"
    one.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=stream({"content": wide}), content_type="text/event-stream")
    )
    one.say("u" * 200)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 360 and overflow(one.page) == []
    one.page.click("#open-metrics")
    expect(one.page.locator("#metrics")).to_contain_text("Requests")
    assert overflow(one.page) == []
    one.page.click("#tab-settings")
    assert overflow(one.page) == []
    one.page.click("#close-side")
    one.page.click("#menu")
    expect(one.page.locator("#new")).to_be_focused()
    assert overflow(one.page) == []
    one.page.keyboard.press("Escape")
    expect(one.page.locator("#chats")).not_to_be_in_viewport()


MARKDOWN = [
    ("a *b* **c** ***d***", "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong></p>"),
    ("~~e~~ `f*g*`", "<p><del>e</del> <code>f*g*</code></p>"),
    ("snake_case_name 2*3*4 a * b * c \\*d\\*", "<p>snake_case_name 2*3*4 a * b * c *d*</p>"),
    ("**open *and `never closed", "<p>**open *and `never closed</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A #\n#### B", "<h3>A</h3><h6>B</h6>"),
    ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
    ("3. a\n   b\n4. c", '<ol start="3"><li>a<br>b</li><li>c</li></ol>'),
    ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
    ("[x](ftp://h) [y](/z) <javascript:a>", "<p>[x](ftp://h) [y](/z) &lt;javascript:a&gt;</p>"),
    ("It was in\n2020. Then", "<p>It was in<br>2020. Then</p>"),
]  # fmt: skip


RENDER = """async (text) => { const { render } = await import('/ui/markdown.js');
    const box = document.createElement('div'); render(box, text); return box.innerHTML; }"""


def test_markdown(visit: Open, served: Served) -> None:
    page = visit(served.url).page
    assert [page.evaluate(RENDER, text) for text, _ in MARKDOWN] == [html for _, html in MARKDOWN]
    link = page.evaluate(RENDER, "(see https://example.com/a_(b)?c=1), [**d**](http://e.example)")
    assert link.count('target="_blank" rel="noopener noreferrer nofollow"') == 2 and "<strong>d</strong>" in link
    assert 'href="https://example.com/a_(b)?c=1"' in link
    code = page.evaluate(RENDER, "```py\nif a < b:\n\n    c\n```\nafter")
    assert "<code>if a &lt; b:\n\n    c</code>" in code and code.endswith("<p>after</p>")
    table = page.evaluate(RENDER, "|a|b|\n|--|-:|\n|1|`2`|")
    assert '<th>a</th><th class="right">b</th>' in table and '<td class="right"><code>2</code></td>' in table


def test_markdown_grows_as_it_is_written_and_costs_little(visit: Open, served: Served) -> None:
    """Whatever was shown before, the end is the same; and no text makes it slow."""
    page = visit(served.url).page
    text = "\n".join(source for source, _ in MARKDOWN) + "\n```\ncode\n```\n|a|b|\n|-|-|\n|1|2|\n"
    grown = """async (text) => { const { render } = await import('/ui/markdown.js');
        const box = document.createElement('div'); for (let i = 1; i <= text.length; i += 3) render(box, text.slice(0, i));
        render(box, text); return box.innerHTML; }"""
    assert page.evaluate(grown, text) == page.evaluate(RENDER, text)
    timed = """async (texts) => { const { render } = await import('/ui/markdown.js'); return texts.map((text) => {
        const begun = performance.now(); render(document.createElement('div'), text); return performance.now() - begun; }); }"""
    nasty = ["*" * 20000, "**a " * 5000, "[" * 20000, "[a](" * 5000, "`" * 9999 + "a", "_a*b~~" * 4000, "> " * 9000 + "a"]
    nasty += ["- " * 9000, "|" * 9000 + "\n" + "|-" * 9000, "\\" * 20000, "h" * 20000, " " * 20000 + "#", "# " + " #" * 9000]
    assert max(page.evaluate(timed, nasty)) < 3000


def test_events_cut_anywhere(visit: Open, served: Served) -> None:
    """Every cut of the bytes into two, each byte by itself, and all three line endings."""
    found = visit(served.url).page.evaluate(
        """async () => { const { EventParser } = await import('/ui/sse.js'); const wrong = [];
        for (const end of ['\\n', '\\r\\n', '\\r']) {
            const lines = ['data: {"a": "é日🎉"}', '', ': ping', 'event: x', 'data:b', 'data: c', '', 'data: [DONE]', '', ''];
            const bytes = new TextEncoder().encode(lines.join(end));
            const want = JSON.stringify(['{"a": "é日🎉"}', 'b\\nc', '[DONE]']);
            for (let cut = 0; cut <= bytes.length; cut++) {
                const parser = new EventParser();
                const parts = [bytes.slice(0, cut), bytes.slice(cut), new Uint8Array([10])];
                const got = parts.flatMap((part) => parser.push(part));
                if (JSON.stringify(got) !== want) wrong.push([end, cut, got]);
            }
            const single = new EventParser();
            const got = [...bytes].flatMap((byte) => single.push(new Uint8Array([byte])));
            if (JSON.stringify([...got, ...single.push(new Uint8Array([10]))]) !== want) wrong.push([end, 'single', got]);
        }
        return wrong; }"""
    )
    assert found == []


def test_a_server_that_is_killed(visit: Open, demo: Running) -> None:
    """The last of the tests with this server."""
    one = visit(demo.url, expected="net::ERR_")
    one.set("more", json.dumps(LONG))
    one.say("Spell the word garden.", wait=False)
    expect(one.page.locator(".assistant .figures")).to_contain_text("tokens")
    demo.process.kill()
    expect(one.page.locator(".error:not([hidden])")).to_contain_text("broke off")
    expect(one.page.locator("#state")).to_have_text("no answer")
    assert one.texts[1], "what came is kept"
