"""Label maps of MATLAB files, against scipy's writer and reader."""

import io

import numpy as np
import pytest
import scipy.io

from data_pipelines.sources import matlab


def saved(content: dict, **options) -> bytes:
  file = io.BytesIO()
  scipy.io.savemat(file, content, **options)
  return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f8"])
@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (3, 1), (0, 3)])
def test_as_scipy_reads_it(compressed, dtype, shape):
  label = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
  content = saved(
    {
      "other": np.ones((2, 2)), "words": "text", "LabelMap": label,
      "GTcls": {"a": 1.0, "Segmentation": label, "Boundaries": [1, 2]},
    },
    do_compression=compressed,
  )  # fmt: skip
  told = scipy.io.loadmat(io.BytesIO(content))
  for field, want in (
    ("LabelMap", told["LabelMap"]), ("GTcls.Segmentation", told["GTcls"]["Segmentation"][0, 0]),
  ):  # fmt: skip
    got = matlab.read(content, field)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype == dtype
  assert matlab.read(content, "words") is None and matlab.read(content, "GTcls") is None
  assert matlab.read(content, "GTcls.missing") is None and matlab.read(content, "other.x") is None
  with pytest.raises(ValueError, match="no 'missing' in it"):
    matlab.read(content, "missing")


def test_damage():
  content = saved({"x": np.arange(300, dtype="u2").reshape(20, 15)})
  for length in range(0, len(content), 7):
    with pytest.raises(ValueError):
      matlab.read(content[:length], "x")
  with pytest.raises(ValueError, match="values for the shape"):
    matlab.read(content.replace(b"\x14\0\0\0\x0f\0\0\0", b"\x15\0\0\0\x0f\0\0\0"), "x")
