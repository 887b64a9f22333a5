"""The script's own sources: shellcheck, shfmt, and one table of messages in two languages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.script.machine import REPOSITORY, SCRIPT

PARTS = sorted((REPOSITORY / "script").glob("*.sh"))
STAGES = ("tests/run", "tests/compiled", "tests/real_vllm", "tests/speed")
CHECKS = [REPOSITORY / name for name in (*STAGES, "tests/lint", "tests/environment.sh", ".ci/run")]
COMPLETION = REPOSITORY / "completions/test_single_machine.bash"


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (requirements-dev.txt has it)")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck() -> None:
    run(tool("shellcheck"), "-x", SCRIPT)
    run(tool("shellcheck"), "--shell=bash", COMPLETION)
    run(tool("shellcheck"), "-x", *CHECKS)


def test_shfmt() -> None:
    run(tool("shfmt"), "-i", "2", "-ci", "-d", SCRIPT, COMPLETION, *PARTS, *CHECKS)


def test_ci_runs_every_stage_and_make_names_each() -> None:
    calls = r"^tests/\w+$"
    assert tuple(re.findall(calls, (REPOSITORY / ".ci/run").read_text(), re.M)) == STAGES
    assert "tests/lint" in re.findall(calls, (REPOSITORY / "tests/run").read_text(), re.M)
    targets = dict(re.findall(r"^([a-z-]+):.*\n\t(\S+)$", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(targets.values()) == {*STAGES, "tests/lint", ".ci/run"}
    assert targets["ci"] == ".ci/run" and targets["test"] == "tests/run"


def test_every_part_is_sourced_and_short() -> None:
    sourced = re.findall(r'^source "\$ROOT/script/(\w+\.sh)"', SCRIPT.read_text(), re.M)
    assert sorted(sourced) == [part.name for part in PARTS]
    assert {part.name: lines for part in PARTS if (lines := len(part.read_text().splitlines())) > 310} == {}


def test_nothing_is_signalled_by_name() -> None:
    for part in (SCRIPT, *PARTS):
        assert not re.search(r"\b(pkill|killall|pidof|pgrep)\b", part.read_text()), part


def messages() -> dict[str, tuple[str, str]]:
    text = (REPOSITORY / "script/messages.sh").read_text()
    table = text.split("<<'TABLE'\n", 1)[1].split("\nTABLE\n", 1)[0]
    found: dict[str, tuple[str, str]] = {}
    for line in table.splitlines():
        fields = line.split("|")
        assert len(fields) == 3 and all(fields), line
        assert fields[0] not in found, line
        found[fields[0]] = (fields[1], fields[2])
    return found


def arguments(template: str) -> int:
    """How many arguments a template takes; it uses %s or numbers them all."""
    numbered = [int(number) for number in re.findall(r"%(\d)\$s", template)]
    plain = len(re.findall(r"%s", template.replace("%%", "")))
    assert not (numbered and plain), template
    return max(numbered, default=plain)


def test_both_languages_take_the_same_arguments() -> None:
    for key, (english, chinese) in messages().items():
        assert arguments(english) == arguments(chinese), key
        has_words = len(re.findall(r"[a-z]{3,}", english)) >= 3
        assert re.search(r"[\u4e00-\u9fff]", chinese) or not has_words, key


def test_messages_and_their_uses_agree() -> None:
    table = set(messages())
    code = "\n".join(part.read_text() for part in (*PARTS, SCRIPT) if part.name != "messages.sh")
    speakers = r"\b(?:text|say|good|warn|complain|supervisor_says|verdict_\w+|die \d|PROBLEM=\(|\"\$bad\")"
    calls = re.findall(speakers + r" ?\(?([a-z][a-z_]+)\b", code)
    used = {word for word in calls if "_" in word or word in table}
    assert used - table - {"source_", "doc_stale_"} == set()
    words = set(re.findall(r"\b[a-z][a-z_]+\b", code))
    generated = ("source_", "doc_stale_")
    assert {key for key in table - words if not key.startswith(generated)} == set()


def test_completion_offers_commands_and_parts() -> None:
    # Completion in zsh runs the same function, without mapfile.
    script = (
        f"enable -n mapfile readarray; source '{COMPLETION}'; "
        f'COMP_WORDS=({SCRIPT} "$@"); COMP_CWORD=$#; _test_single_machine; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def offered(*words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert offered("do") == ["doctor"]
    assert {"status", "stop", "all"} <= set(offered(""))
    assert offered("all", "--s") == ["--supervise"]
    assert "decode" in offered("restart", "")
