"""The frames of a film under the colors of their classes, above a legend that stays the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from rpn_jax.base.console import silent_stderr
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import replacing
from rpn_jax.drawing.images import display_size, tinted
from rpn_jax.drawing.legend import MAX_ENTRIES, Entry, draw_legend
from rpn_jax.drawing.palette import class_colors

if TYPE_CHECKING:
  import pathlib

MAX_FILM_SIDE = 1920  # pixels
# Suffix -> what OpenCV's wheels can write in it. They have no encoder of H.264, H.265 or AV1.
CODECS = {"mp4": "mp4v", "webm": "VP80"}


class FilmPainter:
  """Draws frames of one size.

  Attributes:
    size: (width, height) of what is drawn, even numbers, as codecs need them.

  Args:
    shape: (height, width) of the frames.
    names: C class names, all of which are in the legend.
    palette: of `class_colors`.
  """

  def __init__(self, shape: tuple[int, int], names: Sequence[str], palette: str = "default"):
    self.colors = class_colors(names, palette)
    self._frame = display_size(shape, MAX_FILM_SIDE)
    letters = max(14, max(self._frame) // 40)
    width = max(self._frame[0], 24 * letters)
    entries = [Entry(color, name) for color, name in zip(self.colors, names)]
    if len(entries) > MAX_ENTRIES:
      entries[MAX_ENTRIES:] = [Entry((), f"and {len(names) - MAX_ENTRIES} more")]
    legend = np.asarray(draw_legend(entries, width - letters, letters))
    height = self._frame[1] + legend.shape[0] + letters
    self.size = width + width % 2, height + height % 2
    self._page = np.full((*self.size[::-1], 3), 255, np.uint8)
    top, left = self._frame[1] + letters // 2, letters // 2
    self._page[top : top + legend.shape[0], left : left + legend.shape[1]] = legend

  def __call__(self, image_HxWx3: np.ndarray, label_HxW: np.ndarray) -> np.ndarray:
    """A frame of the film, (*size[::-1], 3) uint8 RGB.

    Args:
      image_HxWx3: uint8 RGB.
      label_HxW: class ids; pixels of other values stay as they are.
    """
    page = self._page.copy()
    width, height = self._frame
    left = (self.size[0] - width) // 2
    colored = tinted(image_HxWx3, label_HxW, self.colors, self._frame)
    page[:height, left : left + width] = colored
    return page


@contextlib.contextmanager
def film_writer(
  path: pathlib.Path, size: tuple[int, int], rate: float
) -> Iterator[Callable[[np.ndarray], None]]:
  """What writes frames, uint8 RGB, to a film, which is at `path` only once the block has succeeded.

  Args:
    path: its suffix is one of CODECS.
    size: (width, height).
    rate: frames per second.

  Raises:
    InputError: this OpenCV cannot write it, or not all of it could be written.
  """
  kind = path.suffix.removeprefix(".")
  with replacing(path) as temporary:
    named = temporary.with_name(f"{temporary.name}{path.suffix}")  # which tells OpenCV the format
    try:
      with quiet_opencv():
        fourcc = cv2.VideoWriter.fourcc(*CODECS[kind])
        writer = cv2.VideoWriter(ffmpeg_name(named), cv2.CAP_FFMPEG, fourcc, rate, size)
      if not writer.isOpened():
        raise InputError(
          f"{path}: expected an OpenCV that writes {CODECS[kind]}, got {cv2.__version__} without "
          f"it; choose another --film ({', '.join(CODECS)})"
        )
      count = 0

      def write(frame: np.ndarray) -> None:
        nonlocal count  # a frame that cannot be written is told once, below
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        count += 1

      level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
      try:
        yield write
      finally:
        with quiet_opencv():
          writer.release()
        cv2.utils.logging.setLogLevel(level)
      if (kept := _count(named)) < count:  # of a full disk OpenCV says nothing
        raise InputError(
          f"{path}: only {kept} of {count} frames could be written; free some disk space"
        )
      os.replace(named, temporary)
    finally:
      named.unlink(missing_ok=True)


def _count(path: pathlib.Path) -> int:
  """Frames of a film that can be read; they are not decoded to pixels."""
  with quiet_opencv():
    capture = cv2.VideoCapture(ffmpeg_name(path), cv2.CAP_FFMPEG)
    count = 0
    while capture.grab():
      count += 1
    capture.release()
  return count


def ffmpeg_name(path: pathlib.Path) -> str:
  """The path for FFMPEG, which takes what is before a colon, as in 12:30.mp4, for a protocol."""
  return str(path.absolute())


def quiet_opencv() -> contextlib.AbstractContextManager[None]:
  """Keeps OpenCV and its FFMPEG from writing to the terminal; callers tell of errors.

  FFMPEG has a level, OpenCV's own remarks on formats go to stderr without one.
  """
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read with the first film
  return silent_stderr()
