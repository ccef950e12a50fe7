"""The HTTP surface: OpenAI-style routes, adapter and router administration, streaming."""
