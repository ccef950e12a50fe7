"""Routing: gates, the LoRA bank and its maths, and the layers that apply them."""
