"""Numbers read well."""

import math

import pytest

from neurondrift.report import wording


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (wording.effect, -0.001, "+0.00"),
        (wording.effect, 0.125, "+0.12"),
        (wording.effect, -1234.5, "-1.23e+03"),
        (wording.drift, 5.123e-5, "5.12e-05"),
        (wording.drift, 0.05123, "0.0512"),
        (wording.drift, 0.0, "0"),
        (wording.drift, 123.4, "123"),
        (wording.probability, 3e-7, "<0.0001"),
        (wording.probability, 0.00049, "0.00049"),
        (wording.probability, 1.0, "1.00"),
        (wording.ratio, 9.5, "9.50"),
        (wording.plain, 1e-4, "0.0001"),
        (wording.plain, 16.0, "16"),
    ],
)
def test_numbers_read_well(form, value: float, text: str) -> None:
    assert form(value) == text
    assert math.isclose(float(text.removeprefix("<")), value, rel_tol=0.05, abs_tol=1e-3)
