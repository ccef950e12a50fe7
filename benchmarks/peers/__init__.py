"""One runner per peer. Each runs in that peer's own interpreter and imports nothing of the server."""
