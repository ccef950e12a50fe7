"""The reproducible benchmark behind `lora-mixer bench`; how to read its figures: benchmarks/README.md."""
