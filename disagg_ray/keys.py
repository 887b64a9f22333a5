"""What the shared secret of a cluster is used for besides KV: keys that its own processes use among themselves.

Each is derived from the secret, so that one file on each node is all that has to be kept.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping

from disagg_kv.secret import SECRET_FILE_VARIABLE, read_secret
from disagg_ray.settings import Cluster, ClusterFileError

ADMIN, ENGINE, MONITORING = "admin key", "engine key", "monitoring key"
"""Purposes: the proxies' ADMIN_KEY, the engines' own key, and the proxies' API_KEY where clients have keys."""

_FINGERPRINT = "fingerprint"


def derived(secret: str, purpose: str) -> str:
    """The key for one purpose; it tells nothing of the secret or of the others."""
    return hmac.new(secret.encode(), f"disagg-ray {purpose}".encode(), hashlib.sha256).hexdigest()


def fingerprint(secret: str) -> str:
    """Tells whether two nodes have the same secret."""
    return derived(secret, _FINGERPRINT)[:12]


def secret_file(cluster: Cluster, environ: Mapping[str, str] = os.environ) -> str:
    """The file on this node."""
    return environ.get(SECRET_FILE_VARIABLE) or cluster.secret_file


def secret(cluster: Cluster, environ: Mapping[str, str] = os.environ) -> str:
    """The secret on this node.

    Raises:
        ClusterFileError: the file cannot be read, or its first line is empty.
    """
    try:
        return read_secret(secret_file(cluster, environ))
    except ValueError as error:
        raise ClusterFileError(f"secret_file: {error}") from None
