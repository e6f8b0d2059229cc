"""Films into the classes you name: an overlay film, labels of each frame, a table of shares.

Labels are written first, frame by frame, which an interrupted call leaves behind for the next one;
the film is drawn from them.
"""

import collections
import csv
import hashlib
import io
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from rpn_jax.base import overlap, pictures
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import FIELD, Origin, check_free
from rpn_jax.base.paths import expand_local, locked, replacing, write_json, write_text
from rpn_jax.devices import devices_text
from rpn_jax.drawing.film import FilmPainter, ffmpeg_name, film_writer, quiet_opencv
from rpn_jax.drawing.images import no_class_id, save_png
from rpn_jax.drawing.palette import class_colors
from rpn_jax.inference.segmentation import Segmentation
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.inference.smoothing import Smoothing, mean_of

# A frame that is shown for longer, as by a wrong time in the file, is cut short.
MAX_HOLD_SECONDS = 10.0
# Of files that do not tell theirs.
DEFAULT_RATE, MAX_RATE = 25.0, 240.0
# Bytes at the beginning of a film by which, and by its size, it is known again.
KNOWN_BY = 2**20
OPTIONS, MEAN = "options.json", "mean.npz"


class Frame(NamedTuple):
  """A frame of a film: its number, from 0, its time in seconds, and uint8 RGB (H, W, 3)."""

  number: int
  seconds: float
  image: np.ndarray


class Film:
  """A film that OpenCV's FFMPEG reads; frames are turned as the file says phones were held.

  Attributes:
    path: of the file.
    told: number of frames, as the file tells it, which may be wrong; 0: it does not.
    rate: frames per second on average, as the file tells it.

  Raises:
    InputError: the file is no film, or its first frame cannot be read.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    with quiet_opencv():
      capture = cv2.VideoCapture(ffmpeg_name(path), cv2.CAP_FFMPEG)
      if not capture.isOpened():
        raise InputError(
          f"{path}: expected a film that FFMPEG reads, as mp4, mov, mkv, webm or avi; open it in a "
          "player to see whether it is damaged, or whether its end is missing"
        )
      if not capture.grab():
        raise InputError(f"{path}: expected a film with frames, the first one cannot be read")
    rate = capture.get(cv2.CAP_PROP_FPS)
    self.rate = rate if math.isfinite(rate) and 0 < rate <= MAX_RATE else DEFAULT_RATE
    self.told = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    capture.release()

  def frames(self, every: int = 1, begin: int = 0) -> Iterator[Frame]:
    """Each `every`-th frame, from the frame with the number `begin` on, a multiple of `every`.

    Raises:
      InputError: a frame of too many pixels.
    """
    with quiet_opencv():
      capture = cv2.VideoCapture(ffmpeg_name(self.path), cv2.CAP_FFMPEG)
    try:
      # Not sought, which is inexact in many formats: all frames before it are decoded.
      for number in itertools.count():
        if not capture.grab():
          return
        if number < begin or number % every:
          continue
        seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        read, frame = capture.retrieve()
        if not read:
          return
        pictures.check_size(self.path, frame.shape[1::-1])
        yield Frame(number, seconds, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
      capture.release()

  def digest(self) -> str:
    """What tells the file from others of its name."""
    with self.path.open("rb") as file:
      begin = hashlib.sha256(file.read(KNOWN_BY)).hexdigest()[:16]
    return f"{self.path.name}, {self.path.stat().st_size:,} bytes, {begin}"


class FrameFolder:
  """The labels of a film's frames, a table of them, and what another call needs to go on.

  The table's row of a frame is written after all else, so that a frame that has one is complete.

  Attributes:
    path: folder of the labels, a PNG for each frame.
    table: CSV file with a row for each frame.
    done: (number, seconds) of the frames that are complete.
    mean: of the last one, see `Smoothing`; None without smoothing.

  Args:
    path, table: see above.
    names: C class names.
    options: what all frames must have been made with.

  Raises:
    InputError: an earlier call had other options.
  """

  def __init__(self, path: pathlib.Path, table: pathlib.Path, names: Sequence[str], options: dict):
    self.path, self.table, self.names = path, table, names
    self.done: list[tuple[int, float]] = []
    self.mean: list[np.ndarray] | None = None
    lines = self._continued() if self._begun(options) else []
    number, seconds, rest = (free_title(x, names) for x in ("frame", "seconds", "no class"))
    write_text(table, self._line(number, seconds, *names, rest) + "".join(lines))
    write_json(path / OPTIONS, options)

  def labels(self, number: int) -> pathlib.Path:
    """The file of a frame's labels."""
    return self.path / f"{number:06}.png"

  def add(self, frame: Frame, mean: list[np.ndarray] | None) -> None:
    """Notes that the labels of a frame are written."""
    if mean is not None:
      self._write_mean(frame, mean)
    with self.table.open("a", encoding="utf-8") as file:
      file.write(self._row(frame.number, frame.seconds))
    self.done.append((frame.number, frame.seconds))

  def mean_shares(self) -> list[float]:
    """Mean shares over the frames: of the C classes, then of the pixels without one."""
    sums = np.zeros(len(self.names) + 1)
    with self.table.open(encoding="utf-8", newline="") as file:
      for row in itertools.islice(csv.reader(file), 1, None):
        sums += np.array(row[2:], float)
    return (sums / len(self.done)).round(6).tolist()

  def _begun(self, options: dict) -> bool:
    """Whether an earlier call, with the same options, has left frames."""
    stored = self.path / OPTIONS
    if not (stored.exists() and self.table.exists()):
      return False
    try:
      earlier = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError:
      return False
    changed = [key for key in {**earlier, **options} if earlier.get(key) != options.get(key)]
    if changed:
      told = "; ".join(f"{key}: {earlier.get(key)} -> {options.get(key)}" for key in changed)
      raise InputError(
        f"{self.path} holds frames of a call with other options (there -> now): {told}. Use the "
        "same ones, or another --out, or remove that folder to begin again"
      )
    return True

  def _continued(self) -> list[str]:
    """Rows of the complete frames, for `done`."""
    text = self.table.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]  # the last row may have been cut
    rows = {
      (int(number), float(seconds)): self._line(number, seconds, *shares)
      for number, seconds, *shares in list(csv.reader(io.StringIO(complete)))[1:]
    }
    if (self.path / MEAN).exists():
      number, seconds, self.mean = self._read_mean()
      rows = {key: line for key, line in rows.items() if key[0] < number}
      # Also where the call ended between the mean and its frame's row.
      rows[number, seconds] = self._row(number, seconds)
    self.done = list(rows)
    return list(rows.values())

  def _write_mean(self, frame: Frame, mean: list[np.ndarray]) -> None:
    arrays: dict[str, Any] = {f"logits{i}": x for i, x in enumerate(mean)}
    with replacing(self.path / MEAN) as temporary, temporary.open("wb") as file:
      np.savez(file, number=np.array(frame.number), seconds=np.array(frame.seconds), **arrays)

  def _read_mean(self) -> tuple[int, float, list[np.ndarray]]:
    try:
      with np.load(self.path / MEAN) as stored:  # of no pickles
        mean = [stored[f"logits{i}"] for i in range(len(stored.files) - 2)]
        return int(stored["number"]), float(stored["seconds"]), mean
    except (ValueError, KeyError, OSError) as error:
      raise InputError(
        f"{self.path / MEAN}: expected the mean of an earlier call, got a damaged file; remove "
        "that folder to begin again"
      ) from error

  def _row(self, number: int, seconds: float) -> str:
    with Image.open(self.labels(number)) as file:
      labels = np.asarray(file)
    counts = np.bincount(labels.ravel(), minlength=no_class_id(len(self.names)) + 1)
    shares = [*counts[: len(self.names)], counts[no_class_id(len(self.names))]]
    return self._line(number, f"{seconds:.3f}", *(f"{n / labels.size:.6f}" for n in shares))

  @staticmethod
  def _line(*cells: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def free_title(title: str, names: Sequence[str]) -> str:
  """The title of a column of the table, in brackets where a class has that name."""
  while title in names:
    title = f"[{title}]"
  return title


def segment_film(
  segmenter: Segmenter,
  path: pathlib.Path,
  names: Sequence[str],
  directory: str | pathlib.Path,
  *,
  every: int = 1,
  smooth: float = 0.0,
  kind: str = "mp4",
  palette: str = "default",
  told: dict | None = None,
  **options: Any,
) -> list[pathlib.Path]:
  """Writes `<stem>_overlay.<kind>`, `<stem>_labels/`, `<stem>_shares.csv` and `<stem>.json`.

  Interrupted, it leaves the labels and the table of the frames so far, and the same call goes on
  from there. Sound is not kept.

  Args:
    segmenter: the model.
    path: of the film.
    names: C class names.
    directory: where to write, not in a bucket.
    every: each `every`-th frame, from the first one on.
    smooth: weight of the past, see `Smoothing`; 0: each frame by itself.
    kind: of the overlay film, one of CODECS.
    palette: color palette, of the film, the labels and the JSON alike.
    told: options that the model was loaded with; with others a call is not continued.
    **options: other arguments of `Segmenter.__call__`.

  Returns:
    The paths, in this order.

  Raises:
    InputError: the file is no film; the options differ from those of the call to be continued.
  """
  if every < 1:
    raise InputError(f"--every: expected a number of frames of at least 1, got {every}")
  if not 0 <= smooth < 1:
    raise InputError(f"--smooth: expected a weight of at least 0 and below 1, got {smooth}")
  path, directory = expand_local(path, "a film"), expand_local(directory, "--out of a film")
  film, stem, origin = Film(path), path.stem, Origin(path)
  settings = {
    "film": film.digest(), "model": segmenter.method, "names": list(names), "every": every,
    "smooth": smooth, "palette": palette,
    "dtype": np.dtype(segmenter.predictor.network.dtype).name, **(told or {}),
    **{key: value or None for key, value in options.items()},
  }  # fmt: skip
  labels, overlay = directory / f"{stem}_labels", directory / f"{stem}_overlay.{kind}"
  if not labels.exists():  # which says itself what it is of
    check_free(origin, directory, stem, (".json",))
  labels.mkdir(parents=True, exist_ok=True)
  with locked(labels / ".lock", str(labels), "use another --out"):
    folder = FrameFolder(labels, directory / f"{stem}_shares.csv", names, settings)
    try:
      _label(segmenter, film, folder, every, smooth, palette, options)
      last = folder.done[-1][0]
      if film.told - last - every > max(2, film.told // 100):
        print(
          f"{path}: {film.told} frames by its header, {last + 1} could be read; it may be damaged"
        )
      _draw(film, folder, every, overlay, palette)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"interrupted; {len(folder.done)} frames are done and kept, the same command continues"
      ) from None
    summary = _summary(segmenter, film, folder, palette, settings)
    write_json(directory / f"{stem}.json", {**summary, FIELD: origin.name(directory)})
  written = [overlay, folder.path, folder.table, directory / f"{stem}.json"]
  print("\n".join([segmenter.method, *map(str, written)]))
  return written


def _label(
  segmenter: Segmenter, film: Film, folder: FrameFolder, every: int, smooth: float, palette: str,
  options: dict,
) -> None:  # fmt: skip
  """Labels of the frames that have none yet."""
  begun = len(folder.done)
  begin = folder.done[-1][0] + every if begun else 0
  if begun:
    print(f"continuing after {begun} frames, at frame {begin}", flush=True)
  pending: collections.deque[Frame] = collections.deque()

  def images() -> Iterator[np.ndarray]:
    for frame in film.frames(every, begin):
      pending.append(frame)
      yield frame.image

  def results() -> Iterator[tuple[Frame, Segmentation]]:
    smoothing = Smoothing(smooth, folder.mean) if smooth else None
    for result in segmenter.stream(images(), folder.names, smooth=smoothing, **options):
      _ = result.labels  # see `save_all`
      yield pending.popleft(), result

  def save(item: tuple[Frame, Segmentation]) -> tuple[Frame, list[np.ndarray] | None]:
    frame, result = item
    save_png(folder.labels(frame.number), result.mask(palette))
    return frame, mean_of(result.class_scores.scores) if smooth else None

  total = max(-(-film.told // every), begun)
  with progress(total, f"segment on {devices_text()}", "frame", begun) as bar:
    for frame, mean in overlap.mapped(save, results(), lambda item: item[1].nbytes):
      folder.add(frame, mean)
      bar.update()


def _draw(film: Film, folder: FrameFolder, every: int, path: pathlib.Path, palette: str) -> None:
  """Draws the film of the labels, at the pace of the original."""
  with Image.open(folder.labels(folder.done[0][0])) as file:
    painter = FilmPainter(file.size[::-1], folder.names, palette)

  def paint(frame: Frame) -> np.ndarray:
    with Image.open(folder.labels(frame.number)) as file:
      return painter(frame.image, np.asarray(file))

  rate = film.rate / every
  shown = overlap.mapped(paint, film.frames(every), lambda frame: frame.image.nbytes)
  times = repeats([seconds for _, seconds in folder.done], rate)
  with (
    film_writer(path, painter.size, rate) as write,
    progress(len(folder.done), "draw", "frame") as bar,
  ):
    for count, picture in zip(times, shown):
      for _ in range(count):
        write(picture)
      bar.update()


def repeats(seconds: Sequence[float], rate: float) -> list[int]:
  """How often each frame is shown in a film of one rate, so that it keeps the original's pace.

  Args:
    seconds: when each frame is shown in the original, whose rate may vary.
    rate: frames per second.
  """
  ticks = np.round((np.array(seconds) - seconds[0]) * rate).astype(int)
  counts = np.append(np.diff(ticks), 1)
  if (np.diff(seconds) <= 0).any():  # the file has no times that can be used
    return [1] * len(seconds)
  return np.minimum(counts, max(1, int(MAX_HOLD_SECONDS * rate))).tolist()


def _summary(
  segmenter: Segmenter, film: Film, folder: FrameFolder, palette: str, settings: dict
) -> dict:
  with Image.open(folder.labels(folder.done[0][0])) as file:
    width, height = file.size
  colors = class_colors(folder.names, palette).tolist()
  *shares, rest = folder.mean_shares()
  return {
    "film": str(film.path),
    "width": width,
    "height": height,
    "frames": len(folder.done),
    "frames_per_second": round(film.rate, 3),
    "method": segmenter.method,
    "options": settings,
    "classes": [
      {"name": name, "id": i, "share": share, "color": colors[i]}
      for i, (name, share) in enumerate(zip(folder.names, shares))
    ],
    "other": {"id": no_class_id(len(folder.names)), "share": rest},
  }
