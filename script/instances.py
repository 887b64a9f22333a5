"""The proxy's instances from its /stats on stdin, one a line, separated by tabs:
HTTP address, requests so far, requests in flight, state, yes or no for a wanted restart, reason."""

from __future__ import annotations

import json
import sys


def main() -> int:
    try:
        for instance in json.load(sys.stdin)["instances"]:
            numbers = [int(instance["requests_total"]), int(instance["in_flight"])]
            words = [str(instance["http_address"]), *map(str, numbers), str(instance["state"])]
            wanted = "yes" if instance.get("restart_wanted") is True else "no"
            print("\t".join([*words, wanted, " ".join(str(instance.get("reason") or "-").split())]))
    except (ValueError, KeyError, TypeError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
