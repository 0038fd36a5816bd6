// Programs of edits as pointers and sizes, what both devices do alike, and the CUDA kernel that runs them.
#pragma once

#include "phi.cuh"

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include "cuda.cuh"
#endif

namespace whipstaff {

constexpr int MAX_GROUP = 64;  // directions that read the same h

enum class Op : int32_t {
  End = 0,
  Jump = 1,
  Gain = 2,
  When = 3,
  Ramp = 4,
  Diag = 5,
  Cross = 6,
  Dir = 7,
  Save = 8,
  Renorm = 9,
  Probe = 10,
  Meter = 11,
  TopK = 12,
  NormIn = 13,
};
constexpr int NUM_OPS = 14;

// A row of `code` and the same row of `args`; the operator's docstring says what the numbers mean to each op.
struct Instruction {
  Op op;
  int32_t i0, i1, i2, i3, i4;
};

struct Arguments {
  float phi[NUM_PHI_ARGS];  // a, b, c, d
  float bias, e;
};

struct RunEdits {
  void* x;                    // (num_tokens, width)
  void* residual;             // as x, or null
  const float* lines;         // (num_lines, width)
  const Instruction* code;    // (num_instructions,)
  const Arguments* args;      // (num_instructions,)
  const int32_t* tokens;      // (num_tokens, 2 + num_conditions): begin, position, history rows
  const float* gains;         // (num_tokens, num_gains)
  float* history;             // (num_histories, num_positions), NaN = not read
  float* meter;               // (2,) or null
  const float* encoder;       // (num_features, width), or null
  const float* encoder_bias;  // (num_features,), or null
  int64_t num_tokens, width, num_lines, num_instructions, num_conditions, num_gains, num_histories, num_positions;
  int64_t num_features;
  int64_t x_stride, residual_stride, line_stride, token_stride, gain_stride, history_stride, encoder_stride;

  // Where the token's program begins, or -1 where the token is to be left alone.
  WHIPSTAFF_HOST_DEVICE int64_t begin(int64_t token) const {
    const int32_t pc = tokens[token * token_stride];
    return pc < num_instructions ? pc : -1;
  }

  WHIPSTAFF_HOST_DEVICE int64_t position(int64_t token) const { return tokens[token * token_stride + 1]; }

  WHIPSTAFF_HOST_DEVICE const float* line(int32_t i) const { return i < 0 ? nullptr : lines + i * line_stride; }

  // The readings of a condition at one position, or null where it has none.
  WHIPSTAFF_HOST_DEVICE float* past(int64_t token, int32_t condition, int64_t position) const {
    const int64_t row = tokens[token * token_stride + 2 + condition];
    if (row < 0 || row >= num_histories || position < 0 || position >= num_positions) return nullptr;
    return history + row * history_stride + position;
  }

  WHIPSTAFF_HOST_DEVICE float gain_of(int64_t token, const Instruction& i, const Arguments& arg) const {
    return i.i0 < 0 ? arg.phi[0] : arg.phi[0] * gains[token * gain_stride + i.i0];
  }

  // Latched: above the threshold. Else above `a` turns on, at or below `b` off, and between them the state before
  // holds.
  WHIPSTAFF_HOST_DEVICE bool is_on(int64_t token, const Instruction& i, const Arguments& arg) const {
    const float on = arg.phi[0], off = arg.phi[1], sign = arg.phi[2];
    const int64_t last = i.i1 ? 0 : position(token);
    const float* value = past(token, i.i0, last);
    for (int64_t q = last; value && q >= 0; --q, --value) {
      const float v = sign * *value;
      if (v > on) return true;
      if (i.i1 || !(v > off)) return false;
    }
    return false;
  }

  WHIPSTAFF_HOST_DEVICE float ramp(int64_t token, const Instruction& i, const Arguments& arg) const {
    const float *value = past(token, i.i0, position(token)), from = arg.phi[0], to = arg.phi[1], low = arg.phi[2];
    if (!value || *value != *value) return low;
    return low + (arg.phi[3] - low) * fminf(fmaxf((*value - from) / (to - from), 0.0f), 1.0f);
  }

  WHIPSTAFF_HOST_DEVICE float* probed(int64_t token, const Instruction& i) const {
    return past(token, i.i1, i.i2 ? 0 : position(token));
  }

  // How many directions from pc on read the same h.
  WHIPSTAFF_HOST_DEVICE int group_length(int64_t pc) const {
    int length = 1;
    for (; length < MAX_GROUP && pc + length < num_instructions; ++length)
      if (code[pc + length].op != Op::Dir || code[pc + length].i3 == 1) break;
    return length;
  }

  // What direction r of the group at pc adds, before gain and u_out; z are the group's readings.
  WHIPSTAFF_HOST_DEVICE float change(int64_t pc, int r, int length, const float* z, float tau) const {
    const Phi phi = static_cast<Phi>(code[pc + r].i2);
    return apply_phi(phi, args[pc + first_of(phi, r)].phi, z, r, length, tau);
  }
};

}  // namespace whipstaff
