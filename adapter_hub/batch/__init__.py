"""Long jobs over many inputs: durable, resumable, streamed."""
