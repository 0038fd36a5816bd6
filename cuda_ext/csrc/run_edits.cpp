// run_edits_ on the CPU: one thread runs a token's program on its row, which stays in the cache.
#include "run_edits.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu.h"
#include "diag_block.h"

namespace whipstaff {
namespace {

constexpr int TOGETHER = 4;  // lines that are read or written in one pass over h

// out[k] = h . line[k], summed in an order that depends on `size` alone, not on N or on where the numbers lie: TOP_K
// compares readings of the same numbers made in two places.
template <int N>
void dot(float* out, const float* h, const float* const* line, int64_t size) {
  typedef float Lanes __attribute__((vector_size(64)));
  constexpr int NUM_LANES = 16;
  Lanes sum[N] = {}, of_h, of_line;
  int64_t i = 0;
  for (; i + NUM_LANES <= size; i += NUM_LANES) {
    std::memcpy(&of_h, h + i, sizeof(Lanes));
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      std::memcpy(&of_line, line[k] + i, sizeof(Lanes));
      sum[k] += of_h * of_line;
    }
  }
  for (int k = 0; k < N; ++k) {
    float lane[NUM_LANES];
    std::memcpy(lane, &sum[k], sizeof(Lanes));
    for (int half = NUM_LANES / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    for (int64_t rest = i; rest < size; ++rest) lane[0] += h[rest] * line[k][rest];
    out[k] = lane[0];
  }
}

void dots(float* out, const float* h, const float* const* line, int64_t num_lines, int64_t size) {
  int64_t r = 0;
  for (; r + TOGETHER <= num_lines; r += TOGETHER) dot<TOGETHER>(out + r, h, line + r, size);
  for (; r < num_lines; ++r) dot<1>(out + r, h, line + r, size);
}

float dot(const float* h, const float* line, int64_t size) {
  float result;
  dot<1>(&result, h, &line, size);
  return result;
}

// h += scale[0] * line[0] + ..
template <int N>
void add_lines(float* __restrict h, const float* scale, const float* const* line, int64_t size) {
  float by[N];
  const float* from[N];
  std::copy_n(scale, N, by);
  std::copy_n(line, N, from);
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    float sum = by[0] * from[0][i];
#pragma GCC unroll 4
    for (int k = 1; k < N; ++k) sum += by[k] * from[k][i];
    h[i] += sum;
  }
}

// This thread's buffer of at least `size` floats, at the beginning of a cache line. Which: 0 for h, 1 for r.
template <int WHICH>
float* row_buffer(int64_t size) {
  constexpr int64_t LINE = 16;
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size + LINE) buffer.resize(size + LINE);
  return buffer.data() + -reinterpret_cast<uintptr_t>(buffer.data()) / sizeof(float) % LINE;
}

// One thread's steps on its token's row.
template <class X>
struct Machine : Registers {
  float* h;  // (width,) filled when first asked for: a diagonal edit alone passes over the row just once
  float* r = nullptr;  // (width,) what DIRs write apart from h; none until it is asked for

  X* x() const { return static_cast<X*>(edits.x) + token * edits.x_stride; }

  X* residual() const {
    return edits.residual ? static_cast<X*>(edits.residual) + token * edits.residual_stride : nullptr;
  }

  // h, with the row in it.
  const float* row() {
    if (is_loaded) return h;
    is_loaded = true;
    load(h, x(), edits.width);
    if (edits.residual) add_scaled(h, 1.0f, residual(), edits.width);
    return h;
  }

  float length() { return std::sqrt(dot(row(), h, edits.width)); }

  void store_row() const {
    store(x(), h, edits.width);
    if (edits.residual) std::memset(residual(), 0, edits.width * sizeof(X));
  }

  void when(const Instruction& i, const Arguments& arg) { g *= edits.is_on(token, i, arg) ? 1.0f : 0.0f; }

  void ramp(const Instruction& i, const Arguments& arg) { g *= edits.ramp(token, i, arg); }

  void diag(const Instruction& i, const Arguments&) {
    if (g == 0.0f || (i.i0 < 0 && i.i1 < 0)) return;
    if (!is_loaded && is_last()) return edit(x(), residual(), i);
    row();
    edit<float>(h, nullptr, i);
    is_changed = true;
  }

  bool is_last() const { return pc == edits.num_instructions || edits.code[pc].op == Opcode::End; }

  // row <- row + rest, edited; rest <- 0.
  template <class T>
  void edit(T* row, T* rest, const Instruction& i) const {
    const float *mul = edits.line(i.i0), *add = edits.line(i.i1);
    for (int64_t begin = 0; begin < edits.width; begin += BLOCK) {
      const DiagBlock<T> block{.x = row + begin,
                               .residual = rest ? rest + begin : nullptr,
                               .mul = mul ? mul + begin : Neutral::get().ones,
                               .add = add ? add + begin : Neutral::get().negative_zeros,
                               .gain = g,
                               .size = std::min(BLOCK, edits.width - begin)};
      block.edit();
      if (rest) std::memset(rest + begin, 0, block.size * sizeof(T));
    }
  }

  void cross(const Instruction& i, const Arguments&) {
    if (g == 0.0f) return;
    row();
    is_changed = true;
    const float *mul = edits.line(i.i0), *with = edits.line(i.i1), g = this->g;  // h may not be it
    for (int64_t begin = 0; begin < edits.width; begin += 2 * int64_t(i.i2)) {
#pragma GCC ivdep
      for (int64_t a = begin; a < begin + i.i2; ++a) {
        const int64_t b = a + i.i2;
        const float at_a = h[a], at_b = h[b];
        h[a] = towards(at_a, mul[a] * at_a + with[a] * at_b, g);
        h[b] = towards(at_b, mul[b] * at_b + with[b] * at_a, g);
      }
    }
  }

  void dir(const Instruction&, const Arguments&) {
    int32_t at[MAX_GROUP];
    const int length = take_group(at, true);
    if (g == 0.0f) return;
    const float gain = is_apart ? 1.0f : g;
    float z[MAX_GROUP], scale[MAX_GROUP], *into = is_apart ? gathered() : h;
    const float* line[MAX_GROUP];
    read(at, length, z, line);
    int num_targets = 0;
    for (int r = 0; r < length; ++r) {
      scale[num_targets] = gain * u_out * edits.change(at, r, length, z, tau);
      line[num_targets] = edits.line(edits.code[at[r]].i1);
      num_targets += line[num_targets] && scale[num_targets] != 0.0f;
    }
    int r = 0;
    for (; r + TOGETHER <= num_targets; r += TOGETHER) add_lines<TOGETHER>(into, scale + r, line + r, edits.width);
    for (; r < num_targets; ++r) add_lines<1>(into, scale + r, line + r, edits.width);
    is_changed |= num_targets > 0 && !is_apart;
  }

  // z: what the directions at `at` read; `line` is room for as many.
  void read(const int32_t* at, int length, float* z, const float** line) {
    float reading[MAX_GROUP];
    int num_lines = 0;
    for (int r = 0; r < length; ++r)
      if (edits.code[at[r]].i0 >= 0) line[num_lines++] = edits.line(edits.code[at[r]].i0);
    dots(reading, row(), line, num_lines, edits.width);
    for (int r = 0, next = 0; r < length; ++r) {
      const Arguments& arg = edits.args[at[r]];
      z[r] = edits.code[at[r]].i0 < 0 ? arg.bias : (reading[next++] - mean * arg.e) * u_in + arg.bias;
    }
  }

  void save(const Instruction&, const Arguments&) { saved = length(); }

  void renorm(const Instruction&, const Arguments&) {
    const float now = is_changed ? length() : 0.0f, ratio = saved / now;
    if (now > 0.0f)
      for (int64_t i = 0; i < edits.width; ++i) h[i] *= ratio;
  }

  void probe(const Instruction& i, const Arguments& arg) {
    float* target = edits.probed(token, i);
    if (!target) return;
    const float reading = dot(row(), edits.line(i.i0), edits.width);
    *target = (i.i3 ? reading / length() : reading) + arg.bias;
  }

  void meter(const Instruction&, const Arguments&) {
    if (!edits.meter) return;
    std::atomic_ref<float>(edits.meter[0]).fetch_add(length(), std::memory_order_relaxed);
    std::atomic_ref<float>(edits.meter[1]).fetch_add(1.0f, std::memory_order_relaxed);
  }

  void top_k(const Instruction& i, const Arguments&) {
    if (!edits.encoder || i.i1 <= 0) return;
    std::vector<float> z(i.i1);
    std::vector<const float*> feature(i.i1);
    for (int64_t r = 0; r < i.i1; ++r) feature[r] = edits.encoder + (i.i0 + r) * edits.encoder_stride;
    dots(z.data(), row(), feature.data(), i.i1, edits.width);
    for (int64_t r = 0; r < i.i1; ++r) {
      z[r] = z[r] * u_in + (edits.encoder_bias ? edits.encoder_bias[i.i0 + r] : 0.0f);
      if (std::isnan(z[r])) z[r] = -INFINITY;  // what cannot be ordered is not among the largest
    }
    const auto at = z.begin() + std::clamp(i.i2, 1, i.i1) - 1;
    std::nth_element(z.begin(), at, z.end(), std::greater<float>());
    tau = *at;
  }

  void norm_in(const Instruction& i, const Arguments&) {
    u_in = u_out = 1, mean = 0;
    if (i.i0 == 1) {
      u_out = length() / std::sqrt(static_cast<float>(edits.width));
      u_in = u_out > 0 ? 1 / u_out : 0;  // a row of zeros reads as one
    } else if (i.i0 == 2) {
      row();
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < edits.width; ++c) sum += h[c];
      mean = sum / edits.width;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < edits.width; ++c) squares += (h[c] - mean) * (h[c] - mean);
      u_out = std::sqrt(squares / (edits.width - 1));
      u_in = 1 / (u_out + 1e-5f);
    }
  }

  // r, of zeros where nothing has been written there.
  float* gathered() {
    if (!r) clear(r = row_buffer<1>(edits.width));
    return r;
  }

  void clear(float* row) const { std::fill_n(row, edits.width, 0.0f); }

  void apart(const Instruction&, const Arguments&) {
    is_apart = true;
    r = nullptr;
  }

  void take(const Instruction& i, const Arguments& arg) {
    is_apart = false;
    const float gain = g * arg.phi[0], from_line = u_out, shift = mean;
    if (gain == 0.0f) return;
    const float *line = edits.line(i.i0), *sum = gathered();
    row();
    for (int64_t c = 0; c < edits.width; ++c)
      h[c] = towards(h[c], sum[c] + (line ? from_line * line[c] : 0.0f) + shift, gain);
    is_changed = true;
  }

  void keep(const Instruction&, const Arguments&) {
    if (edits.kept) store(static_cast<X*>(edits.kept) + token * edits.kept_stride, row(), edits.width);
  }
};

// The first token that a program edits, or num_tokens: a look or two at each.
int64_t first_edited(const RunEdits& edits) {
  if (is_checked_mode()) check_programs(edits);
  int64_t token = 0;
  while (token < edits.num_tokens && !edits.has_program(token)) ++token;
  return token;
}

// About how many passes over a row a program makes.
int64_t num_passes(const RunEdits& edits, int64_t pc) {
  int64_t passes = 0;
  for (int64_t left = edits.num_instructions; left > 0 && pc >= 0 && pc < edits.num_instructions; --left) {
    const Instruction& i = edits.code[pc];
    const int32_t op = static_cast<int32_t>(i.op);
    if (i.op == Opcode::End || op < 0 || op >= NUM_OPS) break;
    pc = i.op == Opcode::Jump ? i.i0 : pc + 1;
    passes += OP_KINDS[op].passes + (i.op == Opcode::TopK ? i.i1 : 0);
  }
  return std::max<int64_t>(passes, 1);
}

void run_on_cpu(const RunEdits& edits, ScalarType type) {
  const int64_t first = first_edited(edits);
  if (first == edits.num_tokens) return;
  with_float_type(type, [&]<class X>(X) {
    for_rows(edits.num_tokens, edits.width * num_passes(edits, edits.begin(first)), [&](int64_t begin, int64_t end) {
      float* h = row_buffer<0>(edits.width);
      for (int64_t token = std::max(begin, first); token < end; ++token) {
        Machine<X> machine{{edits, token}, h};
        run(machine);
      }
    });
  });
}

void run_edits_cpu(const Tensor& x, const Tensor& lines, const Tensor& code, const Tensor& args, const Tensor& tokens,
                   const Tensor& gains, const Tensor& history, const MaybeTensor& residual, const MaybeTensor& meter,
                   const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  const BoundEdits bound =
      bind_edits(lines, code, args, tokens, gains, history, meter, encoder, encoder_bias, kept);
  run_on_cpu(bound.on(x, residual), x.scalar_type());
}

void run_bound_edits_cpu(const Tensor& x, const MaybeTensor& residual, const Tensor& bound, int64_t site) {
  run_on_cpu(BoundEdits::at(bound, site).on(x, residual), x.scalar_type());
}

void bind_edits_cpu(const Tensor& bound, int64_t site, const Tensor& lines, const Tensor& code, const Tensor& args,
                    const Tensor& tokens, const Tensor& gains, const Tensor& history, const MaybeTensor& meter,
                    const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  BoundEdits::room(bound, site) =
      bind_edits(lines, code, args, tokens, gains, history, meter, encoder, encoder_bias, kept);
}

}  // namespace
}  // namespace whipstaff

STABLE_TORCH_LIBRARY_IMPL(whipstaff, CPU, library) {
  library.impl("run_edits_", TORCH_BOX(&whipstaff::run_edits_cpu));
  library.impl("bind_edits_", TORCH_BOX(&whipstaff::bind_edits_cpu));
  library.impl("run_bound_edits_", TORCH_BOX(&whipstaff::run_bound_edits_cpu));
}
