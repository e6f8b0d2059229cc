"""Plots are looked at as matplotlib's objects: what they show, and where."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rpn_jax.drawing import plots
from rpn_jax.drawing.plots import _moving_mean, plot_curves


@pytest.fixture
def drawn(monkeypatch):
  """The figures made during a test."""
  figures, make = [], plots.figure

  def keep(*args, **options):
    fig, axes = make(*args, **options)
    figures.append(fig)
    return fig, axes

  monkeypatch.setattr(plots, "figure", keep)
  return figures


def assert_nothing_overlaps(figure):
  """Legends lie beside the axes of all panels, and everything inside the figure."""
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  boxes = [ax.get_window_extent(renderer) for ax in figure.axes]
  legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
  for beside in legends:
    box = beside.get_window_extent(renderer)
    assert not any(box.overlaps(other) for other in boxes)
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.bbox.y0


def test_curves_group_by_kind(tmp_path, drawn):
  steps = range(0, 2000, 10)
  history = {
    "train/loss": [(s, 100 * 0.995**s + 0.1) for s in steps],
    "train/focal": [(s, float("nan") if s == 50 else 1.0) for s in steps],
    "train/skipped": [(s, 0) for s in steps],  # neither a loss nor worth a panel
    "train/grad_norm": [(s, 2.0) for s in steps],
    "train/learning_rate": [(s, 1e-5) for s in steps],
    "eval/hiou": [(1000, 0.4), (2000, 0.5)],
    "eval/pAcc": [(1000, 0.8), (2000, 0.9)],
    "speed": [(1000, 3.0)],
  }
  path = plot_curves(tmp_path / "c.png", history)
  with Image.open(path) as image:
    assert image.width > 1000
  (fig,) = drawn
  axes = fig.axes
  assert [ax.get_ylabel() for ax in axes] == [
    "loss",
    "score (%)",
    "learning rate (per step)",
    "L2 norm of the gradient",
    "value",
  ]
  assert [ax.get_yscale() for ax in axes] == ["log", "linear", "linear", "linear", "linear"]
  assert len(axes[0].lines) == 4  # two losses, each raw and smoothed
  assert [t.get_text() for t in axes[1].get_legend().get_texts()] == ["pAcc: 90.0", "hIoU: 50.0"]
  np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [40, 50])
  assert_nothing_overlaps(fig)


def test_skipped_steps_are_drawn_apart_from_losses(tmp_path, drawn):
  history = {"train/loss": [(10, 90.0), (20, 1.0)], "train/skipped": [(10, 0), (20, 3)]}
  plot_curves(tmp_path / "c.png", history)
  losses, others = drawn[0].axes
  assert (losses.get_ylabel(), len(losses.lines), losses.get_yscale()) == ("loss", 1, "log")
  np.testing.assert_allclose(others.lines[0].get_ydata(), [0, 3])


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [(1, float("nan"))]}])
def test_curves_of_nothing_say_so(tmp_path, drawn, history):
  plot_curves(tmp_path / "c.png", history)
  assert "nothing" in drawn[0].axes[0].texts[0].get_text()


def test_moving_mean_keeps_constants_and_ends():
  np.testing.assert_allclose(_moving_mean(np.full(200, 3.0)), 3)
  line = np.arange(200.0)
  smooth = _moving_mean(line)
  np.testing.assert_allclose(smooth[:196], line[:196])
  noise = np.random.default_rng(0).normal(size=1000)
  assert _moving_mean(noise).std() < 0.3


def test_import_is_light():
  code = (
    "import sys, rpn_jax.drawing.images, rpn_jax.drawing.plots, rpn_jax.base.console;"
    "print([m for m in ('matplotlib', 'PIL', 'tensorboardX', 'jax') if m in sys.modules])"
  )
  assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
