"""Peers that want an environment of their own."""
