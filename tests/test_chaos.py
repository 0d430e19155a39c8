"""Faults against live runs, short; `python tests/chaos.py` is the long one."""

from chaos import run_chaos

KINDS = 11


def test_whatever_is_done_to_it_a_run_accounts_for_every_frame():
    end, _, done, _ = run_chaos(seconds=6.0, events=KINDS, seed=4)
    assert len(done) == done.total() == KINDS, "each kind of event once"
    assert end["published"] > 50
