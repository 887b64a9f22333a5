"""The client's side: the HTTP server, the rules of its connections, and both ways into the generation routes."""
