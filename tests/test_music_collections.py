"""Nothing of the collections in music_collections.py is lost without a word, with and without PyAV."""

from importlib.util import find_spec

import pytest

from music_collections import FORMATS, LAYOUTS, NotMade, judge

CASES = LAYOUTS | FORMATS


@pytest.mark.parametrize("name", CASES)
def test_a_collection_is_taken_or_a_line_says_what_is_not(name, tmp_path):
    """Lengths and captions are the true ones, or named."""
    case = CASES[name]
    try:
        verdict, line = judge(case, tmp_path)
    except NotMade as reason:
        pytest.skip(str(reason))
    if case.says:
        assert verdict in ("named", "refused") and case.says in line, (verdict, line)
    elif verdict != "taken":
        assert verdict in ("named", "refused") and "pip install av" in line, (verdict, line)
        assert not find_spec("av"), line
