"""The man page of ``disagg-proxy``. ``python -m tools.generate`` writes it; a test compares it."""

from __future__ import annotations

from disagg_machine.table import SETTINGS as MACHINE_SETTINGS
from disagg_machine.table import WORKED_OUT
from disagg_proxy import __version__
from tools.command_line import SCRIPT, Command, Option

PATH = "man/disagg-proxy.1"

_DESCRIPTION = """\
.B disagg\\-proxy
listens for OpenAI and Anthropic requests and serves each one on a pair of vLLM engines: prefill computes the prompt,
decode the answer. Engines register by themselves (ZMQ) or are given with
.B \\-\\-prefill
and
.BR \\-\\-decode .
.B test_single_machine.sh
in a checkout is the same as
.BR "disagg\\-proxy machine" .
"""

_END = """\
.SH SIGNALS
.TP
.BR SIGTERM ", " SIGINT
Stop: no new requests, those received completely are answered within SHUTDOWN_GRACE seconds. A second signal ends the
process at once.
.TP
.B SIGHUP
Read the settings that can change without a restart again.
.SH EXIT STATUS
Of the proxy: 0 stopped by a signal, 1 a port is taken or no worker starts, 2 a bad setting or command.
Of
.BR machine :
0 all went well, 1 something failed, 2 wrong usage or a bad setting, 3 nothing is running, 130 interrupted, 143
terminated.
.SH EXAMPLES
.nf
disagg\\-proxy \\-\\-http\\-port 8000 \\-\\-log\\-format json
disagg\\-proxy machine all && disagg\\-proxy machine test
disagg\\-proxy sim \\-\\-role pair \\-\\-proxy 127.0.0.1:30001
.fi
.SH SEE ALSO
docs/index.md of the source: routes (api.md), settings (settings.md), deployment (deployment.md), messages and remedies
(troubleshooting.md).
"""


def page(program: Command) -> str:
    """The page in the man macros of roff."""
    lines = [
        '.\\" Made by tools/man_page.py: make tables',
        f'.TH DISAGG\\-PROXY 1 "" "disagg\\-proxy {__version__}" "User Commands"',
        ".nh",  # A flag is not hyphenated.
        ".ad l",
        ".SH NAME",
        f"disagg\\-proxy \\- {_text(program.help)}",
        ".SH SYNOPSIS",
        ".B disagg\\-proxy",
        "[\\fBserve\\fR] [\\fIOPTION\\fR...]",
        ".br",
        ".B disagg\\-proxy",
        "\\fICOMMAND\\fR [\\fIOPTION\\fR...]",
        ".SH DESCRIPTION",
        _DESCRIPTION.rstrip("\n"),
        ".SH COMMANDS",
    ]
    for command in program.commands:
        lines += [".TP", f".B {_text(command.name)}", _line(command.help)]
    lines += [
        ".SH OPTIONS",
        "Of the proxy. Each can be set by the environment variable that is named; the option wins.",
    ]
    for option in program.options:
        lines += _option(option)
    for command in program.commands[1:]:
        lines += _command(command)
    lines += [
        ".SH SETTINGS OF THE MACHINE",
        f"Environment variables of \\fBmachine\\fR and {_text(SCRIPT)}, or lines of the file",
    ]
    lines += ["that CONFIG names."]
    for setting in MACHINE_SETTINGS:
        default = "" if setting.default in ("", WORKED_OUT) else f"={setting.default}"
        lines += [".TP", f".B {_text(setting.env + default)}", _line(setting.help)]
    return "\n".join(lines) + "\n" + _END


def _command(command: Command) -> list[str]:
    lines = [f'.SH "OPTIONS OF {_text(" ".join(command.path)).upper()}"']
    for one in command.all():
        if one is not command:
            arguments = f" {_text(one.arguments)}" if one.arguments else ""
            lines += [".TP", f"\\fB{_text(one.name)}\\fR{arguments}", _line(one.help)]
        if not (one is not command and command.name == "machine"):
            lines += [line for option in one.options if "--help" not in option.flags for line in _option(option)]
    return lines


def _option(option: Option) -> list[str]:
    flags = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in option.flags)
    value = f" \\fI{_text(option.metavar)}\\fR" if option.metavar else ""
    lines = [".TP", flags + value, _line(option.help or "see the documentation of reports")]
    if option.choices and option.setting is None:
        lines.append(_line(f"One of {', '.join(option.choices)}."))
    if option.setting is not None:
        default = f", default {option.setting.default}" if option.setting.default else ""
        lines.append(_line(f"[{option.setting.env}{default}]"))
    return lines


def _text(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


def _line(text: str) -> str:
    """Text that no macro can begin with."""
    text = _text(text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


FILES = {PATH: page}
"""Path in the repository -> what makes it."""
