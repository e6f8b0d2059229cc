"""Memory of a long-lived Segmenter: images of many sizes, lists of many lengths, one process.

    python -m benchmarks.memory --calls=2000 --figure=docs/images/memory.png

Every call gets an image of 60 to 500 random pixels on each side and 1 to 19 words. The table and
the figure show the resident memory of the process and the programs that are kept.
"""

import os
import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from rpn_jax import Segmenter, devices
from rpn_jax.base.console import progress, table
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import figure, line_style
from rpn_jax.inference import predictor, views

FLAGS = flags.FLAGS
flags.DEFINE_integer("calls", 2000, "Number of calls")
flags.DEFINE_string("model", "shapes_clip", "What `Segmenter.load` takes")
flags.DEFINE_string("figure", "", "PNG of the curve; empty: none")

SIDES, WORDS = (60, 501), (1, 20)
ROWS = 20  # of the table


def resident() -> float:
  """Resident memory of this process, MB."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def draw(path: str, points: np.ndarray) -> None:
  """Draws memory and programs over the calls."""
  fig, axes = figure((8, 3.2), columns=2)
  titles = ("resident memory, MB", "programs: kept, and compiled so far (dotted)")
  for ax, title, columns in zip(axes[0], titles, ((1,), (2, 3))):
    for i, column in enumerate(columns):
      ax.plot(
        points[:, 0], points[:, column], **line_style(0) | {"linestyle": "-" if not i else ":"}
      )
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("calls")
    ax.set_ylim(0)
  save_png(path, fig)


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  devices.configure_compilation_cache()
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  )
  segmenter, rng, points = Segmenter.load(FLAGS.model), np.random.default_rng(0), []
  for call in progress(range(1, FLAGS.calls + 1), "segment", "call"):
    size, words = rng.integers(*SIDES, 2), rng.integers(*WORDS)
    names = [f"thing {i}" for i in rng.choice(2000, words, replace=False)]
    _ = segmenter(rng.integers(0, 256, (*size, 3), np.uint8), names).labels
    kept = [f.cache_info().currsize for f in (views.tile_program, predictor.forward)]
    points.append([call, resident(), sum(kept), len(compiled)])
  shown = np.unique(np.geomspace(1, FLAGS.calls, ROWS).astype(int)) - 1
  rows = [[f"{x:,.0f}" for x in points[i]] for i in shown]
  print(table(rows, ["calls", "resident MB", "programs kept", "compiled so far"], markdown=True))
  if FLAGS.figure:
    draw(FLAGS.figure, np.array(points))


if __name__ == "__main__":
  app.run(main)
