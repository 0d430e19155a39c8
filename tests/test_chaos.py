"""Faults against live runs, short; `python tests/chaos.py` is the long one."""

import sys

import pytest
from chaos import KINDS, main, run_chaos


def test_fewer_events_than_there_are_kinds_are_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chaos.py", "--events", "10"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--events: at least 11, one of each kind, got 10" in capsys.readouterr().err


def test_whatever_is_done_to_it_a_run_accounts_for_every_frame():
    end, _, done, _ = run_chaos(seconds=6.0, events=len(KINDS), seed=4)
    assert len(done) == done.total() == len(KINDS), "each kind of event once"
    assert end["published"] > 50
