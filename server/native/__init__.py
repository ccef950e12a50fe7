"""The native step: a routed Llama-family decoder in C++ for CPUs with AVX-512. The torch graph is its reference."""
