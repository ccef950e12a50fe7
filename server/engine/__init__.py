"""The engine: sequences, scheduling, KV blocks, sampling, and the thread that owns the model."""
