"""Initial values of what is trained."""

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models import initializers

KEY = jax.random.key(3)


def test_values_are_those_of_a_draw_of_that_shape():
  """To the bit, compiled: the compiler may round a product otherwise."""
  shapes = [(), (5,), (16, 16), (257,), (3, 3, 40, 7)]
  plain = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.3, 0.3)
  draw = lambda init: jax.jit(lambda key: [init(key, shape, jnp.float32) for shape in shapes])(KEY)
  jax.tree.map(np.testing.assert_array_equal, draw(initializers.uniform(0.3)), draw(plain))


def test_shapes_share_what_is_compiled():
  """Each length that is drawn takes half a second to compile."""
  shapes = [(3, 3, width, 64) for width in range(8, 24)]
  init = initializers.uniform(0.1)
  jaxpr = jax.make_jaxpr(lambda key: [init(key, shape) for shape in shapes])(KEY)
  drawn = {tuple(x.aval.shape for x in e.outvars) for e in jaxpr.eqns if e.primitive.name == "jit"}
  assert drawn == {((16384,),)}
