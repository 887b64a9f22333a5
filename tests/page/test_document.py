"""The document: one file that needs no other, a policy that names exactly what is in it, both languages whole."""

from __future__ import annotations

import base64
import hashlib
import re

from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.page.document import SCRIPTS, WEB, document, strings
from tools.settings_tables import ROOT


def policy() -> dict[str, list[str]]:
    parts = document().headers["Content-Security-Policy"].split("; ")
    return {name: values for name, *values in (part.split() for part in parts)}


def inline(tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", document().body.decode(), re.S)
    assert len(found) == 1
    return found[0]


def test_the_policy_names_the_one_script_and_the_one_style_by_their_hashes() -> None:
    for directive, tag in ("script-src", "script"), ("style-src", "style"):
        digest = base64.b64encode(hashlib.sha256(inline(tag).encode()).digest()).decode()
        assert policy()[directive] == [f"'sha256-{digest}'"]


def test_the_policy_allows_nothing_else() -> None:
    rest = {name: values for name, values in policy().items() if name not in ("script-src", "style-src")}
    assert rest == {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
    }


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_inline_but_what_the_policy_names() -> None:
    page = document().body.decode()
    links = re.findall(r"""\b(?:src|href|action)=["']([^"']*)""", page)
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert re.findall(r"https?://[^'\s)]+", page.replace("http://www.w3.org/2000/svg", "")) == []
    markup = page.replace(inline("script"), "").replace(inline("style"), "")
    assert not re.search(r"\s(?:style|on\w+)=", markup)


def test_the_markup_has_no_text_in_one_language_only() -> None:
    markup = re.sub(r"<(title|style|script)>.*?</\1>", "", (WEB / "index.html").read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r">[^<>]*\w[^<>]*<", markup) == []
    assert not re.findall(r"\b(?:aria-label|placeholder|title|alt)=", markup)


def test_text_never_becomes_markup() -> None:
    script = inline("script")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "new Function"):
        assert way not in script


def test_every_script_is_joined_and_every_file_is_used() -> None:
    assert {path.name for path in WEB.glob("*.js")} == set(SCRIPTS)
    assert inline("script").startswith("(() => {\n'use strict';")


def test_both_languages_say_the_same_things_with_the_same_places() -> None:
    english, chinese = strings()["en"], strings()["zh"]
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert text.strip() and chinese[key].strip(), key
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_text_that_the_page_asks_for_is_there_and_none_is_left_over() -> None:
    sources = "".join((WEB / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "index.html"))
    asked = set(re.findall(r"""\bt\(\s*"(\w+)\"""", sources))
    asked |= set(re.findall(r'data-(?:text|label)="(\w+)"', sources)) | set(re.findall(r'figure\("(\w+)"', sources))
    asked |= {f"{stem}_{end}" for stem in re.findall(r'plural\("(\w+)"', sources) for end in ("one", "many")}
    texts = set(strings()["en"])
    assert asked <= texts
    # The rest is asked for by a name that is put together: a word of the proxy's, or one of a table in the page.
    stems = {
        "role",
        "state",
        "why",
        "event",
        "outcome",
        "seg",
        "chart",
        "series",
        "head",
        "detail",
        "ask",
        "top",
        "energy",
        "way",
        "placement",
    }
    rest = {text for text in texts - asked if text.partition("_")[0] not in stems}
    assert all(f'"{text}"' in sources for text in rest), rest


def documented(section: str) -> list[str]:
    """The words in the first column of a table of docs/observe.md."""
    text = (
        (ROOT / "docs/observe.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    )
    return [word for row in re.findall(r"^\| (`.*?) \|", text, re.M) for word in re.findall(r"`(\w+)`", row)]


def test_every_word_of_the_proxys_has_a_text() -> None:
    words = [("role", role.value) for role in Role] + [("state", state.value) for state in State]
    kinds, outcomes = documented("Events"), documented("How a request ends")
    assert "frozen" in kinds and "ok" in outcomes
    words += [("way", way.value) for way in Way] + [("placement", state) for state in ("learning", "fallback")]
    words += [("event", kind) for kind in kinds] + [("outcome", outcome) for outcome in outcomes]
    assert [word for word in words if "_".join(word) not in strings()["en"]] == []
