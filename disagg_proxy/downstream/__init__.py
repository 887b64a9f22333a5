"""What the client gets: its side of one request, the streamed body, and engine refusals as responses."""
