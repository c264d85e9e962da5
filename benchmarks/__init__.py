"""Figures, each beside a named peer, each from one command."""
