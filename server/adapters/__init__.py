"""Adapters: from a folder or the Hub, through validation, into the registry."""
