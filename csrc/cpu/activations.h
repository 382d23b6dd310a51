// SiLU and its parts, of vectors. Included once per target namespace, after simd.h.

// 1/(1 + exp(-z)); the exponential is of a number that is not positive.
template <class V>
COTNET_INLINE V sigmoid(V z) {
  const V e = exponential(z < 0 ? z : -z);
  return (z < 0 ? e : V{} + 1) / (1 + e);
}
template <class V>
COTNET_INLINE V silu(V z) {
  return z * sigmoid(z);
}
