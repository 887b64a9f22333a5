"""One generation request in flight: the order of its two legs, the relay of its answer, and its tidy end."""
