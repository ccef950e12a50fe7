"""The native step: a routed Llama-family decoder in C++ for x86 CPUs from AVX2 on. The torch graph is its reference."""
