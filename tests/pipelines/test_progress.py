"""Progress: a line with rate and time left on a terminal, one log line per milestone elsewhere."""

import io
import logging

import pytest

from pipelines.steps.progress import Progress, TerminalLine, from_line, lines_to, log_to


def test_the_terminal_line_shows_rate_and_time_left() -> None:
    stream, now = io.StringIO(), [100.0]
    line = TerminalLine(stream, lambda: now[0])
    line(Progress("train", 0, 1000, "steps", "start"))
    now[0] += 10
    line(Progress("train", 200, 1000, "steps", "epoch 1, loss 3.0"))
    assert stream.getvalue().endswith("\r\x1b[2Ktrain: 200/1,000 steps, 20.0 steps/s, 0:40 left, epoch 1, loss 3.0")
    line(Progress("train", 201, 1000, "steps", "too soon to draw"))
    assert "too soon" not in stream.getvalue()
    now[0] += 1
    line(Progress("train", 1000, 1000, "steps", "done"))
    assert stream.getvalue().endswith("train: 1,000/1,000 steps, done\n")


def test_the_rate_counts_from_where_a_resumed_job_started() -> None:
    stream, now = io.StringIO(), [0.0]
    line = TerminalLine(stream, lambda: now[0])
    line(Progress("shard", 50, 100, "shards", ""))
    now[0] = 10
    line(Progress("shard", 60, 100, "shards", ""))
    assert "1.0 shards/s, 0:40 left" in stream.getvalue()


def test_a_log_gets_the_milestones_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = log_to(logging.getLogger("pipelines.test"))
    report(Progress("train", 1, 2, "steps", "news"))
    report(Progress("train", 2, 2, "steps", "no news", milestone=False))
    assert caplog.messages == ["train: 1 of 2 steps, news"]


def test_lines_for_a_reader_far_away_say_the_same_and_are_few() -> None:
    stream = io.StringIO()
    report = lines_to(stream)
    first = Progress("shard", 1, 300, "shards", "train-000000: 1,000 rows, 2 quarantined", milestone=True)
    passing = Progress("train", 2, 10, "steps", "epoch 1, loss 3.0", milestone=False)
    report(first)
    for _ in range(50):
        report(passing)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1, "what passes is said once a second at most"
    assert from_line(lines[0]) == first
    stream = io.StringIO()
    lines_to(stream)(passing)
    assert from_line(stream.getvalue().rstrip()) == passing
    assert from_line("table /x: generation 1, 3072 rows") is None
    assert from_line("oh: 1 of many steps, x") is None
