// Programs of edits as pointers and sizes, the loop that runs them on both devices, and the CUDA kernel.
#pragma once

#include "phi.cuh"

#include <cmath>
#include <cstdint>

#ifdef WHIPSTAFF_KERNELS
#include "cuda.cuh"
#endif

namespace whipstaff {

// A row of `code` and the same row of `args`; the operator's docstring says what the numbers mean to each op.
struct Instruction {
  Opcode op;
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
  void* kept;                 // as x, or null
  int64_t num_tokens, width, num_lines, num_instructions, num_conditions, num_gains, num_histories, num_positions;
  int64_t num_features;
  int64_t x_stride, residual_stride, line_stride, token_stride, gain_stride, history_stride, encoder_stride, kept_stride;

  // Where the token's program begins, or -1 where the token is to be left alone.
  WHIPSTAFF_HOST_DEVICE int64_t begin(int64_t token) const {
    const int32_t pc = tokens[token * token_stride];
    return pc < num_instructions ? pc : -1;
  }

  // Whether a program begins there that does something.
  WHIPSTAFF_HOST_DEVICE bool has_program(int64_t token) const {
    const int64_t pc = begin(token);
    return pc >= 0 && code[pc].op != Opcode::End;
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

  // Above `a` turns on, at or below `b` off, between them the state before holds. Latched: the first reading decides.
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

  // Where the next direction of a group is, at pc or behind a JUMP there; -1: the group ends.
  WHIPSTAFF_HOST_DEVICE int64_t next_in_group(int64_t pc) const {
    if (pc < num_instructions && code[pc].op == Opcode::Jump) pc = code[pc].i0;
    return 0 <= pc && pc < num_instructions && code[pc].op == Opcode::Dir && code[pc].i3 != 1 ? pc : -1;
  }

  // What direction r of a group adds, before gain and u_out; z are the group's readings, `at` its instructions.
  WHIPSTAFF_HOST_DEVICE float change(const int32_t* at, int r, int length, const float* z, float tau) const {
    const Phi phi = static_cast<Phi>(code[at[r]].i2);
    return apply_phi(phi, args[at[first_of(phi, r)]].phi, z, r, length, tau);
  }
};

WHIPSTAFF_HOST_DEVICE inline float towards(float from, float to, float g) {
  return g == 1.0f ? to : from + g * (to - from);
}

// One token's registers, and the steps that are the same on every machine.
struct Registers {
  const RunEdits& edits;
  int64_t token;
  int64_t pc = edits.begin(token), left = edits.num_instructions;  // what is next, and how many may still run
  bool is_loaded = false, is_apart = false, is_changed = false;
  float g = 1, saved = 0, u_in = 1, u_out = 1, mean = 0, tau = -INFINITY;

  // A program that jumps in circles ends too.
  WHIPSTAFF_DEVICE bool is_running() const { return left > 0 && pc >= 0 && pc < edits.num_instructions; }

  WHIPSTAFF_DEVICE void end(const Instruction&, const Arguments&) { left = 0; }

  WHIPSTAFF_DEVICE void jump(const Instruction& i, const Arguments&) { pc = i.i0; }

  WHIPSTAFF_DEVICE void gain(const Instruction& i, const Arguments& arg) { g = edits.gain_of(token, i, arg); }

  // How many directions read the same h, from the one that has begun on; all of them count as done. `at`: room for
  // MAX_GROUP, where they stand, written if `writes`.
  WHIPSTAFF_DEVICE int take_group(int32_t* at, bool writes) {
    int length = 0;
    for (int64_t next = pc - 1; next >= 0; next = length < MAX_GROUP ? edits.next_in_group(pc) : -1) {
      if (length > 0) left -= 1 + (next != pc);
      if (writes) at[length] = static_cast<int32_t>(next);
      pc = next + 1;
      ++length;
    }
    return length;
  }
};

// Runs a token's program. A machine has a step for every instruction, or does not compile; at what is none it ends.
template <class Machine>
WHIPSTAFF_DEVICE void run(Machine& machine) {
  while (machine.is_running()) {
    const Instruction& i = machine.edits.code[machine.pc];
    const Arguments& arg = machine.edits.args[machine.pc];
    ++machine.pc, --machine.left;
    switch (i.op) {
#define WHIPSTAFF_STEP(op, step) \
  case Opcode::op: machine.step(i, arg); break;
      WHIPSTAFF_FOR_EACH_OP(WHIPSTAFF_STEP)
#undef WHIPSTAFF_STEP
      default: machine.end(i, arg);
    }
  }
  if (machine.is_changed) machine.store_row();
}

#ifdef WHIPSTAFF_KERNELS

// Floats in the same order as numbers without a sign.
__device__ inline uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A block's steps on its token's row. All threads hold the same registers and take the same way; what one writes into
// shared memory is there for all when an instruction ends.
template <class X, int N>
struct Machine : Registers {
  float* h;         // (width,) in shared memory, filled when first asked for
  float* z;         // (MAX_GROUP,) in shared memory: readings
  float* scale;     // (MAX_GROUP,) in shared memory: what is written along each direction
  int32_t* at;      // (MAX_GROUP,) in shared memory: a group's instructions
  float* r;         // (width,) in device memory, this block's own: what DIRs write apart from h, if is_gathered
  float* features;  // (num_features,) in device memory, this block's own
  bool is_gathered = false;

  __device__ X* x() const { return static_cast<X*>(edits.x) + token * edits.x_stride; }

  __device__ X* residual() const {
    return edits.residual ? static_cast<X*>(edits.residual) + token * edits.residual_stride : nullptr;
  }

  // use(column) for this thread's packs of N columns.
  template <class Use>
  __device__ void for_columns(const Use& use) const {
    for (int64_t column = int64_t(threadIdx.x) * N; column < edits.width; column += THREADS * N) use(column);
  }

  __device__ void load_row() {
    if (is_loaded) return;
    is_loaded = true;
    for_columns([&](int64_t column) {
      float row[N], rest[N];
      load(row, x() + column);
      if (edits.residual) {
        load(rest, residual() + column);
        for (int k = 0; k < N; ++k) row[k] += rest[k];
      }
      store(h + column, row);
    });
    __syncthreads();
  }

  __device__ void store_row() const {
    for_columns([&](int64_t column) {
      float row[N];
      load(row, h + column);
      store(x() + column, row);
      if (!edits.residual) return;
      for (int k = 0; k < N; ++k) row[k] = 0.0f;
      store(residual() + column, row);
    });
  }

  __device__ void keep(const Instruction&, const Arguments&) {
    if (!edits.kept) return;
    load_row();
    X* target = static_cast<X*>(edits.kept) + token * edits.kept_stride;
    for_columns([&](int64_t column) {
      float row[N];
      load(row, h + column);
      store(target + column, row);
    });
    __syncthreads();
  }

  // The sum of of_value(h[i], i) over the row.
  template <class Of>
  __device__ float sum_of(const Of& of_value) {
    load_row();
    float sum = 0;
    for_columns([&](int64_t column) {
      for (int k = 0; k < N; ++k) sum += of_value(h[column + k], column + k);
    });
    return block_sum(sum);
  }

  __device__ float length() {
    return sqrtf(sum_of([](float value, int64_t) { return value * value; }));
  }

  // line . h, by one warp, rounded the same wherever it is called: TOP_K compares readings made in two places.
  __device__ float dot(const float* line) const {
    float sum = 0;
    for (int64_t column = threadIdx.x % WARP * N; column < edits.width; column += WARP * N) {
      float row[N], along[N];
      load(row, h + column);
      load(along, line + column);
      for (int k = 0; k < N; ++k) sum = __fmaf_rn(row[k], along[k], sum);
    }
    return warp_reduce(sum, [](float a, float b) { return __fadd_rn(a, b); });
  }

  __device__ float normed(float reading, float of_mean, float bias) const {
    return __fmaf_rn(__fsub_rn(reading, of_mean), u_in, bias);
  }

  // What thread 0 finds. Other blocks may write history meanwhile, and all threads must go the same way.
  template <class Find>
  __device__ float agreed(const Find& find) {
    if (threadIdx.x == 0) z[0] = find();
    __syncthreads();
    const float found = z[0];
    __syncthreads();
    return found;
  }

  __device__ void when(const Instruction& i, const Arguments& arg) {
    g *= agreed([&] { return edits.is_on(token, i, arg) ? 1.0f : 0.0f; });
  }

  __device__ void ramp(const Instruction& i, const Arguments& arg) {
    g *= agreed([&] { return edits.ramp(token, i, arg); });
  }

  __device__ void diag(const Instruction& i, const Arguments&) {
    if (g == 0.0f || (i.i0 < 0 && i.i1 < 0)) return;
    load_row();
    is_changed = true;
    const float *mul = edits.line(i.i0), *add = edits.line(i.i1);
    for_columns([&](int64_t column) {
      float row[N], edited[N], operand[N];
      load(row, h + column);
      load(edited, h + column);
      if (mul) {
        load(operand, mul + column);
        for (int k = 0; k < N; ++k) edited[k] *= operand[k];
      }
      if (add) {
        load(operand, add + column);
        for (int k = 0; k < N; ++k) edited[k] += operand[k];
      }
      for (int k = 0; k < N; ++k) edited[k] = towards(row[k], edited[k], g);
      store(h + column, edited);
    });
    __syncthreads();
  }

  __device__ void cross(const Instruction& i, const Arguments&) {
    if (g == 0.0f) return;
    load_row();
    is_changed = true;
    const float *mul = edits.line(i.i0), *with = edits.line(i.i1);
    const int64_t stride = i.i2;
    for (int64_t pair = threadIdx.x; pair < edits.width / 2; pair += THREADS) {
      const int64_t a = ((pair & -stride) << 1) | (pair & (stride - 1)), b = a + stride;
      const float at_a = h[a], at_b = h[b];
      h[a] = towards(at_a, mul[a] * at_a + with[a] * at_b, g);
      h[b] = towards(at_b, mul[b] * at_b + with[b] * at_a, g);
    }
    __syncthreads();
  }

  __device__ void dir(const Instruction&, const Arguments&) {
    const int length = take_group(at, threadIdx.x == 0);
    if (g == 0.0f) return;
    load_row();
    __syncthreads();
    for (int r = threadIdx.x / WARP; r < length; r += THREADS / WARP) {
      const float *line = edits.line(edits.code[at[r]].i0), bias = edits.args[at[r]].bias;
      const float reading = line ? normed(dot(line), mean * edits.args[at[r]].e, bias) : bias;
      if (threadIdx.x % WARP == 0) z[r] = reading;
    }
    __syncthreads();
    if (threadIdx.x < length) {
      const bool writes = edits.code[at[threadIdx.x]].i1 >= 0;
      const float gain = is_apart ? 1.0f : g;
      scale[threadIdx.x] = writes ? gain * u_out * edits.change(at, threadIdx.x, length, z, tau) : 0.0f;
    }
    __syncthreads();
    for (int r = 0; r < length; ++r) is_changed |= scale[r] != 0.0f && !is_apart;
    float* into = is_apart ? gathered() : h;
    for_columns([&](int64_t column) {
      float row[N], sum[N] = {}, along[N];
      for (int r = 0; r < length; ++r) {
        if (scale[r] == 0.0f) continue;
        load(along, edits.line(edits.code[at[r]].i1) + column);
        for (int k = 0; k < N; ++k) sum[k] += scale[r] * along[k];
      }
      load(row, into + column);
      for (int k = 0; k < N; ++k) row[k] += sum[k];
      store(into + column, row);
    });
    __syncthreads();
  }

  // r, of zeros where nothing has been written there. A thread reads of it only what it wrote itself.
  __device__ float* gathered() {
    if (!is_gathered) {
      const float zeros[N] = {};
      for_columns([&](int64_t column) { store(r + column, zeros); });
    }
    is_gathered = true;
    return r;
  }

  __device__ void apart(const Instruction&, const Arguments&) {
    is_apart = true;
    is_gathered = false;
  }

  __device__ void take(const Instruction& i, const Arguments& arg) {
    is_apart = false;
    const float gain = g * arg.phi[0], *line = edits.line(i.i0), *sum = gathered();
    if (gain == 0.0f) return;
    load_row();
    is_changed = true;
    for_columns([&](int64_t column) {
      float row[N], target[N], along[N] = {};
      load(row, h + column);
      load(target, sum + column);
      if (line) load(along, line + column);
      for (int k = 0; k < N; ++k) row[k] = towards(row[k], target[k] + u_out * along[k] + mean, gain);
      store(h + column, row);
    });
    __syncthreads();
  }

  __device__ void save(const Instruction&, const Arguments&) { saved = length(); }

  __device__ void renorm(const Instruction&, const Arguments&) {
    if (!is_changed) return;
    const float now = length(), ratio = saved / now;
    if (!(now > 0.0f)) return;
    for_columns([&](int64_t column) {
      for (int k = 0; k < N; ++k) h[column + k] *= ratio;
    });
    __syncthreads();
  }

  __device__ void probe(const Instruction& i, const Arguments& arg) {
    float* target = edits.probed(token, i);
    if (!target) return;
    const float* line = edits.line(i.i0);
    float reading = sum_of([&](float value, int64_t column) { return value * line[column]; });
    if (i.i3) reading /= length();
    if (threadIdx.x == 0) *target = reading + arg.bias;  // thread 0 is also the one that reads history
  }

  __device__ void meter(const Instruction&, const Arguments&) {
    if (!edits.meter) return;
    const float now = length();
    if (threadIdx.x != 0) return;
    atomicAdd(edits.meter, now);
    atomicAdd(edits.meter + 1, 1.0f);
  }

  __device__ void top_k(const Instruction& i, const Arguments&) {
    if (!edits.encoder || i.i1 <= 0) return;
    load_row();
    for (int64_t r = threadIdx.x / WARP; r < i.i1; r += THREADS / WARP) {
      const float bias = edits.encoder_bias ? edits.encoder_bias[i.i0 + r] : 0.0f;
      const float reading = normed(dot(edits.encoder + (i.i0 + r) * edits.encoder_stride), 0.0f, bias);
      // What cannot be ordered is not among the largest.
      if (threadIdx.x % WARP == 0) features[r] = reading == reading ? reading : -INFINITY;
    }
    __syncthreads();
    const float wanted = i.i2 < 1 ? 1 : i.i2 < i.i1 ? i.i2 : i.i1;
    uint32_t best = 0;  // the largest key that as many features as wanted reach, bit by bit
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      float count = 0;
      for (int64_t r = threadIdx.x; r < i.i1; r += THREADS) count += key_of(features[r]) >= (best | bit) ? 1.0f : 0.0f;
      if (block_sum(count) >= wanted) best |= bit;
    }
    tau = value_of(best);
    __syncthreads();
  }

  __device__ void norm_in(const Instruction& i, const Arguments&) {
    u_in = u_out = 1, mean = 0;
    if (i.i0 == 1) {
      u_out = length() / sqrtf(edits.width);
      u_in = u_out > 0 ? 1 / u_out : 0;  // a row of zeros reads as one
    } else if (i.i0 == 2) {
      const float center = mean = sum_of([](float value, int64_t) { return value; }) / edits.width;
      const float squares = sum_of([=](float value, int64_t) { return (value - center) * (value - center); });
      u_out = sqrtf(squares / (edits.width - 1));
      u_in = 1 / (u_out + 1e-5f);
    }
  }
};

// Block b runs the programs of the tokens b, b + gridDim.x, ..; `room` holds (gridDim.x, width) for the second rows and
// (gridDim.x, num_features).
template <class X, int N>
__global__ void __launch_bounds__(THREADS) run_edits_kernel(const RunEdits edits, float* room) {
  float *z = dynamic_shared(), *scale = z + MAX_GROUP, *h = scale + 2 * MAX_GROUP;  // shared_floats(edits)
  int32_t* at = reinterpret_cast<int32_t*>(scale + MAX_GROUP);
  for (int64_t token = blockIdx.x; token < edits.num_tokens; token += gridDim.x) {
    if (edits.begin(token) < 0) continue;
    float* r = room + blockIdx.x * edits.width;
    float* features = room + gridDim.x * edits.width + blockIdx.x * edits.num_features;
    Machine<X, N> machine{{edits, token}, h, z, scale, at, r, features};
    run(machine);
    __syncthreads();
  }
}

inline int64_t shared_floats(const RunEdits& edits) { return 3 * MAX_GROUP + edits.width; }

#endif  // WHIPSTAFF_KERNELS

}  // namespace whipstaff
