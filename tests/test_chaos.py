"""Faults against live runs, short; `python tests/chaos.py` is the long one."""

from chaos import run_chaos


def test_whatever_is_done_to_it_a_run_accounts_for_every_frame():
    end, done, _ = run_chaos(seconds=5.0, events=10, seed=4)
    assert sum(done.values()) == 10
    assert end["published"] > 50
