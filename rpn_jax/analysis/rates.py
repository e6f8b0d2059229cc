"""Learning rates for the rows of a sweep, each chosen from one grid where nobody is looking.

Methods differ in the rate that suits them, and a comparison at one rate for all favors those that
it happens to suit. So every row is trained at every rate of the same grid, at one seed, without a
part of the training images, on which it is then scored: on trained classes only, never on
evaluation images or unseen classes. The config file says what the grid is, by a function

    rate_grid(config) -> {variant: {rate: {field: value}}}

of a row's config. Variants are what else belongs to a method's rates, such as the share that h has
of them in RPN; most have one, "".
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from rpn_jax.analysis.kept import Results
from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json, write_text
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import figure, legend_beside, line_style

# What is compared: the mean IoU of the trained classes that the held-out images have.
METRIC = "miou_gt"
SEED = 0


@dataclasses.dataclass(frozen=True)
class Trial:
  """A row at one rate.

  Attributes:
    row: its name.
    variant: see the top of the module.
    rate: as the grid has it.
    fields: of the config, to values.
    workdir: of its run.
    results: of the sweep.
  """

  row: str
  variant: str
  rate: float
  fields: Mapping
  workdir: pathlib.Path
  results: Results

  @property
  def title(self) -> str:
    return ", ".join(filter(None, [f"{self.rate:g}", self.variant]))

  @property
  def score(self) -> float | None:
    """On the held-out images, 0 where the training diverged; None if it has not ended."""
    try:
      return self.results.read(self.workdir).last[METRIC]
    except (InputError, OSError):
      return 0.0 if self.results.diverged(self.workdir) else None


def trials(
  row: str,
  grid: Mapping[str, Mapping[float, Mapping]],
  workdir: Callable[[Mapping], pathlib.Path],
  results: Results,
) -> list[Trial]:
  """All of a row; `workdir` is of the fields of one."""
  return [
    Trial(row, variant, rate, fields, workdir(fields), results)
    for variant, rates in grid.items()
    for rate, fields in rates.items()
  ]


def choose(of_row: Sequence[Trial]) -> Trial | None:
  """The best one, of several the one with the lowest rate; None unless all have ended."""
  scores = [trial.score for trial in of_row]
  if None in scores:
    return None
  order = sorted(of_row, key=lambda trial: trial.rate)
  best = max(order, key=lambda trial: trial.score or 0.0)
  return best if best.score else None


def notes(rows: Mapping[str, Sequence[Trial]]) -> list[str]:
  """What a reader of the choices must know."""
  found = []
  for row, of_row in rows.items():
    best = choose(of_row)
    if best is None:
      missing = [trial.title for trial in of_row if trial.score is None]
      why = f"no score yet at {'; '.join(missing)}" if missing else "nothing was learned at any"
      found.append(f"{row}: no rate chosen, {why}")
      continue
    rates = sorted({trial.rate for trial in of_row})
    if len(rates) > 1 and best.rate in (rates[0], rates[-1]):
      end = "lowest" if best.rate == rates[0] else "highest"
      found.append(f"{row}: the best rate, {best.rate:g}, is the {end} that was tried")
  return found


def rate_table(rows: Mapping[str, Sequence[Trial]], *, markdown: bool = False) -> str:
  """Scores in percent, a line for every row and variant."""
  rates = sorted({trial.rate for of_row in rows.values() for trial in of_row})
  cells = []
  for row, of_row in rows.items():
    best = choose(of_row)
    for variant, line in _by_variant(of_row).items():
      at = {trial.rate: _text(trial) for trial in line}
      chosen = f"{best.rate:g}" if best in line and best else ""
      cells.append([row, variant, *(at.get(rate, "") for rate in rates), chosen])
  heads = ["row", "variant", *(f"{rate:g}" for rate in rates), "chosen"]
  return table(cells, heads, markdown=markdown)


def write(out: pathlib.Path, rows: Mapping[str, Sequence[Trial]]) -> pathlib.Path:
  """Writes rates.md, .json and .png to a folder, which is made; returns it."""
  out.mkdir(parents=True, exist_ok=True)
  content = {
    row: {
      "chosen": best.title if (best := choose(of_row)) else None,
      "trials": [
        {"variant": t.variant, "rate": t.rate, "fields": dict(t.fields), METRIC: t.score}
        for t in of_row
      ],
    }
    for row, of_row in rows.items()
  }
  write_json(out / "rates.json", content)
  lines = [
    rate_table(rows, markdown=True),
    "",
    f"Mean IoU of held-out training images in %, trained classes only, seed {SEED}.",
    *(f"\n- {note}" for note in notes(rows)),
    "\n![Scores by rate](rates.png)",
  ]
  write_text(out / "rates.md", "\n".join(lines) + "\n")
  fig, ((ax,),) = figure((8.5, 4.6))
  for i, (label, line) in enumerate(_lines(rows)):
    points = [(t.rate, 100 * score) for t in line if (score := t.score) is not None]
    if points:
      ax.plot(*zip(*sorted(points)), marker="o", markersize=4, label=label, **line_style(i))
  for of_row in rows.values():
    if best := choose(of_row):
      ax.plot(best.rate, 100 * (best.score or math.nan), "k*", markersize=10, zorder=3)
  ax.set_xscale("log")
  ax.set_xlabel("learning rate")
  ax.set_title("mIoU of held-out training images (%), * chosen", loc="left", fontsize=12)
  legend_beside(ax)
  save_png(out / "rates.png", fig)
  return out


def _by_variant(of_row: Iterable[Trial]) -> dict[str, list[Trial]]:
  found: dict[str, list[Trial]] = {}
  for trial in of_row:
    found.setdefault(trial.variant, []).append(trial)
  return found


def _lines(rows: Mapping[str, Sequence[Trial]]) -> list[tuple[str, list[Trial]]]:
  return [
    (", ".join(filter(None, [row, variant])), line)
    for row, of_row in rows.items()
    for variant, line in _by_variant(of_row).items()
  ]


def _text(trial: Trial) -> str:
  score = trial.score
  if score is None:
    return "-"
  return f"{100 * score:.1f}" if score or not trial.results.diverged(trial.workdir) else "diverged"
