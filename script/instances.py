"""The proxy's instances from its /stats on stdin, one a line, separated by tabs:
HTTP address, requests so far, requests in flight, state, reason."""

from __future__ import annotations

import json
import sys


def main() -> int:
    try:
        for instance in json.load(sys.stdin)["instances"]:
            numbers = [int(instance["requests_total"]), int(instance["in_flight"])]
            words = [str(instance["http_address"]), *map(str, numbers), str(instance["state"])]
            print("\t".join([*words, " ".join(str(instance.get("reason") or "-").split())]))
    except (ValueError, KeyError, TypeError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
