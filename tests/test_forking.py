"""tests/forking.py: a fork copies the locks of threads as they are, so none may run yet."""

import os
from types import SimpleNamespace

from tests import forking


def test_all_are_forked_before_the_store_has_its_thread(monkeypatch):
    """Eight that were forked beside it waited for each other for good, once in six times."""
    order = []

    def fork():
        order.append("fork")
        return 1000 + len(order)

    def store(*args, **options):
        order.append("store")
        return SimpleNamespace(port=80)

    names = ("pipe", "write", "close", "kill", "WNOHANG", "waitstatus_to_exitcode")
    alike = {name: getattr(os, name) for name in names}
    made = SimpleNamespace(**alike, fork=fork, waitpid=lambda child, options: (child, 0))
    monkeypatch.setattr(forking, "os", made)
    monkeypatch.setattr(forking, "TCPStore", store)
    assert forking.together(3, lambda: None) == [0, 0, 0]
    assert order == ["fork", "fork", "fork", "store"]
