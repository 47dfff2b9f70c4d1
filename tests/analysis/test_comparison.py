"""The page of a comparison."""

import pytest

from diffmm.analysis.comparison import Chart, Page, results_of


@pytest.mark.parametrize(("other", "num_dots"), [([(20.0, 1.5)], 3), ([(10.0, 1.5), (20.0, 1)], 0)])
def test_curves_of_one_point_are_visible(other, num_dots):
    curves = {0: [(10.0, 2.0), (20.0, 1.0)], 1: other}
    page = Page("", [], ["run"], [["a"], ["b"]], [], [Chart("val/loss", curves)], "")
    assert results_of(page).count('class="dot"') == num_dots
