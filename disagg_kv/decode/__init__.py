"""The decode side: loads that wait for blocks, and the connections that receive them."""
