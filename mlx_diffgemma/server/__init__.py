"""The HTTP server. Needs the extra `server`."""
