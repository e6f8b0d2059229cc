"""Training-free methods against the whole tower written down in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import training_free as config_file
from data_pipelines import DATA_SETS
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, resize_positions
from rpn_jax.models.training_free import METHODS, DenseCLIP, smooth, suppress

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


def before_last_block(image):
  """Tokens (1 + 4 * 3, D) of one image of 32 x 24 pixels."""
  params, size = tiny()[0], TINY.patch_size
  kernel = params["patch_embed"]["kernel"].reshape(-1, TINY.vision_width)
  patches = [image[y : y + size, x : x + size].ravel() @ kernel
             for y in range(0, 32, size) for x in range(0, 24, size)]  # fmt: skip
  x = np.stack([params["class_embedding"], *patches])
  # Another grid than the tower's: position embeddings as the ordinary forward pass makes them.
  x = x + resize_positions(params["position_embedding"], 4, 3)
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


@pytest.mark.parametrize("method", METHODS)
def test_method(method):
  got = scores(method)
  assert got.shape == (2, 4, 3, 5) and got.dtype == np.float32
  np.testing.assert_allclose(got.reshape(2, 12, 5), reference(method), atol=2e-5)


def test_methods_differ():
  """Else the comparison above would let one stand for another."""
  for a in METHODS:
    for b in METHODS:
      assert a == b or np.abs(reference(a) - reference(b)).max() > 0.01


def test_vanilla_is_the_ordinary_forward_pass():
  """The class token of the same tokens is the embedding that `VisionTransformer` returns."""
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
  np.testing.assert_allclose(scores("vanilla").reshape(2, 12, 5), patches @ text.T, atol=1e-5)


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
  less = lambda threshold: np.asarray(cosine - suppress(jnp.asarray(cosine), threshold))[0].tolist()
  assert less(0.4) == [[0, 0, 2], [0, 0, 2]]
  assert less(0.6) == [[0, 2, 2], [0, 2, 2]]
  # None is sure enough: their order is kept.
  np.testing.assert_array_equal(suppress(cosine, 0.9).argmax(-1), cosine.argmax(-1))


def test_suppression_looks_at_one_image_at_a_time():
  cosine = np.float32([[[0.3, 0.1]], [[0.1, 0.3]]])
  less = np.asarray(cosine - suppress(cosine, 0.5)).round(4)
  assert less.tolist() == [[[0, 2]], [[2, 0]]]


def test_smooth_by_hand():
  # Cosines of the keys: 1 with itself, 0.6 between the first two, -1 between first and third.
  keys = np.float32([[[2, 0], [3, 4], [-5, 0]]])
  values = np.float32([[[1, 0], [0, 1], [0.5, 0.5]]])
  want = [
    [(1 - 0.5) / 2.6, (0.6 - 0.5) / 2.6],
    [(0.6 - 0.3) / 2.2, (1 - 0.3) / 2.2],
    [(-1 + 0.5) / 2.6, (-0.6 + 0.5) / 2.6],
  ]
  np.testing.assert_allclose(smooth(values, keys)[0], want, atol=1e-6)


@pytest.mark.parametrize("method", ["maskclip", "clearclip"])
def test_refinements_inside_the_network(method):
  params, images, _ = tiny()
  cosine = reference(method)
  # A threshold that suppresses some classes of some image, and not all.
  best = softmax(100 * cosine).max(1)
  threshold = float(np.sort(best.ravel())[4:6].mean())
  denoised = cosine - 2.0 * (best < threshold)[:, None]
  got = scores(method, denoise=threshold).reshape(2, 12, 5)
  np.testing.assert_allclose(got, denoised, atol=1e-4)

  got = scores(method, denoise=threshold, key_smoothing=True).reshape(2, 12, 5)
  for image, row, smoothed in zip(images, denoised, got):
    _, k, _ = projections(params[f"block_{TINY.vision_layers - 1}"], before_last_block(image))
    k = k.transpose(1, 0, 2).reshape(13, -1)[1:]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    # Patch by patch, and for the weights, as the formula reads.
    for i in range(12):
      weights = [float(k[i] @ k[j]) for j in range(12)]
      want = sum(w * p for w, p in zip(weights, softmax(100 * row))) / np.abs(weights).sum()
      np.testing.assert_allclose(smoothed[i], want, atol=1e-3)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"method": "clear"}, "did you mean 'clearclip'"),
    ({"denoise": 50.0}, "denoise=50.0: expected a probability"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    DenseCLIP(TINY, **fields)


def test_config_words():
  assert set(config_file.DATA) == set(DATA_SETS)
  c = config_file.get_config("sclip,denoise,smooth")
  assert c.method == "training_free" and c.data.name == "shapes"
  assert c.dense.to_dict() == {"method": "sclip", "denoise": 0.5, "key_smoothing": True}
  c = config_file.get_config("data=voc20,l14")
  assert c.dense.to_dict() == {"method": "maskclip", "denoise": 0.0, "key_smoothing": False}
  assert c.clip == "ViT-L/14" and c.eval.crop % 14 == 0
