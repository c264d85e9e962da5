"""Processes that do a thing at the same time, as several commands or runs on one machine would."""

from __future__ import annotations

import multiprocessing

FORK = multiprocessing.get_context("fork")


def rivals(target, arguments):
    """Run target(*a) for each a in a process of its own, at the same time; returns the exit codes."""
    processes = [FORK.Process(target=target, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]
