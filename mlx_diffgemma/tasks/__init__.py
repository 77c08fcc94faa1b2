"""What a user asks for: each task is one request, prepared once and run by one protocol."""
