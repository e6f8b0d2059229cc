"""Films made by OpenCV, segmented, interrupted and continued; read back from disk."""

import csv
import functools
import json
import pathlib
import resource
import shutil
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines import shapes
from rpn_jax import Segmenter
from rpn_jax.base.errors import InputError
from rpn_jax.drawing import film as drawing
from rpn_jax.drawing.palette import class_colors
from rpn_jax.tasks import video

NAMES = ("plain red", "striped blue", "grass", "sand", "water")
HEIGHT, WIDTH, RATE = 48, 64, 10.0


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip", templates="single")


def write(path, count=8, codec="mp4v", step=7):
  """A film of a camera that moves over a scene, and its frames as a player shows them."""
  scene, _ = shapes.draw_scene(np.random.default_rng(1), HEIGHT, WIDTH + step * count, (4, 6))
  with drawing.quiet_opencv():  # whose level FFMPEG takes from its first use in the process
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), RATE, (WIDTH, HEIGHT))
  for i in range(count):
    writer.write(np.ascontiguousarray(scene[:, i * step : i * step + WIDTH, ::-1]))
  writer.release()
  return read(path)


def read(path):
  capture, frames = cv2.VideoCapture(str(path)), []
  while (got := capture.read())[0]:
    frames.append(got[1][..., ::-1])
  return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  path = tmp_path_factory.mktemp("film") / "clip.mp4"
  return path, write(path)


def labels_in(out, stem="clip"):
  files = sorted((out / f"{stem}_labels").glob("*.png"))
  return {int(file.stem): np.asarray(Image.open(file)) for file in files}


def rows_in(out):
  return list(csv.reader((out / "clip_shares.csv").read_text().splitlines()))


def test_each_frame_is_segmented_as_an_image_would_be(model, clip, tmp_path, capsys):
  path, frames = clip
  written = video.segment_film(model, path, NAMES, tmp_path, other=0.2)
  assert [file.name for file in written] == [
    "clip_overlay.mp4", "clip_labels", "clip_shares.csv", "clip.json",
  ]  # fmt: skip
  assert sorted(tmp_path.iterdir()) == sorted(written)  # nothing half-written
  assert "clip_overlay.mp4" in capsys.readouterr().out
  head, *rows = rows_in(tmp_path)
  assert head == ["frame", "seconds", *NAMES, "no class"] and len(rows) == len(frames) == 8
  for i, (number, label) in enumerate(labels_in(tmp_path).items()):
    right = model(np.ascontiguousarray(frames[i]), NAMES, other=0.2).labels
    np.testing.assert_array_equal(label, np.where(right < 0, 255, right))
    shares = [*((right == k).mean() for k in range(len(NAMES))), (right < 0).mean()]
    assert number == int(rows[i][0]) == i and float(rows[i][1]) == pytest.approx(i / RATE)
    np.testing.assert_allclose(np.array(rows[i][2:], float), shares, atol=1e-6)
  summary = json.loads((tmp_path / "clip.json").read_text())
  means = np.array([row[2:] for row in rows], float).mean(0)
  found = [each["share"] for each in summary["classes"]] + [summary["other"]["share"]]
  np.testing.assert_allclose(found, means, atol=1e-6)
  assert (summary["frames"], summary["width"], summary["height"]) == (8, WIDTH, HEIGHT)


def test_colors_of_another_palette(model, clip, tmp_path):
  video.segment_film(model, clip[0], NAMES, tmp_path, every=4, palette="colorblind")
  with Image.open(tmp_path / "clip_labels/000000.png") as labels:
    colors = np.reshape(labels.getpalette(), (-1, 3))[: len(NAMES)]
  summary = json.loads((tmp_path / "clip.json").read_text())
  for found in (colors, [row["color"] for row in summary["classes"]]):
    np.testing.assert_array_equal(found, class_colors(NAMES, "colorblind"))


def test_a_class_may_be_called_as_a_column_is(model, clip, tmp_path):
  names = ("sand", "no class", "[no class]", "frame")
  video.segment_film(model, clip[0], names, tmp_path, every=4, other=0.3)
  head, *rows = rows_in(tmp_path)
  assert head == ["[frame]", "seconds", *names, "[[no class]]"]
  means = np.array([row[2:] for row in rows], float).mean(0)
  summary = json.loads((tmp_path / "clip.json").read_text())
  assert [(row["name"], row["id"]) for row in summary["classes"]] == [
    (name, i) for i, name in enumerate(names)
  ]
  found = [*(row["share"] for row in summary["classes"]), summary["other"]["share"]]
  np.testing.assert_allclose(found, means, atol=1e-6)


@pytest.mark.parametrize("kind", drawing.CODECS)
def test_the_film_shows_the_classes_above_one_legend(clip, tmp_path, kind, capfd):
  frames = clip[1]
  colors = class_colors(NAMES)
  painter = drawing.FilmPainter((HEIGHT, WIDTH), NAMES)
  with drawing.film_writer(tmp_path / f"f.{kind}", painter.size, RATE) as write_frame:
    for k, frame in enumerate(frames):
      write_frame(painter(frame, np.full((HEIGHT, WIDTH), k % len(NAMES))))
  assert capfd.readouterr() == ("", "")
  shown = read(tmp_path / f"f.{kind}")
  assert len(shown) == len(frames) and shown[0].shape[:2] == painter.size[::-1]
  legend = np.stack([page[390:] for page in shown]).astype(int)
  assert np.abs(legend - legend[0]).mean() < 6  # it stays; the codec loses some
  for k, page in enumerate(shown):
    right = 0.45 * frames[k].mean((0, 1)) + 0.55 * colors[k % len(NAMES)]
    np.testing.assert_allclose(page[:384, :512].mean((0, 1)), right, atol=6)


def test_every_so_many_frames(model, clip, tmp_path):
  path, frames = clip
  video.segment_film(model, path, NAMES, tmp_path, every=3)
  labels = labels_in(tmp_path)
  assert list(labels) == [0, 3, 6]
  right = model(np.ascontiguousarray(frames[6]), NAMES).labels
  np.testing.assert_array_equal(labels[6], right)
  capture = cv2.VideoCapture(str(tmp_path / "clip_overlay.mp4"))
  assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(RATE / 3, rel=0.01)
  assert len(read(tmp_path / "clip_overlay.mp4")) == 3


def interrupt_after(monkeypatch, frames, before_row=False):
  """Ctrl-C once so many frames are done, or before the row of the next one."""
  add, mean = video.FrameFolder.add, video.FrameFolder._write_mean

  def stop(self, *given):
    if len(self.done) == frames:
      if before_row:
        mean(self, *given)
      raise KeyboardInterrupt
    add(self, *given)

  monkeypatch.setattr(video.FrameFolder, "add", stop)


@pytest.fixture(scope="module")
def whole(model, clip, tmp_path_factory):
  """Smoothing -> the folder of a call that was not interrupted."""

  @functools.cache
  def whole(smooth):
    folder = tmp_path_factory.mktemp("whole")
    video.segment_film(model, clip[0], NAMES, folder, smooth=smooth)
    return folder

  return whole


# "before_row": after the mean, which there is with smoothing only.
@pytest.mark.parametrize(
  ("how", "smooth"), [("between", 0.7), ("before_row", 0.7), ("cut", 0.7), ("cut", 0.0)]
)
def test_an_interrupted_call_is_continued(
  model, clip, whole, tmp_path, monkeypatch, capsys, how, smooth
):
  path, _ = clip
  wanted = whole(smooth)
  out = tmp_path / "parts"
  with monkeypatch.context() as patch:
    interrupt_after(patch, 3, how == "before_row")
    with pytest.raises(KeyboardInterrupt, match="3 frames are done and kept, the same command"):
      video.segment_film(model, path, NAMES, out, smooth=smooth)
  assert not list(out.glob("*overlay*")) and not list(out.glob("*.tmp"))
  if how == "cut":  # a row that a full disk or a kill has cut
    table = out / "clip_shares.csv"
    table.write_text(table.read_text()[:-5])
  capsys.readouterr()
  given = []
  stream = type(model).stream
  monkeypatch.setattr(
    type(model), "stream",
    lambda self, images, *a, **k: stream(self, (given.append(1) or x for x in images), *a, **k),
  )  # fmt: skip
  video.segment_film(model, path, NAMES, out, smooth=smooth)
  done = {"between": 3, "before_row": 4, "cut": 3 if smooth else 2}[how]
  assert len(given) == 8 - done
  assert f"continuing after {done} frames, at frame {done}" in capsys.readouterr().out
  labels, parts = labels_in(wanted), labels_in(out)
  assert list(labels) == list(parts)
  for number in labels:
    np.testing.assert_array_equal(labels[number], parts[number])
  assert (out / "clip_shares.csv").read_text() == (wanted / "clip_shares.csv").read_text()
  summaries = [json.loads((folder / "clip.json").read_text()) for folder in (out, wanted)]
  assert summaries[0] | {"source": summaries[1]["source"]} == summaries[1]
  given.clear()
  video.segment_film(model, path, NAMES, out, smooth=smooth)  # all is done: only drawn again
  assert not given


def test_other_options_are_no_continuation(model, clip, tmp_path):
  path, _ = clip
  video.segment_film(model, path, NAMES, tmp_path, every=4)
  before = rows_in(tmp_path)
  with pytest.raises(InputError, match=r"other options \(there -> now\): every: 4 -> 2; smooth: "):
    video.segment_film(model, path, NAMES, tmp_path, every=2, smooth=0.5)
  with pytest.raises(InputError, match=r"names: .* -> .*another --out, or remove that folder"):
    video.segment_film(model, path, NAMES[1:], tmp_path, every=4)
  with pytest.raises(InputError, match="palette: default -> colorblind"):
    video.segment_film(model, path, NAMES, tmp_path, every=4, palette="colorblind")
  # As "auto" is on two machines.
  half, whole = (
    Segmenter.load("shapes_clip", templates="single", dtype=t) for t in ("bfloat16", "float32")
  )
  video.segment_film(half, path, NAMES, tmp_path / "half", every=4)
  with pytest.raises(InputError, match="dtype: bfloat16 -> float32"):
    video.segment_film(whole, path, NAMES, tmp_path / "half", every=4)
  other = tmp_path / "other" / "clip.mp4"
  other.parent.mkdir()
  write(other, 3)
  with pytest.raises(InputError, match=r"film: clip.mp4, .* bytes.* -> clip.mp4, "):
    video.segment_film(model, other, NAMES, tmp_path, every=4)
  assert rows_in(tmp_path) == before


@pytest.mark.parametrize(("options", "message"), [
  ({"every": 0}, "--every: expected a number of frames of at least 1, got 0"),
  ({"smooth": 1.0}, "--smooth: expected a weight of at least 0 and below 1, got 1.0"),
])  # fmt: skip
def test_options_out_of_range(model, clip, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    video.segment_film(model, clip[0], NAMES, tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_phones_that_were_held_upright(clip, tmp_path):
  content = bytearray(clip[0].read_bytes())
  begin = content.find(b"tkhd") + 4  # of the track's header: version, times, …, matrix
  assert content[begin] == 0
  matrix = begin + 4 + 20 + 16
  assert struct.unpack_from(">9i", content, matrix)[0] == 1 << 16
  turned = (0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
  struct.pack_into(">9i", content, matrix, *turned)
  (tmp_path / "phone.mp4").write_bytes(content)
  frames = [frame.image for frame in video.Film(tmp_path / "phone.mp4").frames()]
  assert len(frames) == 8
  for frame, right in zip(frames, clip[1]):
    np.testing.assert_array_equal(frame, np.rot90(right, -1))


def test_what_is_no_film_is_told_in_one_line(model, clip, tmp_path, capfd):
  for name, content in [("a.mp4", b"no film"), ("b.mp4", clip[0].read_bytes()[:2000])]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: expected a film that FFMPEG reads"):
      video.Film(tmp_path / name)
  cv2.VideoWriter(str(tmp_path / "c.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48)).release()
  with pytest.raises(InputError, match=r"c\.avi: expected a film"):
    video.Film(tmp_path / "c.avi")
  assert capfd.readouterr() == ("", "")  # nor does FFMPEG say anything


def test_a_time_of_day_in_a_films_name_is_no_protocol(model, clip, tmp_path, monkeypatch):
  path = pathlib.Path("2026-11-27T12:30:05.mp4")
  shutil.copy(clip[0], tmp_path / path)
  monkeypatch.chdir(tmp_path)  # behind a folder it is none to FFMPEG
  overlay, *_ = video.segment_film(model, path, NAMES, ".", every=4)
  assert overlay.name == f"{path.stem}_overlay.mp4" and len(read(overlay.absolute())) == 2


def test_a_film_without_its_end_gives_what_is_there(model, tmp_path, capsys):
  path = tmp_path / "clip.avi"
  write(path, 12, "MJPG")
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  video.segment_film(model, path, NAMES, tmp_path / "out")
  count = len(labels_in(tmp_path / "out"))
  assert 2 <= count <= 7
  assert (
    f"frames by its header, {count} could be read; it may be damaged" in capsys.readouterr().out
  )


def test_the_pace_of_the_original_is_kept():
  assert video.repeats([0.0, 0.1, 0.2, 0.3], 10) == [1, 1, 1, 1]
  # A phone that took 30 frames per second in the sun and 10 in the dark; 20 on average.
  assert video.repeats([0.0, 0.1, 0.2, 0.233, 0.267, 0.3], 20) == [2, 2, 1, 0, 1, 1]
  assert sum(video.repeats([0.0, 0.5, 3600.0], 10)) < 120  # a time that is wrong
  assert video.repeats([0.0, 0.0, 0.0], 10) == [1, 1, 1]  # no times
  assert video.repeats([2.0], 10) == [1]


def test_a_codec_that_opencv_lacks(clip, tmp_path, monkeypatch, capfd):
  monkeypatch.setitem(drawing.CODECS, "mp4", "avc1")
  with (
    pytest.raises(InputError, match=r"f\.mp4: expected an OpenCV that writes avc1, got .* --film"),
    drawing.film_writer(tmp_path / "f.mp4", (64, 48), 10),
  ):
    pass
  assert not list(tmp_path.iterdir())
  assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_no_half_of_a_film(tmp_path, capfd):
  noise = np.random.default_rng(0).integers(0, 256, (20, 240, 320, 3)).astype(np.uint8)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    with (
      pytest.raises(InputError, match=r"f\.mp4: only \d+ of 20 frames could be written; free some"),
      drawing.film_writer(tmp_path / "f.mp4", (320, 240), 10) as write_frame,
    ):
      for frame in noise:
        write_frame(frame)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())
  assert capfd.readouterr() == ("", "")
