"""The account of time is what a simulated run spent, second by second, whatever was killed and done again."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.clock import CLOCK, PARTS, Account, Clock, account, read_clock
from walt_jax.evaluation.report_goodput import goodput_section

SPENT = ("data_wait", "compile", "checkpoint", "evaluation")

steps = st.tuples(st.integers(1, 5), st.integers(1, 9), st.dictionaries(st.sampled_from(SPENT), st.integers(0, 4)))
attempts = st.lists(
    st.tuples(
        st.integers(0, 20),  # downtime before
        st.integers(0, 9),  # until the first step
        st.floats(0, 1),  # where it goes on, as a fraction of what has been done
        st.lists(steps, max_size=5),  # rows: steps, seconds a step, seconds of other parts
        st.integers(0, 6),  # evaluation at the end
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(attempts)
def test_the_account_is_what_was_spent(attempts):
    """The slow twin goes through the run step by step, and remembers each step that it has done."""
    spent, rows, now, done = dict.fromkeys(PARTS, 0.0), [], 1e9, set()
    for number, (downtime, start, resumed, stretches, evaluation) in enumerate(attempts, 1):
        if rows:
            now, spent["downtime"] = now + downtime, spent["downtime"] + downtime
        rows.append({"what": "start", "attempt": number, "time": now})
        now, spent["other"] = now + start, spent["other"] + start
        rows.append({"what": "other", "attempt": number, "time": now, "seconds": {}})
        step = int(resumed * len(done))
        for count, each, others in stretches:
            first = step + 1
            for _ in range(count):
                step += 1
                spent["again" if step in done else "useful"] += each
                done.add(step)
            for part, seconds in others.items():
                spent[part] += seconds
            now += count * each + sum(others.values())
            rows.append({"what": "steps", "stage": "a", "first": first, "last": step, "seconds": others, "time": now})
        now, spent["evaluation"] = now + evaluation, spent["evaluation"] + evaluation
        rows.append({"what": "evaluation", "time": now, "seconds": {}})
    total = account(rows)
    assert total.seconds() == pytest.approx(spent, abs=1e-5)
    assert sum(total.seconds().values()) == pytest.approx(now - 1e9, abs=1e-5)
    assert 0 <= total.goodput() <= 1 and len(total.attempts) == len(attempts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["start", "steps", "evaluation", "done"]), st.floats(-50, 50), st.floats(-9, 99)),
        max_size=12,
    )
)
def test_clocks_that_jump_give_no_negative_time(rows):
    total = Account()
    for what, time, seconds in rows:
        total.add({"what": what, "time": time, "stage": "a", "first": 1, "last": 3, "seconds": {"compile": seconds}})
    assert all(value >= 0 for value in total.seconds().values()) and 0 <= total.goodput() <= 1


def test_the_file_is_only_appended_to_and_a_cut_line_is_left_out(tmp_path):
    with pytest.raises(ZeroDivisionError), Clock(tmp_path) as clock:
        clock.row("other")
        values = clock.row("steps", stage="first", first=1, last=4)
        assert set(values) == {"goodput", *(f"clock_{part}_seconds" for part in PARTS)}
        raise ZeroDivisionError
    before = (tmp_path / CLOCK).read_bytes()
    with (tmp_path / CLOCK).open("ab") as file:
        file.write(b'{"what": "ste')
    with Clock(tmp_path) as clock, clock.span("checkpoint"):
        clock.row("steps", stage="first", first=3, last=6)
    assert (tmp_path / CLOCK).read_bytes().startswith(before)
    rows = read_clock(tmp_path / CLOCK)
    assert [row["what"] for row in rows] == ["start", "other", "steps", "stopped", "start", "steps", "done"]
    assert len({row["run"] for row in rows}) == 1 and [row["attempt"] for row in rows] == [1] * 4 + [2] * 3
    assert account(rows).seconds() == clock.account.seconds() and clock.account.seconds()["again"] > 0


def test_what_comes_after_the_end_of_a_run_is_no_downtime():
    row = {"seconds": {}, "stage": "a", "first": 1, "last": 9}
    whats = {0: "start", 9: "steps", 10: "done", 1000: "start", 1002: "evaluation", 1003: "stopped", 1007: "start"}
    seconds = account([{"what": what, "time": time, **row} for time, what in whats.items()]).seconds()
    assert seconds == dict.fromkeys(PARTS, 0) | {"useful": 9, "evaluation": 2, "other": 2, "downtime": 4}


def test_the_report_has_a_bar_for_each_attempt(tmp_path):
    assert goodput_section(tmp_path) == ""
    steps = {"what": "steps", "stage": "a"}
    rows = [{"what": "start", "time": 0}, {**steps, "first": 1, "last": 2, "time": 30, "seconds": {"compile": 10}}]
    rows += [{"what": "start", "time": 40}, {**steps, "first": 2, "last": 3, "time": 60}]
    (tmp_path / CLOCK).write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = goodput_section(tmp_path)
    assert "Goodput 50% of 60 s in 2 attempts, again 17%, compile 17%, downtime 17%." in section
    assert section.count('<div class="bar">') == 2 and "width: 66.667%" in section
