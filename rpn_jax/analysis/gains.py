"""By how much rows of a study are ahead of others, and what that goes with, as tables."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from rpn_jax.analysis import paired, rates, report
from rpn_jax.analysis.plan import Plan, key
from rpn_jax.analysis.runs import Row
from rpn_jax.base.console import percent, table

# Measures of a tower, as `rpn_jax.analysis.locality` and the pre-training call them -> titles.
MEASURES = {
  "probe_miou": "linear probe on patches, mIoU (%)",
  "attention_distance_share": "attention distance, % of uniform attention's",
  "far_changed": "patches whose class far pixels change (%)",
}


@dataclasses.dataclass(frozen=True)
class Gain:
  """By how much one row of a table is ahead of another, seed by seed.

  Attributes:
    series: what stands for both.
    place: the table, as a tower.
    values: fractions.
  """

  series: str
  place: str
  values: Sequence[float]

  @property
  def point(self) -> tuple[float, float]:
    """Mean and half of Student's 95 % interval, NaN for one seed; percent."""
    return paired.interval(self.values)


def gains(
  rows: Mapping[str, Sequence[Row]],
  pairs: Mapping[str, tuple[str, str]],
  places: Collection[str],
  metric: str = "hiou",
) -> list[Gain]:
  """Of every pair of rows in every table that has both.

  Args:
    rows: table -> its rows.
    pairs: series -> (row, row that it is compared with).
    places: tables.
    metric: what the gain is in.
  """
  found = []
  for series, (ahead, behind) in pairs.items():
    for place in places:
      by_label = {row.label: row for row in rows.get(place, ())}
      if ahead in by_label and behind in by_label:
        values = paired.differences(by_label[ahead], by_label[behind], metric)
        if values:
          found.append(Gain(series, place, values))
  return found


def tower_table(
  towers: Mapping[str, Mapping], rows: Mapping[str, Sequence[Row]], found: Sequence[Gain]
) -> str:
  """What is known of each tower, as Markdown."""
  series = list(dict.fromkeys(gain.series for gain in found))
  most = max((len(gain.values) for gain in found), default=0)
  cells = []
  for tower, measures in towers.items():
    hiou = {row.label: row.values("last", "hiou") for row in rows.get(tower, ())}
    gain_of = {gain.series: gain.values for gain in found if gain.place == tower}
    cells.append(
      [
        tower,
        *(percent(measures.get(measure)) for measure in ("top1", *MEASURES)),
        *(report.mean_and_deviation(hiou.get(row, [])) for row in ("training_free", "lpm")),
        *(paired.mean_and_interval(gain_of.get(name, []), most) for name in series),
      ]
    )
  heads = ["tower", "zero-shot top-1 (%)", *MEASURES.values()]
  heads += ["training-free hIoU", "LPM alone hIoU", *(f"{name} [95 %]" for name in series)]
  return table(cells, heads, markdown=True)


def trend_table(towers: Mapping[str, Mapping], found: Sequence[Gain]) -> str:
  """Over all towers: the mean gain, and how it grows with each measure, as Markdown; "" if there
  are not two."""
  cells = []
  for name in dict.fromkeys(gain.series for gain in found):
    means = {g.place: g.point[0] for g in found if g.series == name and g.place in towers}
    slopes = []
    for measure in MEASURES:
      points = [
        (10 * towers[tower][measure], mean)
        for tower, mean in means.items()
        if towers[tower].get(measure) is not None
      ]
      x, y = ([point[i] for point in points] for i in range(2))
      slopes.append(paired.with_interval(*paired.slope(x, y)))
    if len(means) > 1:
      gained = paired.mean_and_interval([mean / 100 for mean in means.values()])
      cells.append([name, len(means), gained, *slopes])
  heads = ["over towers", "towers", "mean [95 %]"]
  heads += [f"points for 10 more of: {title} [95 %]" for title in MEASURES.values()]
  return table(cells, heads, markdown=True) if cells else ""


def group_table(
  rows: Mapping[str, Sequence[Row]],
  pairs: Mapping[str, tuple[str, str]],
  towers: Collection[str],
) -> str:
  """The gains around each tower, in mIoU of seen and of unseen classes, as Markdown; "" if there
  are none. See `gains`."""
  cells = []
  for name, pair in pairs.items():
    for group in ("seen", "unseen"):
      found = {g.place: g for g in gains(rows, {name: pair}, towers, f"miou_{group}")}
      if found:
        means = [gain.point[0] / 100 for gain in found.values()]
        of_tower = (paired.mean_and_interval(found[t].values if t in found else []) for t in towers)
        cells.append([name, group, *of_tower, paired.mean_and_interval(means)])
  heads = ["gain in mIoU [95 %]", "classes", *towers, "over towers"]
  return table(cells, heads, markdown=True) if cells else ""


def rate_table(
  plan: Plan,
  trials: Mapping[str, Sequence[rates.Trial]],
  pairs: Mapping[str, tuple[str, str]],
  towers: Collection[str],
) -> str:
  """The gains of the runs that rates were chosen by, at equal rates, over towers, as Markdown; ""
  if there are none. A row without variants is compared with every variant of another."""
  changes = dict(plan.rows(list(plan.content["TABLES"])))
  of_changes = {key(changes[name]): of_row for name, of_row in trials.items()}

  def scores(tower: str, row: str) -> dict[tuple[str, float], float]:
    own = changes.get(f"{tower}_{row}")
    of_row = () if own is None else of_changes.get(key(own), ())
    return {(t.variant, t.rate): t.score for t in of_row if t.score is not None}

  cells, every = [], sorted({t.rate for of_row in trials.values() for t in of_row})
  for name, (ahead, behind) in pairs.items():
    both = [(scores(tower, ahead), scores(tower, behind)) for tower in towers]
    for variant in dict.fromkeys(variant for a, _ in both for variant, _ in a):
      line = []
      for rate in every:
        at = (variant, rate)
        others = [(a.get(at), b.get(at, b.get(("", rate)))) for a, b in both]
        line.append(
          paired.mean_and_interval([a - b for a, b in others if a is not None and b is not None])
        )
      cells.append([name, variant, *line])
  heads = ["gain on held-out images at equal rates [95 %]", "variant", *(f"{r:g}" for r in every)]
  return table(cells, heads, markdown=True) if cells else ""
