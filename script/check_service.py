"""`test`: URL MODEL TIMEOUT. One completion, one stream, one chat; records of tab-separated fields on stdout.

    model    NAME
    answer   WHAT  SECONDS  FIRST_PIECE_SECONDS  TOKENS  ENGINES  TEXT
    skipped  WHAT  WHY
    problem  WHAT  WHY
    end      NUMBER_OF_PROBLEMS

A request that is silent for TIMEOUT seconds ends the test: the others would only wait as long. The engines of a
request are those whose request count in /stats went up meanwhile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from service_client import Answer, Failed, Service, Silent


def record(*fields: object) -> None:
    """One record; white space inside a field becomes a blank, an empty one a dash."""
    print("\t".join(" ".join(str(field).split()) or "-" for field in fields), flush=True)


def served_by(service: Service, before: dict[str, int]) -> str:
    """Engines whose count rose, prefill before decode. Asks again for up to a second: counts may lag."""
    for attempt in range(10):
        if attempt:
            time.sleep(0.1)
        after = service.counts()
        rose = sorted((name for name in after if after[name] > before.get(name, 0)), reverse=True)
        if {name.split()[0] for name in rose} == {"prefill", "decode"}:
            return " -> ".join(rose)
    raise Failed("answered, but /stats does not show both a prefill and a decode engine at work")


def main() -> int:
    service = Service(sys.argv[1], float(sys.argv[3]))
    problems = 0
    try:
        model = service.model(sys.argv[2])
    except Failed as error:
        record("problem", "/v1/models", error)
        record("end", 1)
        return 0
    record("model", model)
    prompt = {"model": model, "prompt": "San Francisco is a", "max_tokens": 24, "temperature": 0}
    chat = {
        "model": model,
        "messages": [{"role": "user", "content": "Name one city in California."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    checks: list[tuple[str, Callable[[], Answer]]] = [
        ("completion", lambda: service.whole("/v1/completions", prompt)),
        ("stream", lambda: service.stream("/v1/completions", prompt)),
        ("chat", lambda: service.whole("/v1/chat/completions", chat)),
    ]
    for what, ask in checks:
        try:
            before = service.counts()
            answer = ask()
            engines = served_by(service, before)
        except Failed as error:
            if what == "chat" and "chat template" in str(error).lower():
                record("skipped", what, "the model's tokenizer has no chat template")
                continue
            problems += 1
            record("problem", what, error)
            if isinstance(error, Silent):
                break
            continue
        record("answer", what, f"{answer.seconds:.2f}", f"{answer.first:.2f}", answer.tokens, engines, answer.text)
    record("end", problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
