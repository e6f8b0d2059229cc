"""Training-free methods that read the last block, against the whole tower written down in numpy;
what all methods have in common. tests/test_training_free_parity.py has the official code's arrays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import training_free as config_file
from data_pipelines import DATA_SETS
from rpn_jax.config import Dense
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, resize_positions
from rpn_jax.models.training_free import (
  METHODS,
  DenseCLIP,
  gem,
  res_clip,
  sc_clip,
  smooth,
  suppress,
)
from rpn_jax.models.training_free.positions import POSITIONS

TINY = CLIPConfig(
  embed_dim=12, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2,
  text_width=8, text_layers=2, text_heads=2, context_length=16, vocab_size=50,
)  # fmt: skip


@functools.cache
def tiny():
  """Parameters, every one random (biases too), two images and five unit-length texts."""
  keys = jax.random.split(jax.random.key(0), 4)
  image = jax.random.normal(keys[0], (2, 32, 24, 3))
  text = np.asarray(jax.random.normal(keys[1], (5, TINY.embed_dim)))
  params = jax.jit(VisionTransformer(TINY).init)(keys[2], image)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.normal(size=x.shape), params)
  params = jax.tree.map(np.float32, params)
  return params, np.asarray(image), text / np.linalg.norm(text, axis=-1, keepdims=True)


def scores(method, **fields):
  params, image, text = tiny()
  model = DenseCLIP(TINY, method, **fields)
  return np.asarray(jax.jit(model.apply)({"params": {"visual": params}}, image, text))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def norm(p, x):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def projections(block, x):
  """Queries, keys and values (heads, tokens, width of a head) of one image's tokens."""
  parts = np.split(dense(block["attn"]["in_proj"], norm(block["ln_1"], x)), 3, -1)
  return [part.reshape(len(x), TINY.vision_heads, -1).transpose(1, 0, 2) for part in parts]


def attention(block, x, weights):
  q, k, v = projections(block, x)
  scale = q.shape[-1] ** -0.5
  pairs = {name: softmax(a @ b.transpose(0, 2, 1) * scale) for name, (a, b) in
           {"qk": (q, k), "qq": (q, q), "kk": (k, k)}.items()}  # fmt: skip
  mixed = weights(pairs, np.eye(len(x))) @ v
  return dense(block["attn"]["out_proj"], mixed.transpose(1, 0, 2).reshape(len(x), -1))


def mlp(block, x):
  hidden = dense(block["mlp"]["c_fc"], norm(block["ln_2"], x))
  return dense(block["mlp"]["c_proj"], hidden / (1 + np.exp(-1.702 * hidden)))


def ordinary(block, x):
  x = x + attention(block, x, lambda maps, _: maps["qk"])
  return x + mlp(block, x)


def cubic(x, a=-0.75):
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def positions_by_hand(positions, height, width, excess=0.1):
  """SCLIP's rule, number by number: row i of the new grid is at (i + 0.5) S / (h + 0.1) - 0.5."""
  side = round((len(positions) - 1) ** 0.5)
  grid = positions[1:].reshape(side, side, -1).astype(np.float64)

  def sampled(grid, count):
    rows = []
    for i in range(count):
      at = (i + 0.5) * side / (count + excess) - 0.5
      near = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
      rows.append(sum(cubic(at - j) * grid[min(max(j, 0), side - 1)] for j in near))
    return np.stack(rows)

  grid = sampled(sampled(grid, height).swapaxes(0, 1), width).swapaxes(0, 1)
  return np.concatenate([positions[:1], grid.reshape(height * width, -1)])


def before_last_block(image):
  """Tokens (1 + 4 * 3, D) of one image of 32 x 24 pixels."""
  params, size = tiny()[0], TINY.patch_size
  kernel = params["patch_embed"]["kernel"].reshape(-1, TINY.vision_width)
  patches = [image[y : y + size, x : x + size].ravel() @ kernel
             for y in range(0, 32, size) for x in range(0, 24, size)]  # fmt: skip
  x = np.stack([params["class_embedding"], *patches])
  x = x + positions_by_hand(params["position_embedding"], 4, 3)
  x = norm(params["ln_pre"], x)
  for i in range(TINY.vision_layers - 1):
    x = ordinary(params[f"block_{i}"], x)
  return x


# method -> last block, written from the papers
LAST = {
  "vanilla": ordinary,
  "maskclip": lambda block, x: with_mlp(block, x, lambda maps, identity: identity),
  "sclip": lambda block, x: with_mlp(block, x, lambda maps, _: maps["qq"] + maps["kk"]),
  "clearclip": lambda block, x: attention(block, x, lambda maps, _: maps["qq"]),
  "naclip_kk": lambda block, x: attention(block, x, lambda maps, _: maps["kk"]),
}


def with_mlp(block, x, weights):
  x = x + attention(block, x, weights)
  return x + mlp(block, x)


@functools.cache
def reference(method):
  """Cosines (2, 12, 5)."""
  params, images, text = tiny()
  rows = []
  for image in images:
    x = LAST[method](params[f"block_{TINY.vision_layers - 1}"], before_last_block(image))
    z = norm(params["ln_post"], x[1:]) @ params["proj"]
    rows.append(z / np.linalg.norm(z, axis=-1, keepdims=True) @ text.T)
  return np.stack(rows)


# Of the others test_training_free_parity.py has the official code's.
@pytest.mark.parametrize(
  "method",
  ["vanilla", "naclip_kk"]
  + [pytest.param(m, marks=pytest.mark.slow) for m in ("maskclip", "sclip", "clearclip")],
)
def test_method(method):
  got = scores(method)
  assert got.shape == (2, 4, 3, 5) and got.dtype == np.float32
  np.testing.assert_allclose(got.reshape(2, 12, 5), reference(method), atol=2e-5)


def test_methods_differ():
  """Else the comparison above would let one stand for another."""
  for a in LAST:
    for b in LAST:
      assert a == b or np.abs(reference(a) - reference(b)).max() > 0.01


def test_vanilla_is_the_ordinary_forward_pass():
  """With RPN's positions, the class token of the same tokens is `VisionTransformer`'s embedding."""
  params, image, text = tiny()
  tower = VisionTransformer(TINY)

  def tokens(tower, image):
    x, _ = tower.embed(image)
    for i in range(TINY.vision_layers):
      x = tower.run_block(i, x)
    return tower.project(x), tower(image)

  z, embedding = jax.jit(functools.partial(tower.apply, method=tokens))({"params": params}, image)
  np.testing.assert_allclose(z[:, 0], embedding, atol=1e-5)
  patches = z[:, 1:] / np.linalg.norm(z[:, 1:], axis=-1, keepdims=True)
  got = scores("vanilla", positions="bilinear")
  np.testing.assert_allclose(got.reshape(2, 12, 5), patches @ text.T, atol=1e-5)


def test_maskclip_tokens_do_not_see_each_other_in_the_last_block():
  one_layer = CLIPConfig(**{**vars(TINY), "vision_layers": 1})
  model = DenseCLIP(one_layer, "maskclip")
  image, text = np.zeros((1, 32, 32, 3), np.float32), tiny()[2]
  params = jax.jit(model.init)(jax.random.key(0), image, text)
  apply = jax.jit(model.apply)
  before = apply(params, image, text)
  image = image.copy()
  image[:, :8, :8] = 1
  changed = np.abs(np.asarray(apply(params, image, text) - before)).max(-1)[0]
  assert changed[0, 0] > 0 and not np.delete(changed.ravel(), 0).any()


def test_suppress_by_hand():
  # softmax(100 · cosine) of the patches: (0.731, 0.269, 0.000) and (0.500, 0.500, 0.000), up to
  # the third class's e^-10.
  cosine = np.float32([[[0.30, 0.29, 0.20], [0.25, 0.25, 0.15]]])
  suppressed = lambda *a: (np.asarray(suppress(jnp.asarray(cosine), *a)) == -100)[0].tolist()
  assert suppressed(0.4, 100.0) == [[False, False, True]] * 2
  assert suppressed(0.6, 100.0) == [[False, True, True]] * 2
  # None is sure enough: the first class wins everywhere, as in the official head.
  assert suppressed(0.9, 100.0) == [[True] * 3] * 2
  # With a scale of 10: (0.440, 0.398, 0.162), (0.422, 0.422, 0.155).
  assert suppressed(0.4, 10.0) == [[False, False, True]] * 2
  assert suppressed(0.43, 10.0) == [[False, True, True]] * 2


def test_suppression_looks_at_one_image_at_a_time():
  cosine = np.float32([[[0.3, 0.1]], [[0.1, 0.3]]])
  got = np.asarray(suppress(cosine, 0.5, 100.0)).round(4)
  assert got.tolist() == [[[np.float32(0.3), -100]], [[-100, np.float32(0.3)]]]


def test_smooth_by_hand():
  # Two channels over three patches: of length 5 and 13 before, 1 after.
  keys = np.float32([[[3, 0], [4, 5], [0, -12]]])
  values = np.float32([[[0.9, 0.1], [0.25, 0.75], [1, 0]]])
  k = np.array([[3 / 5, 0], [4 / 5, 5 / 13], [0, -12 / 13]])
  want = np.array([[sum(k[i] @ k[j] * values[0, j, c] for j in range(3)) for c in range(2)]
                   for i in range(3)])  # fmt: skip
  np.testing.assert_allclose(smooth(values, keys, 2.0)[0], want, atol=1e-6)
  # Patches that are sure keep their scores; those of all patches are still summed up.
  want[2] = values[0, 2]
  np.testing.assert_allclose(smooth(values, keys, 1.0)[0], want, atol=1e-6)
  want[0] = values[0, 0]
  np.testing.assert_allclose(smooth(values, keys, 0.8)[0], want, atol=1e-6)


@pytest.mark.parametrize("method", ["maskclip", "clearclip"])
def test_refinements_inside_the_network(method):
  params, images, _ = tiny()
  cosine, scale = reference(method), 20.0
  # A threshold that suppresses some classes of some image, and not all.
  best = softmax(scale * cosine).max(1)
  threshold = float(np.sort(best.ravel())[4:6].mean())
  denoised = np.where((best < threshold)[:, None], -100.0, cosine)
  fields = {"denoise": threshold, "logit_scale": scale}
  got = scores(method, **fields).reshape(2, 12, 5)
  np.testing.assert_allclose(got, denoised, atol=1e-4)

  got = scores(method, key_smoothing=True, **fields).reshape(2, 12, 5)
  for image, row, smoothed in zip(images, denoised, got):
    block = params[f"block_{TINY.vision_layers - 1}"]
    _, k, _ = projections(block, before_last_block(image))
    k = dense(block["attn"]["out_proj"], k.transpose(1, 0, 2).reshape(13, -1))[1:]
    k = k / np.linalg.norm(k, axis=0)
    np.testing.assert_allclose(smoothed, k @ k.T @ softmax(scale * row), atol=1e-3)


def test_positions_as_they_are_for_as_many_patches():
  """SCLIP's and MaskCLIP's rules look at the count alone, GEM's and RPN's at the grid."""
  positions = tiny()[0]["position_embedding"]
  for name, rule in POSITIONS.items():
    np.testing.assert_array_equal(rule(positions, 4, 4), positions)
    same = np.array_equal(rule(positions, 2, 8), positions)
    assert same == (name in ("sclip", "maskclip"))
    assert rule(positions, 5, 3).shape == (16, TINY.vision_width)
  for name, excess in (("sclip", 0.1), ("maskclip", 0.0)):
    want = positions_by_hand(positions, 5, 7, excess)
    np.testing.assert_allclose(POSITIONS[name](positions, 5, 7), want, atol=1e-5)
  np.testing.assert_array_equal(
    POSITIONS["bilinear"](positions, 5, 7), resize_positions(positions, 5, 7)
  )


def test_positions_of_a_smaller_grid_are_averaged_by_gem():
  """With antialias, a = -0.5 and weights that add up to 1: the kernel is as wide as a new patch."""
  grid = np.random.default_rng(0).normal(size=(1 + 36, 2)).astype(np.float32)

  def weights(i, count):
    factor = 6 / count
    w = [cubic((j + 0.5 - (i + 0.5) * factor) / factor, -0.5) for j in range(6)]
    return np.array(w) / sum(w)

  rows, columns = (np.stack([weights(i, n) for i in range(n)]) for n in (3, 4))
  want = np.einsum("Hh,hwd,Ww->HWd", rows, grid[1:].reshape(6, 6, 2), columns).reshape(12, 2)
  np.testing.assert_allclose(POSITIONS["gem"](grid, 3, 4)[1:], want, atol=1e-5)


SMALL = {"sc_clip_neighbors": 5, "sc_clip_contamination": 0.2}


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_do_not_see_each_other(method):
  """And every method sees a grid that is not square."""
  params, image, text = tiny()
  apply = jax.jit(DenseCLIP(TINY, method, **SMALL).apply)
  a, b = apply({"params": {"visual": params}}, image, text)
  assert a.shape == (4, 3, 5) and np.isfinite(a).all() and np.abs(a - b).max() > 0.01
  swapped = apply({"params": {"visual": params}}, image[::-1].copy(), text)
  np.testing.assert_allclose(swapped, np.stack([b, a]), atol=1e-6)


def test_sides_that_are_no_multiples_of_the_patch():
  params, image, text = tiny()
  run = lambda image, **fields: jax.jit(DenseCLIP(TINY, "maskclip", **fields).apply)(
    {"params": {"visual": params}}, image, text
  )
  odd = image[:, :29, :23]
  np.testing.assert_array_equal(run(odd), run(image[:, :24, :16]))
  padded = np.zeros_like(image)
  padded[:, :29, :23] = odd
  np.testing.assert_array_equal(run(odd, odd_sides="pad"), run(padded))
  with pytest.raises(ValueError, match="image of 29x7 pixels: expected one patch of 8x8 or more"):
    run(image[:, :29, :7])
  assert run(image[:, :29, :7], odd_sides="pad").shape == (2, 4, 1, 5)
  assert METHODS["maskclip_released"].odd_sides == "pad"


def test_cosines_do_not_depend_on_the_compute_type():
  """An arg-max over cosines that differ by 0.01 cannot bear bfloat16's steps of 0.004."""
  params, _, text = tiny()
  tokens = jax.random.normal(jax.random.key(3), (1, 200, TINY.vision_width))
  cosines = {
    dtype: np.asarray(
      jax.jit(functools.partial(DenseCLIP(TINY, "maskclip", dtype=dtype).apply, method="cosines"))(
        {"params": {"visual": params}}, tokens.astype(dtype), text
      )
    )
    for dtype in (jnp.float32, jnp.bfloat16)
  }
  rounded = norm(params["ln_post"], np.float64(tokens.astype(jnp.bfloat16)[0])) @ params["proj"]
  want = rounded / np.linalg.norm(rounded, axis=-1, keepdims=True) @ text.T
  np.testing.assert_allclose(cosines[jnp.bfloat16][0], want, atol=2e-6)
  # What rounding the features and the text on the way would have cost.
  bf16 = lambda x: np.float64(jnp.asarray(x, jnp.bfloat16))
  lost = bf16(bf16(rounded) / np.linalg.norm(rounded, axis=-1, keepdims=True)) @ bf16(text).T
  assert np.abs(lost - want).max() > 1e-3
  # And every product of the program asks for the highest precision of the device.
  network = DenseCLIP(TINY, "maskclip", dtype=jnp.bfloat16)
  program = jax.jit(functools.partial(network.apply, method="cosines")).lower(
    {"params": {"visual": params}}, tokens.astype(jnp.bfloat16), text
  )
  products = [line for line in program.as_text().splitlines() if "dot_general" in line]
  assert len(products) == 2
  assert all("HIGHEST" in line and "bf16" not in line for line in products)


def test_defaults_are_those_of_the_config():
  declared = {f.name: f.default for f in dataclasses.fields(Dense)}
  for settings in ({}, declared, Dense()):
    network = DenseCLIP.create(TINY, settings)
    assert {name: getattr(network, name) for name in declared} == declared
  old = {"method": "sclip", "denoise": 0.5, "key_smoothing": True}
  assert DenseCLIP.create(TINY, old) == DenseCLIP(TINY, **old)
  lists = {"res_clip_rcs": [1.0, 0.0], "sc_clip_blocks": [1, 1, 1, 1]}  # of a run's JSON
  assert hash(DenseCLIP.create(TINY, lists)) == hash(DenseCLIP.create(TINY, lists))


def test_probabilities():
  a, b = (DenseCLIP(TINY, logit_scale=scale).probabilities for scale in (40.0, 100.0))
  assert a is DenseCLIP(TINY, "sclip", logit_scale=40.0).probabilities and a is not b
  np.testing.assert_allclose(a(np.float32([0.1, 0.0])), softmax(np.array([4.0, 0.0])), rtol=1e-6)


def test_what_a_method_keeps_of_the_last_block():
  keeps = lambda method, **fields: DenseCLIP(TINY, method, **fields).keeps_residual
  assert keeps("sclip") and not keeps("naclip") and keeps("naclip", residual="kept")
  assert not keeps("sclip", residual="dropped")
  # ResCLIP keeps what its base does.
  assert [keeps("res_clip", res_clip_base=base) for base in res_clip.BASES] == [False, False, True]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"method": "clear"}, "did you mean 'clearclip'"),
    (
      {"positions": "clip"},
      "positions='clip' is not known; did you mean 'sclip'. Known: sclip, .*, ''",
    ),
    ({"residual": "no"}, "residual='no' is not known"),
    ({"denoise": 50.0}, "denoise=50.0: expected a probability"),
    (
      {"method": "res_clip", "res_clip_blocks": (1, 2)},
      r"res_clip_blocks=\(1, 2\): expected blocks from 1 to 1 of the 2 that the tower has",
    ),
    ({"method": "res_clip", "res_clip_base": "gem"}, "res_clip_base='gem': expected one of naclip"),
    ({"method": "sc_clip", "sc_clip_blocks": (0, 1, 1, 1)}, "expected blocks from 1 to 1"),
    (
      {
        "method": "sc_clip",
        "clip": dataclasses.replace(TINY, vision_layers=3),
        "sc_clip_blocks": (1, 1, 2, 1),
      },
      "expected the first of those that are added up, 2, to be no later than the last, 1",
    ),
    ({"method": "sc_clip", "residual": "kept"}, 'residual="kept": sc_clip has no residual'),
    ({"method": "gem", "gem_depth": 7}, "gem_depth=7: expected 2 to 3, one more than blocks"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    DenseCLIP(**{"clip": TINY, **fields})


def test_too_few_patches():
  message = "sc_clip_neighbors=30: expected fewer than the 4 x 3 patches of an image or window"
  with pytest.raises(ValueError, match=message):
    scores("sc_clip")


def test_blocks_of_other_towers():
  deep = lambda layers: DenseCLIP(dataclasses.replace(TINY, vision_layers=layers))
  assert res_clip.blocks(deep(12)) == res_clip.blocks(deep(24)) == (6, 7, 8, 9)
  assert res_clip.blocks(deep(6)) == (3, 4, 4, 4)
  assert sc_clip.blocks(deep(12)) == (9, 4, 4, 10)
  assert sc_clip.blocks(deep(24)) == (18, 8, 8, 20)
  assert [gem.depth(deep(layers)) for layers in (24, 12, 6, 2)] == [7, 7, 4, 2]


def test_config_words():
  assert set(config_file.DATA) - {"all"} == set(DATA_SETS) and set(config_file.METHODS) == set(
    METHODS
  )
  changed = lambda words: {
    name: value
    for name, value in config_file.get_config(words).dense.to_dict().items()
    if value != dict(vars(Dense()))[name]
  }
  assert changed("sclip,denoise,smooth") == {
    "method": "sclip", "denoise": 0.5, "key_smoothing": True,
  }  # fmt: skip
  assert changed("sclip,set=voc20,l14") == {"method": "sclip", "logit_scale": 40}
  c = config_file.get_config("set=voc20,l14")
  assert c.method == "training_free" and c.clip == "ViT-L/14" and c.eval.crop % 14 == 0
