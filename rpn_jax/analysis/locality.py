"""How local a frozen tower's patches are: python -m rpn_jax locality --clip=FILE

Whether the last patches of a CLIP's vision tower still tell what is under them, measured on scenes
of the shapes data set with the labels of all their classes. Of each scene one window is taken, of
the tower's own image size, at a place drawn from the seed; scenes with a shorter side are enlarged
first. A patch's feature is what a head gets of it: the output of the last block after `ln_post` and
the projection to the joint space. What the projection drops no head can use, and as the space is as
wide in towers of any width, their probes have as many parameters.

Probe: multinomial logistic regression on the features of training scenes, standardized per channel,
with a penalty of 1e-4 / 2 times the squared weights, by full-batch L-BFGS from zeros until no entry
of the gradient of the mean loss exceeds 1e-5 (or 2000 iterations, which is said). A patch has the
class of most of its pixels. mIoU, over the classes in truth or prediction, and accuracy are those
of patches of evaluation scenes; the floor is the accuracy of always answering the class that most
training patches have.

Attention distance: the mean distance between a patch and those it attends to (see
`distance.mean_distance`) over the last two layers, their heads and the evaluation scenes; in pixels
of the windows, and over the same of attention that is the same everywhere, so that towers with
other grids compare.

Far pixels: of 16 random patches of each evaluation scene. The pixels of a patch and its neighbors,
all within one patch of it up, down, sideways and diagonally, stay, and all others become those of
another scene, the same for all patches of a scene. Counted are the patches whose class, by the
probe, changes; and the mean cosine between a patch's feature before and after. Where both stay
(0 % changed, cosine 1) the tower is local.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpn_jax import devices
from rpn_jax.analysis.attention import qkv_of_layers
from rpn_jax.analysis.distance import mean_distance
from rpn_jax.base import pixels
from rpn_jax.base.console import progress, table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.inference import metrics
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIPConfig, VisionTransformer
from rpn_jax.weights import clip_file
from rpn_jax.weights.architecture import normalization
from rpn_jax.weights.arrays import fingerprint

PENALTY, TOLERANCE, MAX_ITERATIONS = 1e-4, 1e-5, 2000
PATCHES_EACH = 16  # and windows at a time
LAST_LAYERS = 2
MIN_GRID = 4  # patches a side; on a smaller grid most patches have few pixels that are far

# Windows (B, S, S, 3) uint8 -> features (B, N, E), the patches row by row.
Features = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Probe:
  """A linear classifier of features (…, E): class ids (…,)."""

  mean_E: np.ndarray
  std_E: np.ndarray
  weight_ExC: np.ndarray
  bias_C: np.ndarray

  def __call__(self, features: np.ndarray) -> np.ndarray:
    return ((features - self.mean_E) / self.std_E @ self.weight_ExC + self.bias_C).argmax(-1)


def fit_probe(features_NxE: np.ndarray, class_ids_N: np.ndarray, classes: int) -> Probe:
  """The probe of the features of N patches; see the top of the module."""
  mean, std = features_NxE.mean(0), np.maximum(features_NxE.std(0), 1e-6)
  x, y = jnp.asarray((features_NxE - mean) / std), jax.nn.one_hot(class_ids_N, classes)
  solver = optax.lbfgs()

  def loss(params, x, y):
    weight, bias = params
    errors = optax.softmax_cross_entropy(x @ weight + bias, y)
    return errors.mean() + PENALTY / 2 * (weight**2).sum()

  @jax.jit
  def step(params, state, x, y):
    value, grad = optax.value_and_grad_from_state(loss)(params, x, y, state=state)
    updates, state = solver.update(
      grad, state, params, value=value, grad=grad, value_fn=loss, x=x, y=y
    )
    steepest = jnp.max(jnp.stack([jnp.abs(g).max() for g in grad]))
    return optax.apply_updates(params, updates), state, steepest

  params = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
  state = solver.init(params)
  # An iterator has no length: how many are needed is not known.
  for _ in progress(iter(range(MAX_ITERATIONS)), "fit the probe", "iteration"):
    after, state, steepest = step(params, state, x, y)
    if steepest <= TOLERANCE:
      break
    params = after
  else:
    print(f"the probe's largest gradient is {steepest:.1e} after {MAX_ITERATIONS} iterations")
  return Probe(mean, std, *map(np.asarray, params))


def patch_classes(label_BxSxS: np.ndarray, patch: int, classes: int) -> np.ndarray:
  """The class of most pixels of each patch, the first of several: (B, N), row by row."""
  batch, side, _ = label_BxSxS.shape
  grid = side // patch
  cells = label_BxSxS.reshape(batch, grid, patch, grid, patch)
  counts = np.stack([(cells == c).sum((2, 4)) for c in range(classes)], -1)
  return counts.argmax(-1).reshape(batch, -1)


def far_pixels(
  features: Features, classify: Callable, windows: np.ndarray, patch: int, seed: int
) -> tuple[float, float]:
  """What other far pixels do: the share of patches whose class changes, and the mean cosine.

  Args:
    features: of the tower.
    classify: features (…, E) -> class ids.
    windows: (B, S, S, 3) uint8, two or more.
    patch: side of a patch, pixels.
    seed: of the patches and of which window is whose other one.
  """
  rng, grid = np.random.default_rng(seed), windows.shape[1] // patch
  order = rng.permutation(len(windows))
  other = np.empty_like(order)
  other[order] = np.roll(order, 1)  # a single circle, so that none is its own
  whole = features(windows)
  changed, cosines = [], []
  of_pixel = np.arange(windows.shape[1]) // patch
  for i in progress(range(len(windows)), "change far pixels", "scene"):
    places = rng.choice(grid**2, min(PATCHES_EACH, grid**2), replace=False)
    rows, columns = np.divmod(places, grid)
    near = [np.abs(of_pixel - place[:, None]) <= 1 for place in (rows, columns)]
    kept = near[0][:, :, None, None] & near[1][:, None, :, None]
    mixed = np.where(kept, windows[i], windows[other[i]])
    before = whole[i, places]
    after = features(mixed)[np.arange(len(places)), places]
    changed.append(classify(before) != classify(after))
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosines.append((before * after).sum(-1) / lengths)
  return float(np.mean(changed)), float(np.mean(cosines))


def take_windows(
  scenes: Sequence[Mapping], count: int, side: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """A window of each scene, at a random place: (B, side, side, 3) uint8 and labels (B, side, side).

  Args:
    scenes: {image uint8 [H,W,3], label [H,W]}; where a side is shorter, both are enlarged.
    count: B, of the first scenes.
    side: of the windows, pixels.
    seed: of the places.
  """
  images, labels = [], []
  for i in progress(range(count), "cut windows", "scene"):
    scene = scenes[i]
    image, label = scene["image"], scene["label"]
    if min(label.shape) < side:
      height, width = label.shape
      size = pixels.short_side_size(height, width, side)
      rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, label.shape)
      )
      image, label = pixels.resize(image, size), label[rows][:, columns]
    rng = np.random.default_rng((seed, i))
    top, left = (rng.integers(extent - side + 1) for extent in label.shape)
    window = np.s_[top : top + side, left : left + side]
    images.append(image[window])
    labels.append(label[window])
  return np.stack(images), np.stack(labels)


@functools.partial(jax.jit, static_argnums=0)
def last_layers(
  tower: VisionTransformer, variables: dict, windows_BxSxSx3: jax.Array, mean: Any, std: Any
) -> tuple[jax.Array, list]:
  """Features (B, N, E), and the projected tokens of the last layers, (B, 1 + N, 3 D) each."""

  def patches(tower, image):
    x, _ = tower.embed(image)
    for i in range(tower.config.vision_layers):
      x = tower.run_block(i, x)
    return tower.project(x[:, 1:])

  image = (windows_BxSxSx3.astype(jnp.float32) / 255 - mean) / std
  features, inside = tower.apply(variables, image, method=patches, mutable=["intermediates"])
  return features, qkv_of_layers(tower.config, inside["intermediates"])[-LAST_LAYERS:]


class Tower:
  """A frozen vision tower, as the measures see it."""

  def __init__(self, clip: CLIPConfig, params: Mapping):
    self.clip, self._variables = clip, {"params": params["visual"]}
    platform = jax.local_devices()[0].platform
    self._tower = VisionTransformer(clip, kernels=kernels.for_platform(platform))
    mean, std = normalization(clip.mean, clip.std)
    self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def __call__(self, windows: np.ndarray) -> tuple[np.ndarray, list]:
    """`last_layers` of up to PATCHES_EACH windows; always as many, so it is compiled once."""
    count = len(windows)
    windows = np.concatenate([windows, np.repeat(windows[-1:], PATCHES_EACH - count, axis=0)])
    features, qkv = last_layers(self._tower, self._variables, windows, self._mean, self._std)
    return np.asarray(features[:count]), [x[:count] for x in qkv]

  def features(self, windows: np.ndarray) -> np.ndarray:
    """See `Features`; any number of windows."""
    starts: Iterable[int] = range(0, len(windows), PATCHES_EACH)
    if len(windows) > PATCHES_EACH:
      starts = progress(starts, "compute features", "batch")
    return np.concatenate([self(windows[i : i + PATCHES_EACH])[0] for i in starts])

  def attention_distance(self, windows: np.ndarray) -> tuple[float, float]:
    """Mean attention distance of the last layers: pixels, and in proportion to even attention."""
    clip, grid = self.clip, (self.clip.grid, self.clip.grid)
    distance = functools.partial(
      mean_distance, heads=clip.vision_heads, grid=grid, patch_size=clip.patch_size
    )
    found, counts = [], []
    for i in range(0, len(windows), PATCHES_EACH):
      batch = windows[i : i + PATCHES_EACH]
      found.append(np.mean([distance(qkv) for qkv in self(batch)[1]]))
      counts.append(len(batch))
    mean = float(np.average(found, weights=counts))
    even = distance(jnp.zeros((1, clip.grid**2, 3 * clip.vision_width)))
    return mean, mean / float(even.mean())


def locality(
  clip: CLIPConfig, params: Mapping, scenes: Mapping[str, Any], image_count: int, seed: int
) -> dict:
  """All measures of a tower; fractions from 0 to 1 but for the distance, in pixels.

  Args:
    clip: architecture.
    params: of both towers.
    scenes: {"train", "val": see `take_windows`, "names": of the classes}.
    image_count: training scenes; as many evaluation scenes, if there are so many.
    seed: of windows, patches and pairs of scenes.

  Raises:
    InputError: fewer than two scenes, or a tower with a grid that is too small.
  """
  if clip.grid < MIN_GRID:
    raise InputError(
      f"expected a tower with {MIN_GRID} patches a side or more, got {clip.grid}: too few of its "
      "pixels are far from a patch"
    )
  classes, side = len(scenes["names"]), clip.grid * clip.patch_size
  used = {}
  for split in ("train", "val"):
    used[split] = min(image_count, len(scenes[split]))
    if used[split] < 2:
      raise InputError(f"expected two scenes or more of {split}, got {used[split]}")
  tower = Tower(clip, params)
  windows, labels = take_windows(scenes["train"], used["train"], side, seed)
  truth = patch_classes(labels, clip.patch_size, classes)
  features = tower.features(windows)
  probe = fit_probe(features.reshape(-1, features.shape[-1]), truth.ravel(), classes)
  majority = np.bincount(truth.ravel()).argmax()

  windows, labels = take_windows(scenes["val"], used["val"], side, seed)
  truth = patch_classes(labels, clip.patch_size, classes)
  confusion = metrics.confusion_matrix(truth, probe(tower.features(windows)), classes)
  scores = metrics.scores(confusion)
  distance, share = tower.attention_distance(windows)
  changed, cosine = far_pixels(tower.features, probe, windows, clip.patch_size, seed)
  return {
    "fingerprint": fingerprint(params),
    "probe_miou": scores["miou_union"],
    "probe_accuracy": scores["pAcc"],
    "majority_accuracy": float((truth == majority).mean()),
    "attention_distance": distance,
    "attention_distance_share": share,
    "far_changed": changed,
    "far_cosine": cosine,
    "scenes": used,
    "seed": seed,
  }


def text_of(result: Mapping) -> str:
  """The measures as a table."""
  percent = lambda name: f"{100 * result[name]:.1f} %"
  rows = [
    ("mIoU of a linear probe", percent("probe_miou")),
    ("its accuracy", percent("probe_accuracy")),
    ("accuracy of the most frequent class", percent("majority_accuracy")),
    ("attention distance, last two layers", f"{result['attention_distance']:.1f} px"),
    ("in proportion to even attention", percent("attention_distance_share")),
    ("classes changed by other far pixels", percent("far_changed")),
    ("cosine of features before and after", f"{result['far_cosine']:.3f}"),
  ]
  used = result["scenes"]
  return (
    f"{table(rows, ['patches of the last layer', result['fingerprint']])}\n\n"
    f"{used['train']} training and {used['val']} evaluation scenes, seed {result['seed']}"
  )


def main(arguments: list[str], load: Callable[[str], Mapping[str, Any]]) -> int:
  """Runs the command; `load` opens the scenes of a data folder, see `locality`."""
  parser = argparse.ArgumentParser(prog="rpn locality", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  add("--clip", required=True, help="CLIP weights: a file, or a name as of config.clip")
  add(
    "--image-count",
    type=int,
    default=1600,
    help="training scenes, and at most as many evaluation scenes (%(default)s)",
  )
  add("--data-dir", default="data", help="folder of prepared data sets (%(default)s)")
  add("--seed", type=int, default=0, help="of windows, patches and pairs of scenes (%(default)s)")
  add("--json", help="also write the numbers to this file")
  args = parser.parse_args(arguments)
  if args.seed < 0:
    raise InputError(f"--seed: expected at least 0, got {args.seed}")
  with devices.runtime(alone=True):
    clip, params = clip_file.load_clip(args.clip)
    result = locality(clip, params, load(args.data_dir), args.image_count, args.seed)
  print(text_of(result))
  if args.json:
    write_json(expand(args.json), result)
  return 0
