"""`test`, `page` and `top`: commands that use what serves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_machine import net, proxy_view, python_environment, signals, ui
from disagg_machine.context import Context
from disagg_machine.messages import die, text
from disagg_machine.service_client import Answer, Failed, Service, Silent

TOKENS = 24
"""Of each answer that `test` requests."""


def need_proxy(context: Context) -> net.Answer:
    """The proxy's answer to ``/health``, whatever it says.

    Raises:
        MachineError: 3, no proxy answers.
    """
    answer = proxy_view.get(context.settings, "/health")
    if answer is None:
        raise die(3, "no_proxy", context.url)
    return answer


def need_key(context: Context) -> net.Answer:
    """As :func:`need_proxy`, for what needs the proxy's key.

    Raises:
        MachineError: 3, no proxy answers; 1, it refuses the key.
    """
    answer = need_proxy(context)
    if proxy_view.ask(context.settings).refused:
        raise die(1, proxy_view.key_problem(context.settings), context.url)
    return answer


# -- test


def cmd_test(context: Context, words: Sequence[str]) -> int:
    """``test``: one completion, one stream, one chat.

    Raises:
        MachineError: 3, nothing serves; 1, the proxy refuses the key.
    """
    if words:
        raise die(2, "unknown_argument", "test", words[0])
    need_key(context)
    settings = context.settings
    service = Service(context.url, settings.api_key, settings.test_timeout)
    if not check(service, settings.served_names[0]):
        ui.complain("test_failed")
        return 1
    ui.good("test_ok")
    return 0


def requests(model: str) -> dict[str, tuple[str, bool, dict[str, Any]]]:
    """What is sent: name to path, whether it is streamed, and body."""
    common = {"model": model, "max_tokens": TOKENS, "temperature": 0}
    prompt = {**common, "prompt": "San Francisco is a"}
    chat = {**common, "messages": [{"role": "user", "content": "Name one city in California."}]}
    return {
        "completion": ("/v1/completions", False, prompt),
        "stream": ("/v1/completions", True, prompt),
        "chat": ("/v1/chat/completions", False, chat),
    }


def check(service: Service, wanted: str, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Send each request and print how it was answered; whether all went well.

    A request without an answer in time ends the test: the others would only wait as long.
    """
    try:
        model = service.model(wanted)
    except Failed as error:
        ui.complain("test_problem", "/v1/models", _one_line(str(error)))
        return False
    ui.out(text("test_model", _one_line(model)))
    good = True
    for name, (path, streamed, body) in requests(model).items():
        try:
            before = service.counts()
            answer = service.stream(path, body) if streamed else service.whole(path, body)
            engines = served_by(service, before, sleep)
        except Failed as error:
            if name == "chat" and "chat template" in str(error).lower():
                ui.warn("test_skipped", name, "the model's tokenizer has no chat template")
                continue
            ui.complain("test_problem", name, _one_line(str(error)))
            good = False
            if isinstance(error, Silent):
                break
            continue
        _show(name, answer, engines)
    return good


def _show(name: str, answer: Answer, engines: str) -> None:
    times = text("test_times", f"{answer.seconds:.2f}", f"{answer.first:.2f}", answer.tokens, engines)
    ui.out(f"{ui.coloured(f'{name:<10}', ui.BOLD, stream=sys.stdout)} {times}")
    ui.out(f"           {_one_line(answer.text)}")


def served_by(service: Service, before: Mapping[str, int], sleep: Callable[[float], None] = time.sleep) -> str:
    """Engines whose request count rose since ``before``, prefill first. Counts may lag by up to a second.

    Raises:
        Failed: not both a prefill and a decode engine.
    """
    for attempt in range(10):
        if attempt:
            sleep(0.1)
        after = service.counts()
        rose = sorted((name for name in after if after[name] > before.get(name, 0)), reverse=True)
        if {name.split()[0] for name in rose} == {"prefill", "decode"}:
            return " -> ".join(rose)
    raise Failed("answered, but /stats does not show both a prefill and a decode engine at work")


def _one_line(words: str) -> str:
    """Text of another program, safe to show; a dash for none."""
    return ui.plain_line(" ".join(words.split())) or "-"


# -- page and top


def cmd_page(context: Context, words: Sequence[str]) -> int:
    """``page``: the address of the live page on stdout, alone; opened only where a person sits in front of a desktop.

    Raises:
        MachineError: 3, nothing serves.
    """
    if words:
        raise die(2, "unknown_argument", "page", words[0])
    need_proxy(context)
    settings = context.settings
    ui.out(f"{context.url}/")
    if settings.api_key or proxy_view.ask(settings).refused:
        ui.say("page_key")
    if _opened(f"{context.url}/", context.environ):
        ui.say("page_opened")
    else:
        authority = net.authority(settings.http_proxy_host, settings.http_proxy_port)
        ui.say("page_hint", settings.http_proxy_port, authority)
    return 0


def _opened(url: str, environ: Mapping[str, str]) -> bool:
    desktop = environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")
    program = shutil.which("xdg-open", path=environ.get("PATH"))
    if not (desktop and program and ui.is_terminal(sys.stderr)):
        return False
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run([program, url], stdin=quiet, stdout=quiet, stderr=quiet, env=environ, check=False)
    except OSError:
        return False
    return done.returncode == 0


def cmd_top(context: Context, words: Sequence[str]) -> int:
    """``top [--once]``: the live page in this terminal, by the proxy's own command.

    Raises:
        MachineError: 3, nothing serves; 1, the proxy refuses the key, or the package rich is missing.
    """
    if list(words) not in ([], ["--once"]):
        raise die(2, "unknown_argument", "top", words[0])
    need_key(context)
    python = python_environment.ensure(context)
    ensure_rich(context, python)
    program = [python, "-m", "disagg_proxy", "top", "--url", context.url, *words]
    os.chdir(context.root)
    signals.restore_sigpipe()
    os.execve(python, program, context.child_environment())


def ensure_rich(context: Context, python: str) -> None:
    """The package rich for ``python``. Only an environment that this script has made is its to install into.

    Raises:
        MachineError: 1, with the command that installs it.
    """
    has_rich = subprocess.run(
        [python, "-c", "import rich"], env=context.environ, stderr=subprocess.DEVNULL, check=False
    )
    if has_rich.returncode == 0:
        return
    venv = python_environment.environment(context)
    if python != str(venv.python):
        raise die(1, "top_no_rich", python)
    ui.say("top_installing", venv.folder, venv.log)
    venv.install(context.root / "requirements-top.txt")
