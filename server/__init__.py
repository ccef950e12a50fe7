"""LoRA-Mixer server: one frozen base model, many LoRA adapters, a router that picks per token and layer."""

__version__ = "0.1.0"
