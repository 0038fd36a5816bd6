// What a direction does with what it reads, on both devices; instructions.h lists the functions.
#pragma once

#include "instructions.h"

#include <cmath>
#include <cstdint>

namespace whipstaff {

// A pair's two halves carry the same phi, the first at an even r and with the arguments of both.
WHIPSTAFF_HOST_DEVICE inline int64_t first_of(Phi phi, int64_t r) { return is_pair(phi) ? r - r % 2 : r; }

WHIPSTAFF_HOST_DEVICE inline float apply_to_one(Phi phi, const float* arg, float z, float tau) {
  switch (phi) {
    case Phi::Affine: return arg[0] * z + arg[1];
    case Phi::Set: return arg[0] - z;
    case Phi::Clamp: return fminf(fmaxf(z, arg[0]), arg[1]) - z;
    case Phi::Gated: return z > arg[0] ? arg[1] * z + arg[2] : arg[3];
    case Phi::TopK: return z > arg[0] && z >= tau ? arg[1] * z + arg[2] : arg[3];
    case Phi::Tanh: return arg[0] * tanhf(z);
    case Phi::Silu: return arg[0] * z / (1.0f + expf(-z));
    case Phi::Sign: return z > 0.0f ? arg[0] : z < 0.0f ? -arg[0] : 0.0f;
    default: return 0.0f;
  }
}

// One half of the pair (z[0], z[1]): half 0 or 1.
WHIPSTAFF_HOST_DEVICE inline float apply_to_pair(Phi phi, const float* arg, const float* z, int half) {
  const float cosine = cosf(arg[0]), sine = sinf(arg[0]);
  if (phi == Phi::Rotate) return (half ? sine * z[0] + cosine * z[1] : cosine * z[0] - sine * z[1]) - z[half];
  if (!(z[0] > arg[1])) return 0.0f;
  return sqrtf(z[0] * z[0] + z[1] * z[1]) * (half ? sine : cosine) - z[half];
}

// What direction r of `rank` adds along its writing vector; `arg` are the arguments of direction first_of(phi, r), and
// readings below tau are not among the largest.
WHIPSTAFF_HOST_DEVICE inline float apply_phi(Phi phi, const float* arg, const float* z, int64_t r, int64_t rank,
                                             float tau) {
  if (!is_pair(phi)) return apply_to_one(phi, arg, z[r], tau);
  const int64_t first = first_of(phi, r);
  return first + 1 < rank ? apply_to_pair(phi, arg, z + first, r - first) : 0.0f;
}

}  // namespace whipstaff
