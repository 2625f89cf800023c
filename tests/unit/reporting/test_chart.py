"""The loss curve as an image."""

import base64
import re
from xml.etree import ElementTree

import pytest

from loraflow.reporting import chart


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 3.0), (2, 3.0)], [(i, 5 / i) for i in range(1, 3000)]])
def test_the_curve_is_well_formed_and_inside_its_image(points):
    text = chart.embedded(chart.svg(points, "training loss"), "training loss")
    assert text.startswith("![training loss](data:image/svg+xml;base64,") and "\n" not in text
    root = ElementTree.fromstring(base64.b64decode(re.search(r"base64,([^)]*)", text)[1]))
    line = root.find("{http://www.w3.org/2000/svg}polyline").attrib["points"].split()
    assert len(line) == min(len(points), chart.MAX_POINTS)
    for pair in line:
        x, y = map(float, pair.split(","))
        assert chart.LEFT <= x <= chart.WIDTH and 0 <= y <= chart.HEIGHT - chart.BOTTOM + 0.1


def test_a_falling_loss_is_drawn_as_falling():
    line = re.search(r'points="([^"]*)"', chart.svg([(1, 3.0), (2, 2.0), (3, 1.0)], "x"))[1].split()
    heights = [float(pair.split(",")[1]) for pair in line]
    assert heights == sorted(heights), "SVG counts downwards"


@pytest.mark.parametrize(
    ("points", "numbers"),
    [
        ([(10, 0.769), (130, 0.0139)], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 20, 40, 60, 80, 100, 120]),
        ([(1, 2.2), (3, 2.1)], [2.1, 2.12, 2.14, 2.16, 2.18, 2.2, 1, 2, 3]),
        ([(1, 3.0)], [3, 1]),
    ],
)
def test_the_axes_have_round_numbers_and_whole_steps(points, numbers):
    labels = re.findall(r">([^<>]+)</text>", chart.svg(points, "x"))
    assert labels == [f"{number:g}" for number in numbers] + ["step"]
