"""Charts: what is drawn, and what is not."""

import re

from minmacpo.evaluation.charts import Point, curve, figure


def segments(path: str) -> list[str]:
    """The unbroken parts of a path."""
    (data,) = re.findall(' d="(M[^"]*)"', path)
    return data.split("M")[1:]


def test_a_line_that_goes_on_from_left_to_right_is_one():
    assert segments(curve([(0, 5), (10, 3), (20, 4)])) == ["0.0,5.0L10.0,3.0L20.0,4.0"]


def test_two_points_at_one_epoch_are_not_joined_by_a_vertical_line():
    # the last loss of round 1 and the first one of round 2
    assert segments(curve([(0, 5), (10, 3), (10, 9), (20, 7)])) == [
        "0.0,5.0L10.0,3.0",
        "10.0,9.0L20.0,7.0",
    ]


def test_hovering_tells_a_number_with_its_interval():
    drawn = figure("Gold", "", {"student": [Point(0, 0.5, (0.25, 0.75)), Point(1, 0.625)]})

    assert "student: 0.5 (95%: 0.250 to 0.750)" in drawn
    assert "student: 0.625<" in drawn


def test_a_figure_without_points_is_nothing():
    assert figure("Gold", "", {"student": []}) == ""


def test_a_long_name_does_not_leave_a_narrow_page():
    name = "world-mutual_positives=false-rounds=10"
    drawn = figure("Gold", "", {name: [Point(0, 0.5), Point(1, 0.625)]}, is_main=True)

    wide, narrow = re.findall('class="name">(.*?)<', drawn)
    assert wide == f"{name} 0.625"
    assert narrow == "world-mut… 0.625"
