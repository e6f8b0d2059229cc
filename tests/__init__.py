"""Tests mirror the rooms of the package; what spans several of them is directly in here."""

import pathlib

ROOT = pathlib.Path(__file__).parent.parent
FIXTURES = ROOT / "tests/fixtures"
