"""The chat page in headless Chromium, with a model that says what it is told."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_browser
from scripted import write_scripted
from served import Served, serve, stop

import forge
from forge.server.chat_page import chat_page

FILE = Path(forge.__file__).parent / "server/chat_page.html"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant><say:{{ messages[-1].content }}>"
SCRIPTS = {
    "<say:code>": ["# Sum", "\n\nUse **s", "um**:\n\n``", "`python\nsum(", "[1, 2])\n``", "`\n\n- one\n", "- two"],
    "<say:think>": ["<think>", "Let me", " see.", "</think>", "It is 4."],
    "<say:round>": ["On ", "and ", "on. ", "And ", "on. "],
    "<say:attack>": [
        "Hi <script>window.pwned=1</script>",
        "<img src=x onerror='window.pwned=2'>",
        "[a](javascript:pwn())",
    ],
}
HOSTILE = """
<script>window.pwned = 1</script><img src="https://example.com/a.png" onerror="window.pwned = 2">
<iframe src="javascript:window.pwned=3"></iframe><svg onload="window.pwned=4"><style>* { display: none }</style>

![picture](https://example.com/b.png) [a](javascript:window.pwned=5) [b](JaVaScRiPt:window.pwned=6)
[c](data:text/html,<script>window.pwned=7</script>) [d](//example.com) [e](/v1/models) [f](vbscript:x) [g](https://)
[h](https://example.com/"onmouseover="window.pwned=8") [i]( https://example.com/i ) [j](&#106;avascript:window.pwned=9)

```"><img src=x onerror=window.pwned=10>
</code></pre><script>window.pwned = 11</script>
```

| <b onclick="window.pwned=12">x</b> | `<i>` |
|---|---|
| [k](file:///etc/passwd) | https://example.com/"><script>window.pwned=13</script> |
"""
# Markdown, and the HTML that it stands for.
RENDERED = [
    (
        "a **b** *c* ***d*** __e__ _f_ ~~g~~",
        "<p>a <strong>b</strong> <em>c</em> <strong><em>d</em></strong> <strong>e</strong> <em>f</em> <del>g</del></p>",
    ),
    ("snake_case_name 2 * 3 * 4 a*b*c", "<p>snake_case_name 2 * 3 * 4 a<em>b</em>c</p>"),
    ("`a*b*` ``c`d`` `e", "<p><code>a*b*</code> <code>c`d</code> `e</p>"),
    (r"\*a\* \\ \d", r"<p>*a* \ \d</p>"),
    ("**a *b** c", "<p><strong>a *b</strong> c</p>"),
    ("# A\n## B *c*\nd", "<h1>A</h1><h2>B <em>c</em></h2><p>d</p>"),
    ("a\n\n---\n\nb\nc", "<p>a</p><hr><p>b\nc</p>"),
    ("- a\n- b\n  1. c\n  2. d\n- e", "<ul><li>a</li><li>b<ol start=1><li>c</li><li>d</li></ol></li><li>e</li></ul>"),
    ("3. a\n\n4. b\n\nc", "<ol start=3><li>a</li><li>b</li></ol><p>c</p>"),
    ("- [x] a\n- [ ] b", "<ul><li>☑ a</li><li>☐ b</li></ul>"),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("```py\na\n\n  b\n```\nc", "<pre><code>a\n\n  b\n</code></pre><p>c</p>"),
    ("~~~\n```\n~~~", "<pre><code>```\n</code></pre>"),
    ("```\nno end", "<pre><code>no end</code></pre>"),
    ("- a\n  ```\n  b\n  ```", "<ul><li>a<pre><code>b</code></pre></li></ul>"),
    (
        "| a | b |\n|:--|--:|\n| 1 | `x|` \\| y |\n\nc",
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>`x</td></tr></tbody></table><p>c</p>",
    ),
    ('[a *b*](https://x.org/c "t") [d] (e) f[1]', '<p><a href="https://x.org/c">a <em>b</em></a> [d] (e) f[1]</p>'),
    ("see https://x.org/a_b_c.", '<p>see <a href="https://x.org/a_b_c">https://x.org/a_b_c</a>.</p>'),
    ("[a](javascript:b)", "<p>[a](javascript:b)</p>"),
]
HUGE = {
    "line": "x" * 1_000_000,
    "quotes": ">" * 20_000 + " a",
    "lists": "\n".join(" " * depth + "- a" for depth in range(1_000)),
    "emphasis": "*a **b " * 30_000,
    "stars": "*" * 100_000,
    "brackets": "[" * 30_000 + "a" + "](" * 30_000,
    "links": "[a](https://x.org/" * 20_000,
    "ticks": " ".join("`" * (1 + n % 100) for n in range(2_000)),
    "fence": "`" * 3 + " " * 500_000 + "`",
    "table": "|a" * 3_000 + "\n" + "|-" * 3_000 + "\n" + "|\n" * 3_000,
    "rules": ("- " * 50_000) + "x",
    "escapes": "\\" * 200_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("page") / "scripted.gguf"
    found = serve(write_scripted(path, TEMPLATE + "{# <think></think> #}", SCRIPTS, ["<think>", "</think>"]))
    yield found
    stop(found)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    """A profile of its own."""
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture
def page(context: Any, server: Served) -> Iterator[Any]:
    """The page. What its script raises, and requests to other addresses, fail the test."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if is_own(request.url, server.url) else wrong.append(request.url))
    page.goto(server.url)
    page.locator("#model", has_text="scripted").wait_for(state="attached")
    yield page
    assert wrong == []


def is_own(url: str, server: str) -> bool:
    return url.startswith((f"{server}/", "data:image/svg+xml,", f"blob:{server}/"))


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any, *, done: bool = True) -> list[str]:
    """The texts of all answers, when none is being made."""
    if done:
        page.locator("#send", has_text="Send").wait_for()
    return page.locator(".assistant .body").all_inner_texts()


def questions(page: Any) -> list[str]:
    return page.locator(".user .body").all_inner_texts()


def rendered(page: Any, markdown: str, pieces: int = 1) -> str:
    """HTML of Markdown that arrives in so many pieces, without what is the same everywhere."""
    script = """([text, pieces]) => {
        const element = document.createElement("div"), view = new MarkdownView(element);
        for (let n = 1; n < pieces; n++) view.update(text.slice(0, text.length * n / pieces), false);
        view.update(text, true);
        element.normalize();
        return element.innerHTML;
    }"""
    html = page.evaluate(script, [markdown, pieces])
    html = re.sub(r' (tabindex|target|rel|title)="[^"]*"', "", html).replace('start="', "start=")
    html = re.sub(r'<div class="code"><div>.*?</div>(<pre>.*?</pre>)</div>', r"\1", html, flags=re.DOTALL)
    html = re.sub(r'<div class="table">(.*?)</div>', r"\1", html, flags=re.DOTALL)
    return re.sub(r'start=(\d+)">', r"start=\1>", html)


def test_the_policy_names_the_script_and_the_styles_by_their_hashes() -> None:
    response, text = chat_page(), FILE.read_text(encoding="utf-8")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for kind in ("script", "style"):
        [inner] = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert response.body.decode() == text


def test_the_page_makes_no_markup_of_texts_and_stays_readable() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)
    assert len(text.splitlines()) < 1050
    assert max(map(len, text.splitlines())) < 320


@pytest.mark.slow
def test_the_page_needs_no_key_and_is_served_with_its_policy(server: Served) -> None:
    response = server.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == chat_page().headers["content-security-policy"]
    [model] = server.client.get("/v1/models").json()["data"]
    assert model["context_length"] == model["max_model_len"] == 4096


@needs_browser
@pytest.mark.slow
class TestInABrowser:
    def test_a_conversation_streams_into_the_page_and_outlives_a_reload(self, page: Any) -> None:
        ask(page, "code")
        assert answers(page) == ["Sum\n\nUse sum:\n\npython\nCopy\nsum([1, 2])\n\none\ntwo"]
        assert page.locator(".assistant strong").inner_text() == "sum"
        assert re.match(r"7 tokens( · [\d.]+ tokens/s)?$", page.locator(".assistant .foot span").inner_text())
        used = json.loads(page.evaluate("localStorage['forge.chat.' + current.id]"))["messages"][1]["tokens"]
        assert page.locator("#used").inner_text() == f"Context {used} of 4,096 tokens"
        ask(page, "code")
        before = answers(page)
        assert len(before) == 2
        page.reload()
        assert answers(page) == before
        assert questions(page) == ["code", "code"]

    def test_reasoning_is_folded(self, page: Any) -> None:
        ask(page, "think")
        assert answers(page) == ["It is 4."]
        thought = page.locator(".reasoning .md")
        assert not thought.is_visible()
        page.locator(".reasoning summary").click()
        assert thought.inner_text() == "Let me see."

    def test_escape_stops_an_answer_and_keeps_what_has_come(self, page: Any, server: Served) -> None:
        ask(page, "round")
        page.locator(".assistant .body", has_text="On and on. And on.").wait_for()
        page.keyboard.press("Escape")
        [answer] = answers(page)
        assert answer.startswith("On and on. And on.")
        assert "stopped" in page.locator(".assistant .foot").inner_text()
        page.reload()
        assert answers(page) == [answer]

    def test_an_answer_that_a_reload_cuts_is_kept_and_says_so(self, page: Any) -> None:
        ask(page, "round")
        page.locator(".assistant .body", has_text="On and on. And on.").wait_for()
        page.reload()
        [answer] = answers(page)
        assert answer.startswith("On and on. And on.")
        assert "stopped" in page.locator(".assistant .foot").inner_text()

    def test_two_tabs_of_one_conversation_lose_nothing(self, page: Any, context: Any, server: Served) -> None:
        ask(page, "think")
        answers(page)
        other = context.new_page()
        other.goto(server.url)
        assert questions(other) == ["think"]
        ask(page, "code")
        answers(page)
        other.locator(".user .body", has_text="code").wait_for()
        other.locator(".assistant .foot", has_text="tokens").nth(1).wait_for()
        ask(other, "think")
        answers(other)
        page.locator(".user .body").nth(2).wait_for()
        assert questions(page) == questions(other) == ["think", "code", "think"]

    def test_a_conversation_that_fills_the_context_says_what_to_do(self, page: Any) -> None:
        ask(page, "long " * 2000)
        page.get_by_text("Begin a new chat, or edit a message to go on from there.").wait_for()
        assert len(questions(page)) == 1
        assert answers(page) == []

    def test_stop_is_a_button_too(self, page: Any) -> None:
        ask(page, "round")
        page.locator(".assistant .body", has_text="On and on.").wait_for()
        page.get_by_role("button", name="Stop").click()
        assert answers(page)[0].startswith("On and on.")

    def test_a_message_is_edited_and_answered_anew(self, page: Any) -> None:
        ask(page, "code")
        answers(page)
        ask(page, "code")
        answers(page)
        page.locator(".user").first.get_by_role("button", name="Edit").click()
        page.get_by_label("Your message").fill("think")
        page.get_by_role("button", name="Send again").click()
        assert answers(page) == ["It is 4."]
        assert questions(page) == ["think"]

    def test_an_answer_is_edited_and_regenerated(self, page: Any) -> None:
        ask(page, "think")
        answers(page)
        page.locator(".assistant").get_by_role("button", name="Edit").click()
        page.get_by_label("The answer").fill("It is *5*.")
        page.get_by_role("button", name="Save").click()
        assert answers(page) == ["It is 5."]
        page.get_by_role("button", name="Regenerate").click()
        page.locator(".assistant .body", has_text="It is 4.").wait_for()
        assert answers(page) == ["It is 4."]

    def test_settings_go_to_the_server_and_to_new_conversations(self, page: Any) -> None:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Save").click()
        page.get_by_role("button", name="New chat").click()
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "code")
        assert json.loads(sent.value.post_data) == {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "code"}],
            "temperature": 0.5,
            "max_completion_tokens": 3,
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert answers(page) == ["Sum\nUse s**um**:"] or answers(page)[0].startswith("Sum")
        assert "cut off" in page.locator(".assistant .foot").inner_text()

    def test_conversations_are_renamed_deleted_exported_and_imported(self, page: Any, tmp_path: Path) -> None:
        ask(page, "think")
        answers(page)
        page.get_by_label("Title of the conversation").fill("Four")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="New chat").click()
        ask(page, "code")
        answers(page)
        assert page.locator("#list .open").all_inner_texts() == ["code", "Four"]
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        download.value.save_as(tmp_path / "chats.json")
        page.on("dialog", lambda dialog: dialog.accept())
        for name in ("Delete Four", "Delete code"):
            page.get_by_role("button", name=name).click()
        assert page.locator("#list li").count() == 0
        page.locator("#file").set_input_files(tmp_path / "chats.json")
        page.get_by_role("button", name="Four", exact=True).click()
        assert (questions(page), answers(page)) == (["think"], ["It is 4."])

    @pytest.mark.parametrize("content", ["no json", "[]", '{"chats": [null, 1, {"messages": "x"}, {}]}', "[" * 100_000])
    def test_a_file_that_is_no_export_is_refused(self, page: Any, content: str) -> None:
        file = {"name": "x.json", "mimeType": "application/json", "buffer": content.encode()}
        page.locator("#file").set_input_files(file)
        page.locator("#notice", has_text="no conversations").wait_for()
        assert page.locator("#list li").count() == 0

    def test_broken_entries_in_the_storage_are_passed_over(self, page: Any) -> None:
        page.evaluate("""() => {
            localStorage["forge.chat.x"] = "{";
            const messages = [{ role: "user", content: {} }];
            localStorage["forge.chat.y"] = JSON.stringify({ id: "<b>", title: 7, messages });
            localStorage["forge.settings"] = "null";
        }""")
        page.reload()
        ask(page, "think")
        assert answers(page)[-1] == "It is 4."

    def test_hostile_answers_do_nothing(self, page: Any, server: Served) -> None:
        ask(page, "attack")
        [said] = answers(page)
        assert said == "".join(SCRIPTS["<say:attack>"])
        page.evaluate(
            """text => save({ ...newChat(), title: text, messages: [
                { role: "user", content: text },
                { role: "assistant", content: text, reasoning: text, note: text }] })""",
            HOSTILE,
        )
        page.reload()
        page.locator(".assistant > .body .code").wait_for()
        assert page.evaluate("window.pwned") is None
        assert page.locator("#log").locator("script, img, iframe, svg, style, b, i, object, embed, form").count() == 0
        found = page.locator("#log *").evaluate_all("all => all.flatMap(one => one.getAttributeNames())")
        assert [name for name in set(found) if name.startswith("on") or name in ("style", "src", "srcdoc")] == []
        links = page.locator("#log a")
        assert links.count() >= 2
        for attributes in links.evaluate_all("all => all.map(a => [a.protocol, a.target, a.rel, a.host])"):
            assert attributes == ["https:", "_blank", "noopener noreferrer", "example.com"]

    def test_the_policy_stops_scripts_markup_and_requests_that_the_page_itself_would_make(self, page: Any) -> None:
        found = page.evaluate("""async () => {
            const tried = {};
            for (const [name, action] of Object.entries({
                markup: () => { document.createElement("div").innerHTML = "<b>x</b>"; },
                request: () => fetch("https://example.com/"),
                script: () => { document.createElement("script").text = "1"; },
            })) tried[name] = await Promise.resolve().then(action).then(() => "went through", () => "stopped");
            return tried;
        }""")
        assert found == dict.fromkeys(("markup", "request", "script"), "stopped")

    @pytest.mark.parametrize(("markdown", "html"), RENDERED)
    @pytest.mark.parametrize("pieces", [1, 1000])
    def test_markdown_is_rendered_whole_or_in_pieces(self, page: Any, markdown: str, html: str, pieces: int) -> None:
        assert rendered(page, markdown, pieces) == html

    @pytest.mark.parametrize("name", HUGE)
    def test_huge_markdown_is_rendered_in_linear_time_and_bounded_depth(self, page: Any, name: str) -> None:
        """Quadratic time would take minutes."""
        script = """text => {
            const element = document.createElement("div"), view = new MarkdownView(element);
            for (let n = 1; n < 5; n++) view.update(text.slice(0, text.length * n / 5), false);
            view.update(text, true);
            let depth = 0;
            for (const one of element.querySelectorAll("*")) {
                let above = 0;
                for (let node = one; node !== element; node = node.parentNode) above++;
                depth = Math.max(depth, above);
            }
            return depth;
        }"""
        assert page.evaluate(script, HUGE[name]) < 50

    def test_blocks_that_are_whole_stay_the_same_nodes(self, page: Any) -> None:
        script = """() => {
            const element = document.createElement("div"), view = new MarkdownView(element);
            const text = "# A\\n\\n**b** c\\n\\n- d\\n- e\\n\\n```\\nf\\ng\\n```\\nh **i** j";
            let list = null;
            for (let n = 1; n <= text.length; n++) {
                view.update(text.slice(0, n), n === text.length);
                list ??= element.querySelector("ul");
            }
            return [...element.children].map(one => one.tagName).join() + " " + element.contains(list);
        }"""
        assert page.evaluate(script) == "H1,P,UL,DIV,P true"

    def test_the_keyboard_is_enough(self, page: Any) -> None:
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("th")
        page.keyboard.press("Shift+Enter")
        assert page.get_by_label("Message", exact=True).input_value() == "th\n"
        page.keyboard.press("Backspace")
        page.keyboard.type("ink")
        page.keyboard.press("Enter")
        assert answers(page) == ["It is 4."]
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.textContent || document.activeElement.ariaLabel"))
            focused = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert focused != "none" or page.evaluate("document.activeElement === document.body")
        wanted = {"New chat", "think", "✕", "Export", "Import", "Settings", "Copy", "Edit", "Regenerate", "Send"}
        assert wanted <= set(reached)
        page.get_by_role("button", name="Settings").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.name") == "system"
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        assert page.evaluate("document.activeElement.id") == "settings-open"

    def test_every_control_has_a_name(self, page: Any) -> None:
        nameless = page.locator("button, input, textarea, meter, dialog").evaluate_all("""all => all.filter(one =>
            !one.textContent.trim() && !one.ariaLabel && !one.labels?.length).map(one => one.outerHTML)""")
        assert nameless == []

    def test_a_phone_has_no_horizontal_overflow(self, page: Any) -> None:
        page.set_viewport_size({"width": 320, "height": 640})
        wide = f"{'x' * 500}\n\n```\n{'y' * 500}\n```\n\n{'| z ' * 50}|\n{'|---' * 50}|\n{'| z ' * 50}|"
        page.evaluate(
            """text => {
                const one = { content: text, reasoning: text };
                current.messages.push({ ...one, role: "user" }, { ...one, role: "assistant" });
                show(current);
            }""",
            wide,
        )
        page.locator(".body .table").wait_for()
        widths = "() => [document.documentElement.scrollWidth, $('log').scrollWidth, $('settings').scrollWidth]"
        page.get_by_role("button", name="Settings").click()
        assert max(page.evaluate(widths)) <= 320
        page.keyboard.press("Escape")
        assert not page.locator("#side").is_visible()
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New chat").click()
        assert not page.locator("#side").is_visible()
        assert page.locator("#send").bounding_box()["y"] < 640

    def test_dark_and_light_follow_the_system(self, page: Any) -> None:
        colors = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colors == ["rgb(255, 255, 255)", "rgb(25, 24, 22)"]

    @pytest.mark.parametrize(
        ("status", "error", "message"),
        [
            (
                429,
                {"message": "too many requests are waiting", "code": "queue_full"},
                "too many requests are waiting: trying",
            ),
            (503, {"message": "the model is loading", "code": "loading"}, "the model is loading: trying again in 1 s"),
        ],
    )
    def test_the_page_waits_where_the_server_is_busy(self, page: Any, status: int, error: Any, message: str) -> None:
        body = json.dumps({"error": error})
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body), times=1)
        ask(page, "think")
        page.locator("#notice", has_text=message).wait_for()
        assert answers(page) == ["It is 4."]
        assert not page.locator("#notice").is_visible()

    def test_an_error_is_shown_and_loses_nothing(self, page: Any) -> None:
        ask(page, "think")
        answers(page)
        page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
        page.get_by_role("button", name="Regenerate").click()
        page.locator("#notice", has_text="The server cannot be reached.").wait_for()
        assert answers(page) == ["It is 4."]
        page.get_by_role("button", name="Try again").click()
        page.locator("#notice").wait_for(state="hidden")
        assert answers(page) == ["It is 4."]

    def test_an_answer_that_breaks_off_is_kept_and_says_so(self, context: Any, tmp_path: Path) -> None:
        served = serve(write_scripted(tmp_path / "scripted.gguf", TEMPLATE, SCRIPTS, []))
        try:
            page = context.new_page()
            page.goto(served.url)
            ask(page, "round")
            page.locator(".assistant .body", has_text="On and on.").wait_for()
        finally:
            stop(served)
        page.locator("#notice", has_text="The connection broke before the answer was whole.").wait_for()
        assert len(answers(page)) == 1
        assert "cut off" in page.locator(".assistant .foot").inner_text()

    def test_a_refusal_of_the_server_is_shown(self, page: Any) -> None:
        ask(page, "a " * 5000)
        page.locator("#notice", has_text="4096").wait_for()
        assert questions(page)[0].startswith("a a")


@needs_browser
@pytest.mark.slow
def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(model_path: str, context: Any) -> None:
    server = serve(model_path, "--api-key", "secret")
    try:
        page = context.new_page()
        page.goto(server.url)
        for key in ("wrong", "secret"):
            page.locator("#key input").fill(key)
            page.keyboard.press("Enter")
        page.locator("#used, #model", has_text="tiny").wait_for()
        assert page.locator("dialog[open]").count() == 0
        assert page.evaluate("[sessionStorage['forge.key'], JSON.stringify(localStorage).includes('secret')]") == [
            "secret",
            False,
        ]
        page.reload()
        page.locator("#model", has_text="tiny").wait_for()
    finally:
        stop(server)
