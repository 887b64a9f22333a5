"""Wire protocol between engines: frames, messages, handshake and keys of transfers. No I/O, no torch."""
