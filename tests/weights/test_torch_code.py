"""What is found in the code of TorchScript archives."""

import zipfile

import pytest

from rpn_jax.weights import torch_code
from rpn_jax.weights.torch_code import Code

TANH = '_1 = torch.gelu(_0, approximate="tanh")'
NORM = "_1 = _0(x, [8], weight, bias, {}, )\n_2 = torch.clamp_min(_1, 9.9999999999999998e-13)"


@pytest.mark.parametrize(("lines", "want"), [
  (("_1 = torch.sigmoid(_0)", "_2 = torch.sigmoid(_1)"), Code("quick_gelu")),
  (("_1 = torch.gelu(_0)",), Code("gelu")),
  (("_1 = torch.gelu(_0)", "_2 = torch.sigmoid(_1)"), Code()),
  ((TANH,), Code("gelu", tanh=True)),
  ((NORM.format("1.0000000000000001e-05"),), Code(epsilons=frozenset({1e-5}))),
  ((NORM.format("9.9999999999999995e-07"),), Code(epsilons=frozenset({1e-6}))),
])  # fmt: skip
def test_what_the_code_tells(tmp_path, lines, want):
  path = tmp_path / "x.pt"
  with zipfile.ZipFile(path, "w") as archive:
    for i, line in enumerate(lines):
      archive.writestr(f"m/code/__torch__/{i}.py", f"{line}\n")
    archive.writestr("m/code/__torch__/0.py.debug_pkl", "torch.gelu(")
  assert torch_code.read(path) == want
  path.write_bytes(path.read_bytes()[:50])
  assert torch_code.read(path) == Code()
