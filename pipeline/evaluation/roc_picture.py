"""A picture of ROC curves: probability of detection over false alarms a frame."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 600, 80, 30, 30, 70
LEAST, GREATEST = 1e-3, 1e2
"""Of the axis; fewer false alarms are drawn at its left end."""
COLOURS = (
    (180, 90, 20),
    (40, 130, 230),
    (60, 150, 50),
    (160, 60, 170),
    (40, 40, 200),
    (90, 90, 90),
)
FONT, BLACK, GREY = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0), (215, 215, 215)


def draw_roc(curves: dict[str, list[dict[str, Any]]]) -> NDArray[np.uint8]:
    """Picture (HEIGHT, WIDTH, 3) of curves as `evaluation.run.roc` gives them."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for exponent in range(-3, 3):
        x, _ = _place(10.0**exponent, 0.0)
        cv2.line(image, (x, TOP), (x, HEIGHT - BOTTOM), GREY, 1)
        _write(image, f"1e{exponent}" if exponent < 0 else f"{10**exponent}", (x - 14, HEIGHT - 48))
    for tenth in range(0, 11, 2):
        _, y = _place(1.0, tenth / 10.0)
        cv2.line(image, (LEFT, y), (WIDTH - RIGHT, y), GREY, 1)
        _write(image, f"{tenth / 10:.1f}", (LEFT - 38, y + 5))
    _write(image, "false alarms a frame", (WIDTH // 2 - 80, HEIGHT - 18))
    _write(image, "Pd", (12, HEIGHT // 2))
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [_place(point["false_alarms_per_frame"], point["pd"] or 0.0) for point in points]
        cv2.polylines(image, [np.array(places, np.int32)], False, colour, 2, cv2.LINE_AA)
        for place in places:
            cv2.circle(image, place, 4, colour, -1, cv2.LINE_AA)
        y = HEIGHT - BOTTOM - 20 - 22 * number
        cv2.line(image, (WIDTH - 230, y - 5), (WIDTH - 200, y - 5), colour, 3)
        _write(image, name, (WIDTH - 190, y))
    return image


def _place(false_alarms: float, pd: float) -> tuple[int, int]:
    span = np.log(GREATEST / LEAST)
    share = float(np.log(np.clip(false_alarms, LEAST, GREATEST) / LEAST) / span)
    x = LEFT + share * (WIDTH - LEFT - RIGHT)
    return round(x), round(HEIGHT - BOTTOM - pd * (HEIGHT - TOP - BOTTOM))


def _write(image: NDArray[np.uint8], text: str, place: tuple[int, int]) -> None:
    cv2.putText(image, text, place, FONT, 0.5, BLACK, 1, cv2.LINE_AA)
