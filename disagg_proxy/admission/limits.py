"""What an instance may have at once. 0 means no limit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_proxy.cluster.instance import Instance, Role


@dataclass(frozen=True, slots=True)
class Limits:
    """The configured bounds.

    Attributes:
        in_flight, prefill, decode: requests in all, and on one instance of each role.
        kv_buffer: bytes of KV that may wait on one decode (its kv_buffer_size).
        queue: requests that may wait; queue_timeout: for how many seconds.
    """

    in_flight: int = 0
    prefill: int = 0
    decode: int = 0
    kv_buffer: int = 0
    queue: int = 0
    queue_timeout: float = 60.0

    def has_room(self, instance: Instance, kv_bytes: int) -> bool:
        """Whether ``instance`` may get one more request, whose KV takes ``kv_bytes`` on decode.

        A prompt that is larger than the whole buffer goes to a decode on which nothing waits: waiting longer would
        not make it fit, and decode's pinned pool takes what the buffer does not.
        """
        most = self.prefill if instance.role is Role.PREFILL else self.decode
        if most and instance.in_flight >= most:
            return False
        if instance.role is Role.PREFILL or not self.kv_buffer or not instance.kv_waiting_bytes:
            return True
        if instance.kind.computes:
            # It has no buffer: KV comes straight into the blocks of a scheduled request.
            return True
        return instance.kv_waiting_bytes + kv_bytes <= self.kv_buffer
