"""When a pipeline counts as stuck."""

from worker.health import Standstill


def test_only_comments_that_wait_and_go_no_step_further_are_a_standstill() -> None:
    standstill = Standstill()
    looks = [
        # Nothing to do, for as long as you like
        (0, False, 0, 0),
        (500, False, 0, 0),
        # Comments wait since, at the latest, this look
        (501, True, 0, 0),
        (550, True, 0, 49),
        (700, True, 0, 199),
        # One step
        (701, True, 1, 0),
        (711, True, 1, 10),
        # All is done; the next ones have just come
        (712, False, 1, 0),
        (900, True, 1, 0),
        (903, True, 1, 3),
    ]
    for now_s, waiting, done, expected_s in looks:
        assert standstill(now_s, waiting=waiting, done=done) == expected_s, now_s
