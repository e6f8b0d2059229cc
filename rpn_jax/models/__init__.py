"""The networks, and what each of them answers to.

A network is a module that answers the questions of `Network`, a config section with its settings
and an entry of NETWORKS (docs/extending.md). Nothing outside this package asks which one it has.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from rpn_jax.models.cat_seg import CATSeg
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.network import Windows
from rpn_jax.models.rpn import RPN
from rpn_jax.models.training_free import DenseCLIP


class Network(Hashable, Protocol):
  """A segmentation network around CLIP: a Flax module, hashable by its attributes.

  Its variables are `params`, the parameters of CLIP's towers, and `prompts`, which are trained.
  Function-valued members are module-level functions, the same object for equal networks, since they
  are static arguments of compiled programs.

  Attributes:
    clip: the architecture of CLIP.
    section: the config section with the network's settings.
    dtype: compute type.
    kernels: the versions of its heavy parts, see `Kernels`.
    towers: which branches of CLIP's parameters `params` holds: ("visual",) or ("visual", "text").
    trained: regular expression over whole '/'-joined paths of `params` that are trained besides
      everything in `prompts`; "" is none. See `trained.split`.
    trainable: whether anything is trained at all.
    input_multiple: sides of the images that it is called with are multiples of this, in pixels.
    title: what stands for the network in a table of scores.
    scores: logits (..., C) -> scores (..., C); classes are compared, averaged over windows and
      penalized by scores.
    probabilities: scores (..., C) -> values in [0, 1] for people.
    emphasis: what an emphasis of 1 on a class adds to its scores.
    independent: whether rows of the text input may be added or dropped without changing the scores
      of the others.
  """

  clip: CLIPConfig
  dtype: Any
  kernels: Kernels
  section: str
  trainable: bool
  emphasis: float

  def apply(self, variables: Mapping, *args: Any, **kwargs: Any) -> Any:
    """Of the Flax module: a call, or another method, with its variables."""
    ...

  def clone(self, *, dtype: Any) -> "Network":
    """Of the Flax module: the same with another compute type."""
    ...

  @property
  def towers(self) -> tuple[str, ...]: ...

  @property
  def title(self) -> str: ...

  @property
  def trained(self) -> str: ...

  @property
  def input_multiple(self) -> int: ...

  @property
  def scores(self) -> Callable[[jax.Array], jax.Array]: ...

  @property
  def probabilities(self) -> Callable[[jax.Array], jax.Array]: ...

  @property
  def independent(self) -> bool: ...

  @classmethod
  def create(
    cls,
    clip: CLIPConfig,
    settings: Any,
    *,
    loss: str = "sigmoid",
    dtype: Any = jnp.float32,
    remat: str = "none",
    kernels: Kernels = TEXTBOOK,
  ) -> Self:
    """The network of a config.

    Args:
      clip: the architecture of CLIP.
      settings: object or mapping with the fields of the config section, plain values.
      loss: name of the loss that trains it, a key of `heads.SCORES`.
      dtype: compute type.
      remat: what the tower's blocks compute again in the backward pass, see `VisionTransformer`.
      kernels: of the devices it runs on, see `kernels.for_platform`.

    Raises:
      ValueError: a setting that no network can have.
    """
    ...

  @classmethod
  def windows(cls, clip: CLIPConfig) -> Windows:
    """The inference protocol that the network was made for."""
    ...

  def text_input(self, encoder: Any, names: Sequence[str]) -> Any:
    """What the network takes as text.

    `encoder.embed(names)`, embeddings (C, E), or `encoder.tokens(names)` where the network encodes
    them itself, since the text tower is trained.
    """
    ...

  def encode_text(self, text: Any) -> Any:
    """The part of the network that sees the text alone, a row per class, for inference.

    A method of the module with its variables, as in `apply(variables, text, method="encode_text")`.
    A call of the network takes the result in place of `text`, so that a text tower runs once for a
    list of classes and not for every window. Without a text tower the text is returned unchanged.
    """
    ...

  def merged(self, params: dict, prompts: dict) -> tuple[Self, dict, dict]:
    """Network, `params` and `prompts` for inference, with tuners in the tower's weights."""
    ...

  def __call__(
    self, image: jax.Array, text: Any, /, *, train: bool = False, example_offset: Any = 0
  ) -> jax.Array:
    """Class logits on the patch grid, or a finer one: (B, h, w, C) float32.

    Args:
      image: (B, H, W, 3), normalized.
      text: of `text_input`, or in inference of `encode_text`; a row per class.
      train: whether dropout and other noise are on.
      example_offset: position of the first image in the global batch; the noise of an image
        depends on its position there, not on how the batch is split over devices.
    """
    ...


# Value of config.method -> network.
NETWORKS: dict[str, type[Network]] = {"rpn": RPN, "cat_seg": CATSeg, "training_free": DenseCLIP}
