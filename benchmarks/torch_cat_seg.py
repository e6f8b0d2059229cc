"""CAT-Seg in PyTorch, for comparing speed; not part of the library.

Written from the description of the network, with PyTorch's best practices:
`scaled_dot_product_attention`, fused AdamW, no gradients of what is frozen, names encoded at the
length they need. Weights have the official code's names, which `rpn_jax.weights.cat_seg` writes, so
that outputs can be compared, too.
"""

import json
import pathlib
import re
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

CLIP = "sem_seg_head.predictor.clip_model"
AGGREGATOR = "sem_seg_head.predictor.transformer"
TRAINED = rf"upsample.*|{AGGREGATOR}\.(?!.*attn_mask).*|{CLIP}\..*\.(q|v)_proj_weight"
NORMS = r".*(norm.*|double_conv\.[14]\.(weight|bias))"
BILINEAR = {"mode": "bilinear", "align_corners": False}


class CATSeg:
  """The network as a function of its weights.

  Args:
    weights: name -> tensor; those that are trained require gradients afterwards.
    heads: attention heads of the vision tower and of the text tower.
    guidance_layers: blocks whose output guides the decoder.
    side: pixels of what the vision tower sees.
    window: side of the windows of spatial aggregation.
    padding: classes are filled up to this number.
  """

  def __init__(self, weights, *, heads, guidance_layers, side, window=12, padding=256):
    self.w, self.heads, self.guidance_layers = weights, heads, guidance_layers
    self.side, self.window, self.padding = side, window, padding
    for name, x in weights.items():
      x.requires_grad_(bool(re.fullmatch(TRAINED, name)))
    blocks = lambda part: len(
      {m[1] for m in (re.match(part + r"\.(\d+)\.", n) for n in weights) if m}
    )
    self.vision_layers = blocks(re.escape(f"{CLIP}.visual.transformer.resblocks"))
    self.text_layers = blocks(re.escape(f"{CLIP}.transformer.resblocks"))
    self.layers = blocks(re.escape(f"{AGGREGATOR}.layers"))

  def linear(self, x, name):
    return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

  def norm(self, x, name):
    return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

  def conv(self, x, name, bias=True):
    weight = self.w[f"{name}.weight"]
    bias = self.w[f"{name}.bias"] if bias else None
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

  def up(self, x, name):
    weight = self.w[f"{name}.weight"]
    return F.conv_transpose2d(x, weight, self.w[f"{name}.bias"], stride=weight.shape[-1])

  def projections(self, x, name, which):
    """Input projections of CLIP's attention, whose biases are packed."""
    biases = dict(zip("qkv", self.w[f"{name}.in_proj_bias"].chunk(3)))
    return [F.linear(x, self.w[f"{name}.{c}_proj_weight"], biases[c]) for c in which]

  def feed_forward(self, x, name):
    hidden = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
    return x + self.linear(hidden * torch.sigmoid(1.702 * hidden), f"{name}.mlp.c_proj")

  def clip_block(self, x, name, heads, causal=False):
    projected = self.projections(self.norm(x, f"{name}.ln_1"), f"{name}.attn", "qkv")
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in projected)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    return self.feed_forward(x + self.linear(out, f"{name}.attn.out_proj"), name)

  def encode_text(self, tokens):
    """Token ids (T, N) -> unit-length embeddings (T, D)."""
    w = self.w
    x = w[f"{CLIP}.token_embedding.weight"][tokens]
    x = x + w[f"{CLIP}.positional_embedding"][: tokens.shape[1]]
    for i in range(self.text_layers):
      x = self.clip_block(x, f"{CLIP}.transformer.resblocks.{i}", self.heads[1], causal=True)
    x = self.norm(x[torch.arange(len(x)), tokens.argmax(-1)], f"{CLIP}.ln_final")
    return F.normalize(x @ w[f"{CLIP}.text_projection"], dim=-1)

  def dense_features(self, image):
    """(B, 3, H, W) -> features (B, D, g, g) and the two outputs that guide the decoder."""
    w, visual = self.w, f"{CLIP}.visual"
    if image.shape[-1] != self.side:
      image = F.interpolate(image, (self.side, self.side), **BILINEAR)
    weight = w[f"{visual}.conv1.weight"]
    x = F.conv2d(image, weight, stride=weight.shape[-1])
    g = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    position = w[f"{visual}.positional_embedding"]
    if len(position) != g * g + 1:
      old = round((len(position) - 1) ** 0.5)
      grid = position[1:].T.reshape(1, -1, old, old)
      grid = F.interpolate(grid, (g, g), mode="bicubic", align_corners=False)
      position = torch.cat([position[:1], grid[0].flatten(1).T])
    cls = w[f"{visual}.class_embedding"].expand(len(x), 1, -1)
    x = self.norm(torch.cat([cls, x], 1) + position, f"{visual}.ln_pre")
    on_grid = lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (g, g))
    hidden, last = [], self.vision_layers - 1
    for i in range(last):
      x = self.clip_block(x, f"{visual}.transformer.resblocks.{i}", self.heads[0])
      if i in self.guidance_layers:
        hidden.append(self.up(on_grid(x), f"upsample{len(hidden) + 1}"))
    name = f"{visual}.transformer.resblocks.{last}"
    (v,) = self.projections(self.norm(x, f"{name}.ln_1"), f"{name}.attn", "v")
    x = self.feed_forward(x[:, :1] + self.linear(v, f"{name}.attn.out_proj"), name)
    return on_grid(self.norm(x, f"{visual}.ln_post") @ w[f"{visual}.proj"]), hidden

  def window_block(self, x, guidance, name, shift):
    """(N, g, g, C) -> (N, g, g, C); windows of 12 x 12, rolled by `shift`."""
    n, g, _, channels = x.shape
    m, heads, wide = min(self.window, g), 4, g // min(self.window, g)
    y = self.norm(x, f"{name}.norm1")
    z = torch.cat([y, guidance], -1)

    def split(t):
      t = t.roll((-shift, -shift), (1, 2)) if shift else t
      t = t.reshape(n, wide, m, wide, m, heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
      return t.reshape(n, wide * wide * heads, m * m, -1)

    q, k = (split(self.linear(z, f"{name}.attn.{c}")) for c in "qk")
    mask = self.w[f"{name}.attn_mask"].repeat_interleave(heads, 0)[None] if shift else None
    out = F.scaled_dot_product_attention(q, k, split(self.linear(y, f"{name}.attn.v")), mask)
    out = out.reshape(n, wide, wide, heads, m, m, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = self.linear(out.reshape(n, g, g, channels), f"{name}.attn.proj")
    x = x + (out.roll((shift, shift), (1, 2)) if shift else out)
    hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
    return x + self.linear(hidden, f"{name}.mlp.fc2")

  def spatial(self, x, appearance, name):
    """(B, T, g, g, C), every class by itself."""
    guidance = self.norm(appearance, f"{name}.guidance_norm")[:, None]
    guidance = guidance.expand(*x.shape[:4], -1).flatten(0, 1)
    y = x.flatten(0, 1)
    y = self.window_block(y, guidance, f"{name}.block_1", 0)
    y = self.window_block(y, guidance, f"{name}.block_2", self.window // 2)
    return y.reshape(x.shape)

  def classes(self, x, text, name, pooling):
    """(B, T, g, g, C), every pooled position by itself; linear attention over the classes."""
    batch, count, g, _, channels = x.shape
    s = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pooling)
    small = s.shape[-1]
    s = s.reshape(batch, count, channels, -1).permute(0, 3, 1, 2)  # (B, positions, T, C)
    missing = max(0, self.padding - count)
    if missing:
      fill = self.w[f"{name}.padding_tokens"].expand(*s.shape[:2], missing, -1)
      s = torch.cat([s, fill], 2)
      fill = self.w[f"{name}.padding_guidance"].expand(batch, missing, -1)
      text = torch.cat([text, fill], 1)
    y = self.norm(s, f"{name}.norm1")
    z = torch.cat([y, text[:, None].expand(*y.shape[:3], -1)], -1)
    split = lambda t: t.unflatten(-1, (4, -1)).transpose(2, 3)  # (B, positions, heads, T, d)
    q, k = (F.elu(split(self.linear(z, f"{name}.attention.{c}"))) + 1 for c in "qk")
    v, length = split(self.linear(y, f"{name}.attention.v")), y.shape[2]
    total = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    out = (q @ (k.transpose(-1, -2) @ (v / length))) * (length / total)
    s = s + out.transpose(2, 3).flatten(3)
    hidden = F.relu(self.linear(self.norm(s, f"{name}.norm2"), f"{name}.MLP.0"))
    s = (s + self.linear(hidden, f"{name}.MLP.2"))[:, :, :count]
    s = s.permute(0, 2, 3, 1).reshape(-1, channels, small, small)
    if small != g:
      s = F.interpolate(s, (g, g), mode="bilinear", align_corners=True)
    return x + s.permute(0, 2, 3, 1).reshape(x.shape)

  def double_conv(self, x, name):
    for i in (0, 3):
      x = self.conv(x, f"{name}.{i}", bias=False)
      weight, bias = (self.w[f"{name}.{i + 1}.{part}"] for part in ("weight", "bias"))
      x = F.relu(F.group_norm(x, x.shape[1] // 16, weight, bias, 1e-5), inplace=True)
    return x

  def __call__(self, image, text, pooling):
    """(B, 3, H, W) and embeddings (T, D) -> logits (B, T, 4 g, 4 g)."""
    features, hidden = self.dense_features(image)
    batch, count, g = len(image), len(text), features.shape[-1]
    cost = torch.einsum("bdhw,td->bthw", F.normalize(features, dim=1), F.normalize(text, dim=-1))
    kept = None
    if count > self.padding:
      kept = cost.amax((2, 3)).topk(self.padding).indices
      cost = cost[torch.arange(batch)[:, None], kept]
    chosen = text.expand(batch, -1, -1) if kept is None else text[kept]
    a = AGGREGATOR
    x = self.conv(cost.flatten(0, 1)[:, None], f"{a}.conv1")
    x = x.permute(0, 2, 3, 1).reshape(batch, cost.shape[1], g, g, -1)
    appearance = F.relu(self.conv(features, f"{a}.guidance_projection.0")).permute(0, 2, 3, 1)
    words = F.relu(self.linear(F.normalize(chosen, dim=-1), f"{a}.text_guidance_projection.0"))
    for i in range(self.layers):
      x = self.spatial(x, appearance, f"{a}.layers.{i}.swin_block")
      x = self.classes(x, words, f"{a}.layers.{i}.attention", pooling)
    x = x.flatten(0, 1).permute(0, 3, 1, 2)
    for i, guide in enumerate(hidden):
      guide = F.relu(self.conv(guide, f"{a}.decoder_guidance_projection.{i}.0"))
      x = self.up(x, f"{a}.decoder{i + 1}.up")
      guide = guide[:, None].expand(-1, cost.shape[1], -1, -1, -1).flatten(0, 1)
      x = self.double_conv(torch.cat([x, guide], 1), f"{a}.decoder{i + 1}.conv.double_conv")
    logits = self.conv(x, f"{a}.head").reshape(batch, -1, 4 * g, 4 * g)
    if kept is None:
      return logits
    every = logits.new_full((batch, count, *logits.shape[2:]), -100)
    return every.scatter(1, kept[..., None, None].expand_as(logits), logits)


def loss(logits, label):
  """Binary cross-entropy at the labels' size; ignored pixels are negatives."""
  logits = F.interpolate(logits, label.shape[1:], **BILINEAR)
  target = torch.zeros_like(logits)
  valid = (label != 255)[:, None]
  target.scatter_(1, torch.where(label != 255, label, 0)[:, None], valid.float())
  return F.binary_cross_entropy_with_logits(logits, target)


def views(image, crop=384, square=640, stride=256):
  """The four tiles of the image squashed to a square, and all of it: (5, 3, crop, crop)."""
  large = F.interpolate(image, (square, square), **BILINEAR)
  steps = range(0, square - crop + 1, stride)
  tiles = [large[..., y : y + crop, x : x + crop] for y in steps for x in steps]
  return torch.cat([*tiles, F.interpolate(image, (crop, crop), **BILINEAR)])


def merge(logits, size, crop=384, square=640, stride=256):
  """Class ids (height, width) from the logits of `views`."""
  scores = F.interpolate(logits, (crop, crop), **BILINEAR).sigmoid()
  total = scores.new_zeros(1, scores.shape[1], square, square)
  count = scores.new_zeros(1, 1, square, square)
  steps = range(0, square - crop + 1, stride)
  corners = [(y, x) for y in steps for x in steps]
  for score, (y, x) in zip(scores, corners):
    total[..., y : y + crop, x : x + crop] += score
    count[..., y : y + crop, x : x + crop] += 1
  whole = F.interpolate(scores[-1:], (square, square), **BILINEAR)
  return F.interpolate((total / count + whole) / 2, size, **BILINEAR).argmax(1)[0]


def parameter_groups(weights):
  """CLIP's at a hundredth of the rate, norms without decay."""
  trained = {n: x for n, x in weights.items() if x.requires_grad}
  for clip in (True, False):
    for norm in (True, False):
      yield {
        "params": [
          x for n, x in trained.items()
          if n.startswith(CLIP) == clip and bool(re.fullmatch(NORMS, n)) == norm
        ],
        "lr": 2e-6 if clip else 2e-4,
        "weight_decay": 0.0 if norm else 1e-4,
      }  # fmt: skip


def main() -> None:
  """Child process of benchmarks.cat_seg: folder with the case, what -> a line of JSON."""
  folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
  case = json.loads((folder / "case.json").read_text())
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_num_threads(case["threads"])
  arrays = np.load(folder / "official.npz")
  weights = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
  net = CATSeg(weights, **{k: case[k] for k in ("heads", "guidance_layers", "side")})
  data = np.load(folder / f"{what}.npz")
  image = torch.tensor(data["image"]).permute(0, 3, 1, 2).contiguous().to(device)
  tokens = torch.tensor(data["tokens"][:, 0]).long().to(device)
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  first = {}

  if what == "evaluate":
    with torch.inference_mode():
      text = net.encode_text(tokens)

    @torch.inference_mode()
    def call():
      logits = net(views(image), text, 1)
      if not first:
        np.save(folder / "torch.npy", logits.permute(0, 2, 3, 1).cpu().numpy())
      ids = merge(logits, case["size"])
      if not first:
        np.save(folder / "torch_ids.npy", ids.cpu().numpy())
        first["loss"] = None
  else:
    label = torch.tensor(data["label"]).long().to(device)
    groups = [g for g in parameter_groups(weights) if g["params"]]
    optimizer = torch.optim.AdamW(groups, fused=True)
    every = [x for g in groups for x in g["params"]]

    def call():
      optimizer.zero_grad(set_to_none=True)
      total = loss(net(image, net.encode_text(tokens), 2), label)
      total.backward()
      norm = torch.nn.utils.clip_grad_norm_(every, 0.01)
      optimizer.step()
      if not first:
        first.update(loss=total.item(), grad_norm=norm.item())

  call()
  times = []
  while len(times) < 2 or sum(times) < case["seconds"]:
    wait()
    began = time.perf_counter()
    call()
    wait()
    times.append(time.perf_counter() - began)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if device == "cuda":
    peak = torch.cuda.max_memory_allocated()
  print(json.dumps({
    "seconds": sorted(times)[len(times) // 2], "peak_bytes": peak, "device": device,
    "version": torch.__version__, **first,
  }))  # fmt: skip


if __name__ == "__main__":
  main()
