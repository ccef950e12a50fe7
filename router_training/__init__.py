"""Offline training of the router with the Routing Specialization Loss (arXiv 2507.00029)."""
