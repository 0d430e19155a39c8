from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages import Dropped, Trace
from pipeline.runtime.account import MAX_GAP, MAX_REASONS, Account, Reorder
from pipeline.wire import EndMessage, check_wire

TRACE = Trace(0, {})


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_whatever_the_order_of_arrival_each_frame_comes_out_once_in_order(order, lost):
    reorder = Reorder()
    out = []
    for seq in order:
        if seq not in lost:
            out += reorder.push(Dropped(seq, "detect", "test"), TRACE)
    firsts = min(lost, default=12)
    assert [message.seq for message, _ in out] == list(range(firsts)), "nothing overtakes"
    for seq in sorted(lost):
        out += reorder.push(Dropped(seq, "transport", "test"), TRACE)
    assert [message.seq for message, _ in out] == list(range(12))


@given(st.lists(st.sampled_from(["publish", "shed", "failed"]), max_size=40))
def test_totals_always_add_up_and_gaps_name_each_lost_frame_once(outcomes):
    account = Account()
    gaps = []
    for seq, outcome in enumerate(outcomes):
        if outcome == "publish":
            gaps += account.gap
            account.publish()
        else:
            account.drop(Dropped(seq, "source", outcome))
    end = check_wire(account.end_message("roof", len(outcomes)))
    assert isinstance(end, EndMessage)
    assert end.published + sum(entry.frames for entry in end.dropped) == len(outcomes)
    lost = [seq for seq, outcome in enumerate(outcomes) if outcome != "publish"]
    published = [seq for seq, outcome in enumerate(outcomes) if outcome == "publish"]
    assert gaps == [seq for seq in lost if published and seq < published[-1]]


def test_a_run_of_months_keeps_a_bounded_account():
    account = Account()
    for seq in range(10_000):
        account.drop(Dropped(seq, "unmix", f"odd number {seq}"))
    assert account.total == 10_000
    assert len(account.dropped) <= MAX_REASONS + 1
    assert account.gap == list(range(10_000 - MAX_GAP, 10_000))
