// The doors of `run_edits_` and `run_bound_edits_`: tensors are checked here, for both devices, and become a RunEdits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "run_edits.cuh"

namespace whipstaff {

// A table of rows beside `lines`; `num_columns` of -1: any.
inline void* rows_of(const Tensor& tensor, const char* name, ScalarType type, const Tensor& lines,
                     int64_t num_columns) {
  check_rows(tensor, name);
  check_type(tensor, name, type);
  check_same_device(tensor, name, "lines", lines);
  STD_TORCH_CHECK(num_columns < 0 || tensor.size(1) == num_columns, name, " has ", tensor.size(1), " columns, not ",
                  num_columns);
  return tensor.data_ptr();
}

// One row for each instruction, without gaps: both devices read them as structs.
inline const void* per_instruction(const Tensor& table, const char* name, ScalarType type, const Tensor& lines) {
  const void* data = rows_of(table, name, type, lines, 6);
  STD_TORCH_CHECK(table.is_contiguous(), name, " must be contiguous");
  return data;
}

// Everything that a call takes beside the activations: checked once, then good for any number of calls.
struct BoundEdits {
  uint64_t magic;
  RunEdits edits;  // of no token yet
  int64_t rows_of_tokens, rows_of_gains, rows_of_kept;
  ScalarType kept_type;
  int32_t device;  // the index; -1 on the CPU

  static constexpr uint64_t MAGIC = 0x77686970737461ff;
  static constexpr int64_t NUM_WORDS = 40;  // of a row that holds one: cuda_ext.BOUND_WORDS

  // The place of one in a table of them, (num_sites, NUM_WORDS) int64 in the host's memory.
  static BoundEdits& room(const Tensor& bound, int64_t site) {
    const bool is_table = bound.is_cpu() && bound.dim() == 2 && bound.scalar_type() == ScalarType::Long &&
                          bound.size(1) == NUM_WORDS && bound.is_contiguous();
    STD_TORCH_CHECK(is_table, "bound must have rows of ", NUM_WORDS, " Long on the CPU");
    STD_TORCH_CHECK(0 <= site && site < bound.size(0), "site ", site, " is outside [0, ", bound.size(0), ")");
    return *reinterpret_cast<BoundEdits*>(static_cast<int64_t*>(bound.data_ptr()) + site * NUM_WORDS);
  }

  static const BoundEdits& at(const Tensor& bound, int64_t site) {
    const BoundEdits& found = room(bound, site);
    STD_TORCH_CHECK(found.magic == MAGIC, "nothing was bound for site ", site);
    return found;
  }

  RunEdits on(const Tensor& x, const MaybeTensor& residual) const;
};

static_assert(sizeof(BoundEdits) <= BoundEdits::NUM_WORDS * sizeof(int64_t));

inline int32_t device_index(const Tensor& tensor) { return tensor.is_cpu() ? -1 : tensor.get_device_index(); }

// Raises where the tables do not fit each other.
inline BoundEdits bind_edits(const Tensor& lines, const Tensor& code, const Tensor& args, const Tensor& tokens,
                             const Tensor& gains, const Tensor& history, const MaybeTensor& meter,
                             const MaybeTensor& encoder, const MaybeTensor& encoder_bias, const MaybeTensor& kept) {
  check_rows(lines, "lines");
  const int64_t width = lines.size(1);
  BoundEdits bound{
      .magic = BoundEdits::MAGIC,
      .edits =
          {
              .lines = static_cast<const float*>(rows_of(lines, "lines", ScalarType::Float, lines, width)),
              .code = static_cast<const Instruction*>(per_instruction(code, "code", ScalarType::Int, lines)),
              .args = static_cast<const Arguments*>(per_instruction(args, "args", ScalarType::Float, lines)),
              .tokens = static_cast<const int32_t*>(rows_of(tokens, "tokens", ScalarType::Int, lines, -1)),
              .gains = static_cast<const float*>(rows_of(gains, "gains", ScalarType::Float, lines, -1)),
              .history = static_cast<float*>(rows_of(history, "history", ScalarType::Float, lines, -1)),
              .width = width,
              .num_lines = lines.size(0),
              .num_instructions = code.size(0),
              .num_conditions = tokens.size(1) - 2,
              .num_gains = gains.size(1),
              .num_histories = history.size(0),
              .num_positions = history.size(1),
              .line_stride = lines.stride(0),
              .token_stride = tokens.stride(0),
              .gain_stride = gains.stride(0),
              .history_stride = history.stride(0),
          },
      .rows_of_tokens = tokens.size(0),
      .rows_of_gains = gains.size(0),
      .device = device_index(lines),
  };
  RunEdits& edits = bound.edits;
  STD_TORCH_CHECK(edits.num_conditions >= 0, "tokens has ", tokens.size(1), " columns, at least 2 are needed");
  STD_TORCH_CHECK(args.size(0) == code.size(0), "code has ", code.size(0), " rows, args has ", args.size(0));
  if (meter) {
    check_type(*meter, "meter", ScalarType::Float);
    check_per_token(*meter, "meter", 2);
    check_same_device(*meter, "meter", "lines", lines);
    edits.meter = static_cast<float*>(meter->data_ptr());
  }
  if (encoder) {
    edits.encoder = static_cast<const float*>(rows_of(*encoder, "encoder", ScalarType::Float, lines, width));
    edits.encoder_stride = encoder->stride(0);
    edits.num_features = encoder->size(0);
  }
  if (encoder_bias) {
    STD_TORCH_CHECK(encoder, "encoder_bias comes without an encoder");
    check_type(*encoder_bias, "encoder_bias", ScalarType::Float);
    check_per_token(*encoder_bias, "encoder_bias", edits.num_features);
    check_same_device(*encoder_bias, "encoder_bias", "lines", lines);
    edits.encoder_bias = static_cast<const float*>(encoder_bias->data_ptr());
  }
  if (kept) {
    check_float(*kept, "kept");
    edits.kept = rows_of(*kept, "kept", kept->scalar_type(), lines, width);
    edits.kept_stride = kept->stride(0);
    bound.rows_of_kept = kept->size(0);
    bound.kept_type = kept->scalar_type();
  }
  return bound;
}

inline void check_room(const char* name, int64_t rows, int64_t needed) {
  STD_TORCH_CHECK(rows >= needed, name, " has ", rows, " rows, ", needed, " are needed");
}

// The call for activations. Raises where they do not fit what was bound.
inline RunEdits BoundEdits::on(const Tensor& x, const MaybeTensor& residual) const {
  check_float(x, "x");
  check_rows(x, "x");
  RunEdits call = edits;
  call.x = x.data_ptr();
  call.num_tokens = x.size(0);
  call.x_stride = x.stride(0);
  STD_TORCH_CHECK(edits.width == x.size(1), "lines has ", edits.width, " columns, not ", x.size(1));
  STD_TORCH_CHECK(device == device_index(x), "lines is on ", device < 0 ? "cpu" : "cuda:" + std::to_string(device),
                  ", x on ", device_of(x));
  check_room("tokens", rows_of_tokens, call.num_tokens);
  check_room("gains", rows_of_gains, call.num_tokens);
  if (edits.kept) {
    STD_TORCH_CHECK(kept_type == x.scalar_type(), "kept must be ", toString(x.scalar_type()), ", not ",
                    toString(kept_type));
    check_room("kept", rows_of_kept, call.num_tokens);
  }
  if (residual) {
    check_residual(*residual, x);
    call.residual = residual->data_ptr();
    call.residual_stride = residual->stride(0);
  }
  return call;
}

// Walks one token's program, which no data can divert, and refuses what it names but is not there.
struct ProgramCheck {
  const RunEdits& edits;  // with tokens and code in host memory
  int64_t token, pc;

  void within(const char* what, int64_t index, int64_t low, int64_t size) const {
    STD_TORCH_CHECK(low <= index && index < size, "token ", token, ", instruction ", pc, ": ", what, " ", index,
                    " is outside [", low, ", ", size, ")");
  }

  // One past the highest that an operand may be.
  int64_t size_of(Operand kind) const {
    switch (kind) {
      case Operand::Gain: return edits.num_gains;
      case Operand::Condition: return edits.num_conditions;
      case Operand::Line:
      case Operand::MaybeLine: return edits.num_lines;
      case Operand::Phi: return NUM_PHIS;
      case Operand::Feature:
      case Operand::NumFeatures: return edits.num_features;
      case Operand::Number:
      case Operand::Stride: break;
    }
    return 0;
  }

  void operand(Operand kind, int32_t before, int32_t value) const {
    if (kind == Operand::Number) return;
    if (kind == Operand::Stride) return stride(value);
    const OperandKind& is = OPERAND_KINDS[static_cast<int32_t>(kind)];
    within(is.title, kind == Operand::NumFeatures ? int64_t(before) + value - 1 : value, is.lowest, size_of(kind));
    if (kind == Operand::Condition) history_row(edits.tokens[token * edits.token_stride + 2 + value]);
  }

  void history_row(int32_t row) const { within("history row", std::max(row, -1), -1, edits.num_histories); }

  void stride(int32_t value) const {
    const bool is_paired = value > 0 && (value & (value - 1)) == 0 && edits.width % (2 * int64_t(value)) == 0;
    STD_TORCH_CHECK(is_paired, "token ", token, ", instruction ", pc, ": stride ", value, " does not pair ",
                    edits.width, " columns");
  }

  bool has(Needs needs) const {
    switch (needs) {
      case Needs::Nothing: return true;
      case Needs::Encoder: return edits.encoder != nullptr;
      case Needs::Kept: return edits.kept != nullptr;
    }
    return false;
  }

  void instruction(const Instruction& i) const {
    const int32_t op = static_cast<int32_t>(i.op), values[] = {0, i.i0, i.i1, i.i2, i.i3, i.i4};
    within("op", op, 0, NUM_OPS);
    const OpKind& is = OP_KINDS[op];
    STD_TORCH_CHECK(has(is.needs), "token ", token, ", instruction ", pc, ": ", is.name, " needs ", is.needed);
    for (int k = 0; k < NUM_OPERANDS; ++k) operand(is.operands[k], values[k], values[k + 1]);
  }

  void run() {
    pc = edits.tokens[token * edits.token_stride];
    if (pc < 0) return;
    const int64_t size = edits.num_instructions;
    STD_TORCH_CHECK(pc < size, "tokens[", token, ", 0] is ", pc, ", code has ", size, " instructions");
    for (int64_t left = size; left > 0; --left) {
      const Instruction& i = edits.code[pc];
      instruction(i);
      if (i.op == Opcode::End) return;
      pc = i.op == Opcode::Jump ? i.i0 : pc + 1;
      STD_TORCH_CHECK(0 <= pc && pc < size, "token ", token, " leaves the code for ", pc, ", it has ", size,
                      " instructions");
    }
    STD_TORCH_CHECK(false, "token ", token, ": its program does not end");
  }
};

inline void check_programs(const RunEdits& edits) {
  for (int64_t token = 0; token < edits.num_tokens; ++token) ProgramCheck{edits, token, 0}.run();
}

}  // namespace whipstaff
