"""RPN with the preset `released` in PyTorch, for comparing speed; not part of the library.

Written from the equations, with PyTorch's best practices: `scaled_dot_product_attention`, a fused
input projection, given text embeddings, no gradients of the tower, optional bfloat16 autocast with
the tower's matrices kept in bfloat16, or everything in bfloat16, optional `torch.compile`.
Parameters come from rpn_jax's trees, so that outputs can be compared, too.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peak


def to_torch(tree: dict, device) -> dict:
  """Nested numpy arrays -> tensors."""
  return {
    k: to_torch(v, device) if isinstance(v, dict) else torch.tensor(v).to(device)
    for k, v in tree.items()
  }


def leaves(tree: dict) -> list[torch.Tensor]:
  return [x for v in tree.values() for x in (leaves(v) if isinstance(v, dict) else [v])]


def dense(x, p):
  return F.linear(x, p["kernel"].T, p["bias"])


def norm(x, p, eps):
  return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps)


def unit(x):
  return x / x.norm(dim=-1, keepdim=True)


class Released(torch.nn.Module):
  """The forward pass (B, 3, H, W), (C, E) -> logits (B, C, h, w) of the `released` preset.

  Args:
    tower: parameters of the frozen vision tower.
    prompts: the trained parameters.
    heads, patch: attention heads and patch size of the tower.
    side: side of the images, pixels; a multiple of the patch size.
    dropout: dropout rate of projected prompts in training.
    dtype: of the tower's matrices, which autocast would cast in each step.
  """

  def __init__(
    self, tower, prompts, *, heads, patch, side, dropout=0.1, device="cpu", dtype=torch.float32
  ):
    super().__init__()
    self.tower, self.prompts = to_torch(tower, device), to_torch(prompts, device)
    self.dtype = dtype  # of the tower's matrices
    for x in leaves(self.prompts):
      x.requires_grad_(True)
    self.heads, self.patch, self.rate = heads, patch, dropout
    self.layers = sum(name.startswith("block_") for name in tower)
    # Linear layers as PyTorch stores them, (out, in), so that no call transposes.
    self._store(self.tower)
    self.conv = self.tower["patch_embed"]["kernel"].permute(3, 2, 0, 1).contiguous()
    position, n = self.tower["position_embedding"], side // patch
    old = round((len(position) - 1) ** 0.5)
    grid = position[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (n, n), mode="bilinear", align_corners=False)
    self.position = torch.cat([position[:1], grid[0].flatten(1).T])

  def _store(self, tree):
    for name, value in tree.items():
      if isinstance(value, dict):
        self._store(value)
      elif name == "kernel" and value.ndim == 2:
        tree[name] = value.T.contiguous().to(self.dtype).T

  def to_bfloat16(self) -> None:
    """All parameters in bfloat16, for images and text that are, too."""
    low = lambda tree: {
      name: low(x) if isinstance(x, dict) else x.detach().bfloat16() for name, x in tree.items()
    }
    self.tower, self.prompts = low(self.tower), low(self.prompts)
    self.conv, self.position = self.conv.bfloat16(), self.position.bfloat16()
    for x in leaves(self.prompts):
      x.requires_grad_(True)

  def block(self, x, p):
    qkv = dense(norm(x, p["ln_1"], 1e-5), p["attn"]["in_proj"])
    q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + dense(attended, p["attn"]["out_proj"])
    hidden = dense(norm(x, p["ln_2"], 1e-5), p["mlp"]["c_fc"])
    return x + dense(hidden * torch.sigmoid(1.702 * hidden), p["mlp"]["c_proj"])

  def read_out(self, x):
    x = norm(x, self.prompts["prompt_norm"], 1e-6)
    return unit(norm(x, self.tower["ln_post"], 1e-5) @ self.tower["proj"])

  def forward(self, image, text):
    p, t = self.prompts, self.tower
    x = F.conv2d(image, self.conv, stride=self.patch)
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    cls = (2 * t["class_embedding"]).expand(len(x), 1, -1)
    x = norm(torch.cat([cls, x], 1) + self.position, t["ln_pre"], 1e-5)
    relationship = None
    for i in range(self.layers):
      extra = [dense(p["deep_tokens"][i], p["prompt_proj"]).expand(len(x), -1, -1)]
      if relationship is not None:
        extra.append(dense(relationship, p["prompt_proj"]))
      extra = F.dropout(torch.cat(extra, 1), self.rate, self.training)
      # The dtype of the residual stream, which is float32 under autocast.
      x = torch.cat([x[:, :1], extra.to(x.dtype), x[:, 1:]], 1)
      x = self.block(x, t[f"block_{i}"])
      x = torch.cat([x[:, :1], x[:, 1 + extra.shape[1] :]], 1)
      z = self.read_out(x)
      patches, cls = z[:, 1:], z[:, 0]
      if i + 1 < self.layers:
        m = (patches * cls[:, None]) @ text.T
        relationship = m.transpose(1, 2) @ p["h"]
    head = p["head"]
    both = torch.cat([text * cls[:, None], text.expand(len(x), -1, -1)], -1)
    both = norm(dense(dense(both, head["text_reduce"]), head["text_proj"]), head["text_norm"], 1e-5)
    patches = norm(dense(patches, head["patch_proj"]), head["patch_norm"], 1e-5)
    logits = patches @ both.transpose(1, 2) * patches.shape[-1] ** -0.5
    return logits.transpose(1, 2).unflatten(-1, grid)


def loss(logits, label):
  """Focal and dice loss of the official code, at the labels' size."""
  logits = F.interpolate(logits.float(), label.shape[1:], mode="bilinear", align_corners=False)
  valid = label != 255
  y = F.one_hot(torch.where(valid, label, 0), logits.shape[1]).movedim(-1, 1)
  y = (y * valid[:, None]).float()
  p = logits.sigmoid()
  cross_entropy = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
  wrong = p * (1 - y) + (1 - p) * y
  focal = (0.25 * y + 0.75 * (1 - y)) * wrong**2 * cross_entropy
  present = y.sum((2, 3)) > 0
  dice = 1 - (2 * (p * y).sum((2, 3)) + 1) / (p.sum((2, 3)) + y.sum((2, 3)) + 1)
  total = 100 * focal.mean((2, 3)).sum() + (dice * present).sum()
  return total / present.sum().clamp(min=1)


def nested(flat) -> dict:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    inner = tree
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[name] = value
  return tree


def read(folder: pathlib.Path) -> tuple[dict, dict]:
  """The settings of a case, and its parameters as trees of arrays."""
  return json.loads((folder / "case.json").read_text()), nested(
    dict(np.load(folder / "weights.npz"))
  )


def inputs(folder: pathlib.Path, device: str) -> tuple[torch.Tensor, ...]:
  """Images (B, 3, H, W), labels and text of a case."""
  data = np.load(folder / "data.npz")
  image = torch.tensor(data["image"]).permute(0, 3, 1, 2).contiguous()
  label, text = torch.tensor(data["label"]).long(), torch.tensor(data["text"])
  return image.to(device), label.to(device), text.to(device)


def to_openvino(folder: pathlib.Path) -> None:
  """Writes the network of a case for images and text of its sizes as `model.xml`."""
  import openvino

  case, arrays = read(folder)
  settings = {name: case[name] for name in ("heads", "patch", "side")}
  net = Released(arrays["tower"], arrays["prompts"], **settings).eval()
  for x in leaves(net.prompts):
    x.requires_grad_(False)  # so that they can be constants
  image, _, text = inputs(folder, "cpu")
  with torch.inference_mode():
    model = openvino.convert_model(
      net, example_input=(image, text), input=[list(image.shape), list(text.shape)]
    )
  openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def product_gflops(device: str, dtype: torch.dtype) -> float:
  a = torch.randn(peak.SIDE, peak.SIDE, device=device).to(dtype)
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None

  def multiply() -> None:
    a @ a
    wait()

  with torch.inference_mode():
    return peak.gflops(multiply)


def main() -> None:
  """Child process of benchmarks.speed: folder with the case, forward or train, type, mode -> a line
  of JSON. The word openvino in place of the last three converts the network.

  The type is float32; bfloat16, autocast with the tower's matrices in bfloat16; or
  bfloat16_weights, in which everything is bfloat16.
  """
  folder = pathlib.Path(sys.argv[1])
  if sys.argv[2:] == ["openvino"]:
    to_openvino(folder)
    print("{}")
    return
  what, dtype, mode = sys.argv[2:]
  case, arrays = read(folder)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_num_threads(case["threads"])
  torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as in JAX
  low = torch.float32 if dtype == "float32" else torch.bfloat16
  net = Released(
    arrays["tower"], arrays["prompts"], device=device, dtype=low,
    **{k: case[k] for k in ("heads", "patch", "side", "dropout")},
  )  # fmt: skip
  del arrays
  image, label, text = inputs(folder, device)
  if dtype == "bfloat16_weights":
    net.to_bfloat16()
    image, text = image.bfloat16(), text.bfloat16()
  autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None

  run, objective = net, loss
  if mode == "compile":
    run, objective = torch.compile(net), torch.compile(loss)
  if what == "forward":
    net.eval()

    @torch.inference_mode()
    def call():
      with autocast:
        return run(image, text)
  else:
    net.train()
    optimizer = torch.optim.AdamW(leaves(net.prompts), 2e-4, weight_decay=0.01, fused=True)

    def call():
      optimizer.zero_grad(set_to_none=True)
      with autocast:
        logits = run(image, text)
      total = objective(logits, label)
      total.backward()
      optimizer.step()
      return total

  began = time.perf_counter()
  first = call()
  wait()
  seconds_to_compile = time.perf_counter() - began
  if what == "forward":
    np.save(folder / "other.npy", first.float().permute(0, 2, 3, 1).cpu().numpy())
  times = []
  while len(times) < 2 or sum(times) < case["seconds"]:
    wait()
    began = time.perf_counter()
    call()
    wait()
    times.append(time.perf_counter() - began)
  peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if device == "cuda":
    peak_bytes = torch.cuda.max_memory_allocated()
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  print(json.dumps({
    "seconds": sorted(times)[len(times) // 2], "seconds_to_compile": seconds_to_compile,
    "peak_bytes": peak_bytes, "peak_gflops": product_gflops(device, low), "device": name,
    "version": torch.__version__, "first": float(first.float().mean()),
  }))  # fmt: skip


if __name__ == "__main__":
  main()
